"""Models, adapters and tokenizers: loaded, and a tokenizer saved, the same in every stage."""

# ruff: noqa: E402  (environment and warnings are set before the libraries are imported)

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# oneDNN compiles and caches each matmul shape: 0.56 MB each, 1,024 by default. A micro-batch has
# about 50 shapes: with 64 it hardly compiles more often, with 32 three times as often.
PRIMITIVES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
os.environ.setdefault(PRIMITIVES, "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
warnings.filterwarnings("ignore", message="`loftq_config` specified")  # merging reads it

from stages.shared.weights import bnb, experts, precision  # before peft imports bitsandbytes
from stages.shared.weights.checkpoint import Weights, load_strictly, require_finite

# isort: split
import torch
from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stages.shared.core import files
from stages.shared.core.bounds import without_panic_output
from stages.shared.core.errors import reading
from stages.shared.model import attention, expert_adapters

ADAPTER = "default"  # peft's name of the first adapter


def stored_dtype(folder: Path) -> torch.dtype:
    """Dtype of a model's dense weights, from its config."""
    with reading(folder / "config.json"):  # if it is missing, transformers would query the hub
        dtype = AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype or torch.float32
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype is {dtype!r}")
    return dtype


def compute_dtype(folder: Path, device: torch.device) -> torch.dtype:
    """Compute dtype of a model on a device, see `precision.compute_dtype`."""
    return precision.compute_dtype(stored_dtype(folder), device.type)


def load_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    on_cpu: bool = False,
) -> PreTrainedModel:
    """Load a model in evaluation mode, its dense weights in `dtype` or the `compute_dtype`.

    `on_cpu`: on the CPU, to be moved to `device` later.
    """
    weights = Weights(folder)
    dtype = dtype or compute_dtype(folder, device)
    model = _load(weights, torch.device("cpu") if on_cpu else device, dtype)
    if experts.layers(model) and os.environ[PRIMITIVES] == "64":  # read at the first matmul
        os.environ[PRIMITIVES] = "256"  # for experts of many sizes: 0.14 s a step instead of 0.36
    bnb.guard(model, device)
    stored = model.dtype
    if stored != dtype:  # transformers leaves the dense weights of a quantized model as stored
        for parameter in model.parameters():  # not buffers: rotary frequencies stay in fp32
            if parameter.dtype == stored:
                parameter.data = parameter.data.to(dtype)
    return model.eval()


