"""Score one model on the held-out conversations, and let it answer some of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stages.evaluate import answers, metrics
from stages.evaluate.settings import Evaluate
from stages.shared import models, scoring
from stages.shared.chat import templates
from stages.shared.chat.encode import Encoder
from stages.shared.chat.tokenizer import load_tokenizer
from stages.shared.core.machine import device
from stages.shared.examples import read_examples, require_vocabulary


def evaluate(
    variant: str,
    model_folder: Path,
    onto: Path,
    tokenizer_folder: Path,
    data: Path,
    wanted: Evaluate,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate one of the four variants.

    Args:
        variant: its name, for the files.
        model_folder: its weights, or an adapter.
        onto: the model below an adapter.
        tokenizer_folder: the tokenizer.
        data: holds eval.parquet and format.json.
        wanted: the parameters.

    Returns:
        The metrics, and all answers (the report shows `evaluate.prompts` of them).
    """
    where = device()
    tokenizer = load_tokenizer(tokenizer_folder)
    form = templates.read_format(data / "format.json")
    examples = read_examples(data / "eval.parquet")
    columns = ["messages", "text_bytes", "answer", "language"]
    rows = pq.read_table(data / "eval.parquet", columns=columns).to_pylist()
    dtype = models.compute_dtype(onto if models.is_adapter(model_folder) else model_folder, where)
    model = models.load_adapted(model_folder, onto, where)
    require_vocabulary(examples, model.get_input_embeddings().num_embeddings)
    sums, tokens = scoring.score(model, examples, where, dtype, f"{variant}: loss")

    count = max(wanted.generate_rows, wanted.prompts)
    encoder = Encoder(tokenizer, templates.make(form.template, tokenizer))
    asked: list[int] = []
    prompts: list[list[int]] = []
    for i in answers.in_order([r["answer"] is not None for r in rows], wanted.seed):
        if len(asked) == count:
            break
        prompt = encoder.encode_prompt(rows[i]["messages"][:-1])
        if len(prompt) < len(examples[i]):  # else it was cut, and is longer than what is learnt
            asked.append(i)
            prompts.append(prompt)
    replies = answers.generate(
        model, tokenizer, prompts, form.stop_ids, wanted.max_new_tokens, where, dtype
    )
    counted = dict(zip(asked[: wanted.generate_rows], replies, strict=False))
    measured = [
        _measure(row, float(sums[i]), int(tokens[i]), counted.get(i)) for i, row in enumerate(rows)
    ]
    shown = [_show(rows[i], reply) for i, reply in zip(asked, replies, strict=True)]
    return metrics.report(measured), {"variant": variant, "answers": shown}


def _measure(
    row: dict[str, Any], nats: float, tokens: int, reply: answers.Reply | None
) -> metrics.Row:
    return metrics.Row(
        nats=nats,
        tokens=tokens,
        text_bytes=row["text_bytes"],
        english=row["language"] == "en",
        stopped=None if reply is None else reply.stopped,
        right=_right(row["answer"], reply),
    )


def _right(answer: str | None, reply: answers.Reply | None) -> bool | None:
    return None if reply is None or answer is None else answers.is_right(reply.text, answer)


def _show(row: dict[str, Any], reply: answers.Reply) -> dict[str, Any]:
    messages: Sequence[dict[str, str]] = row["messages"]
    return {
        "prompt": messages[:-1],
        "reference": messages[-1]["content"],
        "expected": row["answer"],
        "answer": reply.text,
        "stopped": reply.stopped,
        "correct": _right(row["answer"], reply),
        "language": row["language"],
    }
