"""Which layers an adapter is put on."""

import pytest

from stages.shared.tensors import Kind, Tensor, lora_targets, saved_tensors


def matrix(name: str, *shape: int, kind: Kind = "linear") -> Tensor:
    return Tensor(f"{name}.weight", kind, shape, quantizable=kind == "linear")


LAYERS = [
    matrix("model.embed_tokens", 384, 64, kind="embedding"),
    matrix("model.layers.0.self_attn.q_proj", 64, 64),
    matrix("model.layers.0.mlp.up_proj", 128, 64),
    matrix("model.layers.1.mlp.up_proj", 128, 64),
    matrix("lm_head", 384, 64, kind="head"),
]


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        ("all-linear", [1, 2, 3]),
        (["up_proj"], [2, 3]),
        (["q_proj", "model.layers.1.mlp.up_proj"], [1, 3]),
        (["proj"], []),
        (r".*\.1\..*_proj", [3]),
        (r"up_proj", []),
        (["lm_head"], [4]),
    ],
)
def test_targets_are_matched_as_peft_does(target_modules, expected):
    assert lora_targets(LAYERS, target_modules) == [LAYERS[i] for i in expected]


def test_a_layer_that_is_trained_in_full_gets_no_adapter():
    assert saved_tensors(LAYERS, ["lm_head"]) == [LAYERS[4]]
    assert lora_targets(LAYERS, ["lm_head", "q_proj"], ["lm_head"]) == [LAYERS[1]]
    assert saved_tensors(LAYERS, None) == []
