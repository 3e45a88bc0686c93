"""Train and eval Parquet files of raw rows: encoded chunk by chunk, split, written."""

import os
from contextlib import ExitStack
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.prepare import limits, mix
from stages.prepare.config import Prepare
from stages.prepare.encoding import encode_file, make_encoder
from stages.prepare.mix import Mixture
from stages.prepare.output import SCHEMA, Rejections, SplitFile, Tally
from stages.prepare.rows import SPLITS, Source, Split, find_sources
from stages.prepare.splitting import Splitter
from stages.shared.core import display, files


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
    mix.require_sources(parameters.mix, sources["train"].names)
    encoder = make_encoder(str(tokenizer), parameters)
    splitter = Splitter("eval" in sources, None if parameters.mix else parameters.max_rows)
    processes = processes or len(os.sched_getaffinity(0))
    tally = Tally()
    with ExitStack() as stack:
        path = stack.enter_context(files.whole_file(folder / "rejected.jsonl"))
        rejections = Rejections(stack.enter_context(path.open("w", encoding="utf-8")))
        splits = dict[Split, SplitFile]()
        for split in SPLITS:
            partial = stack.enter_context(files.whole_file(folder / f"{split}.parquet"))
            writer = pq.ParquetWriter(partial, SCHEMA, compression="zstd")
            splits[split] = SplitFile(stack.enter_context(writer))
        targets: dict[Split, SplitFile | Mixture] = {**splits}
        if parameters.mix:
            stored = folder / "mix.partial"
            stack.callback(stored.unlink, missing_ok=True)
            targets["train"] = mixture = Mixture(stored, parameters.mix)
        size = sum(source.path.stat().st_size for source in sources.values())
        bar = stack.enter_context(display.bar(total=size, desc="prepare", unit="B"))
        for split in sorted(sources):  # eval first: it decides what leaks
            forms: dict[int, str] = {}
            chunks = encode_file(sources[split].path, processes, str(tokenizer), parameters)
            for encoded, read_bytes in chunks:
                some = _reject_stray_text(encoded, sources[split], forms, parameters)
                rows, has_own_eval = _with_source(some, sources[split])
                is_first = rows["is_first"].to_numpy()
                heads = rows if is_first.all() else rows.filter(rows["is_first"])
                outcomes = _assign(splitter, heads, split, has_own_eval[is_first])
                of_rows = outcomes if heads is rows else outcomes[np.cumsum(is_first) - 1]
                for target, file in targets.items():
                    file.add(rows.filter(of_rows == target))
                rejections.add(sources[split], heads.filter(outcomes == "rejected"))
                tally.add(heads, outcomes)
                bar.update(read_bytes)
                if splitter.is_full and sources[split].all_have_eval:
                    break
        bar.close()
        metrics = tally.figures()
        limits.require_rows(parameters, metrics, rejections.reasons, rejections.first)
        metrics |= {"mix": mixture.draw(splits["train"], parameters)} if parameters.mix else {}
        metrics |= {str(split): file.figures() for split, file in splits.items()}
        metrics |= {"template": parameters.template} | encoder.figures()
        limits.require_splits(metrics, splitter, rejections.first)
        if model is not None:
            longest = max(file.longest for file in splits.values())
            limits.require_fit(model, parameters, longest, max(f.last_id for f in splits.values()))
    form = encoder.template.format(limits.end_ids(model) if model else ())
    files.write_json(folder / "format.json", form.model_dump())
    tally.tell_unknown()
    return metrics


def _reject_stray_text(
    rows: pa.Table, source: Source, forms: dict[int, str], parameters: Prepare
) -> pa.Table:
    """Reject plain text in a file whose first row is of turns; `forms`: of the first, by part."""
    parts, found = source.parts_of(rows["line"].to_numpy()), rows["form"].to_pylist()
    usable = pc.is_null(rows["reason"]).to_numpy()
    for part, form in zip(parts[usable].tolist(), compress(found, usable), strict=True):
        forms.setdefault(part, form)
    turns = np.array([forms.get(part, "text") != "text" for part in parts.tolist()], bool)
    stray = usable & turns & np.array([form == "text" for form in found], bool)
    if parameters.format != "auto" or not stray.any():
        return rows
    why = (
        "`text` has no turns, unlike the rows before; set prepare.format: text to learn it as it is"
    )
    reasons = pc.if_else(pa.array(stray), why, rows["reason"])
    rows = rows.set_column(rows.schema.get_field_index("reason"), "reason", reasons)
    return rows.filter(pa.array(~stray | rows["is_first"].to_numpy()))


def _with_source(rows: pa.Table, source: Source) -> tuple[pa.Table, np.ndarray]:
    """Fill `source`; and whether the row's source has an eval split, bool [rows]."""
    parts = source.parts_of(rows["line"].to_numpy())
    names = [part.get("source") for part in source.parts]
    column = pa.array(names, pa.string()).take(pa.array(parts))
    rows = rows.set_column(rows.schema.get_field_index("source"), "source", column)
    return rows, np.array([name in source.with_eval for name in names], bool)[parts]


def _assign(
    splitter: Splitter, rows: pa.Table, split: Split, has_own_eval: np.ndarray
) -> np.ndarray:
    is_eval = pc.fill_null(rows["is_held_out"], False).to_numpy() & ~has_own_eval
    if split == "eval":
        is_eval = np.ones(len(rows), bool)
    columns = (pc.fill_null(rows[name], "") for name in ("conversation_id", "question"))
    ids, questions = (np.array(column.to_pylist(), "S32") for column in columns)
    return splitter.assign(pc.is_null(rows["reason"]).to_numpy(), is_eval, ids, questions)
