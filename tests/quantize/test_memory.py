"""Memory of quantizing, in bytes of live tensors."""

from pathlib import Path

import pytest
import torch

from stages.quantize import convert, quantization_error
from stages.shared.step.memory.live_bytes import LiveBytes
from stages.shared.weights import heap
from stages.shared.weights.checkpoint import Weights
from tests import tiny

CPU = torch.device("cpu")
LAYERS = 16


class RealMemory(LiveBytes):
    """Without the storages of torch's meta device, which have a size and take no memory."""

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "meta":
            super()._count(tensor)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So deep that two layers are an eighth of it; in fp32, which every precision has to change."""
    folder = tmp_path_factory.mktemp("base")
    tiny.model(layers=LAYERS).save_pretrained(folder)
    return folder


def sizes(folder: Path) -> dict[str, int]:
    return {stored.name: stored.bytes for stored in Weights(folder).parameters}


def allowed(base: Path, written: Path) -> int:
    """The quantized model, two layers and the embedding, as they lie in the base."""
    layer = sum(size for name, size in sizes(base).items() if ".layers.0." in name)
    embedding = sizes(base)["model.embed_tokens.weight"]
    return sum(sizes(written).values()) + 2 * layer + embedding


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_memory_is_the_result_and_two_layers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
):
    # What other threads allocate would not be seen: read in this one.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with RealMemory() as memory:
        original = convert.convert(base, tmp_path, tiny.quantization(precision), CPU)
    bound = allowed(base, tmp_path)
    assert sum(sizes(tmp_path).values()) < memory.peak_bytes <= bound
    # The bound is one that the base and the result together would break.
    assert sum(sizes(base).values()) + sum(sizes(tmp_path).values()) > bound

    # Of each matrix as small a part as of a real model's; here 256 blocks would be all of it.
    monkeypatch.setattr(quantization_error, "BLOCKS_FOR_ALPHA", 4)
    written = Weights(tmp_path)
    matrices = convert.linear_matrices(written.parameters, original.embeddings)
    with RealMemory() as memory:
        quantization_error.measure(original, written, matrices)
    assert 0 < memory.peak_bytes <= bound


def mapped(folder: Path) -> int:
    """The bytes of files below `folder` that this process has in its address space."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            begin, end = (int(address, 16) for address in line.split()[0].split("-"))
            total += end - begin
    return total


def test_base_is_released_as_it_is_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[int] = []

    def observe() -> int:
        seen.append(mapped(base))
        return 0

    monkeypatch.setattr(heap, "resident_bytes", observe)
    convert.convert(base, tmp_path, tiny.quantization("nf4"), CPU)
    assert len(seen) == len(sizes(base)) + 1  # one before
    largest = max(sizes(base).values())
    assert max(seen) <= largest + 8192  # whole pages
    assert mapped(base) == 0


def test_view_of_a_file_goes_with_its_tensor(base: Path):
    weights = Weights(base)
    views = [weights.tensor(name) for name in sizes(base)]
    assert mapped(base) >= sum(sizes(base).values())
    del views
    assert mapped(base) == 0
