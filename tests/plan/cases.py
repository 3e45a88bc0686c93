"""Parameters, data and a model for the plan's tests."""

from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from stages.plan.config import Data, Params
from stages.shared.core import params

DATA = Data(conversations=1500, tokens=96_000, supervised_tokens=32_000, longest=160)
SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)


def written(folder: Path) -> Path:
    """The config of SmolLM2-135M."""
    SMOLLM2.save_pretrained(folder)
    return folder / "config.json"


def settings(**changes: dict[str, Any]) -> Params:
    """The default parameters, with changes."""
    import yaml

    values: dict[str, Any] = yaml.safe_load(Path("params.yaml").read_text())
    values = {name: values[name] for name in Params.model_fields}
    values["train"]["batch_size"] = 16
    for section, change in changes.items():
        values[section] |= change
    return params.validate(Params, values)
