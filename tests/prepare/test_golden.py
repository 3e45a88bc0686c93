"""The mask, token by token, as golden.txt has it; and on the stage's whole way to its files."""

from pathlib import Path

import pytest

from stages.prepare.forms import parse
from stages.prepare.loss_mask import ExampleEncoder, TrainOn
from stages.shared.chat import templates
from stages.shared.chat.conversation import RejectedRow
from tests import tiny
from tests.conversations import encode
from tests.prepare import golden
from tests.prepare.golden import Case
from tests.prepare.helpers import Stage

OWN = (
    "<|endoftext|>{% if messages[0]['role'] != 'system' %}<|im_start|>system\nfor<|im_end|>"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY = tiny.tokenizer()
TINY.chat_template = OWN
CASES = golden.read()


def shown(input_ids: list[int], loss_mask: list[bool]) -> list[tuple[str, bool]]:
    tokens = TINY.convert_ids_to_tokens(input_ids)
    return list(zip(tokens, loss_mask, strict=True))


@pytest.mark.parametrize("train_on", golden.TRAIN_ON)
@pytest.mark.parametrize("template", golden.TEMPLATES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_token_is_supervised_or_not(case: Case, template: str, train_on: TrainOn) -> None:
    messages = parse(case.row).messages
    made = templates.make(template, TINY)
    [one] = encode(ExampleEncoder(TINY, made, train_on, case.max_length), [messages])
    if isinstance(one, RejectedRow):
        assert str(one) == case.expected(template, train_on)
    else:
        found = shown(one.input_ids.tolist(), one.loss_mask.tolist())
        assert found == case.expected(template, train_on)


@pytest.mark.parametrize("form", ["text", "messages"])  # a file is of one
@pytest.mark.parametrize("train_on", golden.TRAIN_ON)
@pytest.mark.parametrize("template", golden.TEMPLATES)
def test_the_files_hold_the_same(
    tmp_path: Path, template: str, train_on: TrainOn, form: str
) -> None:
    TINY.save_pretrained(tmp_path / "tokenizer")
    stage = Stage(tmp_path, tmp_path / "tokenizer")
    cases = [case for case in CASES if form in case.row and case.max_length == 512]
    held_out = [{"instruction": "plus", "output": "two"}]
    wanted = {"template": template, "train_on": train_on, "max_length": 512, "max_rejected": 0.5}
    stage.prepare([case.row for case in cases], held_out, **wanted)
    expected = [case.expected(template, train_on) for case in cases]
    written = [shown(row["input_ids"], row["loss_mask"]) for row in stage.rows("train")]
    assert written == [one for one in expected if isinstance(one, list)]
    refused = [entry["reason"] for entry in stage.rejected()]
    assert refused == [one for one in expected if isinstance(one, str)]


def test_the_page_is_whole() -> None:
    assert len(CASES) >= 12
    for case in CASES:
        assert {*case.tokens, *case.refusals} == set(golden.TEMPLATES), case.name
