"""Merge into a folder, and compare what lies there with what was trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.merge import merging, proof
from stages.merge.settings import Merge
from stages.shared import models
from stages.shared.chat.templates import read_format
from stages.shared.core import files
from stages.shared.core.machine import device
from stages.shared.examples import Example, read_examples
from stages.shared.precision import DTYPES


def merge_and_prove(
    settings: Merge,
    adapter: Path,
    weights: Mapping[str, Path],
    tokenizer: Path,
    data: Path,
    folder: Path,
) -> dict[str, Any]:
    """Write a standalone model into `folder` and measure how far it is from the trained one.

    Args:
        settings: the parameters.
        adapter: what was trained: an adapter, or a standalone model.
        weights: the folders of the `quantized` and the `original` weights.
        tokenizer: the tokenizer's folder.
        data: holds eval.parquet and format.json.
        folder: an existing folder.

    Returns:
        The metrics for `reports/merge.json`.

    Raises:
        UserError: merged onto `quantized`, the model is not what was trained.
    """
    onto, trained_on, where = settings.onto, weights["quantized"], device()
    merging.refuse_original(adapter, onto)
    if models.is_adapter(adapter):
        merging.merge_adapter(adapter, weights[onto], folder, DTYPES[settings.dtype], where)
    else:
        files.link_folder(adapter, folder)  # standalone already
    form = read_format(data / "format.json")
    merging.make_standalone(folder, trained_on, tokenizer, form)

    examples = proof.first_positions(read_examples(data / "eval.parquet"))
    cpu, fp32 = torch.device("cpu"), torch.float32
    trained = trained_exactly(adapter, trained_on, examples, where)
    saved = merged_in(fp32, folder, examples, cpu, "proof: merged")
    exact = proof.compare(trained, saved)
    del trained
    if onto == "quantized":
        proof.require(exact, settings.dtype)

    dtype = models.compute_dtype(folder, where)
    if (where, dtype) != (cpu, fp32):  # else it has just been computed
        saved = merged_in(dtype, folder, examples, where, "as run: merged")
    runtime = proof.compare(trained_as_run(adapter, trained_on, examples, where), saved)
    return {
        "onto": onto,
        "kl_divergence": exact.kl_divergence,
        "top1_agreement": exact.top1_agreement,
        "runtime_kl_divergence": runtime.kl_divergence,
        "runtime_top1_agreement": runtime.top1_agreement,
        "runtime_dtype": str(dtype).removeprefix("torch."),
        "positions": exact.positions,
        "bytes": files.folder_bytes(folder),
    }


def trained_exactly(
    adapter: Path, quantized: Path, examples: list[Example], where: torch.device
) -> list[torch.Tensor]:
    """Log-probabilities of what was trained: in fp32, on the weights as `where` multiplies them.

    The adapter is not merged.
    """
    cpu, fp32 = torch.device("cpu"), torch.float32
    trained: nn.Module
    if models.is_adapter(adapter):
        trained = models.attach(models.load_dequantized(quantized, where), adapter)
    else:
        trained = models.load_model(adapter, cpu, fp32)
    return proof.log_probabilities(trained, examples, cpu, fp32, "proof: trained")


def trained_as_run(
    adapter: Path, quantized: Path, examples: list[Example], where: torch.device
) -> list[torch.Tensor]:
    """The same as this device computes it: in half precision every layer rounds otherwise."""
    below = quantized if models.is_adapter(adapter) else adapter
    dtype = models.compute_dtype(below, where)
    trained = models.load_adapted(adapter, quantized, where)
    return proof.log_probabilities(trained, examples, where, dtype, "as run: adapter")


def merged_in(
    dtype: torch.dtype, merged: Path, examples: list[Example], where: torch.device, desc: str
) -> list[torch.Tensor]:
    """The log-probabilities of the file that was saved, computed in `dtype`."""
    saved = models.load_model(merged, where, dtype)
    return proof.log_probabilities(saved, examples, where, dtype, desc)
