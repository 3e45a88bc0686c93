"""Faults that are injected: each function damages a copy of the pipeline, and returns its `Try`."""

import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import constants

from stages.shared.core import files
from stages.shared.hub import repository as hub_client
from tests import hub as hubs
from tests import workspace
from tests.faults.pipeline import Pipeline, files_below
from tests.test_contract import declared, outs_of, paths


def overwrite(path: Path, content: bytes) -> None:
    """Write a new file in the place of one that may be a hard link."""
    path.unlink()
    path.write_bytes(content)


ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 2**70, 1e308, "", "x", "\x1b[31m", [], ["x"], [None]),
    *({}, {"a": {"b": []}}, [[[]]]),
)


DAMAGES = (
    *("truncate", "flip", "empty", "remove", "garbage", "folder", "fifo", "unreadable"),
    *("wrong_type", "wrong_type"),
)


def damage(path: Path, kind: str, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    match kind:
        case "truncate":
            content = content[: draw.randrange(max(1, len(content)))]
        case "flip":
            content = content or bytearray(b"x")
            for _ in range(draw.choice((1, 1, 8))):
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        case "empty":
            content.clear()
        case "garbage":
            content = bytearray(draw.randbytes(draw.randrange(1, 4096)))
        case "wrong_type":
            content = bytearray(json.dumps(_retyped(content, draw)).encode())
    path.unlink()
    match kind:
        case "remove":
            return
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case _:
            path.write_bytes(content)
            path.chmod(0 if kind == "unreadable" else 0o644)  # see `obey_permissions`


def _retyped(content: bytearray, draw: random.Random) -> Any:
    """Another value at a place of JSON; where it is none, any."""
    try:
        value = json.loads(content)
    except ValueError:
        return draw.choice(ODD)
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        at = waiting.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
        places += [(at, key) for key in keys]
        waiting += [at[key] for key in keys]
    if not places or draw.random() < 0.1:
        return draw.choice(ODD)
    at, key = draw.choice(places[:200])
    at[key] = draw.choice([odd for odd in ODD if type(odd) is not type(at[key])])
    return value


@dataclass
class Try:
    """One fault: where, and what is allowed to follow."""

    stage: str
    fault: str
    how: dict[str, Any] = field(default_factory=dict)
    before: Callable[[], Any] | None = None
    may_differ: bool = False  # another result is right
    resumes: bool = False  # run again undisturbed, it ends with the undamaged outs


def damaged_input(pipeline: Pipeline, root: Path, stage: str, draw: random.Random) -> Try:
    names = [n for n in paths(declared()[stage]["deps"]) if not n.startswith("stages/")]
    known = {"${data.path}": "mine.jsonl"}
    names = [known.get(name, name) for name in names] + ["dvc.lock", "dvc.yaml"]
    if stage == "fetch_model":
        names += ["my-model"] * 3
    name = draw.choice(sorted(files_below(root, [draw.choice(names)])))
    kind = draw.choice(DAMAGES)
    damage(root / name, kind, draw)
    users = stage == "fetch_data" or name in ("params.yaml", "dvc.yaml", "dvc.lock", "matplotlibrc")
    return Try(stage, f"{kind} {name}", may_differ=users)


def odd_model(pipeline: Pipeline, root: Path, stage: str, draw: random.Random) -> Try:
    """A config of the user's own model, pinned as it is."""
    names = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
    name = draw.choice(names)
    damage(root / "my-model" / name, "wrong_type", draw)
    set_params(root, {"model.revision": files.folder_sha256(root / "my-model")})
    return Try("fetch_model", f"odd {name}", may_differ=True)


def odd_base(pipeline: Pipeline, root: Path, stage: str, draw: random.Random) -> Try:
    """The same, where the stages before have let it pass: dvc.lock knows it so."""
    name = draw.choice(("config.json", "generation_config.json", "tokenizer_config.json"))
    where = "tokenizer" if name.startswith("tokenizer") else draw.choice(("base", "quantized"))
    damage(root / "models" / where / name, "wrong_type", draw)
    (root / "dvc.lock").unlink()
    return Try(stage, f"odd models/{where}/{name}", may_differ=True)


def blocked_out(pipeline: Pipeline, root: Path, stage: str, draw: random.Random) -> Try:
    """Something else lies where a stage writes."""
    target = root / draw.choice(outs_of(declared()[stage]))
    if draw.random() < 0.3:
        target = target.with_name(f"{target.name}.partial")
    kind = draw.choice(("file", "folder", "full folder", "fifo", "read-only"))
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    makers: dict[str, Callable[[Path], Any]] = {"fifo": os.mkfifo, "file": Path.touch}
    makers.get(kind, Path.mkdir)(target)
    if kind == "full folder":
        (target / "x").write_text("x")
    if kind == "read-only":
        target.chmod(0o500)
    return Try(stage, f"{kind} at {target.relative_to(root)}")


def signalled(pipeline: Pipeline, root: Path, stage: str, draw: random.Random) -> Try:
    number = draw.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL))
    after = draw.uniform(0.0, 1.0) * pipeline.seconds[stage]
    send = draw.choice((os.kill, os.killpg))
    how = {"after": after, "number": number, "send": send}
    return Try(stage, f"{number.name} after {after:.2f} s, {send.__name__}", how, resumes=True)


