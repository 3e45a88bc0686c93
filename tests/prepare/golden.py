"""Reads golden.txt: conversations, and what of them is supervised with each template."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.prepare.loss_mask import TrainOn

TEMPLATES = ("chatml", "guanaco", "llama2", "tokenizer")
TRAIN_ON: tuple[TrainOn, ...] = ("assistant", "last", "all")
_SUPERVISED = {"assistant": "+*", "last": "*"}


@dataclass
class Case:
    """A conversation of golden.txt.

    Attributes:
        name: its heading.
        row: a row of a source file, in the form that the page shows.
        max_length: tokens.
        tokens: of each template the tokens with their marks, in order.
        refusals: of each template that refuses it, why.
    """

    name: str
    row: dict[str, Any] = field(default_factory=dict)
    max_length: int = 512
    tokens: dict[str, list[str]] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    def expected(self, template: str, train_on: TrainOn) -> str | list[tuple[str, bool]]:
        """Why it is refused, or each token and whether it is supervised."""
        tokens = self.tokens.get(template, [])
        if template in self.refusals and (train_on != "all" or not tokens):
            return self.refusals[template]
        marks = [token[0] if token[0] in "+*" else "" for token in tokens]
        if train_on == "all":
            supervised = [at > 0 for at in range(len(tokens))]
        else:
            supervised = [bool(mark) and mark in _SUPERVISED[train_on] for mark in marks]
        plain = [token[len(mark) :] for token, mark in zip(tokens, marks, strict=True)]
        return list(zip(plain, supervised, strict=True))


def read() -> list[Case]:
    """All conversations of the page."""
    lines = Path(__file__).with_name("golden.txt").read_text(encoding="utf-8").split("\n")
    cases: list[Case] = []
    template = ""
    for line in lines[lines.index(next(x for x in lines if x.startswith("== "))) :]:
        if line.startswith("== "):
            cases.append(Case(line[3:]))
        elif line[10:11] in ("|", "!"):
            template = line[:9].strip() or template
            _take_tokens(cases[-1], template, line[10], line[12:])
        elif line:
            _take_row(cases[-1], *line.split(": ", 1))
    return cases


def _take_tokens(case: Case, template: str, kind: str, rest: str) -> None:
    if kind == "!":
        case.refusals[template] = rest
    else:
        case.tokens.setdefault(template, []).extend(rest.split(" "))


def _take_row(case: Case, key: str, value: str) -> None:
    if key == "max_length":
        case.max_length = int(value)
    elif key == "text":
        case.row["text"] = json.loads(value)
    else:
        message = {"role": key, "content": json.loads(value)}
        case.row.setdefault("messages", []).append(message)
