"""Merge into a folder, and compare what lies there with what was trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stages.merge import merging, proof
from stages.merge.settings import Merge
from stages.shared import files, models, prepared
from stages.shared.examples import Example, read_examples
from stages.shared.machine import device
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
    onto, trained_on = settings.onto, weights["quantized"]
    merging.refuse_original(adapter, onto)
    if models.is_adapter(adapter):
        merging.merge_adapter(adapter, weights[onto], folder, DTYPES[settings.dtype])
    else:
        files.link_folder(adapter, folder)  # standalone already
    form = prepared.read_format(data / "format.json")
    merging.make_standalone(folder, trained_on, tokenizer, form)

    examples = proof.first_positions(read_examples(data / "eval.parquet"))
    exact = compare_exactly(adapter, trained_on, folder, examples)
    if onto == "quantized":
        proof.require(exact, settings.dtype)
    runtime = compare_as_run(adapter, trained_on, folder, examples)
    return {
        "onto": onto,
        "kl_divergence": exact.kl_divergence,
        "top1_agreement": exact.top1_agreement,
        "runtime_kl_divergence": runtime.kl_divergence,
        "runtime_top1_agreement": runtime.top1_agreement,
        "runtime_dtype": str(models.compute_dtype(folder, device())).removeprefix("torch."),
        "positions": exact.positions,
        "bytes": files.folder_bytes(folder),
    }


def compare_exactly(
    adapter: Path, quantized: Path, merged: Path, examples: list[Example]
) -> proof.Agreement:
    """In fp32: the adapter, not merged, on dequantized weights, against the file that was saved.

    One model is in memory at a time.
    """
    cpu, fp32 = torch.device("cpu"), torch.float32
    trained: torch.nn.Module
    if models.is_adapter(adapter):
        trained = models.attach(models.load_dequantized(quantized), adapter)
    else:
        trained = models.load_model(adapter, cpu, fp32)
    first = proof.log_probabilities(trained, examples, cpu, fp32, "proof: trained")
    del trained
    saved = models.load_model(merged, cpu, fp32)
    return proof.compare(
        first, proof.log_probabilities(saved, examples, cpu, fp32, "proof: merged")
    )


def compare_as_run(
    adapter: Path, quantized: Path, merged: Path, examples: list[Example]
) -> proof.Agreement:
    """The same in what this device computes in: in half precision every layer rounds otherwise."""
    where = device()
    below = quantized if models.is_adapter(adapter) else adapter
    dtype = models.compute_dtype(below, where)
    trained = models.load_adapted(adapter, quantized, where)
    first = proof.log_probabilities(trained, examples, where, dtype, "as run: adapter")
    del trained
    dtype = models.compute_dtype(merged, where)
    saved = models.load_model(merged, where)
    return proof.compare(
        first, proof.log_probabilities(saved, examples, where, dtype, "as run: merged")
    )
