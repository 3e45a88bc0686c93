"""The one way to render a conversation as the text that a model reads.

Every template is a Jinja chat template, the very one that the merged model carries. It is rendered
once for each sequence of roles, with placeholders in place of the messages; a conversation is then
put together from these literals and its messages. So it is known exactly which characters are a
message's own, whatever stands in it.
"""

import contextlib
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from stages.shared.chat import jinja_texts
from stages.shared.chat.conversation import Message, RejectedRow, Role
from stages.shared.chat.tokenizer import control_pattern, control_tokens, special_prefix
from stages.shared.core.errors import UserError

Name = Literal["guanaco", "llama2", "chatml", "tokenizer"]
Span = tuple[int, int]
_TURNS: tuple[Role, ...] = ("user", "assistant") * 2
_PROBES: tuple[tuple[Role, ...], ...] = (_TURNS, ("system", *_TURNS))


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
        bos_ids: tokens that begin a text and end none; never supervised.
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
        self._control = control_pattern(tokenizer)
        self._literals = functools.cache(self._render_literals)
        self._skeleton = functools.cache(self._build)
        probe = self._skeleton(_TURNS, False)
        end = probe.literals[-1][: probe.tails[3]].strip()
        ids = [tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id]
        self.eos_token = end
        self.stop_ids: list[int] = list(dict.fromkeys(ids))
        bos = tokenizer.encode(special_prefix(tokenizer), add_special_tokens=False)
        self.bos_ids = [token for token in bos if token not in self.stop_ids]
        if own:
            self.markers = self._plain_boundaries()

    def begins_with(self, prefix: str) -> set[bool]:
        """Whether conversations begin with this text: with a system message, and without."""
        begin = set()
        for roles in _PROBES:
            with contextlib.suppress(RejectedRow):  # many templates take no system message
                begin.add(self._literals(roles, False)[0].startswith(prefix))
        return begin

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
            RejectedRow: the model's own chat template refuses the messages, or alters one.
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
            raise RejectedRow("the model's own chat template alters the text of a message")
        replies = tuple(
            (contents[i][0] - lead, contents[i][1] + skeleton.tails[i])
            for i, lead in skeleton.leads.items()
        )
        return Rendered(text, tuple(contents), replies)

    def _build(self, roles: tuple[Role, ...], prompt: bool) -> _Skeleton:
        """Render placeholders, and find out where each reply begins and ends.

        Raises:
            RejectedRow: two messages cannot be told from one.
            UserError: a reply cannot be told from its prompt, or no control token ends it.
        """
        literals = self._literals(roles, prompt)
        if not all(text.strip() for text in literals[1:-1]):
            raise RejectedRow(
                "the model's own chat template puts nothing but white space between two messages"
            )
        leads, tails = {}, {}
        for i in (i for i, role in enumerate(roles) if role == "assistant"):
            asked = self._literals(roles[:i], True)
            answered = self._literals(roles[: i + 1], False)
            if not (_begins(literals, asked) and _begins(literals, answered)):
                raise self.unfit("renders the same turns differently once others follow")
            end = re.match(rf"\s*(?:{self._control.pattern})", literals[i + 1])
            if end is None:
                raise self.unfit("puts no end token after a reply")
            lead = literals[i][len(asked[-1]) :]
            if lead.strip() and asked == self._literals(roles[:i], False):
                raise self.unfit(f"has no generation prompt: the model itself would write {lead!r}")
            leads[i], tails[i] = len(lead), end.end()
        return _Skeleton(literals, leads, tails)

    def _render_literals(self, roles: tuple[Role, ...], prompt: bool) -> tuple[str, ...]:
        messages = [Message(role=role, content=f"\ue000{i}\ue001") for i, role in enumerate(roles)]
        found = re.split("\ue000([0-9]+)\ue001", self._apply(messages, prompt))
        if found[1::2] != [str(i) for i in range(len(roles))]:
            raise RejectedRow("the model's own chat template leaves a message out")
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
            raise RejectedRow(f"the model's own chat template refuses it: {error}") from None
        except TypeError as error:
            reason = "prints today's date" if "strftime_now" in self.chat_template else str(error)
            raise self.unfit(reason) from None
        except (ArithmeticError, LookupError, ValueError, AttributeError, RecursionError) as error:
            raise RejectedRow(f"the model's own chat template refuses it: {error}") from None

    def _plain_boundaries(self) -> tuple[str, ...]:
        """What the model's own template puts between messages where no control token stands."""
        found = set()
        for roles in _PROBES:
            try:
                between = self._skeleton(roles, False).literals[1:-1]
            except RejectedRow:  # many templates take no system message
                continue
            found |= {text.strip() for text in between if not self._control.search(text)}
        return tuple(sorted(found - {""}))

    def unfit(self, reason: str) -> UserError:
        """The error for a chat template that cannot be trained on."""
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
    control = control_tokens(tokenizer)
    begin = special_prefix(tokenizer) or tokenizer.bos_token or ""
    end = tokenizer.eos_token
    jinja, markers = {
        "chatml": (jinja_texts.CHATML, ("<|im_start|>",)),
        "guanaco": (jinja_texts.GUANACO, ("### Human:", "### Assistant:")),
        "llama2": (jinja_texts.LLAMA2, ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")),
    }[name]
    if name == "chatml" and "<|im_end|>" in control:
        end = "<|im_end|>"
    # Jinja reads a JSON string as it is; without escapes, since it knows no surrogate pairs.
    begin, end = (json.dumps(token, ensure_ascii=False) for token in (begin, end))
    head = f"{{%- set begin, end = {begin}, {end} -%}}"
    template = _with_bos(name, tokenizer, head + jinja.strip("\n"), own=False)
    template.markers = tuple(marker for marker in markers if marker not in control)
    return template


def _with_bos(
    name: str, tokenizer: PreTrainedTokenizerBase, chat_template: str, own: bool
) -> Template:
    """A template that begins each text as the tokenizer would, once.

    `apply_chat_template` has the tokenizer add nothing: BOS has to stand in the template.
    """
    template = Template(name, tokenizer, chat_template, own)
    prefix = special_prefix(tokenizer)
    begins = template.begins_with(prefix)
    if len(begins) > 1:
        raise template.unfit(f"begins only some conversations with {prefix!r}")
    if begins == {True}:
        return template
    written = json.dumps(prefix, ensure_ascii=False)
    return Template(name, tokenizer, f"{{{{- {written} }}}}{chat_template}", own)


def _own(tokenizer: PreTrainedTokenizerBase) -> Template:
    if not tokenizer.chat_template:
        raise UserError(
            "params.yaml: prepare.template is 'tokenizer'; the model's tokenizer has no chat "
            "template; choose chatml, guanaco or llama2"
        )
    try:
        return _with_bos("tokenizer", tokenizer, tokenizer.get_chat_template(), own=True)
    except (RejectedRow, ValueError) as error:  # several templates, and none of them the default
        raise UserError(
            f"params.yaml: prepare.template is 'tokenizer'; {error}; "
            "choose chatml, guanaco or llama2"
        ) from None
