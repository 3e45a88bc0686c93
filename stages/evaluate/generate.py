"""Generation of replies: order of prompts, greedy decoding, exact match."""

import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from stages.shared.core import display
from stages.shared.model.loading import without_adapter
from stages.shared.model.packing import has_length_dependent_rope
from stages.shared.parallel.group import Group
from stages.shared.weights.precision import autocast

# Fixed, as other prompts in the batch can change a bf16 reply. A 7B model with multi-head attention
# caches half a MB per token.
BATCH = 32
BATCH_TOKENS = 8192  # of prompts and replies, padding included
ALONE = Group()
# Left padding enters their states, or the positions that they count themselves.
PADDING_DEPENDENT = frozenset({"cpmant", "minimax", "rwkv"})


@dataclass(frozen=True)
class Reply:
    """A generated reply."""

    text: str
    stopped: bool  # at a stop token, within `max_new_tokens`
    raw: str = ""  # the text with its control tokens


def order_rows(has_answer: Sequence[bool], seed: int) -> list[int]:
    """Row indices in a seeded order, those with a known answer first."""
    order = np.random.default_rng(seed).permutation(len(has_answer))
    return sorted(order.tolist(), key=lambda row: not has_answer[row])


def normalize(text: str) -> str:
    """NFKC, single spaces, no final full stop."""
    return " ".join(unicodedata.normalize("NFKC", text).split()).rstrip(".").rstrip()


def is_correct(reply: str, answer: str) -> bool:
    """Whether the normalized last lines of the reply, as many as the answer has, equal the answer.

    Case is ignored unless the answer is in upper case, which the task then demands.
    """
    lines = reply.strip().split("\n")
    last = normalize("\n".join(lines[-len(answer.strip().split("\n")) :]))
    expected = normalize(answer)
    if not expected.isupper():
        last, expected = last.casefold(), expected.casefold()
    return bool(last) and last == expected


@dataclass
class _Progress(BaseStreamer):
    """Advances the bar with each token of a batch."""

    bar: Any

    def put(self, value: torch.Tensor) -> None:
        self.bar.update(int(value.ndim == 1))  # first come the prompts, [rows, width]

    def end(self) -> None:
        pass


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    stop_ids: list[int],
    max_new_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    group: Group = ALONE,
) -> list[Reply]:
    """Reply to each prompt by greedy decoding, up to `stop_ids` or the end of learned positions.

    Processes of a `group` divide the batches, and all make as many forward passes.
    """
    plain: Any = without_adapter(model)
    positions = _learned_positions(plain)
    max_rows = BATCH if may_batch(plain) else 1
    batches = group_by_length(prompts, max_new_tokens, max_rows)
    if positions == sys.maxsize:  # else one could pass the last position while it waits
        passes = -(-len(batches) // group.size)
        own = batches[group.rank :: group.size]
        batches = own + batches[:1] * (passes - len(own))  # once more, to the same replies
    pad = partial(pad_sequence, batch_first=True, padding_side="left")  # all replies start together
    replies: dict[int, Reply] = {}
    total = len(batches) * max_new_tokens
    with display.bar(total=total, desc="answers", unit="batch-token") as bar:
        for done, batch in enumerate(batches, start=1):
            tokens = [torch.tensor(prompts[i], device=device) for i in batch]
            ids = pad(tokens, padding_value=stop_ids[0])
            width = ids.shape[1]
            new_tokens = min(max_new_tokens, positions - width)
            with autocast(device, dtype):
                output = model.generate(
                    input_ids=ids,
                    attention_mask=pad([torch.ones_like(one) for one in tokens]),
                    generation_config=options(model, new_tokens, stop_ids),
                    streamer=_Progress(bar),
                    synced_gpus=group.size > 1,
                )
            for i, row in zip(batch, output[:, width:].tolist(), strict=True):
                replies[i] = decode(tokenizer, row, stop_ids)
            bar.update(done * max_new_tokens - bar.n)
    for part in group.gather(replies):
        replies |= part
    return [replies[i] for i in range(len(prompts))]


def options(
    model: nn.Module, max_new_tokens: int, stop_ids: list[int], temperature: float = 0.0
) -> GenerationConfig:
    """Generation options; temperature 0 is greedy.

    The model's own, which would fill what they leave open (penalties, beams), are dropped.
    """
    plain: Any = without_adapter(model)
    plain.generation_config = GenerationConfig()
    plain.config.get_text_config().output_router_logits = False  # a padded mixture fails with them
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
    )


def may_batch(model: PreTrainedModel) -> bool:
    """Whether replies do not depend on the left padding of a batch."""
    config: Any = model.config
    # BART and its kin count positions from the padding on; others are told `position_ids`.
    told = "position_ids" in signature(model.forward).parameters
    counted = not told and _learned_positions(model) < sys.maxsize
    dependent = config.model_type in PADDING_DEPENDENT or has_length_dependent_rope(config)
    return not (counted or dependent)


def group_by_length(
    prompts: Sequence[list[int]], new_tokens: int, max_rows: int
) -> list[list[int]]:
    """Indices of prompts by length, in groups of at most `max_rows` and `BATCH_TOKENS`."""
    groups: list[list[int]] = [[]]
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        tokens = (len(groups[-1]) + 1) * (len(prompts[i]) + new_tokens)
        if groups[-1] and (len(groups[-1]) == max_rows or tokens > BATCH_TOKENS):
            groups.append([])
        groups[-1].append(i)
    return [group for group in groups if group]


def _learned_positions(model: PreTrainedModel) -> int:
    """Size of a model's position embedding; unlimited for rotary positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    tables.discard(model.get_input_embeddings().weight)
    rows = [len(table) for table in (*tables, *model.buffers()) if table.ndim == 2]
    if limit and any(limit <= count <= limit + 2 for count in rows):  # OPT adds two
        return int(limit)
    return sys.maxsize


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop_ids: list[int]) -> Reply:
    """Reply of generated tokens, which may go on after the stop token."""
    text, raw = (to_text(tokenizer, ids, stop_ids, skip_control=skip) for skip in (True, False))
    return Reply(text.strip(), not set(stop_ids).isdisjoint(ids), raw.strip())


def to_text(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], stop_ids: list[int], *, skip_control: bool
) -> str:
    """Text of tokens up to a stop token, control tokens left out or by name."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    return str(tokenizer.decode(ids[:end], skip_special_tokens=skip_control))
