"""Answers: which rows are asked, how a reply is generated, and when it is right."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)

from stages.shared import progress
from stages.shared.precision import autocast

# Fixed, since the other prompts of a batch change a bf16 reply in rare cases.
BATCH = 32


@dataclass(frozen=True)
class Reply:
    """A generated reply, and whether it ended by itself within the tokens it was given."""

    text: str
    stopped: bool


def choose(has_answer: Sequence[bool], count: int, seed: int) -> list[int]:
    """Draw the rows that are asked: those with a checkable answer first, in a seeded order."""
    order = np.random.default_rng(seed).permutation(len(has_answer))
    return sorted(order.tolist(), key=lambda row: not has_answer[row])[:count]


def normalize(text: str) -> str:
    """What two equal answers share: NFKC, one case, single spaces, no full stop at the end."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".").rstrip()


def is_right(reply: str, answer: str) -> bool:
    """Whether the reply's last line, normalized, equals the normalized answer."""
    lines = reply.strip().splitlines()
    return bool(lines) and normalize(lines[-1]) == normalize(answer)


class _Advance(StoppingCriteria):
    """Moves the progress bar with every token, and stops nothing."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        self.bar.update(1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    stop_ids: list[int],
    max_new_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Reply]:
    """Reply to each prompt, always the most likely token (greedy), in batches with a cache.

    Args:
        model: a causal language model of transformers, with or without an adapter.
        tokenizer: decodes the replies.
        prompts: token ids, up to and including what a reply follows.
        stop_ids: tokens that end a reply.
        max_new_tokens: where a reply that does not end is cut.
        device: where the model is.
        dtype: what it computes in.
    """
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
    )
    replies: dict[int, Reply] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [by_length[i : i + BATCH] for i in range(0, len(by_length), BATCH)]
    with progress.bar(
        total=len(groups) * max_new_tokens, desc="answers", unit="batch-token"
    ) as bar:
        for done, group in enumerate(groups, start=1):
            width = max(len(prompts[i]) for i in group)
            ids = torch.full((len(group), width), stop_ids[0], device=device)
            mask = torch.zeros_like(ids)
            for line, i in enumerate(group):  # padded on the left: replies start in one column
                ids[line, width - len(prompts[i]) :] = torch.tensor(prompts[i], device=device)
                mask[line, width - len(prompts[i]) :] = 1
            with autocast(device, dtype):
                output = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=config,
                    stopping_criteria=[_Advance(bar)],
                )
            for line, i in enumerate(group):
                replies[i] = _reply(tokenizer, output[line, width:].tolist(), stop_ids)
            bar.update(done * max_new_tokens - bar.n)
    return [replies[i] for i in range(len(prompts))]


def _reply(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop_ids: list[int]) -> Reply:
    end = next((at for at, token in enumerate(ids) if token in stop_ids), None)
    return Reply(
        str(tokenizer.decode(ids[:end], skip_special_tokens=True)).strip(), end is not None
    )
