"""Train and eval Parquet files of raw rows: encoded batch by batch, split, written."""

import os
from collections.abc import Generator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.prepare import limits, splitting
from stages.prepare.config import Prepare
from stages.prepare.encoding import encode_file, make_encoder
from stages.prepare.output import Mixture, RowGroups, SplitFile, Tally
from stages.prepare.rows import SPLITS, Source, Split, find_sources
from stages.prepare.splitting import Splitter
from stages.shared.core import display, files

_STRAY = (
    "`text` has no turns, unlike the rows before; set prepare.format: text to learn it as it is"
)


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
        limits.require_rows(parameters, metrics, tally.reasons, tally.first)
        if parameters.mix:
            drawn = mixture.draw(splits["train"], parameters.seed, parameters.max_rows)
            metrics |= {"mix": drawn}
        metrics |= {str(split): file.figures() for split, file in splits.items()}
        metrics |= {"template": parameters.template}
        if parameters.system:
            metrics |= {"system_merged": encoder.merges_system}
        limits.require_splits(metrics, splitter, tally.first)
        if model is not None:
            longest = max(file.longest for file in splits.values())
            limits.require_fit(model, parameters, longest, max(f.last_id for f in splits.values()))
        for file in splits.values():
            file.close()
    form = encoder.template.format(limits.end_ids(model) if model else ())
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
