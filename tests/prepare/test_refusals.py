"""The whole stage: a chat template that cannot be trusted, or never teaches to stop, is refused."""

from pathlib import Path
from typing import Any

import pytest

from stages.shared.core.errors import UserError
from tests import tiny
from tests.prepare.helpers import ROWS, Stage, row

TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
NO_END = "puts no end token after a reply"
# As models that think do: what they thought in earlier replies is taken out.
STRIPPED = "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}"


def each(turn: str, prompt: str = PROMPT) -> str:
    return f"{{% for m in messages %}}{turn}{{% endfor %}}{prompt}"


def stage_with(folder: Path, chat_template: str) -> Stage:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder / "tokenizer")
    return Stage(folder, folder / "tokenizer")


@pytest.mark.parametrize(
    ("chat_template", "reason"),
    [
        (each(TURN.replace("<|im_end|>", "")), NO_END),
        (each("{% if loop.last %}{{ m['content'] }}{% else %}" + TURN + "{% endif %}"), NO_END),
        (each(TURN, PROMPT.replace("assistant", "robot")), "is not how its replies begin"),
    ],
    ids=["no end", "no end at the last", "another prompt"],
)
def test_refused_chat_template_writes_nothing(
    tmp_path: Path, chat_template: str, reason: str
) -> None:
    stage = stage_with(tmp_path, chat_template)
    with pytest.raises(UserError) as error:
        stage.prepare(ROWS, template="tokenizer")
    assert reason in str(error.value)
    assert str(error.value).startswith("params.yaml: prepare.template is 'tokenizer'; ")
    assert "\n" not in str(error.value)
    assert not stage.out.exists()


def test_reply_that_the_template_strips_later_is_rejected(tmp_path: Path) -> None:
    stage = stage_with(tmp_path, each(TURN.replace("{{ m['content'] }}", STRIPPED)))
    thought = "<think>two</think>four"
    one, two = row("one", thought), row("two", f"{thought}### Human: why### Assistant: {thought}")
    changed: dict[str, Any] = {"template": "tokenizer", "max_length": 512}
    stage.prepare([*ROWS, one, two], **changed, max_rejected=0.05)
    [rejected] = stage.rejected()
    assert rejected["line"] == 22
    assert rejected["reason"] == "the chat template takes the text of a message apart"
    with pytest.raises(UserError, match=r"takes the text .* first my/train.jsonl:22"):
        stage.prepare([*ROWS, one, two], **changed)
