"""A property of random rows, templates and tokenizers, from a line of JSON to its tokens.

Every supervised token is text that the row asks to be supervised, all text is what the template
renders, and nothing of a row is unread without a word. Words like `w0012` stand once in a row.
"""

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stages.prepare.config import Prepare
from stages.prepare.encoding import encode_rows
from stages.shared.chat import templates
from tests import tiny, vocabularies
from tests.prepare.helpers import DEFAULTS
from tests.tiny import CHATML

WORD = re.compile(r"w\d{4}")
ROLES = {"system": ("system", "developer"), "user": ("user", "human")}
ROLES |= {"assistant": ("assistant", "gpt")}
PIECES = ["two", "is it", "\n", " ### ", "<|im_end|>", "</s>", "<s>", "<|im_start|>user\n"]
# Unread in any form: reported or rejected, by name.
EXTRAS = ("id", "source", "context", "chosen", "label", "Input", "image", "output", "completion")
Turn = tuple[str, str, int]  # role, content, weight


def lowercasing() -> PreTrainedTokenizerFast:
    made = vocabularies.sentencepiece("<s>", "</s>", bos_token="<s>", eos_token="</s>")
    replace = normalizers.Replace(" ", "▁")
    made.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), replace]
    )
    made.backend_tokenizer.pre_tokenizer = None
    return made


TOKENIZERS = {
    "tiny": tiny.tokenizer,
    "llama2": vocabularies.llama2,
    "llama3": vocabularies.llama3,
    "gemma": vocabularies.gemma,
    "lowercasing": lowercasing,
}


class Rows:
    """Random rows, each with the turns that it says."""

    def __init__(self, seed: str) -> None:
        self.random, self.words = random.Random(seed), (f"w{n:04}" for n in itertools.count())

    def text(self) -> str:
        some = [next(self.words), *self.random.choices(PIECES, k=self.random.randint(0, 3))]
        return " ".join([*some, next(self.words)])

    def row(self) -> tuple[dict[str, Any], list[Turn]]:
        draw = self.random.random
        turns: list[Turn] = [("system", self.text(), 1)] if draw() < 0.3 else []
        for _ in range(self.random.randint(1, 3)):
            weight = int(draw() < 0.8)
            turns += [("user", self.text(), 1), ("assistant", self.text(), weight)]
        form = self.random.choice([self.messages, self.guanaco, self.alpaca, self.completion])
        row = form(turns)
        if draw() < 0.3:
            row["answer"] = next(self.words)
        if draw() < 0.3:
            value = next(self.words)
            name, held = self.random.choice(EXTRAS), [value, [value], {"a": value}]
            row.setdefault(name, self.random.choice(held))
        return row, turns

    def messages(self, turns: list[Turn]) -> dict[str, Any]:
        keys = self.random.choice([("role", "content"), ("from", "value")])
        messages = []
        for role, text, weight in turns:
            parts = [{"type": "text", "text": part} for part in re.split("(?<=t)", text)]
            content = self.random.choice([text, text, parts])
            message: dict[str, Any] = {keys[0]: self.random.choice(ROLES[role]), keys[1]: content}
            if role == "assistant" and (not weight or self.random.random() < 0.3):
                message[self.random.choice(["weight", "train"])] = bool(weight)
            if self.random.random() < 0.1:
                message[self.random.choice(EXTRAS)] = next(self.words)
            messages.append(message)
        if self.random.random() < 0.2:
            messages.append({keys[0]: "user", keys[1]: self.text()})
        name = self.random.choice(["messages", "conversations"])
        return {name: self.random.choice([messages, json.dumps(messages)])}

    def guanaco(self, turns: list[Turn]) -> dict[str, Any]:
        turns[:] = [(role, text, 1) for role, text, _ in turns]
        marks = {"system": "", "user": "### Human: ", "assistant": "### Assistant: "}
        return {"text": "".join(marks[role] + text for role, text, _ in turns)}

    def alpaca(self, turns: list[Turn]) -> dict[str, Any]:
        turns[:] = [(role, text, 1) for role, text, _ in turns]
        row = {"system": turns[0][1]} if turns[0][0] == "system" else {}
        *earlier, user, reply = [text for role, text, _ in turns if role != "system"]
        pairs = [list(pair) for pair in zip(earlier[::2], earlier[1::2], strict=True)]
        more = {"input": self.text()} if self.random.random() < 0.5 else {}
        turns[-2] = ("user", "\n\n".join([user, *more.values()]), 1)
        return row | more | {"instruction": user, "output": reply, "history": pairs}

    def completion(self, turns: list[Turn]) -> dict[str, Any]:
        messages = [{"role": role, "content": text} for role, text, _ in turns]
        turns[:] = [(r, t, int(i == len(turns) - 1)) for i, (r, t, _) in enumerate(turns)]
        return {"prompt": messages[:-1], "completion": messages[-1:]}


