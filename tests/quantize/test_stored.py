from pathlib import Path

import torch
from safetensors.torch import save_file

from stages.shared.weights.checkpoint import Weights


def folder_with(folder: Path, **files: dict[str, torch.Tensor]) -> Weights:
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return Weights(folder)


def test_parts_are_counted_with_their_weight(tmp_path: Path):
    weights = folder_with(
        tmp_path,
        one={
            "q.weight": torch.tensor([[127, -127], [0, 64]], dtype=torch.int8),
            "q.SCB": torch.tensor([1.0, 254.0]),
            "q.weight_format": torch.tensor(0, dtype=torch.uint8),
            "q.bias": torch.zeros(2, dtype=torch.bfloat16),
        },
        two={"norm.weight": torch.ones(3)},
    )
    found = {p.name: p for p in weights.parameters}
    assert {name: (p.kind, p.shape, p.bytes) for name, p in found.items()} == {
        "norm.weight": ("fp32", (3,), 12),
        "q.bias": ("bf16", (2,), 4),
        "q.weight": ("int8", (2, 2), 4 + 8 + 1),
    }
    assert weights.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    values = weights.values(found["q.weight"], torch.device("cpu"))
    assert torch.allclose(values, torch.tensor([[1.0, -1.0], [0.0, 128.0]]))


def test_layers_stand_in_their_order(tmp_path: Path):
    names = [f"layers.{i}.weight" for i in (10, 2, 1)] + ["embed.weight"]
    weights = folder_with(tmp_path, model={name: torch.zeros(1) for name in names})
    assert [p.name for p in weights.parameters] == [
        "embed.weight",
        "layers.1.weight",
        "layers.2.weight",
        "layers.10.weight",
    ]


def test_a_checkpoint_without_the_models_prefix_is_understood(tmp_path: Path):
    weights = folder_with(tmp_path, model={"h.0.weight": torch.zeros(1)})
    assert weights.find("transformer.h.0.weight", "transformer") == "h.0.weight"
    assert weights.find("h.0.weight", "transformer") == "h.0.weight"
    assert weights.find("h.1.weight", "transformer") is None
