"""As many conversations as wanted: the sample again and again, with seeded changes."""

import json
import random
import re
from pathlib import Path

SAMPLE = Path(__file__).parents[1] / "data/sample/conversations.jsonl"
_CHANGED = 0.2  # of the words
_WORD = re.compile(r"[^\W\d_]{3,}|\d+")
_MARKERS = {"Human", "Assistant"}


def write(folder: Path, rows: int, seed: int = 0) -> None:
    """Write what `fetch_data` would leave in data/raw.

    Numbers become others of the same length, and a fifth of the words others of the sample: nearly
    all rows differ, at the length and in the languages of the sample.
    """
    sample = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    texts = [row.get("text") or "" for row in sample]
    words = sorted({w for t in texts for w in _WORD.findall(t) if w.isalpha()} - _MARKERS)
    draw = random.Random(seed)  # noqa: S311

    def change(match: re.Match[str]) -> str:
        word = match[0]
        if word.isdigit():
            return str(draw.randrange(10 ** len(word))).zfill(len(word))
        return word if word in _MARKERS or draw.random() > _CHANGED else draw.choice(words)

    folder.mkdir(parents=True)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for index in range(rows):
            row = sample[index % len(sample)]
            changed = row | {"text": _WORD.sub(change, texts[index % len(sample)])}
            file.write(json.dumps(changed, ensure_ascii=False) + "\n")
    listed = [{"split": "train", "name": "train.jsonl"}]
    (folder / "source.json").write_text(json.dumps({"files": listed}), encoding="utf-8")
