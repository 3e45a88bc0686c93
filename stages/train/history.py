"""Loss by optimizer step, the best evaluation, and counts of tokens."""

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

from stages.shared.core import files
from stages.shared.model import packing
from stages.shared.model.packing import Example

COLUMNS = ("step", "epoch", "learning_rate", "loss", "eval_loss", "gradient_norm")
OF_MIXTURES = ("router_aux_loss",)  # columns that only they have


@dataclass
class History:
    """Losses by optimizer step, nats a supervised token; step 0 is the evaluation before training.

    Attributes:
        rows: by step, a value a column of `COLUMNS`.
        best_step: where `eval_loss` was lowest.
        evaluations_since_best: without an improvement.
        expert_use: of a mixture, tokens by layer and expert of the held-out conversations, `before`
            training and `after`, at `best_step`.
    """

    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    best_step: int = 0
    best_loss: float = float("inf")
    evaluations_since_best: int = 0
    expert_use: dict[str, list[list[int]]] = field(default_factory=dict)

    def record(self, step: int, **values: float) -> None:
        """Add values to a step's row."""
        self.rows.setdefault(step, {"step": step}).update(values)

    def record_evaluation(
        self, step: int, epoch: float, eval_loss: float, expert_use: list[list[int]]
    ) -> None:
        """Add an evaluation, and note whether it is the best so far."""
        self.record(step, epoch=epoch, eval_loss=eval_loss)
        if expert_use:
            self.expert_use.setdefault("before", expert_use)
        if eval_loss < self.best_loss:
            if expert_use:
                self.expert_use["after"] = expert_use
            self.best_step, self.best_loss, self.evaluations_since_best = step, eval_loss, 0
        else:
            self.evaluations_since_best += 1

    def evaluated(self, step: int) -> bool:
        """Whether this step has been evaluated."""
        return "eval_loss" in self.rows.get(step, {})

    def train_loss(self, until: int, last: int) -> float | None:
        """The mean loss of the `last` steps up to and including step `until`; None if none."""
        return self.mean("loss", until, last)

    def mean(self, column: str, until: int, last: int) -> float | None:
        """The mean of a column over the `last` steps up to `until`; None if it has no value."""
        steps = range(max(1, until - last + 1), until + 1)
        values = [self.rows[step][column] for step in steps if column in self.rows[step]]
        return sum(values) / len(values) if values else None

    def write(self, path: Path) -> None:
        """Write the rows as CSV, a value that was not measured left empty."""
        with files.whole_file(path) as partial, partial.open("w", newline="") as file:
            measured = {column for row in self.rows.values() for column in row}
            columns = [*COLUMNS, *(c for c in OF_MIXTURES if c in measured)]
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            for step in sorted(self.rows):
                row = self.rows[step].items()
                writer.writerow({k: v if k == "learning_rate" else round(v, 6) for k, v in row})


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of some steps, over all processes.

    Attributes:
        tokens: of the conversations.
        input_tokens: of them, those up to the last that predicts a supervised token.
        supervised_tokens: that are predicted.
        computed_tokens: positions that went through the model, padding included if there were any.
        capacity_tokens: that the micro-batches could have held.
    """

    tokens: int = 0
    input_tokens: int = 0
    supervised_tokens: int = 0
    computed_tokens: int = 0
    capacity_tokens: int = 0

    @classmethod
    def of(
        cls, examples: Sequence[Example], micro_batches: Sequence[Sequence[Example]], limit: int
    ) -> "TokenCounts":
        """Counts of one step, in micro-batches of at most `limit` tokens."""
        computed = list(map(packing.input_tokens, micro_batches))
        return cls(
            tokens=sum(map(len, examples)),
            input_tokens=packing.input_tokens(examples),
            supervised_tokens=sum(e.supervised_tokens for e in examples),
            computed_tokens=sum(computed),
            capacity_tokens=sum(max(limit, tokens) for tokens in computed),
        )

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        pairs = zip(astuple(self), astuple(other), strict=True)
        return TokenCounts(*(one + another for one, another in pairs))
