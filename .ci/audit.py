"""Judge a report of `pip-audit --format json` on stdin: what could not be looked up is no pass.

pip-audit ends with "No known vulnerabilities found" and code 0 where it found no package at all.
Exit codes: 0 all looked up and none known; 1 known vulnerabilities; 2 not everything looked up.
"""

import json
import sys


def judge(report: str) -> tuple[list[str], int]:
    """Lines to print and the exit code; an empty report is that of an audit that broke off."""
    try:
        packages = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        packages = []
    known = [(p, fault) for p in packages for fault in p.get("vulns", ())]
    skipped = [p["name"] for p in packages if "skip_reason" in p]
    lines = [
        f"{p['name']} {p['version']}: {fault['id']}; fixed in "
        f"{', '.join(fault.get('fix_versions', ())) or 'no version'}"
        for p, fault in known
    ]
    audited = len(packages) - len(skipped)
    if not audited or skipped:
        lines.append(
            f"NOT AUDITED: {len(skipped) or 'all'} of {len(packages) or 'all'} packages could not "
            f"be looked up on PyPI{': ' if skipped else ''}{', '.join(skipped[:10])}"
        )
    else:
        lines.append(f"{audited} packages looked up, {len(known)} known vulnerabilities")
    return lines, 1 if known else 2 if skipped or not audited else 0


if __name__ == "__main__":
    shown, code = judge(sys.stdin.read())
    print(*shown, sep="\n")
    sys.exit(code)
