"""Templates: their text, where replies stand, and what is refused."""

from functools import partial
from pathlib import Path
from typing import cast

import pytest
from transformers import PreTrainedTokenizerFast

from stages.shared.chat import templates
from stages.shared.chat.conversation import Conversation, Message, RejectedRow
from stages.shared.core import bounds
from stages.shared.core.errors import UserError
from tests import tiny, vocabularies
from tests.conversations import FORGED, PLAIN, assistant, system, user

NAMES = ("chatml", "guanaco", "llama2", "tokenizer")
OWN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2_OWN = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (  # its role markers are plain text
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
EXCHANGE = PLAIN["one exchange"]


def with_template(chat_template: str | None) -> PreTrainedTokenizerFast:
    made = tiny.tokenizer()
    made.chat_template = chat_template
    return made


TOKENIZER = with_template(OWN)
RENDERED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n"
    "<|im_start|>assistant\nB<|im_end|>\n",
    "guanaco": "S\n### Human: U\n### Assistant: A<|im_end|>\n"
    "### Human: V\n### Assistant: B<|im_end|>\n",
    "llama2": "<|im_start|>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A <|im_end|>"
    "<|im_start|>[INST] V [/INST] B <|im_end|>",
}
REPLIES = {
    "chatml": ["A<|im_end|>", "B<|im_end|>"],
    "guanaco": [" A<|im_end|>", " B<|im_end|>"],
    "llama2": [" A <|im_end|>", " B <|im_end|>"],
}
TWO = [system("S"), user("U"), assistant("A"), user("V"), assistant("B")]


@pytest.mark.parametrize("name", RENDERED)
def test_template_renders_messages_and_replies(name: str) -> None:
    rendered = templates.make(name, TOKENIZER).render(TWO)
    assert rendered.text == RENDERED[name]
    assert [rendered.text[p.start : p.end] for p in rendered.parts] == ["S", "U", "A", "V", "B"]
    assert [rendered.text[a:b] for a, b in rendered.replies] == REPLIES[name]


@pytest.mark.parametrize("name", RENDERED)
def test_template_is_shown_in_the_documentation(name: str) -> None:
    pages = (Path(__file__).parents[3] / "docs").glob("*.md")
    assert any(f"```\n{RENDERED[name].rstrip()}\n```" in page.read_text("utf-8") for page in pages)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("conversation", [*PLAIN.values(), FORGED, TWO])
