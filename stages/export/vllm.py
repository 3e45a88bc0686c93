"""Adapters that vLLM can load beside a base model.

Source: https://github.com/vllm-project/vllm, vllm/lora/peft_helper.py and vllm/config/lora.py.
"""

from pathlib import Path
from typing import Any

from stages.export.architecture import Unsupported
from stages.export.config import VLLM_RANKS
from stages.shared.core import files
from stages.shared.weights.checkpoint import Weights

_REFUSED = ("use_dora", "modules_to_save", "lora_bias", "layer_replication", "use_qalora")


def require(config: dict[str, Any], weights: Weights) -> None:
    """Raise `Unsupported` for an adapter that vLLM refuses, or whose names it does not map."""
    unfit = [name for name in _REFUSED if config.get(name)]
    unfit += ["bias"] if config.get("bias", "none") != "none" else []
    unfit += [f"rank {config['r']}"] if config["r"] > VLLM_RANKS[-1] else []
    if unfit:
        raise Unsupported(f"vLLM loads no adapter with {', '.join(unfit)}")
    for stored in weights.parameters:
        module, _, factor = stored.name.rpartition(".lora_")
        linear = module.startswith("base_model.model.") and factor in ("A.weight", "B.weight")
        if not linear or module.endswith(("lm_head", "embed_tokens")):
            raise Unsupported(f"vLLM has no place for {stored.name}")


def write_adapter(adapter: Path, folder: Path) -> None:
    """Link the weights, and write a configuration that depends on no folder of this machine.

    `init_lora_weights` says how training began; vLLM would take a base altered by it for granted.
    """
    folder.mkdir()
    weights = "adapter_model.safetensors"
    files.link_or_copy(adapter / weights, folder / weights)
    config = files.read_json(adapter / "adapter_config.json")
    portable = {"base_model_name_or_path": "../base", "init_lora_weights": True}
    files.write_json(folder / "adapter_config.json", config | portable)
