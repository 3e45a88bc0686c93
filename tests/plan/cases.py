"""Parameters, data and models for the plan's tests."""

from functools import cache
from typing import Any

from stages.plan import named
from stages.plan.data import Data
from stages.plan.settings import Params
from stages.shared.architecture import model_of_config
from stages.shared.blocks import Block
from stages.shared.core import params
from stages.shared.tensors import Model, Tensor

DATA = Data(conversations=1500, tokens=96_000, supervised_tokens=32_000, longest=160)
LAYER = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)} | {
    "gate": (1536, 576),
    "up": (1536, 576),
    "down": (576, 1536),
}
SMOLLM2 = Model(
    kind="LlamaDecoderLayer",
    tensors=[
        Tensor("model.embed_tokens.weight", "embedding", (49152, 576)),
        *(
            Tensor(
                f"model.layers.{i}.{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj.weight",
                "linear",
                shape,
                quantizable=True,
            )
            for i in range(30)
            for name, shape in LAYER.items()
        ),
        *(Tensor(f"model.norms.{i}.weight", "norm", (576,)) for i in range(61)),
        Tensor("lm_head.weight", "head", (49152, 576), tied=True),
    ],
    layers=30,
    hidden=576,
    vocabulary=49152,
    block=Block(hidden=576, query=576, key_value=192, inner=1536, heads=9),
)


@cache
def shipped(name: str) -> Model:
    """One of the configs that come with the plan."""
    return model_of_config(named.CONFIGS / f"{name}.json")


def settings(**changes: dict[str, Any]) -> Params:
    """The default parameters, with changes."""
    values: dict[str, dict[str, Any]] = {
        "quantize": {"precision": "nf4", "double_quant": True, "compute_dtype": "bf16"},
        "lora": {
            "r": 16,
            "dropout": 0.0,
            "target_modules": "all-linear",
            "modules_to_save": None,
            "bias": "none",
            "init": "default",
            "dora": False,
        },
        "train": {
            "method": "lora",
            "epochs": 1,
            "max_steps": None,
            "batch_size": 16,
            "optimizer": "adamw",
        },
        "plan": {},
    }
    for section, change in changes.items():
        values[section] |= change
    return params.validate(Params, values)
