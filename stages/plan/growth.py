"""How the peak grows with the length of a conversation, with the batch and with the rank."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from stages.shared import peak
from stages.shared.step.adapter_sizes import Adapter
from stages.shared.tensors import Model
from stages.shared.tuning import Tuning
from stages.shared.workspace import MicroBatch

LENGTHS = tuple(2**power for power in range(9, 16))  # 512 to 32,768 tokens
BATCHES = tuple(2**power for power in range(7))  # conversations of BATCH_LENGTH
BATCH_LENGTH = 512
RANKS = tuple(2**power for power in range(2, 10))
RANK_TOKENS = 2048


@dataclass(frozen=True)
class Growth:
    """Peaks against one quantity.

    Attributes:
        label: of the quantity.
        values: of it.
        peaks: bytes at each value, by technique.
    """

    label: str
    values: tuple[int, ...]
    peaks: Mapping[str, list[int]]


def lines(adapter: Adapter) -> dict[str, Tuning]:
    """What is drawn: LoRA and QLoRA, with and without checkpointing."""
    lora = Tuning("bf16", adapter)
    quantized = Tuning("nf4", adapter, double_quant=True)
    return {
        "LoRA bf16": lora,
        "QLoRA nf4": quantized,
        "LoRA bf16, checkpointed": replace(lora, gradient_checkpointing=True),
        "QLoRA nf4, checkpointed": replace(quantized, gradient_checkpointing=True),
    }


def of_model(model: Model, adapter: Adapter, supervised_share: float) -> list[Growth]:
    """Peaks against length, batch and rank."""

    def peak_bytes(tuning: Tuning, tokens: int) -> int:
        batch = MicroBatch(tokens, round(tokens * supervised_share))
        return peak.predict(model, tuning, batch).total_bytes

    ways = lines(adapter)
    return [
        Growth(
            "tokens of one conversation",
            LENGTHS,
            {name: [peak_bytes(way, n) for n in LENGTHS] for name, way in ways.items()},
        ),
        Growth(
            f"conversations of {BATCH_LENGTH} tokens at once",
            BATCHES,
            {
                name: [peak_bytes(way, n * BATCH_LENGTH) for n in BATCHES]
                for name, way in ways.items()
            },
        ),
        Growth(
            f"rank, at {RANK_TOKENS:,} tokens",
            RANKS,
            {
                name: [
                    peak_bytes(replace(way, adapter=adapter.at_rank(rank)), RANK_TOKENS)
                    for rank in RANKS
                ]
                for name, way in ways.items()
            },
        ),
    ]
