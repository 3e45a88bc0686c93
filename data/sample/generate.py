"""The embedded conversations, written from a seed.

Tasks with computed answers, in the raw form of openassistant-guanaco with its quirks: no line break
between turns, about a quarter of the rows ending on a turn that nobody answered, `###` inside
replies, duplicates, a few rows that cannot be used.

Writes: data/sample/conversations.jsonl

Run: python -m data.sample.generate
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.sample.dice import Dice
from data.sample.exchange import Exchange, Task
from data.sample.follow_up import THANKS, follow_up
from data.sample.tasks import arithmetic, dates, extraction, lists, snippets, strings, tables, units

CONVERSATIONS = Path("data/sample/conversations.jsonl")
SEED = 42

SOUND_ROWS = 1600
DUPLICATES = 15

LANGUAGES = {
    "en": 60, "es": 6, "de": 6, "fr": 6, "it": 5, "pt": 5, "nl": 5, "pl": 3, "ru": 2, "zh": 2
}  # fmt: skip

# (exchanges, whether a turn without a reply follows them) → how often, in percent
SHAPES = {(1, False): 60, (2, False): 12, (3, False): 3, (1, True): 20, (2, True): 5}

FAMILIES: Sequence[tuple[Task, ...]] = (
    arithmetic.TASKS,
    units.TASKS,
    dates.TASKS,
    lists.TASKS,
    strings.TASKS,
    extraction.TASKS,
    tables.TASKS,
    snippets.TASKS,
)
TASKS = [task for family in FAMILIES for task in family]

# Rows of a kind that real exports hold too; each must be rejected, and none may stop a reader.
UNUSABLE: tuple[dict[str, Any], ...] = (
    {"text": "", "answer": None, "language": "en"},
    {"text": None, "answer": None, "language": "en"},
    {"answer": None, "language": "en"},
    {"text": "What is 4 plus 4?", "answer": None, "language": "en"},
    {"text": "### Human: Can you help me with a list?", "answer": None, "language": "en"},
    {"text": "### Human: ¿Puedes ayudarme?", "answer": None, "language": "es"},
    {
        "text": "### Human: Wait, one moment.### Human: What is 1 plus 1?"
        "### Assistant: → 1 + 1 = 2\n2",
        "answer": "2",
        "language": "en",
    },
    {"text": "### Assistant: → 2 + 2 = 4\n4", "answer": "4", "language": "en"},
)


class Writer:
    """Writes conversations in which no question, and no working of one, comes up twice."""

    def __init__(self, seed: int) -> None:
        self.dice = Dice(seed)
        self._seen: set[tuple[str, str]] = set()

    def new_question(self, language: str) -> Exchange:
        """A task's instance that has not been asked; another wording does not make it new."""
        tasks = [task for task in TASKS if language in task.phrases]
        while True:
            task = self.dice.weighted(tasks, [task.weight for task in tasks])
            exchange = task.ask(self.dice, language)
            keys = {(language, exchange.reply), ("", exchange.prompt)}
            if not keys & self._seen:
                self._seen |= keys
                return exchange

    def next_question(self, language: str, answer: str) -> Exchange:
        """A question about the last answer, or a new one."""
        later = follow_up(self.dice, language, answer) if self.dice.number(1, 3) > 1 else None
        return later or self.new_question(language)

    def conversation(self) -> dict[str, Any]:
        """A row that can be used."""
        language = self.dice.weighted(list(LANGUAGES), list(LANGUAGES.values()))
        count, unanswered = self.dice.weighted(list(SHAPES), list(SHAPES.values()))
        exchanges = [self.new_question(language)]
        while len(exchanges) < count:
            exchanges.append(self.next_question(language, exchanges[-1].answer))
        answer = exchanges[-1].answer
        text = "".join(f"### Human: {e.prompt}### Assistant: {e.reply}" for e in exchanges)
        if unanswered:
            text += f"### Human: {self.last_words(language, answer)}"
        return {"text": text, "answer": answer, "language": language}

    def last_words(self, language: str, answer: str) -> str:
        """A turn that nobody answers: thanks, or one more question."""
        if self.dice.number(1, 2) == 1:
            return self.dice.choice(THANKS[language])
        return self.next_question(language, answer).prompt


def rows(seed: int) -> list[dict[str, Any]]:
    """All rows, in random order."""
    writer = Writer(seed)
    sound = [writer.conversation() for _ in range(SOUND_ROWS)]
    everything = [*sound, *writer.dice.sample(sound, DUPLICATES), *UNUSABLE]
    return writer.dice.sample(everything, len(everything))


def write(target: Path, seed: int = SEED) -> None:
    """Write the rows as JSON Lines, the same bytes on every machine."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(seed)]
    target.write_bytes("".join(lines).encode())


if __name__ == "__main__":
    write(CONVERSATIONS)