def test_template_renders_as_apply_chat_template(name: str, conversation: list[Message]) -> None:
    template = templates.make(name, TOKENIZER)
    for messages, prompt in ((conversation, False), (conversation[:-1], True)):
        rendered = (
            template.prompt(Conversation(messages), len(messages))
            if prompt
            else template.render(messages)
        )
        assert rendered.text == TOKENIZER.apply_chat_template(
            cast(list[dict[str, str]], messages),
            chat_template=template.format().chat_template,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    assert template.render(conversation).text.startswith(rendered.text)
    assert template.render(conversation).replies[-1][0] == len(rendered.text)


def test_chatml_ends_turns_with_the_end_token_of_other_models() -> None:
    template = templates.make("chatml", vocabularies.plain())
    assert template.render(EXCHANGE).text == (
        "<|im_start|>user\ntwo plus two is<|endoftext|>\n<|im_start|>assistant\nfour<|endoftext|>\n"
    )
    assert (template.eos_token, template.markers) == ("<|endoftext|>", ("<|im_start|>",))


def test_template_stops_at_its_end_and_the_tokenizers() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    template = templates.make("chatml", tokenizer)
    assert (template.eos_token, template.stop_ids) == ("<|im_end|>", [2, 0])


@pytest.mark.parametrize(
    ("chat_template", "markers"),
    [
        (OWN, ()),
        (LLAMA2_OWN, ("[/INST]", "[INST]")),
        (ZEPHYR, ("<|assistant|>", "<|system|>", "<|user|>")),
    ],
)
def test_markers_are_what_opens_a_turn_in_plain_text(
    chat_template: str, markers: tuple[str, ...]
) -> None:
    tokenizer = vocabularies.llama2() if chat_template is LLAMA2_OWN else tiny.tokenizer()
    tokenizer.chat_template = chat_template
    assert templates.make("tokenizer", tokenizer).markers == markers


@pytest.mark.parametrize(
    ("chat_template", "reason"),
    [
        (None, "has no chat template"),
        (OWN.replace("<|im_end|>", ""), "no end token after a reply"),
        (OWN.replace("{{ m['role'] }}", "{{ loop.length }}"), "is not how its replies begin"),
        (OWN.replace("{{ m['content'] }}", "hello"), "leaves a message out"),
        (OWN + "{{ raise_exception('no chat') }}", "refuses it: no chat"),
        (OWN.partition("{% if add")[0], "has no generation prompt: .* '<|im_start|>assistant"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "no end token after a reply"),
    ],
)
def test_template_that_cannot_be_trained_on_is_refused(
    chat_template: str | None, reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as error:
        templates.make("tokenizer", with_template(chat_template))
    assert str(error.value).startswith("params.yaml: prepare.template is 'tokenizer'")


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("chat_template", "reason"),
    [
        (OWN + LOOP, "takes more than 0.05 seconds of CPU time"),
        (OWN + "{% if messages[-1]['role'] == 'tool' %}" + LOOP + "{% endif %}", "takes more than"),
        (OWN + "{{ 'x' * 10**11 }}", "takes more than 1.1 GB of memory"),
        (OWN + "{{ 'x' * 5000000 }}", "writes more than 1,048,576 characters of its own"),
    ],
)
def test_template_without_bound_is_refused(
    chat_template: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "limited", partial(bounds.limited, 0.05))
    tokenizer = with_template(chat_template)
    tokenizer.add_tokens("<role>")  # so that every role is tried
    with pytest.raises(UserError, match=f"the chat template {reason}"):
        templates.make("tokenizer", tokenizer)


def test_template_needs_no_generation_prompt_without_a_lead() -> None:
    bare = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    rendered = templates.make("tokenizer", with_template(bare)).render(EXCHANGE)
    assert [rendered.text[a:b] for a, b in rendered.replies] == ["four<|im_end|>"]


NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + OWN
)
UPPER = OWN.replace("content'] }", "content']|upper }")


def test_template_rejects_a_conversation_that_it_cannot_render() -> None:
    template = templates.make("tokenizer", with_template(NO_SYSTEM))
    assert template.render(EXCHANGE) == templates.make("chatml", TOKENIZER).render(EXCHANGE)
    with pytest.raises(RejectedRow, match="refuses it: no system"):
        template.render([system("S"), *EXCHANGE])


def test_template_that_alters_text_is_rendered_as_it_does() -> None:
    rendered = templates.make("tokenizer", with_template(UPPER)).render(EXCHANGE)
    assert [rendered.text[a:b] for a, b in rendered.replies] == ["FOUR<|im_end|>"]


def test_template_that_takes_a_date_gets_the_same_every_day() -> None:
    dated = "{% if not date_string is defined %}{{ strftime_now('%Y') }}{% endif %}" + OWN
    tokenizer = with_template(
        dated.replace("<|im_start|>{{", "{{ date_string }}<|im_start|>{{").replace(
            "<|im_start|>assistant", "{{ date_string }}<|im_start|>assistant"
        )
    )
    template = templates.make("tokenizer", tokenizer)
    text = tokenizer.apply_chat_template(
        cast(list[dict[str, str]], EXCHANGE), chat_template=template.chat_template, tokenize=False
    )
    assert template.render(EXCHANGE).text == text
    assert text.startswith("26 Jul 2024<|im_start|>user")


def test_template_needs_an_end_token() -> None:
    tokenizer = vocabularies.plain()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        templates.make("chatml", tokenizer)
