"""What `python -m stages.prepare` does once its parameters are read, timed like its peer.

Run:    python -m benchmarks.prepare_ours RAW_FOLDER TOKENIZER_FOLDER EMPTY_FOLDER
"""

import sys
from pathlib import Path

import yaml

from benchmarks import measured
from stages.prepare import preparing
from stages.prepare.settings import Prepare

PARAMS = Path(__file__).parents[1] / "params.yaml"


def prepare(raw: Path, tokenizer: Path, folder: Path) -> dict[str, int]:
    """Read, prepare, write, with the parameters of the default."""
    wanted = Prepare(**yaml.safe_load(PARAMS.read_text(encoding="utf-8"))["prepare"])
    made = preparing.prepare(raw, tokenizer, folder, wanted)
    return {"rows": made["rows_in"], "tokens": made["train"]["tokens"] + made["eval"]["tokens"]}


if __name__ == "__main__":
    measured.tell(lambda: prepare(*map(Path, sys.argv[1:4])))
