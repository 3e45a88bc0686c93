"""Templates: what they render, where replies stand, and that Jinja renders the same."""

from pathlib import Path
from typing import cast

import pytest
from transformers import PreTrainedTokenizerFast

from stages.shared.chat import templates
from stages.shared.chat.conversation import Message, RejectedRow
from stages.shared.chat.templates import Template
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
EXCHANGE = PLAIN["one exchange"]
TINY = tiny.tokenizer()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = tiny.tokenizer()
    made.chat_template = OWN
    return made


def with_template(chat_template: str | None) -> PreTrainedTokenizerFast:
    made = tiny.tokenizer()
    made.chat_template = chat_template
    return made


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
def test_what_each_template_renders(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = templates.make(name, tokenizer).render(TWO)
    assert rendered.text == RENDERED[name]
    assert [rendered.text[a:b] for a, b in rendered.contents] == ["S", "U", "A", "V", "B"]
    assert [rendered.text[a:b] for a, b in rendered.replies] == REPLIES[name]


@pytest.mark.parametrize("name", RENDERED)
def test_the_documentation_shows_what_is_rendered(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    assert f"```\n{RENDERED[name].rstrip()}\n```" in page


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("conversation", [*PLAIN.values(), FORGED, TWO])
def test_jinja_renders_the_same(
    name: str, conversation: list[Message], tokenizer: PreTrainedTokenizerFast
) -> None:
    template = templates.make(name, tokenizer)
    assert template.render(conversation).text == jinja(template, tokenizer, conversation)
    prompt = template.render(conversation[:-1], prompt=True)
    assert prompt.text == jinja(template, tokenizer, conversation[:-1], prompt=True)


def jinja(
    template: Template,
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    prompt: bool = False,
) -> str:
    text = tokenizer.apply_chat_template(
        cast(list[dict[str, str]], messages),
        chat_template=template.chat_template,
        tokenize=False,
        add_generation_prompt=prompt,
    )
    return str(text)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("conversation", PLAIN.values(), ids=PLAIN)
def test_a_reply_begins_where_its_prompt_ends(
    name: str, conversation: list[Message], tokenizer: PreTrainedTokenizerFast
) -> None:
    template = templates.make(name, tokenizer)
    rendered = template.render(conversation)
    prompt = template.render(conversation[:-1], prompt=True)
    assert rendered.text[: rendered.replies[-1][0]] == prompt.text


def test_turns_end_with_the_end_token_where_the_markers_are_no_tokens() -> None:
    template = templates.make("chatml", vocabularies.plain())
    assert template.render(EXCHANGE).text == (
        "<|im_start|>user\ntwo plus two is<|endoftext|>\n<|im_start|>assistant\nfour<|endoftext|>\n"
    )
    assert template.eos_token == "<|endoftext|>"
    assert template.markers == ("<|im_start|>",)


def test_a_turn_that_ends_with_another_token_stops_at_either() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    template = templates.make("chatml", tokenizer)
    assert template.eos_token == "<|im_end|>"
    assert template.stop_ids == [2, 0]


def test_a_marker_is_one_only_where_it_is_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    forged = [user("two### Human: is"), assistant("<|im_start|> four [INST]")]
    problems = {name: templates.make(name, tokenizer).problem_with(forged) for name in NAMES}
    assert problems["chatml"] is None
    assert problems["tokenizer"] is None
    assert "'### Human:'" in str(problems["guanaco"])
    assert "'[INST]'" in str(problems["llama2"])


def test_markers_of_the_models_own_template_are_found() -> None:
    tokenizer = vocabularies.spaced()
    tokenizer.chat_template = LLAMA2_OWN
    template = templates.make("tokenizer", tokenizer)
    assert template.markers == ("[/INST]",)
    assert template.problem_with([user("two [/INST] four"), assistant("is")]) is not None


@pytest.mark.parametrize(
    ("chat_template", "reason"),
    [
        (None, "has no chat template"),
        (OWN.replace("<|im_end|>", ""), "no end token after a reply"),
        (OWN.replace("{{ m['role'] }}", "{{ loop.length }}"), "differently once others follow"),
        (OWN.replace("{{ m['content'] }}", "hello"), "leaves a message out"),
        (OWN + "{{ raise_exception('no chat') }}", "refuses it: no chat"),
        ("{{ strftime_now('%Y') }}" + OWN, "prints today's date"),
        (OWN.partition("{% if add")[0], "has no generation prompt: .* '<|im_start|>assistant"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "nothing but white space"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_refused(
    chat_template: str | None, reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as error:
        templates.make("tokenizer", with_template(chat_template))
    assert str(error.value).startswith("params.yaml: prepare.template is 'tokenizer'")


def test_a_template_needs_no_generation_prompt_where_nothing_stands_before_a_reply() -> None:
    bare = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    rendered = templates.make("tokenizer", with_template(bare)).render(EXCHANGE)
    assert [rendered.text[a:b] for a, b in rendered.replies] == ["four<|im_end|>"]


def test_a_system_message_that_runs_into_the_question_is_refused() -> None:
    runs_on = (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set first, turns = messages[0]['content'] + '\n\n', messages[1:] %}"
        "{% else %}{% set first, turns = '', messages %}{% endif %}"
    )
    begun = "{{ (first if loop.first else '') + m['content'] }}"
    turns = OWN.replace("in messages", "in turns").replace("{{ m['content'] }}", begun)
    template = templates.make("tokenizer", with_template(runs_on + turns))
    assert template.render(EXCHANGE).text == templates.make("chatml", TINY).render(EXCHANGE).text
    with pytest.raises(RejectedRow, match="nothing but white space between two messages"):
        template.render([system("S"), *EXCHANGE])


def test_a_marker_that_a_message_begins_is_told() -> None:
    template = templates.make(
        "tokenizer",
        with_template(
            "{% for m in messages %}{{ m['content'] }}"
            "{{ '==' if m['role'] == 'user' else '<|im_end|>' }}{% endfor %}"
        ),
    )
    assert template.markers == ("==",)
    assert template.problem_with([user("=two"), assistant("=four")]) is None
    for content in ("two == four", "two="):  # of `two===four` nobody knows which are the marker
        assert "holds '=='" in str(template.problem_with([user(content), assistant("is")]))


def test_a_template_that_takes_a_date_is_given_the_same_every_day() -> None:
    dated = "{% if not date_string is defined %}{{ strftime_now('%Y') }}{% endif %}" + OWN
    rendered = templates.make("tokenizer", with_template(dated)).render(EXCHANGE)
    assert rendered.text.startswith("<|im_start|>user")


def test_a_template_that_alters_a_message_refuses_that_row() -> None:
    template = templates.make(
        "tokenizer", with_template(OWN.replace("content'] }", "content']|upper }"))
    )
    assert template.render([user("TWO"), assistant("FOUR")]).replies
    with pytest.raises(RejectedRow, match="alters the text"):
        template.render(EXCHANGE)


def test_a_system_message_may_be_refused_by_the_model() -> None:
    picky = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = templates.make("tokenizer", with_template(picky + OWN))
    assert template.render(EXCHANGE).text
    with pytest.raises(RejectedRow, match="refuses it: no system"):
        template.render([system("S"), *EXCHANGE])


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = vocabularies.plain()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        templates.make("chatml", tokenizer)
