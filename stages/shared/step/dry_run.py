"""A training step on tensors without values: its live bytes, phase by phase.

The step that trains (packing, autocast, checkpointing, peft, bitsandbytes, the fused functions,
clipping, the optimizer) runs on fake tensors, on the first blocks of a model and its last one. Each
byte is known by the block in whose pass it was allocated, so the bytes of a block that repeats
count as often as there are such blocks.

CUDA is played by fake tensors of a CPU with CUDA's choices patched in (`stand_ins.py`): meta knows
no autocast, and autograd has no thread for a device that torch was not built for. It runs in a
process of its own (`stages.shared.step.count`), as its patches must not meet a training.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import PretrainedConfig

from stages.shared.model import loading, packing, scoring
from stages.shared.model.packing import Example
from stages.shared.parallel import shards
from stages.shared.step import (
    adapter,
    architecture,
    fake_model,
    gradient,
    initialisation,
    memory,
    optim,
    router_loss,
)
from stages.shared.step.architecture import Pattern
from stages.shared.step.fake_model import CPU, META
from stages.shared.step.fused import patch as fused_patch
from stages.shared.step.live_bytes import LiveBytes
from stages.shared.step.router_loss import RouterLoss
from stages.shared.step.setup import SWITCHED_OFF, MicroBatch, TrainingSetup
from stages.shared.step.stand_ins import without_values
from stages.shared.weights import experts, precision
from stages.shared.weights.bnb import Params4bit

MODE = FakeTensorMode(allow_non_fake_inputs=True)
FUSED_BLOCKS = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "MixtralDecoderLayer",
    "Qwen3MoeDecoderLayer",
)
MAX_GRAD_NORM = 0.3
# Operators of bitsandbytes whose Python kernels run on fake tensors too: their temporaries count.
PYTHON_KERNELS = (
    "gemm_4bit",
    "int8_scaled_mm",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
)


def answer(
    kind: str, config: str, setup: dict[str, Any] | None, batch: dict[str, Any] | None
) -> dict[str, Any]:
    """Answer a question of `stages.shared.step.count`, all as JSON."""
    whole = architecture.read_config(Path(config))
    if setup is None:
        return architecture.describe(whole)
    training = TrainingSetup(**setup)
    pattern = architecture.pattern_of(whole)
    few = architecture.first_blocks(whole, pattern.run)
    if batch is None:
        extend = _same_targets_in_all_blocks(training, whole)
        model = prepare(few if extend else whole, training)
        unfused = unfused_because(training, model)
        held = persistent(
            training, model, fused=unfused is None, pattern=pattern if extend else None
        )
        return {**held, "unfused_because": unfused}
    micro_batch = MicroBatch(tuple(batch["lengths"]), batch["supervised"])
    live, held_bytes = run(few, training, micro_batch, scoring_only=kind == "scoring")
    phases = extended(live, held_bytes, pattern)
    return {_in_words(phase, pattern): parts for phase, parts in phases.items()}


def _same_targets_in_all_blocks(setup: TrainingSetup, config: PretrainedConfig) -> bool:
    """Whether few blocks of a mixture stand for all: Qwen3-30B-A3B has 18,432 experts' layers."""
    chosen = (setup.lora or {}).get("target_modules")
    mixture = config.get_text_config().model_type in experts.FAMILIES
    return mixture and (isinstance(chosen, list) or chosen == "all-linear")


def _in_words(phase: str, pattern: Pattern) -> str:
    """The block's number as it is in the whole model, from 1."""
    way, _, number = phase.partition(" ")
    if not number.isdigit():
        return phase
    index = int(number)
    index += pattern.repeats * pattern.period if index >= pattern.start else 0
    return f"{way} pass of block {index + 1} of {pattern.layers}"


def prepare(config: PretrainedConfig, setup: TrainingSetup) -> Any:
    """The model on meta as training has it: quantized, with its adapter or its masters."""
    compute = precision.DTYPES[setup.compute]
    full = setup.lora is None
    dtype = torch.float32 if full and setup.masters else compute
    with experts.unfused(config):
        model = fake_model.model_on_meta(config, dtype)
    if full:
        return model.requires_grad_(True)
    fake_model.quantize_on_meta(model, setup.precision, setup.double_quant, compute)
    model.requires_grad_(False)
    lora: Any = SimpleNamespace(**setup.lora or {}, alpha=1, rslora=False)
    with ExitStack() as stack:
        for module, name, instead in (
            (loading, "load_model", lambda *_, **__: model),
            (initialisation, "initialise", _initialise),
        ):
            stack.enter_context(patch.object(module, name, instead))
        with META:
            return adapter.load_for_lora(Path(), lora, META)


