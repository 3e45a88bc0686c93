"""A training step on tensors without values: its live bytes, phase by phase.

The step that trains (packing, autocast, checkpointing, peft, bitsandbytes, the fused functions,
clipping, the optimizer) runs on fake tensors, on the first blocks of a model and its last one. Each
byte is known by the block in whose pass it was allocated, so the bytes of a block that repeats
count as often as there are such blocks.

CUDA is played by fake tensors of a CPU with CUDA's choices patched in (`fake_model.py`): meta knows
no autocast, and autograd has no thread for a device that torch was not built for. It runs in a
process of its own (`predict.py`), as its patches must not meet a training.
"""

from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import PretrainedConfig

from stages.shared.core import bounds
from stages.shared.model import loading, packing, scoring
from stages.shared.model.packing import Example
from stages.shared.step import adapter, gradient, initialisation, optim, router_loss
from stages.shared.step.fused import patch as fused_patch
from stages.shared.step.memory import fake_model, live_bytes
from stages.shared.step.memory.fake_model import CPU, META, Pattern
from stages.shared.step.memory.live_bytes import LiveBytes
from stages.shared.step.memory.persistent import persistent_bytes
from stages.shared.step.memory.setup import SWITCHED_OFF, MicroBatch, TrainingSetup
from stages.shared.step.router_loss import RouterLoss
from stages.shared.weights import experts, precision

MODE = FakeTensorMode(allow_non_fake_inputs=True)
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Mixtral", "Qwen3Moe")
FUSED_BLOCKS = {f"{family}DecoderLayer" for family in FAMILIES}
MAX_GRAD_NORM = 0.3
# Operators of bitsandbytes whose Python kernels run on fake tensors too: their temporaries count.
OPTIMIZERS = ("optimizer_update_8bit_blockwise", "optimizer_update_32bit")
PYTHON_KERNELS = ("gemm_4bit", "int8_scaled_mm", *OPTIMIZERS)


def answer(
    config: str,
    setup: dict[str, Any] | None = None,
    batch: dict[str, Any] | None = None,
    *,
    scoring: bool = False,
) -> dict[str, Any]:
    """Answer a question of `predict.py` in JSON: on the model, a training, or a step of it."""
    path = Path(config)
    whole, pattern = _read(path, path.read_bytes() if path.is_file() else b"")
    if setup is None:
        return fake_model.describe(whole)
    training = TrainingSetup(**setup)
    few = fake_model.first_blocks(whole, pattern.run)
    if training.lora and not _same_in_all_blocks(training.lora, few, pattern.layers):
        pattern, few = Pattern(pattern.layers, pattern.layers), whole
    if batch is not None:
        micro_batch = MicroBatch(tuple(batch["lengths"]), batch["supervised"])
        live = run(few, training, micro_batch, scoring_only=scoring)
        return live_bytes.extend(live, pattern)
    model = prepare(few, training)
    held = persistent_bytes(training, model, pattern)
    return {**held, "unfused_because": unfused_because(training, model)}


@lru_cache(maxsize=1)
def _read(path: Path, content: bytes) -> tuple[PretrainedConfig, Pattern]:
    """The config in a file of this content, and its pattern: once for all questions."""
    config = fake_model.read_config(path)
    return config, fake_model.pattern_of(config)


def _same_in_all_blocks(lora: dict[str, Any], config: PretrainedConfig, layers: int) -> bool:
    """Whether `lora` names the same modules in all blocks; `config` has the first of them."""
    targets, saved = lora["target_modules"], lora["modules_to_save"]
    if targets == "all-linear" and not saved:
        return True
    with experts.unfused(config):
        model = fake_model.model_on_meta(config, torch.bfloat16)
    blocks = loading.blocks_of(model)
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    modules = {name for block in blocks for name, _ in block.named_modules()}
    with suppress(bounds.Exceeded), bounds.limited():
        for chosen in (LoraConfig(target_modules=names) for names in (targets, saved) if names):
            for name in modules:
                keys = (f"{prefix}.{index}.{name}" for index in range(layers))
                if len({bool(check_target_module_exists(chosen, key)) for key in keys}) > 1:
                    return False
    return True  # or a pattern without end, which `load_for_lora` refuses


def prepare(config: PretrainedConfig, setup: TrainingSetup) -> Any:
    """The model on meta as training has it: quantized, with its adapter or its masters."""
    compute, full = precision.DTYPES[setup.compute], setup.lora is None
    with experts.unfused(config):
        dtype = torch.float32 if full and setup.masters else compute
        model = fake_model.model_on_meta(config, dtype)
    if full:
        return model.requires_grad_(True)
    fake_model.quantize_on_meta(model, setup.precision, setup.double_quant, compute)
    model.requires_grad_(False)
    lora: Any = SimpleNamespace(**setup.lora or {}, alpha=1, rslora=False)
    with (
        patch.object(loading, "load_model", lambda *_, **__: model),
        patch.object(initialisation, "initialise", _initialise),
        patch.object(adapter, "initialise_magnitudes", lambda _: None),
        META,
    ):
        return adapter.load_for_lora(Path(), lora, META)


