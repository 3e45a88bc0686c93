"""What a task is made of, and the one style that every reply has.

A reply is one or two lines of working, each behind an arrow, and then the answer alone:

    → 48 + 17 = 65
    65
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from data.sample.dice import Dice
from data.sample.words import WORDS, Words

Phrases = Mapping[str, Sequence[str]]  # language → ways to put the question, with {slots}


@dataclass(frozen=True)
class Problem:
    """One instance of a task, before it is put into a language."""

    slots: Mapping[str, object]  # what the phrases' {slots} are filled with
    working: str  # a line or two
    answer: str
    heading: str = ""  # a Markdown heading above the working


@dataclass(frozen=True)
class Exchange:
    """A question, its reply in the style above, and the answer, which is the reply's last line."""

    prompt: str
    reply: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A kind of question: how often it is asked, how it is put, how it is solved."""

    weight: int
    phrases: Phrases
    solve: Callable[[Dice, Words], Problem]

    def ask(self, dice: Dice, language: str) -> Exchange:
        """A random instance in one of the languages that the task has phrases for."""
        problem = self.solve(dice, WORDS[language])
        return put(problem, dice.choice(self.phrases[language]))


def put(problem: Problem, phrase: str) -> Exchange:
    """Put a problem into words and give its reply the common style."""
    lines = [f"→ {line}" for line in problem.working.split("\n")]
    if problem.heading:
        lines.insert(0, f"### {problem.heading}")
    return Exchange(
        prompt=phrase.format(**problem.slots),
        reply="\n".join([*lines, problem.answer]),
        answer=problem.answer,
    )
