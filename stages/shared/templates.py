"""The one way to render a conversation as the text that a model reads.

Every template is a Jinja chat template, the very one that the merged model carries. It is rendered
once for each sequence of roles, with placeholders in place of the messages; a conversation is then
put together from these literals and its messages. So it is known exactly which characters are a
message's own, whatever stands in it.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from stages.shared import chat_templates, vocabulary
from stages.shared.conversation import Message, Role, Unusable
from stages.shared.core.errors import UserError

Name = Literal["guanaco", "llama2", "chatml", "tokenizer"]
Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. Spans are (start, end) in characters of it.

    Attributes:
        text: what the model reads.
        contents: of each message its own characters, in order.
        replies: what the model has to write: of each reply all from the end of its prompt to the
            end of the token that ends the turn.
    """

    text: str
    contents: tuple[Span, ...]
    replies: tuple[Span, ...]


@dataclass(frozen=True)
class _Skeleton:
    """A rendering with its messages taken out.

    `literals` stand before, between and after the messages. Of each reply `leads` says how many
    characters before its message the model has to write, `tails` how many after it.
    """

    literals: tuple[str, ...]
    leads: dict[int, int]
    tails: dict[int, int]


class Template:
    """How conversations are rendered for one tokenizer.

    Attributes:
        name: as in `prepare.template`.
        chat_template: Jinja; `apply_chat_template` renders the same text with it.
        eos_token: the control token that ends a reply.
        stop_ids: tokens that end a generated reply: that one, and the tokenizer's own end token.
        markers: what delimits turns and is plain text to this tokenizer.
    """

    def __init__(
        self, name: str, tokenizer: PreTrainedTokenizerBase, chat_template: str, own: bool
    ) -> None:
        self.name = name
        self.chat_template = chat_template
        self.markers: tuple[str, ...] = ()
        self._tokenizer = tokenizer
        self._own = own
        self._control = vocabulary.control_pattern(tokenizer)
        self._literals = functools.cache(self._render_literals)
        self._skeleton = functools.cache(self._build)
        probe = self._skeleton(("user", "assistant") * 2, False)
        end = probe.literals[-1][: probe.tails[3]].strip()
        ids = [tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id]
        self.eos_token = end
        self.stop_ids: list[int] = list(dict.fromkeys(ids))
        if own:
            self.markers = self._plain_boundaries()

    def problem_with(self, messages: Sequence[Message]) -> str | None:
        """Why a conversation cannot be told from its rendering: a marker inside a message."""
        for message in messages:
            for marker in self.markers:
                # Also one that a message begins and the marker after it completes: "=" before "==".
                if marker in (message["content"] + marker)[:-1]:
                    return (
                        f"a message holds {marker!r}, which is how prepare.template "
                        f"{self.name!r} marks a turn"
                    )
        return None

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> Rendered:
        """Render a conversation.

        Args:
            messages: normalized, in the order that `conversation.problem_with` accepts.
            prompt: the messages end with a user's turn, and the text with what a reply follows.

        Raises:
            Unusable: the model's own chat template refuses the messages, or alters one.
        """
        skeleton = self._skeleton(tuple(m["role"] for m in messages), prompt)
        parts, contents, at = [skeleton.literals[0]], [], len(skeleton.literals[0])
        for message, literal in zip(messages, skeleton.literals[1:], strict=True):
            content = message["content"]
            contents.append((at, at + len(content)))
            parts += [content, literal]
            at += len(content) + len(literal)
        text = "".join(parts)
        if self._own and self._apply(messages, prompt) != text:
            raise Unusable("the model's own chat template alters the text of a message")
        replies = tuple(
            (contents[i][0] - lead, contents[i][1] + skeleton.tails[i])
            for i, lead in skeleton.leads.items()
        )
        return Rendered(text, tuple(contents), replies)

    def _build(self, roles: tuple[Role, ...], prompt: bool) -> _Skeleton:
        """Render placeholders, and find out where each reply begins and ends.

        Raises:
            Unusable: two messages cannot be told from one.
            UserError: a reply cannot be told from its prompt, or no control token ends it.
        """
        literals = self._literals(roles, prompt)
        if not all(text.strip() for text in literals[1:-1]):
            raise Unusable(
                "the model's own chat template puts nothing but white space between two messages"
            )
        leads, tails = {}, {}
        for i in (i for i, role in enumerate(roles) if role == "assistant"):
            asked = self._literals(roles[:i], True)
            answered = self._literals(roles[: i + 1], False)
            if not (_begins(literals, asked) and _begins(literals, answered)):
                raise self._unfit("renders the same turns differently once others follow")
            end = re.match(rf"\s*(?:{self._control.pattern})", literals[i + 1])
            if end is None:
                raise self._unfit("puts no end token after a reply")
            lead = literals[i][len(asked[-1]) :]
            if lead.strip() and asked == self._literals(roles[:i], False):
                raise self._unfit(
                    f"has no generation prompt: the model itself would write {lead!r}"
                )
            leads[i], tails[i] = len(lead), end.end()
        return _Skeleton(literals, leads, tails)

    def _render_literals(self, roles: tuple[Role, ...], prompt: bool) -> tuple[str, ...]:
        messages = [Message(role=role, content=f"\ue000{i}\ue001") for i, role in enumerate(roles)]
        found = re.split("\ue000([0-9]+)\ue001", self._apply(messages, prompt))
        if found[1::2] != [str(i) for i in range(len(roles))]:
            raise Unusable("the model's own chat template leaves a message out")
        return tuple(found[::2])

    def _apply(self, messages: Sequence[Message], prompt: bool) -> str:
        # A template that prints the day's date would make other tokens tomorrow: it gets a fixed
        # one where it takes one, and is refused where it insists on today's.
        fixed: dict[str, Any] = (
            {"date_string": "26 Jul 2024", "strftime_now": None} if self._own else {}
        )
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [{"role": m["role"], "content": m["content"]} for m in messages],
                    chat_template=self.chat_template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **(fixed if self._own else {}),
                )
            )
        except jinja2.TemplateError as error:
            raise Unusable(f"the model's own chat template refuses it: {error}") from None
        except TypeError as error:
            reason = "prints today's date" if "strftime_now" in self.chat_template else str(error)
            raise self._unfit(reason) from None
        except (ArithmeticError, LookupError, ValueError, AttributeError, RecursionError) as error:
            raise Unusable(f"the model's own chat template refuses it: {error}") from None

    def _plain_boundaries(self) -> tuple[str, ...]:
        """What the model's own template puts between messages where no control token stands."""
        found = set()
        turns: tuple[Role, ...] = ("user", "assistant") * 2
        for roles in (turns, ("system", *turns)):
            try:
                between = self._skeleton(roles, False).literals[1:-1]
            except Unusable:  # many templates take no system message
                continue
            found |= {text.strip() for text in between if not self._control.search(text)}
        return tuple(sorted(found - {""}))

    def _unfit(self, reason: str) -> UserError:
        return UserError(
            f"params.yaml: prepare.template is {self.name!r}; the chat template {reason}; expected "
            "one that renders a conversation in one way, each reply with its end; choose chatml"
        )