def _load(weights: Weights, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    def load(attn: str) -> PreTrainedModel:
        options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
        return load_strictly(weights, AutoModelForCausalLM, attn_implementation=attn, **options)

    with reading(weights.folder):
        model: PreTrainedModel = attention.with_supported(load)
    for module in model.modules():
        if "dynamic" in str(getattr(module, "rope_type", "")):
            module.register_forward_pre_hook(_forget_longest)
    return model


def _forget_longest(rope: nn.Module, *_: Any) -> None:
    """Dynamic rotary frequencies are a conversation's own, not of the longest one before it."""
    for name in [name for name in vars(rope) if name.endswith("max_seq_len_cached")]:
        setattr(rope, name, 0)


def load_dequantized(folder: Path, device: torch.device) -> PreTrainedModel:
    """Load the weights that training on `device` saw, as a plain fp32 model on the CPU.

    A 4-bit layer becomes an `nn.Linear` with the values of its forward pass, rounded to that
    device's compute dtype. An int8 layer becomes its integers times their scales, unrounded; its
    forward pass also rounds activations. A dense model is cast.
    """
    model = _load(Weights(folder), torch.device("cpu"), torch.float32)
    bnb.guard(model, device)
    if getattr(model, "hf_quantizer", None) is not None:
        model = model.dequantize(dtype=torch.float32)
        del model._weight_conversions  # saving would reverse those for quantized weights
    return model.float().eval()


def load_adapted(
    adapter: Path, base: Path, device: torch.device, *, on_cpu: bool = False
) -> PreTrainedModel | PeftModel:
    """Load an adapter on its base model, or a fully fine-tuned model; `on_cpu` as `load_model`."""
    if not is_adapter(adapter):
        return load_model(adapter, device, on_cpu=on_cpu)
    return attach(load_model(base, device, on_cpu=on_cpu), adapter)


def attach(model: PreTrainedModel | PeftModel, adapter: Path, name: str = ADAPTER) -> PeftModel:
    """Attach a trained adapter, frozen and not merged; its tensors must match and be finite.

    A model that has adapters gets another one, by its `name`, which `set_adapter` activates.
    """
    weights = Weights(adapter)
    with reading(adapter / "adapter_config.json"), expert_adapters.adapting(model):
        config = PeftConfig.from_pretrained(adapter)
        config.inference_mode = True
        if experts.layers(model):  # of fused experts: `targets.on_fused_experts`
            routers = [n for n in config.target_parameters or [] if re.fullmatch(r"\w+\.weight", n)]
            config.target_parameters, config.rank_pattern, config.alpha_pattern = routers, {}, {}
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            tuned = model
        else:
            tuned = PeftModelForCausalLM(model, config, name)
        # peft's own load result leaves out `modules_to_save`.
        own = get_peft_model_state_dict(tuned, adapter_name=name, save_embedding_layers=False)
        names = expert_adapters.saved_names(tuned, own)
        expected = {names[key]: tensor for key, tensor in own.items()}
    tensors = {key: weights.tensor(key) for key in weights.lazy_tensors()}
    with reading(adapter / "adapter_model.safetensors"):
        expert_adapters.split(tuned, tensors)
    for key in sorted(expected.keys() - tensors.keys()):
        raise weights.error(key, "is missing from the adapter")
    for key in sorted(tensors.keys() - expected.keys()):
        raise weights.error(key, "is no tensor of the adapter that adapter_config.json describes")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            shapes = f"{list(tensor.shape)}, but the model makes it {list(expected[key].shape)}"
            raise weights.error(key, f"has shape {shapes}")
    require_finite(tensors, weights)
    with expert_adapters.adapting(model):
        set_peft_model_state_dict(tuned, {key: tensors[names[key]] for key in own}, name)
    return tuned.eval()


def without_adapter(model: nn.Module) -> nn.Module:
    """The transformers model below an adapter, if any."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def blocks_of(model: Any) -> Any:
    """The blocks of a decoder."""
    layers = model.config.get_text_config().num_hidden_layers
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    return next(blocks for blocks in lists if len(blocks) == layers)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, not a standalone model."""
    adapter = (folder / "adapter_config.json").is_file()
    if not adapter:
        (folder / "config.json").open().close()
    return adapter


def save_tokenizer(
    source: Path, folder: Path, form: Mapping[str, Any], rows: int
) -> PreTrainedTokenizerBase:
    """Save the tokenizer of `source` to `folder` as training used it.

    It gets the chat template and end token of `form` (format.json); BOS, which the template writes,
    is added by nothing else; a padding token beyond the embedding's `rows` becomes the end token.
    """
    (source / "tokenizer_config.json").open().close()  # transformers would ask the hub
    files.require_json(source)
    with reading(source), without_panic_output():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    tokenizer.chat_template, tokenizer.eos_token = form["chat_template"], form["eos_token"]
    silenced = add_no_special_tokens(tokenizer)
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    # transformers 4 and llama.cpp read these.
    flags = {"add_bos_token": False, "add_eos_token": False} if silenced else {}
    if (legacy := getattr(tokenizer, "legacy", None)) is not None:
        flags["legacy"] = legacy  # decides on spaces after control tokens; transformers drops it
    with TemporaryDirectory(dir=folder) as scratch:
        tokenizer.save_pretrained(scratch)
        config = Path(scratch, "tokenizer_config.json")
        files.write_json(config, _readable_by_v4(files.read_json(config)) | flags)
        for file in Path(scratch).iterdir():
            file.replace(folder / file.name)  # a link's original stays as it is
    return tokenizer


def add_no_special_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Stop adding BOS and EOS, which a chat template writes itself; return whether it did."""
    added = any(tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"])
    if added:
        tokenizer.add_bos_token = tokenizer.add_eos_token = False  # rewrites the post-processor
    return added


def _readable_by_v4(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4.57 also reads, for the same token ids."""
    dropped = ("backend", "is_local", "local_files_only")
    config = {key: value for key, value in config.items() if key not in dropped}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