def on_two_devices(pipeline: Pipeline, root: Path, stage: str, draw: random.Random) -> Try:
    """A signal to the command, to all its processes or to one of them; or a damaged input."""

    def begin() -> None:
        os.environ["QLORA_DEVICES"] = "2"

    def kill_one(parent: int, number: int) -> None:
        """Of the two, once they are there, which begin after the watcher and a tracker."""
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        workers = Path(f"/proc/{parent}/task").glob("*/children")
        below = [int(child) for path in workers for child in path.read_text().split()]
        with suppress(OSError):
            os.kill(draw.choice([p for p in below if str(p) not in children] or [parent]), number)

    if draw.random() < 0.2:
        attempt = damaged_input(pipeline, root, "train", draw)
        return replace(attempt, before=begin, may_differ=True)
    number = draw.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL))
    send, after = draw.choice((os.kill, os.killpg, kill_one)), draw.uniform(0.5, 20)
    how = {"after": after, "number": number, "send": send}
    what = f"two devices, {number.name} after {after:.2f} s, {send.__name__}"
    return Try("train", what, how, begin, may_differ=True)


NAMES = ("../x.json", "/x.json", "a/../../x.json", "a\\b.json", "\x1b[31m.json", "x" * 300)
ENDPOINTS = ("http://127.0.0.1:1", "http://me:secret@127.0.0.1:1", "ftp://x", "x", "http://[")


def wrong_hub(pipeline: Pipeline, root: Path, stage: str, draw: random.Random) -> Try:
    """The model or the data of a hub that answers wrongly, in the stage's own process."""
    stage = draw.choice(("fetch_data", "fetch_model"))
    name = "datasets/me/set" if stage == "fetch_data" else "me/tiny"
    fault = draw.choice(("status", "cut", "slow", "listing", "names", "hashes", "address", "none"))
    odd, status = draw.choice(ODD), draw.choice((401, 403, 404, 418, 429, 500, 503))
    only, address = draw.choice(("", "resolve", "api", "json")), draw.choice(ENDPOINTS)
    path, after, key = draw.choice(NAMES), draw.randrange(2000), draw.choice(("siblings", "sha"))
    server = hubs.serve()

    def serve() -> None:
        hub = server.__enter__()
        for repository, folder in (("me/tiny", "my-model"), ("datasets/me/set", "set")):
            contents = {p.name: p.read_bytes() for p in (root / folder).iterdir()}
            hub.repositories[repository] = contents
        content = hub.repositories[name]
        match fault:
            case "status":
                hub.status, hub.only, hub.headers = status, only, {"Retry-After": str(after)}
            case "cut":
                hub.cut_after = after
            case "slow":
                hub.drip = 0.001
            case "listing":
                hub.listed = odd if key == "sha" else hub.listing(name) | {key: odd}
            case "names":
                content[path] = b"{}"
            case "hashes":
                hub.listed = hub.listing(name)
                hub.repositories[name] = {path: old[::-1] for path, old in content.items()}
        os.environ["HF_ENDPOINT"] = address if fault == "address" else hub.url
        constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE = False, str(root / "cache")
        hub_client.MINUTE = 1.0

    (root / "set").mkdir()
    shutil.copyfile(root / "mine.jsonl", root / "set/train.jsonl")
    section, named = ("data", "repo") if stage == "fetch_data" else ("model", "name")
    pinned = {"revision": hubs.COMMIT, "source": "hub", named: name.removeprefix("datasets/")}
    set_params(root, {f"{section}.{part}": value for part, value in pinned.items()})
    details = {"status": f"{status} {only}", "listing": f"{key} {odd}", "names": path}
    what = f"hub: {fault} {details.get(fault, address if fault == 'address' else after)}"
    return Try(stage, what, before=serve, may_differ=True)


