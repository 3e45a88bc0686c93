"""docs/benchmarks.md: what a benchmark measured stands between two marks of its own."""

import re
from pathlib import Path

from stages.shared.core import files

PAGE = Path("docs/benchmarks.md")


def put(name: str, text: str, page: Path = PAGE) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- end of name -->`.

    Raises:
        ValueError: the page does not have the two marks.
    """
    between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    old = page.read_text(encoding="utf-8")
    new, count = between.subn(lambda m: f"{m[1]}{text}\n{m[2]}", old)
    if count != 1:
        raise ValueError(f"{page}: expected <!-- {name} --> and <!-- end of {name} --> once")
    files.write_text(page, new)