def _initialise(model: PeftModel, lora: Any, *_: Any) -> None:
    """What `lora.init` changes in the shapes of an adapter."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and "default" in m.lora_A]
    for layer in layers if lora.init in initialisation.WITH_FROZEN else ():  # others are refused
        for part, dim in ((layer.lora_A["default"], 0), (layer.lora_B["default"], 1)):
            half = part.weight.detach().chunk(2, dim)[0]
            initialisation.freeze_half(part, half, half, dim)


def unfused_because(setup: TrainingSetup, model: Any) -> str | None:
    """Why the library's own modules compute the step; None where the fused functions do.

    Args:
        setup: of the training.
        model: from `prepare`.
    """
    lora = setup.lora
    if not setup.fused:
        return SWITCHED_OFF
    if lora is None:
        return "train.method is full"
    blocks = loading.blocks_of(model)
    names = sorted({type(block).__name__ for block in blocks})
    linear = [m for m in blocks.modules() if isinstance(m, nn.Linear | LoraLayer)]
    inside = {m for layer in linear if isinstance(layer, LoraLayer) for m in layer.modules()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    reasons = {
        "quantize.precision is int8": setup.precision == "int8",
        "the router's input is jittered": getattr(model.config, "router_jitter_noise", 0) > 0,
        "lora.dropout is not 0": lora["dropout"] > 0,
        "lora.dora is true": lora["dora"],
        "lora.init is pissa or olora": lora["init"] in initialisation.WITH_FROZEN,
        "lora.modules_to_save are trained too": bool(lora["modules_to_save"]),
        "lora.bias is not none": any(name.endswith("bias") for name in trained),
        "lora.target_modules leave out a linear layer": any(m not in inside for m in linear),
        "lora.target_modules take in the head": isinstance(
            model.get_base_model().get_output_embeddings(), LoraLayer
        ),
        f"blocks of {' and '.join(names)} are not known": not set(names) <= set(FUSED_BLOCKS)
        or getattr(model.config, "hidden_act", "") != "silu",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def persistent(
    setup: TrainingSetup, model: nn.Module, *, fused: bool, pattern: Pattern | None = None
) -> dict[str, int]:
    """What a training holds from step to step, in bytes by part, and what of it may be paged.

    Args:
        setup: of the training.
        model: from `prepare`, of all blocks, or of those that `pattern` runs.
        pattern: how often each of these blocks counts.
        fused: on a CPU the fused step dequantizes the constants of double quantization for good.
    """
    nested = setup.double_quant and not (fused and setup.device == "cpu")
    times = _times(model, pattern)
    weights = adapter = gradients = tensors = 0
    sizes: list[int] = []
    for p in model.parameters():
        count = times.get(p, 1)
        tensors += count
        one = p.nbytes
        if isinstance(p, Params4bit):
            one = memory.four_bit_bytes(p.quant_state.shape.numel(), nested)
        elif setup.precision == "int8" and p.dtype == torch.int8:
            one = memory.int8_bytes(*p.shape)
        if p.requires_grad and setup.lora:
            adapter += count * one
        else:
            weights += count * one
        if p.requires_grad:
            gradients += count * p.nbytes
            sizes += [p.numel()] * count
    frozen = (b for name, b in model.named_buffers() if name.endswith(".frozen"))
    adapter += sum(times.get(b, 1) * b.nbytes for b in frozen)
    return {
        "weights": weights,
        "adapter": adapter,
        "gradients": gradients,
        "optimizer": memory.optimizer_bytes(setup.optimizer, sizes),
        "pageable": memory.pageable_bytes(setup.optimizer, sizes),
        "trainable": sum(sizes),
        "tensors": tensors + 4 * len(sizes),
        **_shardable(model, pattern, nested=nested),
    }


def _shardable(model: Any, pattern: Pattern | None, *, nested: bool) -> dict[str, int]:
    """Frozen bytes that processes may divide, by what is gathered at once."""
    plain: Any = loading.without_adapter(model)
    for p in plain.parameters():
        if isinstance(p, Params4bit) and not nested:
            p.quant_state.absmax = p.quant_state.absmax.float()
    sizes = [shards.frozen_bytes(block) for block in loading.blocks_of(plain)]
    repeated = sum(sizes[i] for i in pattern.repeated) * pattern.repeats if pattern else 0
    head = shards.frozen_bytes(plain.get_output_embeddings())
    return {
        "blocks": sum(sizes) + repeated,
        "largest_block": max(sizes),
        "embedding": shards.frozen_bytes(plain.get_input_embeddings()),
        "head": head,
        "untied_head": 0 if shards.is_tied(plain) else head,
    }


def _times(model: nn.Module, pattern: Pattern | None) -> dict[torch.Tensor, int]:
    """How often tensors of the blocks that stand for several count."""
    if pattern is None:
        return {}
    repeated = [loading.blocks_of(model)[i] for i in pattern.repeated]
    tensors = [t for block in repeated for t in (*block.parameters(), *block.buffers())]
    return dict.fromkeys(tensors, 1 + pattern.repeats)


def run(
    config: PretrainedConfig, setup: TrainingSetup, batch: MicroBatch, *, scoring_only: bool = False
) -> tuple[LiveBytes, int]:
    """Run a step on all blocks of a config: what was alive, and what of it was held before.

    Gradients of an earlier micro-batch and the optimizer's states exist already.

    Args:
        config: of few blocks.
        setup: of the training.
        batch: the micro-batch.
        scoring_only: score it as held-out conversations are scored, and train nothing.
    """
    dtype = precision.DTYPES[setup.compute]
    with unset_fake_temporarily():
        model = prepare(config, setup)
        fused = unfused_because(setup, model) is None
    examples = _examples(batch)
    with MODE, CPU, without_values(setup, dtype, examples):
        fake_model.to_fake(model)
        if fused:
            fused_patch.fuse(model)
        if setup.gradient_checkpointing:
            model.config.use_cache = False
            model.activation_checkpointing_enable({"use_reentrant": False})
        trained = [p for p in model.parameters() if p.requires_grad]
        held = [*model.parameters(), *model.buffers(), *fake_model.state_tensors(model)]
        vocabulary = config.get_text_config().vocab_size
        if scoring_only:
            live = LiveBytes(held, vocabulary, PYTHON_KERNELS)
            before = live.total
            _follow(live, loading.blocks_of(model))
            with live, torch.no_grad(), precision.autocast(CPU, dtype):
                live.phase = "start"
                scoring.negative_log_likelihoods(model.eval(), packing.pack(examples, CPU))
            return live, before
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer = _optimizer(model, setup)
        states = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        held += [*states, *(p.grad for p in trained)]
        live = LiveBytes(held, vocabulary, PYTHON_KERNELS)
        before = live.total
        _follow(live, loading.blocks_of(model))

        def scale(loss: torch.Tensor) -> torch.Tensor:
            live.phase = "gradient of the loss"
            return loss

        scaler: Any = SimpleNamespace(scale=scale)
        weight = router_loss.weight_of(config, setup.router_aux_loss)
        with live:
            live.phase = "start"
            gradient.accumulate(
                model.train(),
                [examples],
                batch.supervised,
                dtype=dtype,
                fused=fused,
                scaler=scaler,
                router=RouterLoss(model, weight) if weight else None,
            )
            live.phase = "update"
            nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            if setup.device == "cpu":  # on CUDA a kernel updates in place
                optimizer.step()
        return live, before


def _optimizer(model: nn.Module, setup: TrainingSetup) -> torch.optim.Optimizer:
    train: Any = SimpleNamespace(optimizer=setup.optimizer, learning_rate=1e-4, weight_decay=0.0)
    with unset_fake_temporarily():  # 8-bit AdamW reads the values of its codebook
        optimizer = optim.make_optimizer(model, train, CPU)
    if setup.device == "cpu":
        optimizer.step()
    return optimizer


def _examples(batch: MicroBatch) -> list[Example]:
    """Conversations of these sizes; each has one target at least."""
    left = batch.supervised - len(batch.lengths)
    found = []
    for row, length in enumerate(batch.lengths):
        more = max(0, min(left, length - 1))
        left -= more
        mask = np.arange(length + 1) >= length - more
        found.append(Example(np.zeros(length + 1, dtype=np.int64), mask, row))
    return found


def _follow(live: LiveBytes, blocks: Sequence[nn.Module]) -> None:
    """Name the phase by the block whose forward or backward pass runs."""

    def enters(index: int) -> Any:
        def hook(*_: Any) -> None:
            if not live.phase.startswith("backward"):  # where it is computed again
                live.phase = f"forward {index}"

        return hook

    def leaves(index: int) -> Any:
        def goes_back(_: Any) -> None:
            live.phase = f"backward {index}"

        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if live.phase.startswith("backward"):
                return
            if index == len(blocks) - 1:
                live.phase = "loss"
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(goes_back)

        return hook

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(enters(index))
        block.register_forward_hook(leaves(index))


def extended(live: LiveBytes, held: int, pattern: Pattern) -> dict[str, dict[str, int]]:
    """The peak of each phase in a model of all blocks: bytes by part beside what is held."""
    last = pattern.run - 1

    def of_period(births: dict[str, int]) -> int:
        names = (f"{way} {i}" for i in pattern.repeated for way in ("forward", "backward"))
        return pattern.repeats * sum(births.get(name, 0) for name in names)

    found = {}
    for phase, (total, births) in live.peaks.items():
        way, _, number = phase.partition(" ")
        index = int(number) if number.isdigit() else last
        if phase == "held" or (way == "forward" and index < pattern.start):
            more = 0
        elif way == "forward":  # what only waits for Python to leave a block counts once
            more = of_period(live.peaks["loss"][1])
        elif way == "backward" and index in pattern.repeated:
            more = of_period(live.peaks[f"backward {last}"][1])
        else:
            more = of_period(births)
        logits = births.get("logits", 0)
        workspace_bytes = births.get(phase, 0)
        found[phase] = {
            "activations": total - held - logits - workspace_bytes + more,
            "logits": logits,
            "workspace": workspace_bytes,
        }
    return {phase: parts for phase, parts in found.items() if phase != "held"}
