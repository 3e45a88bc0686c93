"""A training step as a GPU computes it, operation by operation, on tensors without values.

torch's meta device stands for the GPU. Modules, the fused functions, attention in one call,
autograd and checkpointing run as they are, on shapes and dtypes alone: what a step of an 8B holds
is known to the byte, in seconds and anywhere. What would make the host wait for the device (`item`,
an index by a mask) cannot be computed there and is an error.

It does not tell what a kernel allocates for itself, nor what the allocator and CUDA's context add;
and it is the fused step alone, since meta has no autocast, which the modules would need.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from benchmarks.live_memory import LiveMemory
from benchmarks.training_step import Measured, Setting, held_tensors, micro_batch
from stages.shared.memory import BLOCK, NESTED_BLOCK
from stages.shared.model import attention
from stages.shared.step import gradient
from stages.shared.step.fused import cross_entropy, gpu, liger
from stages.shared.step.fused.patch import fuse
from stages.shared.weights import precision

META = torch.device("meta")
DTYPE = torch.bfloat16
MOMENTS = 2  # fp32 numbers that AdamW keeps of each trained one
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)


class OneDevice(TorchDispatchMode):
    """While it is entered, an operation on tensors of two devices is an error, copies apart."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        # A number of the host goes to the device with the call.
        devices = {x.device.type for x in tensors if x.dim()}
        if len(devices) > 1 and func.overloadpacket not in COPIES:
            raise AssertionError(f"{func} of tensors on {' and '.join(sorted(devices))}")
        return func(*args, **(kwargs or {}))


class _Kernels:
    """Those of `triton_kernels`: two of them overwrite their arguments."""

    @staticmethod
    def dequantize(_: torch.Tensor, state: QuantState, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(state.shape, dtype=dtype, device=META)

    @staticmethod
    def swiglu_backward(*_: torch.Tensor) -> None: ...

    @staticmethod
    def cross_entropy(*_: torch.Tensor) -> None: ...


@contextmanager
def standing_for_a_gpu() -> Iterator[None]:
    """While it is entered, meta tensors are computed on as a GPU's that has every kernel."""
    replaced: tuple[tuple[Any, str, Any], ...] = (
        (attention, "has_kernel", lambda *_: True),
        (precision, "matmul_dtype", lambda _: DTYPE),
        (gradient, "autocast", lambda *_: nullcontext()),
        (gpu, "on_gpu", lambda _: True),
        (gpu, "kernels", lambda: _Kernels),
        (liger, "covers", lambda _: False),
    )
    with ExitStack() as until_the_end:
        for module, name, instead in replaced:
            until_the_end.enter_context(patch.object(module, name, instead))
        sizes = cross_entropy.LOGITS_BYTES
        until_the_end.enter_context(patch.dict(sizes, meta=sizes["cuda"]))
        yield


def measure(config: PretrainedConfig, setting: Setting, *, keep_storages: bool = False) -> Measured:
    """Bytes of live tensors: before a step, and at its peak.

    A step has two micro-batches: the second's activations stand beside the first's gradients.

    Args:
        config: of the model.
        setting: what is trained; nf4, with an adapter.
        keep_storages: see `LiveMemory`.

    Raises:
        AssertionError: a tensor of the host came among those of the device.
        RuntimeError: something would have waited for the device.
    """
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with standing_for_a_gpu():
        model = _prepared(config, setting)
        trained = [p for p in model.parameters() if p.requires_grad]
        moments = [torch.empty(MOMENTS, *p.shape, device=META) for p in trained]
        memory = LiveMemory([*held_tensors(model), *moments], keep_storages=keep_storages)
        before = memory.live_bytes
        batches = [micro_batch(setting, config.vocab_size, seed) for seed in range(2)]
        with OneDevice(), memory:
            for one in batches:
                gradient.accumulate(
                    model,
                    [one],
                    2 * setting.supervised_tokens,
                    dtype=DTYPE,
                    fused=True,
                    scaler=scaler,
                )
    return Measured(before, memory.peak_bytes, memory.peak_storages)


def _prepared(config: PretrainedConfig, setting: Setting) -> PeftModel:
    model = qlora_model(config, setting.rank or 0, double_quant=setting.double_quant)
    fuse(model)
    if setting.gradient_checkpointing:
        model.config.use_cache = False
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def qlora_model(config: PretrainedConfig, rank: int, *, double_quant: bool = True) -> PeftModel:
    """An NF4 model of this config with a LoRA adapter on all linear layers, on the meta device."""
    with META:
        base = AutoModelForCausalLM.from_config(
            config, dtype=DTYPE, attn_implementation=attention.NAME
        )
    dense = get_keys_to_not_convert(base)
    layers = dict(base.named_modules())
    for name, layer in layers.items():
        if type(layer) is nn.Linear and should_convert_module(name, dense):
            parent, _, last = name.rpartition(".")
            setattr(layers[parent], last, _quantized(layer, double_quant))
    base.tie_weights()
    base.is_loaded_in_4bit = True  # what peft chooses its layers by
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear"
    )
    return get_peft_model(base.requires_grad_(False), lora)


def _quantized(layer: nn.Linear, double_quant: bool) -> Linear4bit:
    bias = layer.bias is not None
    made = Linear4bit(
        layer.in_features, layer.out_features, bias=bias, compute_dtype=DTYPE, device=META
    )
    if bias:
        made.bias = layer.bias
    blocks = -(-layer.weight.numel() // BLOCK)
    with META:
        nested = QuantState(
            absmax=torch.empty(-(-blocks // NESTED_BLOCK)),
            code=torch.empty(256),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
        state = QuantState(
            absmax=torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32),
            shape=layer.weight.shape,
            dtype=DTYPE,
            blocksize=BLOCK,
            code=torch.empty(16),
            quant_type="nf4",
            offset=torch.empty(()) if double_quant else None,
            state2=nested if double_quant else None,
        )
        codes = torch.empty(layer.weight.numel() // 2, 1, dtype=torch.uint8)
    made.weight = Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=double_quant,
        quant_type="nf4",
        module=made,
        bnb_quantized=True,
    )
    return made
