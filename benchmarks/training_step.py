"""One optimizer step as training computes it, on a model of any shape, to measure its memory.

The pieces are training's own: packed conversations, the one scorer's losses, autocast, the loader
of what is trained. Weights and tokens are random, which no size depends on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from benchmarks.live_memory import LiveMemory
from stages.quantize.config import Quantize
from stages.quantize.convert import convert
from stages.shared.architecture import KNOWN_BLOCKS
from stages.shared.memory import Optimizer, Precision
from stages.shared.model import loading
from stages.shared.model.packing import Example
from stages.shared.step import adapter, gradient
from stages.shared.step.config import Lora, Train
from stages.shared.step.fused.patch import fuse
from stages.shared.step.optim import make_optimizer
from stages.shared.weights import bnb
from stages.shared.weights.bnb import Linear8bitLt
from stages.train.computing import Computing

MAX_GRAD_NORM = 0.3


@dataclass(frozen=True)
class Setting:
    """What is trained, and how a step is computed.

    Attributes:
        precision: of the frozen matrices; fp32 or bf16 in full fine-tuning.
        rank: of the adapter; None for full fine-tuning.
        gradient_checkpointing: recompute each block in backward.
        lengths: of the conversations in a micro-batch, in tokens.
        supervised: share of each conversation's tokens that is learnt, its last ones.
        optimizer: adamw or adamw_8bit.
        double_quant: of fp4 and nf4.
        dropout: of the adapter's input.
        init: where the adapter starts.
        fusing: use the fused functions where they cover what is trained.
    """

    precision: Precision
    rank: int | None
    gradient_checkpointing: bool
    lengths: tuple[int, ...]
    supervised: float = 0.5
    optimizer: Optimizer = "adamw"
    double_quant: bool = True
    dropout: float = 0.0
    init: Literal["default", "pissa", "olora", "loftq"] = "default"
    fusing: bool = True

    @property
    def fused(self) -> bool:
        """Whether they do; as `Tuning.unfused_because` says of these settings."""
        plain = self.rank is None or self.precision == "int8" or self.dropout or not self.fusing
        return not plain and self.init in ("default", "loftq")

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch."""
        return sum(self.lengths)

    @property
    def supervised_tokens(self) -> int:
        """Tokens of a micro-batch that are predicted."""
        return sum(supervised_tokens(length, self.supervised) for length in self.lengths)


def supervised_tokens(length: int, share: float) -> int:
    """How many of a conversation's tokens are learnt: never the first one."""
    return min(length - 1, max(1, round(length * share)))


def random_base(config: PretrainedConfig, folder: Path) -> Path:
    """Write a model with random bf16 weights, as `fetch_model` would."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def in_precision(base: Path, folder: Path, setting: Setting, device: torch.device) -> Path:
    """Write the base in the setting's precision, as `quantize` would; once."""
    if not folder.exists():
        folder.mkdir(parents=True)
        quantize = Quantize(
            precision=setting.precision,
            double_quant=setting.double_quant,
            compute_dtype="bf16",
        )
        convert(base, folder, quantize, device)
    return folder


def load(folder: Path, setting: Setting, device: torch.device) -> PreTrainedModel | PeftModel:
    """Load what is trained, as `train` does."""
    if setting.rank is None:
        model = adapter.load_for_full(folder, device)
    else:
        model = adapter.load_for_lora(folder, _lora(setting, setting.rank), device)
    if setting.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _lora(setting: Setting, rank: int) -> Lora:
    return Lora(
        r=rank,
        alpha=2 * rank,
        dropout=setting.dropout,
        target_modules="all-linear",
        modules_to_save=None,
        bias="none",
        init=setting.init,
        rslora=False,
        dora=False,
    )


def _train(optimizer: Optimizer) -> Train:
    return Train(
        method="lora",
        epochs=1,
        max_steps=None,
        batch_size=1,
        learning_rate=1e-4,
        scheduler="constant",
        warmup=0.0,
        weight_decay=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        optimizer=optimizer,
        eval_steps=None,
        patience=1,
        seed=0,
    )


