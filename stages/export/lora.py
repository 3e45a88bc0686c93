"""Adapters that llama.cpp and vLLM can load: two factors of each linear layer, and no more.

Sources: https://github.com/ggml-org/llama.cpp, convert_lora_to_gguf.py;
https://github.com/vllm-project/vllm, vllm/lora/peft_helper.py and vllm/config/lora.py.
"""

from pathlib import Path

from stages.export.architecture import Unsupported
from stages.export.config import VLLM_RANKS
from stages.shared.core import files
from stages.shared.weights.checkpoint import Weights

_REFUSED = ("use_dora", "modules_to_save", "lora_bias")
_REFUSED_BY = {
    "gguf-lora": ("alpha_pattern", "rank_pattern"),
    "vllm-lora": ("layer_replication", "use_qalora"),
}


def require(adapter: Path, formats: list[str]) -> None:
    """Raise `Unsupported` for an adapter that a format has no place for."""
    if not (adapter / "adapter_config.json").is_file():
        raise Unsupported("train.method full leaves no adapter")
    config = files.read_json(adapter / "adapter_config.json")
    for name in formats:
        unfit = [key for key in (*_REFUSED, *_REFUSED_BY[name]) if config.get(key)]
        unfit += ["bias"] if config.get("bias", "none") != "none" else []
        if name == "vllm-lora" and config["r"] > VLLM_RANKS[-1]:
            unfit.append(f"rank {config['r']}")
        if unfit:
            raise Unsupported(f"{name} has no place for an adapter with {', '.join(unfit)}")
    for stored in Weights(adapter).parameters:
        module, _, factor = stored.name.rpartition(".lora_")
        linear = module.startswith("base_model.model.") and factor in ("A.weight", "B.weight")
        if not linear or module.endswith(("lm_head", "embed_tokens")):
            raise Unsupported(f"{formats[0]} has no place for {stored.name}")


def write_portable(adapter: Path, folder: Path) -> None:
    """Link the weights, and write a configuration that depends on no folder of this machine.

    `init_lora_weights` says how training began; vLLM would take a base altered by it for granted.
    """
    folder.mkdir()
    weights = "adapter_model.safetensors"
    files.link_or_copy(adapter / weights, folder / weights)
    config = files.read_json(adapter / "adapter_config.json")
    portable = {"base_model_name_or_path": "../base", "init_lora_weights": True}
    files.write_json(folder / "adapter_config.json", config | portable)
