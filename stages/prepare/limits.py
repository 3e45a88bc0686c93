"""Limits: rejected rows, empty splits; the model's positions, embeddings and end tokens."""

import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.prepare.config import Prepare
from stages.prepare.rows import SPLITS
from stages.prepare.splitting import Splitter
from stages.shared.core import files
from stages.shared.core.errors import UserError, reading

# Beyond a table of positions there is an index error. All but rotary models have one, and these.
_NO_TABLE = {"inkling_text", "inkling2_text", "jamba", "kimi_linear", "nemotron_h", "rwkv"}
_NO_TABLE |= {"xglm", "zamba"}
# RoBERTa's first rows, up to that of the padding token, are no positions.
_PADDED = {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"}
_PADDED |= {"xlm-roberta-xl", "xmod"}
_FOLDER = "data.path a folder with train.jsonl and eval.jsonl"


def require_rows(
    parameters: Prepare, metrics: Mapping[str, Any], reasons: Counter[str], first: Mapping[str, str]
) -> None:
    """Refuse a source with too many rejected rows; `reasons` counts them, `first` locates each."""
    rows, rejected = metrics["rows_in"], metrics["rejected"]
    if rejected <= parameters.max_rejected * rows:
        return
    why = "; ".join(
        f"{reason} ({n}, first {first[reason]})" for reason, n in reasons.most_common(3)
    )
    fault = f"{rejected} of {rows} rows are rejected: {why}"
    named = re.search(r"prepare\.(\w+)", reasons.most_common(1)[0][0])
    if named and named[1] in Prepare.model_fields:
        value = getattr(parameters, named[1])
        raise UserError(f"params.yaml: {named[0]} is {value}; {fault}. Change {named[0]}.")
    if rejected == rows:
        raise UserError(f"data: {fault}. Mend the file: docs/data.md shows what is read.")
    raise UserError(
        f"params.yaml: prepare.max_rejected is {parameters.max_rejected}; {fault}. "
        "Mend these rows, or raise prepare.max_rejected."
    )


def require_splits(
    metrics: Mapping[str, Any], splitter: Splitter, first: Mapping[str, str]
) -> None:
    """Refuse an empty split; `first` locates the first rejected row of each reason."""
    reason = "".join(f" ({why}, {where})" for why, where in [*first.items()][:1])
    for split in SPLITS:
        if metrics[split]["conversations"]:
            continue
        remedy = f"Add conversations, change prepare.eval_fraction, or make {_FOLDER}."
        if splitter.own_eval:
            remedy = f"Add conversations to the {split} file."
        elif splitter.begins_alike and metrics["rows_in"] > 1:
            remedy = (
                "All begin with the same message, and the split goes by the first message. "
                f"Make {_FOLDER}."
            )
        raise UserError(
            f"{split} split is empty: of {metrics['rows_in']} rows {metrics['rejected']} rejected"
            f"{reason}, {metrics['duplicates']} duplicates, {metrics['leaked']} begin like one of "
            f"eval. {remedy}"
        )


def require_fit(model: Path, parameters: Prepare, longest: int, last_id: int) -> None:
    """Refuse conversations beyond the positions or embeddings of the model's config.json."""
    from transformers import AutoConfig  # noqa: PLC0415  (once params.yaml is known to be right)

    with reading(model, "Repair it, or choose another model."):  # transformers would ask the hub
        config = AutoConfig.from_pretrained(model.parent).get_text_config()
        positions = int(getattr(config, "max_position_embeddings", None) or sys.maxsize)
        embeddings = int(config.vocab_size)
    if last_id >= embeddings:
        raise UserError(
            f"models/tokenizer: the conversations hold token {last_id}, the model embeds "
            f"{embeddings} ({model}: vocab_size). Change prepare.template or the model."
        )
    if config.model_type in _PADDED:
        positions -= config.pad_token_id + 1
    if longest > positions:
        fault = (
            f"params.yaml: prepare.max_length is {parameters.max_length}; the longest conversation "
            f"has {longest} tokens, the model {positions} positions ({model})"
        )
        rotary = getattr(config, "rope_parameters", None)
        if not rotary and config.model_type not in _NO_TABLE:
            raise UserError(f"{fault}. Lower prepare.max_length to {positions}.")
        print(f"{fault}. Beyond them it was not trained.", file=sys.stderr)


def end_ids(model: Path) -> list[int]:
    """Ids of the tokens that end a reply, of the model's config.json."""
    config = files.read_json(model)
    for one in (config, config.get("text_config") or {}):
        ids = one.get("eos_token_id")
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    return []
