"""A model of the hub: its safetensors, its config and its tokenizer, and no other file."""

from pathlib import Path

from stages.fetch_model.checkpoint import SMALL_FILES, Checkpoint, read_config, weight_files
from stages.shared.download import download
from stages.shared.hub import Repository, list_files


def fetch(repository: Repository, folder: Path) -> Checkpoint:
    """Download into `folder`: first what is small and can be refused, then the weights.

    Raises:
        UserError: as `hub.list_files`, `download`, `read_config` and `weight_files` do.
    """
    listed = {file.path: file for file in list_files(repository)}
    download(repository, [listed[name] for name in SMALL_FILES if name in listed], folder)
    read_config(folder, repository.url)
    weights = weight_files(folder, listed, repository.url)
    download(repository, [listed[name] for name in weights], folder)
    return Checkpoint(folder, repository.url, ours=True)