def words_of(value: Any, *path: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each word and the names of the fields that it stands in."""
    if isinstance(value, str) and value.startswith("["):
        value = json.loads(value)
    if isinstance(value, dict | list):
        named = value.items() if isinstance(value, dict) else (("", one) for one in value)
        for name, one in named:
            yield from words_of(one, *path, *filter(None, [name]))
    else:
        yield from ((word, path) for word in WORD.findall(str(value)))


def squeeze(text: str) -> str:
    return "".join(text.lower().split())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_what_the_row_says(tmp_path: Path, name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = CHATML.replace("<|im_end|>", tokenizer.eos_token)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    count = Counter[str]()
    for template, train_on, max_length in itertools.product(
        ("chatml", "guanaco", "llama2", "tokenizer"), ("assistant", "last"), (60, 4000)
    ):
        source = Rows(f"{name} {template} {train_on} {max_length}")
        rows = [source.row() for _ in range(25)]
        settings = {"template": template, "train_on": train_on, "max_length": max_length}
        lines = [(at, json.dumps(row).encode()) for at, (row, _) in enumerate(rows)]
        encoded = encode_rows(lines, str(tmp_path), Prepare(**(DEFAULTS | settings)))
        form = templates.make(template, tokenizer).format()
        for (row, turns), columns in zip(rows, encoded.to_pylist(), strict=True):
            count["rejected"] += bool(columns["reason"])
            if not columns["reason"]:
                check(row, turns, columns, tokenizer, form, train_on)
                count.update(accepted=1, cut=columns["truncated"], unread=len(columns["unknown"]))
    assert min(count.values()) > 20, count
    assert count["accepted"] > 120


def check(
    row: dict[str, Any],
    turns: list[Turn],
    columns: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    form: templates.Format,
    train_on: str,
) -> None:
    kept = columns["messages"]
    ids, mask = columns["input_ids"], columns["loss_mask"]
    # Supervised is what the row asks for, after what its first token has of the prompt.
    replies = [(text, w) for role, text, w in turns[: len(kept)] if role == "assistant"]
    selected = [text for text, weight in replies[-(train_on == "last") :] if weight]
    runs = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    supervised = [[one for one, _ in run] for on, run in runs if on]
    for text, run in zip(selected, supervised, strict=True):
        asked, whole = squeeze(text + form.eos_token), squeeze(tokenizer.decode(run))
        cut = columns["truncated"] and run is supervised[-1]
        first = len(squeeze(tokenizer.decode(run[:1])))
        rests = [whole[k:] for k in range(first + 1)]
        assert any(asked == rest or (cut and asked.startswith(rest)) for rest in rests)
    # All of it is what the template renders.
    messages = [{"role": role, "content": text.strip()} for role, text, _ in turns[: len(kept)]]
    assert [{k: m[k] for k in ("role", "content")} for m in kept] == messages
    options = {"chat_template": form.chat_template, "tokenize": False}
    rendered = str(tokenizer.apply_chat_template(messages, **options))
    assert rendered.startswith(columns["text"])
    assert columns["truncated"] or rendered == columns["text"]
    assert squeeze(rendered).startswith(squeeze(tokenizer.decode(ids)))
    # Nothing is unread without a word.
    unread = {field.rpartition(".")[2] for field in columns["unknown"]}
    for word, path in words_of(row):
        told = word in columns["text"] or word == columns["answer"] or unread & {*path}
        assert told or columns["truncated"] or columns["dropped_turns"], (word, path)