def _begins(literals: tuple[str, ...], start: tuple[str, ...]) -> bool:
    last = len(start) - 1
    return literals[:last] == start[:last] and literals[last].startswith(start[last])


def make(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of this name for this tokenizer.

    Args:
        name: guanaco, llama2, chatml, or tokenizer for the model's own chat template.
        tokenizer: its vocabulary stays as it is. Where it has no `<|im_end|>`, turns of chatml end
            with its end token.

    Raises:
        UserError: the tokenizer has no end token; the model has no chat template of its own, or
            one that cannot be trained on.
    """
    if tokenizer.eos_token is None:
        raise UserError(
            "models/tokenizer: the tokenizer has no end token; expected `eos_token` in "
            "tokenizer_config.json; set it, or choose another model"
        )
    if name == "tokenizer":
        return _own(tokenizer)
    control = vocabulary.control_tokens(tokenizer)
    begin, end = tokenizer.bos_token or "", tokenizer.eos_token
    jinja, markers = {
        "chatml": (chat_templates.CHATML, ("<|im_start|>",)),
        "guanaco": (chat_templates.GUANACO, ("### Human:", "### Assistant:")),
        "llama2": (chat_templates.LLAMA2, ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")),
    }[name]
    if name == "chatml" and "<|im_end|>" in control:
        end = "<|im_end|>"
    # Jinja reads a JSON string as it is; without escapes, since it knows no surrogate pairs.
    begin, end = (json.dumps(token, ensure_ascii=False) for token in (begin, end))
    head = f"{{%- set begin, end = {begin}, {end} -%}}"
    template = Template(name, tokenizer, head + jinja.strip("\n"), own=False)
    template.markers = tuple(marker for marker in markers if marker not in control)
    return template


def _own(tokenizer: PreTrainedTokenizerBase) -> Template:
    if not tokenizer.chat_template:
        raise UserError(
            "params.yaml: prepare.template is 'tokenizer'; the model's tokenizer has no chat "
            "template; choose chatml, guanaco or llama2"
        )
    try:
        return Template("tokenizer", tokenizer, tokenizer.get_chat_template(), own=True)
    except (Unusable, ValueError) as error:  # several templates, and none of them the default
        raise UserError(
            f"params.yaml: prepare.template is 'tokenizer'; {error}; "
            "choose chatml, guanaco or llama2"
        ) from None
