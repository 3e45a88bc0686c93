"""Evaluation of a model: loss on held-out conversations, and generated replies."""

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from stages.shared.model import loading  # before transformers

# isort: split
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch

from stages.evaluate import breakdown, generate
from stages.evaluate.inputs import Evaluate
from stages.shared.chat import templates
from stages.shared.chat.conversation import Conversation, from_columns
from stages.shared.chat.encode import Encoder
from stages.shared.chat.tokenizer import load_tokenizer
from stages.shared.core import machine
from stages.shared.core.errors import reading
from stages.shared.model import scoring
from stages.shared.model.packing import read_examples, require_vocabulary
from stages.shared.parallel import placement
from stages.shared.parallel.group import Group
from stages.shared.parallel.shards import Shards
from stages.shared.weights.checkpoint import Weights

Report = tuple[dict[str, Any], dict[str, Any]]  # metrics, and the variant's replies
TOKENS = ("input_ids", "loss_mask", "weights")  # columns that `read_examples` reads


def evaluate_on(group: Group, device: torch.device, sharded: bool, *inputs: Any) -> Report:
    """`evaluate` as one of the processes of `launcher.compute`."""
    placement.require_same(group, *inputs[1:5])
    return evaluate(*inputs, group=group, device=device, sharded=sharded)


def evaluate_adapters(
    adapters: Mapping[str, Path], base: Path, tokenizer: Path, data: Path, settings: Evaluate
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Metrics of several adapters by name, each as alone, on a base that is loaded once."""
    model = None
    for name, folder in adapters.items():
        model = model or loading.load_model(base, machine.device())
        tuned = loading.attach(model, folder)
        yield name, evaluate(name, folder, base, tokenizer, data, settings, tuned)[0]
        model = tuned.unload()
        if not all("lora_" in key for key in Weights(folder).lazy_tensors()):
            model = None  # trained biases and `modules_to_save` stay in the base


def evaluate(
    variant: str,
    folder: Path,
    base: Path,
    tokenizer_folder: Path,
    data: Path,
    settings: Evaluate,
    model: Any = None,
    *,
    group: Group = generate.ALONE,
    device: torch.device | None = None,
    sharded: bool = False,
) -> Report:
    """Metrics and replies of a model, or of an adapter on its base; `model` if it is loaded.

    Processes of a `group` share the work, and where it is `sharded` the frozen weights.
    """
    device = device or machine.device()
    tokenizer = load_tokenizer(tokenizer_folder)
    form = templates.read_format(data / "format.json")
    examples = read_examples(data / "eval.parquet")
    with reading(data / "eval.parquet"), (data / "eval.parquet").open("rb") as file:
        stored = pq.ParquetFile(file)
        columns = [name for name in stored.schema_arrow.names if name not in TOKENS]
        rows = stored.read(columns, use_threads=False).to_pylist()
        conversations = [from_columns(row) for row in rows]
    dtype = loading.compute_dtype(base if loading.is_adapter(folder) else folder, device)
    model = model or loading.load_adapted(folder, base, device, on_cpu=sharded)
    # peft's wrapper has no `num_embeddings`.
    require_vocabulary(examples, len(model.get_input_embeddings().weight))
    if sharded:
        Shards(model, group, device)
    losses: dict[int, np.ndarray] = {}
    desc, share = f"{variant}: loss", (group.rank, group.size)
    own, tokens = scoring.score(model, examples, device, dtype, desc, share, losses)
    nats = np.zeros_like(own)
    for part, part_losses in group.gather((own, losses)):
        nats += part
        losses |= part_losses

    template = templates.make(form.template, tokenizer, form.template_name)
    encoder = Encoder(tokenizer, template)
    order = generate.order_rows([*map(_is_scored, conversations)], settings.seed)
    encoded = ((r, encoder.encode_prompt(conversations[r])) for r in order if rows[r]["messages"])
    # A prompt as long as its row was truncated.
    whole = ((row, prompt) for row, prompt in encoded if len(prompt) < len(examples[row]))
    prompts = dict(islice(whole, max(settings.generate_rows, settings.prompts)))
    inputs = ([*prompts.values()], form.stop_ids, settings.max_new_tokens, device, dtype, group)
    replies = generate.generate(model, tokenizer, *inputs)
    answers = {}
    for (row, prompt), reply in zip(prompts.items(), replies, strict=True):
        ids = examples[row].input_ids[len(prompt) :].tolist()
        reference = generate.decode(tokenizer, ids, form.stop_ids).raw
        answers[row] = _answer(conversations[row], reference, reply)
    generated = [*answers][: settings.generate_rows]
    frame = pd.DataFrame(rows).assign(nats=nats, tokens=tokens)
    for column in ("stopped", "correct"):
        values = {row: answers[row][column] for row in generated}
        frame[column] = pd.Series(values, dtype="boolean")
    report = metrics(frame)
    report |= breakdown.by_part(conversations, examples, losses, template, encoder)
    report |= breakdown.rates([answers[row] for row in generated])
    return report, {"variant": variant, "answers": [*answers.values()]}


def metrics(rows: pd.DataFrame) -> dict[str, Any]:
    """Metrics over all rows, by language (English or other), and by source where there are several.

    Columns: `conversation_id`, which several rows may share, `nats` (sum over supervised tokens),
    `tokens`, `text_bytes`, `language`; and NA without a reply, `stopped` (it ended itself) and
    `correct` (its last line is the answer).
    """
    groups = {"by_language": rows["language"].eq("en").map({True: "en", False: "other"})}
    if "source" in rows and rows["source"].notna().any():
        groups["by_source"] = rows["source"]
    return summarize(rows) | {
        name: {str(key): summarize(group) for key, group in rows.groupby(by)}
        for name, by in groups.items()
    }


def summarize(rows: pd.DataFrame) -> dict[str, Any]:
    """Metrics weighted by token; None where nothing was measured.

    `bits_per_byte` (nats / ln 2 / bytes) does not depend on the vocabulary. `stop_rate` is over
    `generated_rows`, `exact_match` over the `answered_rows` of these, which have a known answer.
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
        "conversations": rows["conversation_id"].nunique(),
        "generated_rows": int(counts["stopped"]),
        "answered_rows": int(counts["correct"]),
        "stop_rate": float(means["stopped"]) if counts["stopped"] else None,
        "exact_match": float(means["correct"]) if counts["correct"] else None,
    }


def _is_scored(row: Conversation) -> bool:
    """Whether a reply can be right or wrong: a known answer, or calls."""
    return row.answer is not None or bool(row.messages and "tool_calls" in row.messages[-1])


def _answer(row: Conversation, reference: str, reply: generate.Reply) -> dict[str, Any]:
    """A prompt, its `reference` reply with control tokens by name, and the model's."""
    last, expected = row.messages[-1], row.answer
    parts = breakdown.calls(row, reference, reply) | breakdown.thoughts(row, reference, reply)
    return {
        "prompt": row.messages[:-1],
        "reference": reference if parts else last["content"],
        "expected": expected,
        "answer": reply.raw if parts else reply.text,
        "stopped": reply.stopped,
        "correct": None if expected is None else generate.is_correct(reply.text, expected),
        "language": row.language,
        **parts,
    }