def _initialise(model: PeftModel, lora: Any, *_: Any) -> None:
    """Give an adapter the shapes of `lora.init`."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and "default" in m.lora_A]
    for layer in layers if lora.init in initialisation.WITH_FROZEN else ():  # others are refused
        for part, dim in ((layer.lora_A["default"], 0), (layer.lora_B["default"], 1)):
            half = part.weight.detach().chunk(2, dim)[0]
            initialisation.freeze_half(part, half, half, dim)


def unfused_because(setup: TrainingSetup, model: Any) -> str | None:
    """Why the library's own modules compute a step of `prepare`'s model; None if it is fused."""
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
    head = model.get_base_model().get_output_embeddings()
    unknown = not set(names) <= FUSED_BLOCKS or getattr(model.config, "hidden_act", "") != "silu"
    reasons = {
        "quantize.precision is int8": setup.precision == "int8",
        "the router's input is jittered": getattr(model.config, "router_jitter_noise", 0) > 0,
        "lora.dropout is not 0": lora["dropout"] > 0,
        "lora.dora is true": lora["dora"],
        "lora.init is pissa or olora": lora["init"] in initialisation.WITH_FROZEN,
        "lora.modules_to_save are trained too": bool(lora["modules_to_save"]),
        "lora.bias is not none": any(name.endswith("bias") for name in trained),
        "lora.target_modules leave out a linear layer": any(m not in inside for m in linear),
        "lora.target_modules take in the head": isinstance(head, LoraLayer),
        f"blocks of {' and '.join(names)} are not known": unknown,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def run(
    config: PretrainedConfig, setup: TrainingSetup, batch: MicroBatch, *, scoring_only: bool = False
) -> LiveBytes:
    """Run a step on all blocks of a config: its live bytes, phase by phase.

    Gradients of an earlier micro-batch and the optimizer's states exist already. `scoring_only`:
    the micro-batch is scored as held-out conversations are, and nothing is trained.
    """
    dtype = precision.DTYPES[setup.compute]
    model, examples = prepare(config, setup), _examples(batch)
    fused = unfused_because(setup, model) is None
    with MODE, CPU, fake_model.without_values(setup, dtype):
        fake_model.to_fake(model)
        if fused:
            fused_patch.fuse(model)
        if setup.gradient_checkpointing:
            model.config.use_cache = False
            model.activation_checkpointing_enable({"use_reentrant": False})
        trained = [p for p in model.parameters() if p.requires_grad]
        held = [*model.parameters(), *model.buffers(), *fake_model.state_tensors(model)]
        if not scoring_only:
            for p in trained:
                p.grad = torch.zeros_like(p)
            optimizer = _optimizer(model, setup)
            states = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
            held += [*states, *(p.grad for p in trained)]
        live = LiveBytes(held, config.get_text_config().vocab_size, PYTHON_KERNELS)
        live.phase = "start"
        live_bytes.name_phases(live, model.get_input_embeddings(), loading.blocks_of(model))
        if scoring_only:
            with live, torch.no_grad(), precision.autocast(CPU, dtype):
                for row in packing.packed_rows(model.config, examples, CPU):
                    scoring.negative_log_likelihoods(model.eval(), row)
            return live

        def scale(loss: torch.Tensor) -> torch.Tensor:
            live.phase = "gradient of the loss"
            return loss

        scaler: Any = SimpleNamespace(scale=scale)
        weight = router_loss.weight_of(config, setup.router_aux_loss)
        router = RouterLoss(model, weight) if weight else None
        of_step: Any = {"dtype": dtype, "fused": fused, "scaler": scaler, "router": router}
        with live:
            gradient.accumulate(model.train(), [examples], batch.supervised, **of_step)
            live.phase = "update"
            nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            if setup.device == "cpu":  # on CUDA a kernel updates in place
                optimizer.step()
        return live


def _optimizer(model: nn.Module, setup: TrainingSetup) -> torch.optim.Optimizer:
    train: Any = SimpleNamespace(optimizer=setup.optimizer, learning_rate=1e-4, weight_decay=0.0)
    with unset_fake_temporarily():  # 8-bit AdamW reads the values of its codebook
        optimizer = optim.make_optimizer(model.parameters(), train, CPU)
    if setup.device == "cpu":
        optimizer.step()
    return optimizer


def _examples(batch: MicroBatch) -> list[Example]:
    """Conversations of these sizes; each has one target at least."""
    left = batch.supervised - len(batch.lengths)
    examples = []
    for row, length in enumerate(batch.lengths):
        more = max(0, min(left, length - 1))
        left -= more
        mask = np.arange(length + 1) >= length - more
        examples.append(Example(np.zeros(length + 1, dtype=np.int64), mask, row))
    return examples