def micro_batch(setting: Setting, vocabulary: int, seed: int = 0) -> list[Example]:
    """Conversations of random tokens, with one more that is predicted and not computed on."""
    random = np.random.default_rng(seed)
    examples = []
    for row, length in enumerate(setting.lengths):
        learnt = np.arange(length + 1) > length - supervised_tokens(length, setting.supervised)
        examples.append(Example(random.integers(0, vocabulary, length + 1), learnt, row))
    return examples


def step(
    model: nn.Module,
    adamw: torch.optim.Optimizer,
    micro_batches: Sequence[Sequence[Example]],
    computing: Computing,
) -> None:
    """One optimizer step: backward a micro-batch, clip, update, let go of the gradients.

    A call of `accumulate` a micro-batch: nothing of one micro-batch's graph is left when the next
    begins.
    """
    for examples in micro_batches:
        gradient.accumulate(
            model,
            [examples],
            sum(e.supervised_tokens for e in examples),
            dtype=computing.dtype,
            fused=computing.fused,
            scaler=torch.amp.GradScaler(enabled=False),
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
    adamw.step()
    adamw.zero_grad(set_to_none=True)


def held_tensors(
    model: nn.Module, adamw: torch.optim.Optimizer | None = None
) -> Iterator[torch.Tensor]:
    """All tensors that live from one step to the next: weights, their constants, the states."""
    yield from model.parameters()
    yield from model.buffers()
    for layer in bnb.quantized_layers(model).values():
        if isinstance(layer, Linear8bitLt):  # its scales are no buffers
            yield from (t for t in layer.state_dict(keep_vars=True).values() if torch.is_tensor(t))
        state = getattr(layer.weight, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            yield from (t for t in vars(part or ()).values() if torch.is_tensor(t)) if part else ()
    for values in adamw.state.values() if adamw else ():
        yield from (v for v in values.values() if torch.is_tensor(v))


@dataclass(frozen=True)
class Measured:
    """Bytes of live tensor storage: between two steps, and the peak during a step."""

    persistent_bytes: int
    peak_bytes: int
    peak_storages: Sequence[tuple[int, str]]


def measure(
    folder: Path, setting: Setting, device: torch.device, *, keep_storages: bool = False
) -> Measured:
    """Take a first step, that the optimizer has its states, and measure a second one.

    A step has two micro-batches: the second's activations stand beside the first's gradients.
    """
    model = load(folder, setting, device)
    dtype = loading.compute_dtype(folder, device)
    adamw, take = prepared_step(model, setting, device, dtype)
    memory = LiveMemory(held_tensors(model, adamw), keep_storages=keep_storages)
    before = memory.live_bytes
    with memory:
        take()
    return Measured(before, memory.peak_bytes, memory.peak_storages)


def prepared_step(
    model: nn.Module, setting: Setting, device: torch.device, dtype: torch.dtype
) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """Take a short first step, so that the optimizer has its states; returns it, and the next."""
    adamw = make_optimizer(model, _train(setting.optimizer), device)
    known = any(type(module).__name__ in KNOWN_BLOCKS for module in model.modules())
    if isinstance(model, PeftModel) and setting.fused and known:
        fuse(model)
        unfused_because = None
    else:
        unfused_because = "not covered"
    computing = Computing(
        device=device,
        dtype=dtype,
        micro_batch_tokens=setting.tokens,
        gradient_checkpointing=setting.gradient_checkpointing,
        processes=1,
        unfused_because=unfused_because,
    )
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    step(model, adamw, [micro_batch(replace(setting, lengths=(8,)), vocabulary)], computing)
    batches = [micro_batch(setting, vocabulary, seed) for seed in range(2)]
    return adamw, lambda: step(model, adamw, batches, computing)
