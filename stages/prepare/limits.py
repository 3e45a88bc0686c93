"""Refusals: too many rejected rows, an empty split, conversations that the model cannot take."""

import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.prepare.config import Prepare
from stages.prepare.rows import SPLITS
from stages.shared.core.errors import UserError

# Decoders whose positions are rows of a table; beyond its end is an index error.
_TABLES = {"gpt2", "gpt-sw3", "gpt_bigcode", "gpt_neo", "gptj", "codegen", "opt", "biogpt"}
_TABLES |= {"openai-gpt", "ctrl"}
_FOLDER = "Let data.path be a folder with train.jsonl and eval.jsonl."


def require_rows(
    parameters: Prepare, metrics: Mapping[str, Any], reasons: Counter[str], why: str
) -> None:
    """Refuse a source of which too many rows are rejected.

    Args:
        parameters: of the stage.
        metrics: of all rows.
        reasons: how many rows were rejected for each.
        why: the same in words.
    """
    rows, rejected = metrics["rows_in"], metrics["rejected"]
    if rejected <= parameters.max_rejected * rows:
        return
    remedy = "Mend these rows, or raise prepare.max_rejected."
    if named := re.search(r"prepare\.(?!max_rejected)\w+", reasons.most_common(1)[0][0]):
        remedy = f"Change {named[0]}."
    elif rejected == rows:
        remedy = "Mend the file: docs/data.md shows what is read."
    raise UserError(
        f"params.yaml: prepare.max_rejected is {parameters.max_rejected}; {rejected} of {rows} "
        f"rows are rejected: {why}. {remedy}"
    )


def told(reasons: Counter[str], first: Mapping[str, str]) -> str:
    """The three commonest reasons, how often each is met, and where first."""
    common = reasons.most_common(3)
    return "; ".join(f"{reason} ({count}, first {first[reason]})" for reason, count in common)


def require_splits(
    metrics: Mapping[str, Any], own_eval: bool, begins_alike: bool, why: str
) -> None:
    """Refuse a source that leaves a split empty.

    Args:
        metrics: of all rows.
        own_eval: the source has a split of its own.
        begins_alike: all conversations have one first message.
        why: rows were rejected.
    """
    for split in SPLITS:
        if metrics[split]["conversations"]:
            continue
        remedy = f"Add conversations or change prepare.eval_fraction. Or: {_FOLDER}"
        if own_eval:
            remedy = f"Add conversations to the {split} file."
        elif begins_alike and metrics["rows_in"] > 1:
            remedy = f"All begin with one message, by which they are split. {_FOLDER}"
        raise UserError(
            f"{split} split is empty: of {metrics['rows_in']} rows {metrics['rejected']} rejected"
            f"{f' ({why})' if why else ''}, {metrics['duplicates']} duplicates, "
            f"{metrics['leaked']} of train begin like one of eval. {remedy}"
        )


def require_fit(model: Path, parameters: Prepare, longest: int, last_id: int) -> None:
    """Refuse conversations that the model has no positions or no embeddings for.

    Args:
        model: its config.json.
        parameters: of the stage.
        longest: tokens of the longest conversation.
        last_id: the largest token id.
    """
    from transformers import AutoConfig  # noqa: PLC0415  (with the tokenizer, later than params)

    config = AutoConfig.from_pretrained(model.parent).get_text_config()
    if last_id >= config.vocab_size:
        raise UserError(
            f"models/tokenizer: token {last_id} is in the conversations; the model embeds "
            f"{config.vocab_size} ({model}: vocab_size). Change prepare.template or the model."
        )
    positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
    if longest > positions:
        fault = (
            f"params.yaml: prepare.max_length is {parameters.max_length}; the longest conversation "
            f"has {longest} tokens, the model {positions} positions ({model})"
        )
        if config.model_type in _TABLES:
            raise UserError(f"{fault}. Lower prepare.max_length to {positions}.")
        print(f"{fault}, beyond which it was not trained.", file=sys.stderr)
