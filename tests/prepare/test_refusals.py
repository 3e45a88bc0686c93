"""The whole stage: a template that cannot be trusted, or never teaches to stop, is refused."""

from pathlib import Path

import pytest

from stages.shared.core.errors import UserError
from tests import tiny, vocabularies
from tests.prepare.helpers import ROWS, Stage, row
from tests.prepare.test_golden import OWN

TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# As models that think do: what they thought in earlier replies is taken out.
THINKING = "{% if not loop.last %}{{ m['content'].split('</think>')[-1] }}{% else %}"


def each(turn: str, prompt: str = PROMPT) -> str:
    return f"{{% for m in messages %}}{turn}{{% endfor %}}{prompt}"


def stage_with(folder: Path, chat_template: str | None) -> Stage:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder / "tokenizer")
    return Stage(folder, folder / "tokenizer")


@pytest.mark.parametrize(
    ("chat_template", "reason"),
    [
        (None, "has no chat template"),
        (each(TURN.replace("<|im_end|>", "")), "puts no end token after a reply"),
        (each("{% if not loop.last %}" + TURN + "{% else %}{{ m['content'] }}{% endif %}"),
         "renders the same turns differently once others follow"),
        (each(TURN.replace("{{ m['content'] }}", "{% if loop.last and m['role'] == 'assistant' %}"
                           "<think>\n</think>\n{% endif %}{{ m['content'] }}")),
         "renders the same turns differently once others follow"),
        (each(TURN, PROMPT.replace("assistant", "robot")),
         "renders the same turns differently once others follow"),
        (each(TURN, ""), r"has no generation prompt: the model would write "
         r"'<|im_start|>assistant\n'"),
        (each("{{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}\n", ""),
         "puts nothing but white space between two messages"),
    ],
    ids=["none", "no end", "no end at the last", "a thought at the last", "another prompt",
         "no generation prompt", "no boundary"],
)  # fmt: skip
def test_a_chat_template_that_is_refused(
    tmp_path: Path, chat_template: str | None, reason: str
) -> None:
    stage = stage_with(tmp_path, chat_template)
    with pytest.raises(UserError) as error:
        stage.prepare(ROWS, template="tokenizer")
    assert reason in str(error.value)
    assert str(error.value).startswith("params.yaml: prepare.template is 'tokenizer'; ")
    assert "Choose chatml" in str(error.value)
    assert "\n" not in str(error.value)
    assert not stage.out.exists()


def test_a_reply_that_the_template_strips_later_is_refused(tmp_path: Path) -> None:
    strips = TURN.replace("{{ m['content'] }}", THINKING + "{{ m['content'] }}{% endif %}")
    stage = stage_with(tmp_path, each(strips))
    thought = "<think>two</think>four"
    one, two = row("one", thought), row("two", f"{thought}### Human: why### Assistant: {thought}")
    rows = [*ROWS, one, two]
    figures = stage.prepare(rows, template="tokenizer", max_length=512, max_rejected=0.05)
    [rejected] = stage.rejected()
    assert rejected["line"] == 22
    assert rejected["reason"] == "the model's own chat template alters the text of a message"
    assert figures["train"]["conversations"] + figures["eval"]["conversations"] == 21
    with pytest.raises(UserError, match=r"template alters .* first my/train.jsonl:22") as error:
        stage.prepare(rows, template="tokenizer", max_length=512)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", ["chatml", "guanaco", "llama2", "tokenizer"])
def test_a_model_without_an_end_token_is_refused(tmp_path: Path, template: str) -> None:
    tokenizer = vocabularies.plain()
    tokenizer.eos_token = None
    tokenizer.chat_template = OWN
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    stage = Stage(tmp_path, tmp_path / "tokenizer")
    with pytest.raises(
        UserError, match=r"^models/tokenizer: .* no end token. Set eos_token"
    ) as error:
        stage.prepare(ROWS, template=template)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", ["chatml", "guanaco", "llama2", "tokenizer"])
def test_an_end_token_that_pads_too_is_learnt_in_every_row(tmp_path: Path, template: str) -> None:
    stage = stage_with(tmp_path, OWN)
    assert tiny.tokenizer().pad_token_id == tiny.tokenizer().eos_token_id == 2
    stage.prepare(ROWS, template=template)
    rows = stage.rows("train") + stage.rows("eval")
    assert len(rows) == len(ROWS)
    for one in rows:
        learnt = [
            token for token, mask in zip(one["input_ids"], one["loss_mask"], strict=True) if mask
        ]
        assert learnt.count(2) == 1
        assert learnt[-1] == 2
