"""Train and eval Parquet files of raw rows: encoded batch by batch, split, written.

Refused are too many rejected rows, an empty split, and what is beyond the model.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.prepare import splitting
from stages.prepare.config import Prepare
from stages.prepare.encoding import encode_file, make_encoder
from stages.prepare.output import Mixture, RowGroups, SplitFile, Tally
from stages.prepare.rows import SPLITS, Source, Split, find_sources
from stages.prepare.splitting import Splitter
from stages.shared.core import display, files
from stages.shared.core.errors import UserError, reading

_STRAY = (
    "`text` has no turns, unlike the rows before; set prepare.format: text to learn it as it is"
)

# Beyond a table of positions there is an index error. All but rotary models have one, and these.
_NO_TABLE = {"inkling_text", "inkling2_text", "jamba", "kimi_linear", "nemotron_h", "rwkv"}
_NO_TABLE |= {"xglm", "zamba"}
# RoBERTa's first rows, up to that of the padding token, are no positions.
_PADDED = {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"}
_PADDED |= {"xlm-roberta-xl", "xmod"}
_FOLDER = "data.path a folder with train.jsonl and eval.jsonl"


def prepare(
    raw: Path,
    tokenizer: Path,
    model: Path | None,  # config.json, for its limits
    folder: Path,
    parameters: Prepare,
    processes: int | None = None,  # one per core
) -> dict[str, Any]:
    """Write both splits, rejected.jsonl and format.json to `folder`; return the metrics."""
    sources = find_sources(raw)
    splitting.require_sources(parameters.mix, sources["train"].names)
    encoder = make_encoder(str(tokenizer), parameters)
    splitter = Splitter("eval" in sources, None if parameters.mix else parameters.max_rows)
    processes = processes or len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        path = stack.enter_context(files.whole_file(folder / "rejected.jsonl"))
        tally = Tally(stack.enter_context(path.open("w", encoding="utf-8")))
        paths = {s: stack.enter_context(files.whole_file(folder / f"{s}.parquet")) for s in SPLITS}
        splits = {split: SplitFile(path) for split, path in paths.items()}
        targets: dict[Split, RowGroups] = {**splits}
        if parameters.mix:
            stored = folder / "mix.partial"
            stack.callback(stored.unlink, missing_ok=True)
            targets["train"] = mixture = Mixture(stored, parameters.mix)
        size = sum(source.path.stat().st_size for source in sources.values())
        bar = stack.enter_context(display.bar(total=size, desc="prepare", unit="B"))
        for split in sorted(sources):  # eval first: it decides what leaks
            source = sources[split]
            batches = _read(source, processes, str(tokenizer), parameters)
            for rows, has_own_eval, read_bytes in stack.enter_context(closing(batches)):
                is_first = rows["is_first"].to_numpy()
                heads = rows if is_first.all() else rows.filter(rows["is_first"])
                outcomes = _assign(splitter, heads, split, has_own_eval[is_first])
                of_rows = outcomes if heads is rows else outcomes[np.cumsum(is_first) - 1]
                for target, file in targets.items():
                    file.add(rows.filter(of_rows == target))
                tally.add(source, heads, outcomes)
                bar.update(read_bytes)
                if splitter.is_full and source.names <= source.with_eval:
                    break  # no source holds out some of its rows
        bar.close()
        metrics = tally.figures()
        _require_rows(parameters, metrics, tally.reasons, tally.first)
        if parameters.mix:
            drawn = mixture.draw(splits["train"], parameters.seed, parameters.max_rows)
            metrics |= {"mix": drawn}
        metrics |= {str(split): file.figures() for split, file in splits.items()}
        metrics |= {"template": parameters.template}
        if parameters.system:
            metrics |= {"system_merged": encoder.merges_system}
        _require_splits(metrics, splitter, tally.first)
        if model is not None:
            longest = max(file.longest for file in splits.values())
            _require_fit(model, parameters, longest, max(f.last_id for f in splits.values()))
        for file in splits.values():
            file.close()
    form = encoder.template.format(_end_ids(model) if model else ())
    files.write_json(folder / "format.json", form.model_dump())
    tally.tell_unknown()
    return metrics


def _read(
    source: Source, processes: int, tokenizer: str, parameters: Prepare
) -> Generator[tuple[pa.Table, np.ndarray, int], None, None]:
    """Encode a file: rows with their `source`, whether it holds out rows itself, bytes read."""
    names = [part.source for part in source.parts]
    with_eval = np.array([name in source.with_eval for name in names], bool)
    has_turns = dict[int, bool]()  # whether the first row of a part has
    with closing(encode_file(source.path, processes, tokenizer, parameters)) as batches:
        for encoded, size in batches:
            parts = source.parts_of(encoded["line"].to_numpy())
            column = pa.array(names, pa.string()).take(pa.array(parts))
            rows = _replace(encoded, "source", column)
            if parameters.format == "auto":
                stray = _stray_text(rows, parts, has_turns)
                rows = _replace(rows, "reason", pc.if_else(stray, _STRAY, rows["reason"]))
            yield rows, with_eval[parts], size


def _replace(rows: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(name), name, column)


def _stray_text(rows: pa.Table, parts: np.ndarray, has_turns: dict[int, bool]) -> np.ndarray:
    """Plain text in a file whose first row has turns, bool [rows]."""
    usable = pc.is_null(rows["reason"]).to_numpy()
    is_text = pc.fill_null(pc.equal(rows["form"], "text"), False).to_numpy()
    for part, first in zip(*np.unique(parts[usable], return_index=True), strict=True):
        has_turns.setdefault(int(part), not is_text[usable][first])
    return usable & is_text & np.array([has_turns.get(p, False) for p in parts.tolist()], bool)


def _assign(
    splitter: Splitter, rows: pa.Table, split: Split, has_own_eval: np.ndarray
) -> np.ndarray:
    is_eval = pc.fill_null(rows["is_held_out"], False).to_numpy() & ~has_own_eval
    if split == "eval":
        is_eval = np.ones(len(rows), bool)
    ids = [bytes.fromhex(one[:32]) for one in pc.fill_null(rows["conversation_id"], "").to_pylist()]
    questions = pc.fill_null(rows["question"], b"").to_pylist()
    usable = pc.is_null(rows["reason"]).to_numpy()
    return splitter.assign(usable, is_eval, np.array(ids, "S16"), np.array(questions, "S16"))


def _require_rows(
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


def _require_splits(
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
        elif splitter.has_one_question and metrics["rows_in"] > 1:
            remedy = (
                "All begin with the same message, and the split goes by the first message. "
                f"Make {_FOLDER}."
            )
        raise UserError(
            f"{split} split is empty: of {metrics['rows_in']} rows {metrics['rejected']} rejected"
            f"{reason}, {metrics['duplicates']} duplicates, {metrics['leaked']} begin like one of "
            f"eval. {remedy}"
        )


def _require_fit(model: Path, parameters: Prepare, longest: int, last_id: int) -> None:
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


def _end_ids(model: Path) -> list[int]:
    """Ids of the tokens that end a reply, of the model's config.json."""
    config = files.read_json(model)
    for one in (config, config.get("text_config") or {}):
        ids = one.get("eos_token_id")
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    return []
