"""Raw files into the two splits, batch by batch."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stages.prepare import batches, garbage, sources, writing
from stages.prepare.batches import Batch
from stages.prepare.loss_mask import Example, ExampleEncoder
from stages.prepare.parsing import Conversation, Form
from stages.prepare.settings import Prepare
from stages.prepare.sources import Source
from stages.prepare.splitting import SPLITS, Split, Splitter
from stages.prepare.writing import Rejections, SplitFile
from stages.shared.chat import templates
from stages.shared.chat.conversation import RejectedRow, conversation_id
from stages.shared.chat.tokenizer import load_tokenizer
from stages.shared.core import files, progress
from stages.shared.core.errors import UserError


def prepare(raw: Path, tokenizer_folder: Path, folder: Path, wanted: Prepare) -> dict[str, Any]:
    """Write both splits, the rejected rows and the format.

    Args:
        raw: what `fetch_data` wrote.
        tokenizer_folder: the tokenizer.
        folder: where to write.
        wanted: the parameters.

    Returns:
        The metrics.

    Raises:
        UserError: too many rows cannot be used, or nothing is left for a split.
    """
    found = sources.find(raw)
    tokenizer = load_tokenizer(tokenizer_folder)
    template = templates.make(wanted.template, tokenizer)
    encoder = ExampleEncoder(tokenizer, template, wanted.train_on, wanted.max_length)
    splitter = Splitter(None if "eval" in found else wanted.eval_fraction, wanted.seed)
    size = sum(source.path.stat().st_size for source in found.values())
    with garbage.collected_rarely(), ExitStack() as stack:
        rejected = stack.enter_context(writing.rejections(folder / "rejected.jsonl"))
        splits = {
            split: stack.enter_context(writing.split_file(folder / f"{split}.parquet"))
            for split in SPLITS
        }
        work = _Work(wanted, encoder, splitter, splits, rejected)
        with progress.bar(total=size, desc="prepare", unit="B") as bar:
            for split in ("eval", "train"):  # what is held out decides what train may hold
                if split in found:
                    work.read(found[split], bar)
        work.require_usable()
    files.write_json(folder / "format.json", template.format().model_dump())
    return {**work.figures(), "template": template.name}


@dataclass(frozen=True, slots=True)
class _Placed:
    """A batch, and its conversations that are needed, each with its split."""

    batch: Batch
    needed: list[tuple[Split, Conversation]]


@dataclass
class _Work:
    """The rows as they pass by, and how many took which way.

    `truncated` and `dropped_turns` count conversations that are in a split; the others count what
    is in none.
    """

    wanted: Prepare
    encoder: ExampleEncoder
    splitter: Splitter
    splits: dict[Split, SplitFile]
    rejected: Rejections
    count: Counter[str] = field(default_factory=Counter)

    def read(self, source: Source, bar: "tqdm[Any]") -> None:
        """Take in one file.

        Raises:
            UserError: no row of it has a known form.
        """
        form: Form | None = None if self.wanted.format == "auto" else self.wanted.format
        placed = map(partial(self._split, source), batches.read(source, form, bar))
        for one, examples in batches.ahead(self._encode, placed):
            unusable = one.batch.unusable + self._write(one, examples)
            for line, reason in sorted(unusable):
                self.rejected.add(source, line, reason)
            self.count["rows_in"] += one.batch.rows
            form = one.batch.form
            if self.splitter.fraction is None and self._is_full(source.split):
                return
        if form is None and self.rejected.count:
            raise UserError(
                f"{source.name}: no row of a known form; {self.rejected.first}; expected `text` "
                "with `### Human:` in it, `messages`, `conversations`, or `instruction` and "
                "`output`; see docs/formats.md"
            )

    def _split(self, source: Source, batch: Batch) -> _Placed:
        """Say where each conversation goes, but for those that find their split full."""
        found = [(self.splitter.split_of(source.split, c.question), c) for c in batch.conversations]
        needed = [(split, c) for split, c in found if not self._is_full(split)]
        return _Placed(batch, needed)

    def _encode(self, one: _Placed) -> list[Example | RejectedRow]:
        return self.encoder.encode([conversation.messages for _, conversation in one.needed])

    def _write(
        self, one: _Placed, supervised: list[Example | RejectedRow]
    ) -> list[tuple[int, str]]:
        """Put conversations into their splits; those that cannot be used, by line and reason."""
        unusable: list[tuple[int, str]] = []
        self.count["beyond_max_rows"] += len(one.batch.conversations) - len(one.needed)
        for (split, conversation), made in zip(one.needed, supervised, strict=True):
            if self._is_full(split):
                self.count["beyond_max_rows"] += 1
            elif isinstance(made, RejectedRow):
                unusable.append((conversation.line, str(made)))
            else:
                self.count[self._keep(split, conversation, made)] += 1
        return unusable

    def _keep(self, split: Split, conversation: Conversation, made: Example) -> str:
        """Write a conversation if it is new; which way it took."""
        question, identifier = conversation.question, conversation_id(made.messages)
        if split == "train" and self.splitter.leaks(question):
            return "leaked"
        if self.splitter.is_duplicate(identifier):
            return "duplicates"
        if split == "eval":
            self.splitter.hold_out(question)
        answer = conversation.answer if made.answered else None
        self.splits[split].add(identifier, made, answer, conversation.language)
        self.count["truncated"] += made.truncated
        self.count["dropped_turns"] += conversation.dropped_turn
        return "kept"

    def _is_full(self, split: Split) -> bool:
        limit = self.wanted.max_rows
        return split == "train" and limit is not None and self.splits[split].conversations >= limit

    def figures(self) -> dict[str, Any]:
        """The metrics."""
        names = ("duplicates", "leaked", "truncated", "dropped_turns", "beyond_max_rows")
        return {
            "rows_in": self.count["rows_in"],
            "rejected": self.rejected.count,
            **{name: self.count[name] for name in names},
            **{split: one.figures() for split, one in self.splits.items()},
        }

    def require_usable(self) -> None:
        """Refuse a source of which too little is left.

        Raises:
            UserError: with the figures.
        """
        rows, bad = self.count["rows_in"], self.rejected.count
        if bad > self.wanted.max_rejected * rows:
            raise UserError(
                f"params.yaml: prepare.max_rejected is {self.wanted.max_rejected}; {bad} of {rows} "
                f"rows ({bad / rows:.2%}) cannot be used; first {self.rejected.first}; most often: "
                f"{self.rejected.commonest()}; mend the file, or raise prepare.max_rejected"
            )
        for split, one in self.splits.items():
            if not one.conversations:
                begun = f"params.yaml: prepare.eval_fraction is {self.wanted.eval_fraction}"
                change = ", or change prepare.eval_fraction or prepare.seed"
                if self.splitter.fraction is None:
                    begun, change = "data.path: it has an eval file of its own", " to its files"
                first = f", first {self.rejected.first}" if bad else ""
                raise UserError(
                    f"{begun}; of {rows} rows none is left for the {split} split ({bad} rejected"
                    f"{first}; {self.count['duplicates']} duplicates, {self.count['leaked']} of "
                    "train begin as held-out ones do); expected one at least; add conversations"
                    f"{change}"
                )