def broken_pipe(pipeline: Pipeline, root: Path, stage: str, draw: random.Random) -> Try:
    descriptors = draw.choice(((1,), (2,), (1, 2)))

    def close() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        for descriptor in descriptors:
            os.dup2(writer, descriptor)

    return Try(stage, f"nobody reads {descriptors}", before=close)


def limited(pipeline: Pipeline, root: Path, stage: str, draw: random.Random) -> Try:
    """The sizes of files, of the address space, or the number of open files end early."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    size, extra = draw.choice((0, 100, 4_000, 60_000)), draw.choice((0, 10, 50, 100, 200, 400))
    limits = {"FSIZE": size, "AS": used + extra * 2**20, "NOFILE": draw.randrange(8, 40)}
    kind, value = draw.choice([*limits.items()])

    def limit() -> None:
        resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (value, value))

    return Try(stage, f"{kind} {value}", before=limit)


def set_params(root: Path, changes: dict[str, Any]) -> None:
    overwrite(root / "params.yaml", (root / "params.yaml").read_bytes())
    workspace.Workspace(root).set_params(changes)


PARAMS = (
    *("a: &a [*a]\n", "[" * 5000, "{a: " * 5000, "x: 2024-13-45\n", "\t", "\x00", "- 1\n", "5\n"),
    *("", "a: !!python/object:os.system {}\n", "a: !!binary x\n", "? [1]\n: 2\n", "&a *a"),
    *("a: 1\na: 2\n", "<<: 3\n", "a: !!timestamp x\n", "%YAML 9.9\n---\na: 1\n", "a: !!set {b}\n"),
)


def odd_params(pipeline: Pipeline, root: Path, stage: str, draw: random.Random) -> Try:
    path = root / "params.yaml"
    values = yaml.safe_load(path.read_text())
    if draw.random() < 0.35:
        text = draw.choice(PARAMS)
        if draw.random() < 0.5:
            text = path.read_text() + text
        overwrite(path, text.encode())
        return Try(stage, f"params.yaml {text[:20]!r}")
    section = draw.choice([*values, "unknown"])
    keys = [*values.get(section, ())]
    key = draw.choice([f"{section}.{key}" for key in keys] or [f"{section}.x"])
    date = yaml.safe_load("2024-01-01")
    odd: Any = draw.choice([[["a"]], {"b": {"c": 1}}, "", [None], {}, [], "\x1b[31m", {1: 2}, date])
    if key in ("lora.target_modules", "lora.modules_to_save"):
        odd = {"a": 1}
    if odd == "" or isinstance(odd, str):
        key = draw.choice(("train.epochs", "lora.r", "merge.onto", "quantize.precision", "report"))
    if key == "report" or draw.random() < 0.1:
        values[key.partition(".")[0]] = odd
        overwrite(path, yaml.safe_dump(values).encode())
    else:
        set_params(root, {key: odd})
    fine = odd == {} and key in ("report.x", "plan.x")
    return Try(stage, f"{key} = {odd!r}", may_differ=fine)


FAULTS: tuple[tuple[Callable[..., Try], int], ...] = (
    (damaged_input, 45),
    (odd_model, 6),
    (odd_base, 12),
    (blocked_out, 8),
    (signalled, 12),
    (on_two_devices, 3),
    (wrong_hub, 10),
    (broken_pipe, 3),
    (limited, 10),
    (odd_params, 10),
)
