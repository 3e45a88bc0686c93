"""Score one model on the held-out conversations, and let it reply to some of them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.shared.model import loading  # before transformers

# isort: split
import pandas as pd
import pyarrow.parquet as pq

from stages.evaluate import generate
from stages.evaluate.config import Evaluate
from stages.shared.chat import templates
from stages.shared.chat.encode import Encoder
from stages.shared.chat.tokenizer import load_tokenizer
from stages.shared.core.machine import device
from stages.shared.model import scoring
from stages.shared.model.packing import read_examples, require_vocabulary


def evaluate(
    variant: str,
    model_folder: Path,
    onto: Path,
    tokenizer_folder: Path,
    data: Path,
    settings: Evaluate,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics and all replies of a model, or of an adapter `onto` one.

    `data` holds eval.parquet and format.json; the report shows `evaluate.prompts` of the replies.
    """
    on = device()
    tokenizer = load_tokenizer(tokenizer_folder)
    form = templates.read_format(data / "format.json")
    examples = read_examples(data / "eval.parquet")
    columns = ["messages", "text_bytes", "answer", "language"]
    rows = pq.read_table(data / "eval.parquet", columns=columns).to_pylist()
    below = onto if loading.is_adapter(model_folder) else model_folder
    dtype = loading.compute_dtype(below, on)
    model = loading.load_adapted(model_folder, onto, on)
    # The weight, and not `num_embeddings`, which a wrapper of peft's does not have.
    require_vocabulary(examples, len(model.get_input_embeddings().weight))
    sums, tokens = scoring.score(model, examples, on, dtype, f"{variant}: loss")

    encoder = Encoder(tokenizer, templates.make(form.template, tokenizer))
    prompts: dict[int, list[int]] = {}
    for row in generate.in_order([r["answer"] is not None for r in rows], settings.seed):
        if len(prompts) == max(settings.generate_rows, settings.prompts):
            break
        prompt = encoder.encode_prompt(rows[row]["messages"][:-1])
        if len(prompt) < len(examples[row]):  # else the row was cut inside its prompt
            prompts[row] = prompt
    replies = generate.generate(
        model,
        tokenizer,
        list(prompts.values()),
        form.stop_ids,
        settings.max_new_tokens,
        on,
        dtype,
    )
    by_row = dict(zip(prompts, replies, strict=True))
    frame = pd.DataFrame(rows, columns=columns).assign(nats=sums, tokens=tokens)
    counted = [*by_row][: settings.generate_rows]
    frame["stopped"] = pd.Series({row: by_row[row].stopped for row in counted}, dtype="boolean")
    frame["correct"] = pd.Series(
        {row: _is_correct(rows[row], by_row[row]) for row in counted}, dtype="boolean"
    )
    shown = [_shown(rows[row], reply) for row, reply in by_row.items()]
    return metrics(frame), {"variant": variant, "answers": shown}


def metrics(rows: pd.DataFrame) -> dict[str, Any]:
    """The metrics over all rows, and over English and other languages.

    Args:
        rows: of held-out conversations: `nats` (summed over supervised tokens), `tokens`,
            `text_bytes`, `language`, and, NA where there is none, `stopped` (the reply ended by
            itself) and `correct` (its last line is the answer).
    """
    language = rows["language"].eq("en").map({True: "en", False: "other"})
    by_language = {str(name): summarize(group) for name, group in rows.groupby(language)}
    return summarize(rows) | {"by_language": by_language}


def summarize(rows: pd.DataFrame) -> dict[str, Any]:
    """All metrics over the rows, weighted by token; None where there is nothing to measure.

    `bits_per_byte` does not depend on the vocabulary: nats / ln 2 / bytes. `stop_rate` is of the
    `generated_rows`, `exact_match` of the `answered_rows` among them: those with a known answer.
    """
    tokens, size = int(rows["tokens"].sum()), int(rows["text_bytes"].sum())
    nats = math.fsum(rows["nats"])
    loss = nats / tokens if tokens else None
    counts = rows[["stopped", "correct"]].count()
    means = rows[["stopped", "correct"]].mean()
    return {
        "loss": loss,
        "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / size if size else None,
        "tokens": tokens,
        "conversations": len(rows),
        "generated_rows": int(counts["stopped"]),
        "answered_rows": int(counts["correct"]),
        "stop_rate": float(means["stopped"]) if counts["stopped"] else None,
        "exact_match": float(means["correct"]) if counts["correct"] else None,
    }


def _is_correct(row: dict[str, Any], reply: generate.Reply) -> bool | None:
    return None if row["answer"] is None else generate.is_correct(reply.text, row["answer"])


def _shown(row: dict[str, Any], reply: generate.Reply) -> dict[str, Any]:
    messages: Sequence[dict[str, str]] = row["messages"]
    return {
        "prompt": messages[:-1],
        "reference": messages[-1]["content"],
        "expected": row["answer"],
        "answer": reply.text,
        "stopped": reply.stopped,
        "correct": _is_correct(row, reply),
        "language": row["language"],
    }
