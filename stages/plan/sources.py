"""Model configs: the base model's, a file, a shipped one, or one of the hub."""

import re
from pathlib import Path
from typing import Any

from stages.shared.core.errors import UserError

CONFIGS = Path(__file__).parent / "configs"
BASE = Path("models/base/config.json")
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([0-9a-f]{40}))?", re.ASCII)


def names() -> str:
    """Names of the shipped configs, for a message."""
    return ", ".join(sorted(path.stem for path in CONFIGS.glob("*.json")))


def config_path(model: str | None) -> Path:
    """Find the config of a folder, file, shipped name or `owner/name[@commit]`; None: the base."""
    if model is None:
        return BASE
    path, shipped = Path(model), CONFIGS / f"{model}.json"
    path = path / "config.json" if path.is_dir() else path
    if path.is_file() or shipped.is_file():
        return path if path.is_file() else shipped
    if match := HUB_NAME.fullmatch(model):
        return _of_hub(match[1], match[2])
    raise UserError(
        f"--model: {model!r} is no folder with a config.json and no such file. Name one, "
        f"owner/name of the hub, or one of {names()}."
    )


def _of_hub(name: str, commit: str | None) -> Path:
    """Download one file into the user's cache and print its commit."""
    from huggingface_hub import hf_hub_download  # noqa: PLC0415  (half a second)

    # Imported late, with the hub's client.
    from stages.shared.hub.repository import Repository, one_line_errors  # noqa: PLC0415

    revision = commit or "main"
    repository = Repository("model", name, revision)
    options: dict[str, Any] = {"revision": revision, "endpoint": repository.endpoint}
    with one_line_errors(repository):
        path = Path(hf_hub_download(name, "config.json", **options))
    print(f"{name} at {path.parent.name} ({'pinned' if commit else 'main'})")
    return path
