"""A model in a folder of the user's own disk, pinned by its content."""

from pathlib import Path

from stages.fetch_model.checkpoint import Checkpoint
from stages.shared.core import files
from stages.shared.core.errors import UserError


def find(name: str, revision: str | None) -> Checkpoint:
    """The folder `model.name`, if its content has the hash `model.revision`.

    Raises:
        UserError: there is no such folder, or it holds something else.
    """
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(
            f"params.yaml: model.name is {name!r}, which is no folder; expected a folder with "
            "safetensors, config.json and a tokenizer; correct it (an absolute path also works in "
            "`dvc exp run --temp` and `--queue`)"
        )
    found = files.folder_sha256(folder)
    if found != revision:
        raise UserError(
            f"params.yaml: model.revision is {revision!r}; the content of {name} has the hash "
            f"{found}; make sure that it is the model you mean, and set model.revision to that hash"
        )
    return Checkpoint(folder, name, ours=False)
