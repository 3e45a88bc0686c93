"""Chat templates: a conversation as text, with the spans of its messages and replies.

The Jinja of the merged model is rendered once per sequence of roles, and text is joined from its
literals and the messages, so spans are always exact. A conversation that has more than roles and
contents, or is rendered differently once turns follow, is rendered turn by turn (`turns`).
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from stages.shared.chat import probe
from stages.shared.chat.conversation import Conversation, Message, RejectedRow, Role
from stages.shared.chat.rendering import CONTEXT, Part, Rendered, TurnRenderer
from stages.shared.chat.tokenizer import added_tokens, pattern_of, special_prefix
from stages.shared.core import bounds, files
from stages.shared.core.errors import UserError, reading

# Literals around the messages; per reply its index, characters written before and after.
_Skeleton = tuple[list[str], list[tuple[int, int, int]]]

# For any model: `begin` opens a turn of llama2, `end` is the end token. chatml has tools and
# thoughts as Hermes and Qwen write them; guanaco's prompt ends at the colon: the space is the
# reply's.
_BUILTIN = Path(__file__).with_name("builtin")
# Their turn markers, plain text unless the tokenizer has a token for them.
_MARKERS = {
    "chatml": ("<|im_start|>",),
    "guanaco": ("### Human:", "### Assistant:"),
    "llama2": ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
}
# The date for a model's own template, the same every day.
_DATE = '{% set date_string = "26 Jul 2024" %}'
_STRFTIME = (
    "{%- macro strftime_now(format) -%}{{- format | replace('%d', '26') | replace('%b', 'Jul')"
    " | replace('%B', 'July') | replace('%m', '07') | replace('%Y', '2024') | replace('%y', '24')"
    " | replace('%A', 'Friday') | replace('%a', 'Fri') | replace('%H', '12') | replace('%M', '00')"
    " | replace('%S', '00') | replace('%-d', '26') | replace('%-m', '7') -}}{%- endmacro -%}"
)
_PLAIN = {"role", "content", "weight"}
_GENERATION = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")
_WRITTEN = 1 << 20  # characters that a template may add to the messages


class Format(BaseModel):
    """`data/prepared/format.json`: the template, for evaluation and the merged model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    template: str
    template_name: str | None = None  # of a model's several ones
    chat_template: str  # Jinja
    eos_token: str  # ends a reply
    stop_ids: list[int]  # tokens that end a generated reply


def read_format(path: Path) -> Format:
    """Read `format.json`."""
    with reading(path):
        return Format.model_validate(files.read_json(path))


class Template:
    """A chat template for one tokenizer; `chat_template` is its Jinja, which writes BOS itself."""

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str,
        markers: Sequence[str] | None = None,
    ) -> None:
        """Probe a Jinja template, the model's own if `markers` is None."""
        self.name, self.chat_template = name, chat_template
        self.template_name: str | None = None
        self.is_own, self._tokenizer = markers is None, tokenizer
        self._turns = TurnRenderer(self._apply)
        self._skeleton = functools.cache(self._split)
        bos = special_prefix(tokenizer)
        if not probe.begins_with(self._turns, bos):
            self.chat_template = f"{{{{- {_quote(bos)} }}}}{self.chat_template}"
        self.control_tokens = probe.find_control_tokens(
            self._apply, self.chat_template, *added_tokens(tokenizer)
        )
        control = pattern_of(self.control_tokens)
        self.eos_token = probe.find_end(self._turns, control)
        # Tokens that begin a text and end none; never supervised.
        bos_ids = tokenizer.encode(bos, add_special_tokens=False)
        if markers is None:
            markers = probe.find_markers(self._turns, {self.eos_token, bos}, control)
        # Plain text that delimits turns; no message may hold it.
        self.markers = tuple(marker for marker in markers if marker not in self.control_tokens)
        self._turns.unsafe = pattern_of({*self.control_tokens, *self.markers})
        ends = [self.eos_token]
        self._turns.ends = pattern_of(ends)
        if self.is_own:
            self._turns.turns(probe.placeholders("user", "assistant"), [1])
        if self.is_own or name == "chatml":
            ends += probe.find_call_ends(self._turns, self.eos_token, control)
            self._turns.ends = pattern_of(ends)
        ids = (*(tokenizer.convert_tokens_to_ids(end) for end in ends), tokenizer.eos_token_id)
        self.stop_ids: list[int] = list(dict.fromkeys(ids))  # end a generated reply
        self.bos_ids = [token for token in bos_ids if token not in self.stop_ids]

    def format(self, ends: Sequence[int] = ()) -> Format:
        """Content of format.json; `ends`: ids of other tokens that end a reply, by the model."""
        special = self._tokenizer.added_tokens_decoder.keys() - {*self.bos_ids}
        return Format(
            template=self.name,
            template_name=self.template_name,
            chat_template=self.chat_template,
            eos_token=self.eos_token,
            stop_ids=list(dict.fromkeys([*self.stop_ids, *(i for i in ends if i in special)])),
        )

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether it renders a system message."""
        try:
            self.rows(probe.WITH_SYSTEM, [2])
        except RejectedRow:
            return False
        return True

    def rows(self, conversation: Conversation, selected: Sequence[int]) -> list[Rendered]:
        """Render a conversation for training.

        One row, where each prompt and reply is rendered as a server has them; else a row for each
        of the `selected` replies (indices of messages), or the whole rendering if none is.
        """
        if not _has_extras(conversation):
            if (joined := self._join(conversation.messages)) is not None:
                return [joined]
        elif not self.is_own and self.name != "chatml":
            raise RejectedRow(
                f"prepare.template {self.name!r} renders no tools and no thoughts; choose chatml "
                "or tokenizer, or for thoughts prepare.thinking: drop"
            )
        whole, turns = self._turns.turns(conversation, selected)
        if whole.replies or not selected:
            self._require_generation(conversation, turns)
            return [whole]
        for index, turn in zip(selected, turns, strict=True):
            self._require_generation(conversation, [turn], index + 1)
        return turns

    def render_text(self, text: str, end: str) -> Rendered:
        """A plain text as a document: BOS, if the tokenizer has it, and the end token."""
        begin = special_prefix(self._tokenizer)
        part = Part(len(begin), len(begin) + len(text), CONTEXT)
        return Rendered(f"{begin}{text}{end}", (part,))

    def render(self, messages: Sequence[Message]) -> Rendered:
        """Render normalized messages as one row."""
        return self.rows(Conversation([*messages]), [])[0]

    def prompt(self, conversation: Conversation, count: int) -> Rendered:
        """Render the first messages and the generation prompt."""
        return self._turns.render(conversation, count, prompt=True)

    def _join(self, messages: Sequence[Message]) -> Rendered | None:
        """Join literals and messages; None where their rendering is not made of these."""
        if (skeleton := self._skeleton(tuple(m["role"] for m in messages))) is None:
            return None
        literals, edges = skeleton
        text, parts = literals[0], list[Part]()
        for i, message in enumerate(messages):
            parts.append(Part(len(text), len(text) + len(message["content"]), i))
            text += message["content"] + literals[i + 1]
        if self.is_own:
            chat = [{"role": m["role"], "content": m["content"]} for m in messages]
            if self._apply(chat, False) != text:
                return None
        replies = tuple((parts[i].start - lead, parts[i].end + tail) for i, lead, tail in edges)
        return Rendered(text, tuple(parts), replies)

    def _split(self, roles: tuple[Role, ...]) -> _Skeleton | None:
        """Render placeholders once; None where a message or a reply is not in its own place."""
        conversation = probe.placeholders(*roles)
        indices = [i for i, role in enumerate(roles) if role == "assistant"]
        try:
            whole, replies = self._turns.turns(conversation, [])
        except RejectedRow:
            return None
        owners = [part.owner for part in whole.parts]
        if owners != [*range(len(roles))] or len(whole.replies) < len(indices):
            return None
        self._require_generation(conversation, replies)
        edges = [
            (i, whole.parts[i].start - start, end - whole.parts[i].end)
            for i, (start, end) in zip(indices, whole.replies, strict=True)
        ]
        return whole.literals(), edges

    def _require_generation(
        self, conversation: Conversation, turns: Sequence[Rendered], count: int | None = None
    ) -> None:
        """Refuse a template whose `{% generation %}` blocks are not the replies (to the last)."""
        if not turns or not _GENERATION.search(self.chat_template):
            return
        tagged = _GENERATION.sub('{{\\1 "\ue003" \\2}}', self.chat_template)
        chat, tools, kwargs = self._turns.arguments(
            conversation, count or len(conversation.messages)
        )
        blocks = self._apply(chat, False, tools, kwargs, tagged).split("\ue003")[1::2]
        blocks = blocks[-len(turns) :] if count else blocks
        replies = [turn.text[start:end] for turn in turns for start, end in turn.replies]
        agree = [
            block.strip() in (reply.strip(), reply.removesuffix(self.eos_token).strip())
            for block, reply in zip(blocks, replies, strict=False)
        ]
        if len(blocks) != len(replies) or not all(agree):
            raise _unfit(
                self.name,
                "the chat template marks other text by {% generation %} than what follows its "
                "generation prompt",
            )

    def _apply(
        self,
        chat: Sequence[dict[str, Any]],
        prompt: bool,
        tools: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> str:
        try:
            with bounds.limited():
                text = str(
                    self._tokenizer.apply_chat_template(
                        list(chat),
                        chat_template=chat_template or self.chat_template,
                        tools=None if tools is None else list(tools),
                        tokenize=False,
                        add_generation_prompt=prompt,
                        **(kwargs or {}),
                    )
                )
            if len(text) > _WRITTEN and len(text) > _WRITTEN + 2 * len(repr((chat, tools, kwargs))):
                raise bounds.Exceeded(f"writes more than {_WRITTEN:,} characters of its own")
            return text
        except bounds.Exceeded as exceeded:
            raise _unfit(self.name, f"the chat template {exceeded}") from exceeded
        except Exception as error:  # the template is third-party code
            raise RejectedRow(f"the model's own chat template refuses it: {error}") from None


def make(
    name: str, tokenizer: PreTrainedTokenizerBase, template_name: str | None = None
) -> Template:
    """Make the template `prepare.template` for a tokenizer, whose vocabulary stays as it is."""
    if tokenizer.eos_token is None:
        raise UserError(
            "models/tokenizer: the tokenizer has no end token. Set eos_token in "
            "tokenizer_config.json, or choose another model."
        )
    markers: Sequence[str] | None = None
    if template_name is not None and name != "tokenizer":
        raise UserError(
            f"params.yaml: prepare.template_name is {template_name!r}, but prepare.template is "
            f"{name!r}, which has no names. Set it to null, or prepare.template to tokenizer."
        )
    if name == "tokenizer":
        chat_template = _own_template(tokenizer, template_name)
        date = _DATE if "date_string" in chat_template else ""
        clock = _STRFTIME if "strftime_now" in chat_template else ""
        head = date + clock
    else:
        chat_template = (_BUILTIN / f"{name}.jinja").read_text(encoding="utf-8")
        markers = _MARKERS[name]
        begin = special_prefix(tokenizer) or tokenizer.bos_token or ""
        is_chatml = name == "chatml" and "<|im_end|>" in tokenizer.added_tokens_encoder
        end = "<|im_end|>" if is_chatml else tokenizer.eos_token
        head = f"{{%- set begin, end = {_quote(begin)}, {_quote(end)} -%}}"
    try:
        made = Template(name, tokenizer, head + chat_template.strip("\n"), markers)
    except RejectedRow as reason:
        raise _unfit(name, str(reason)) from None
    made.template_name = template_name
    return made


def _own_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str:
    """The model's own chat template, of several the one of this name or the default."""
    known = tokenizer.chat_template or {}
    named = {None: known} if isinstance(known, str) else {None: known.get("default"), **known}
    if chat_template := named.get(name):
        return str(chat_template)
    names = ", ".join(sorted(filter(None, named)))
    if not known:
        raise _unfit("tokenizer", "the model has no chat template")
    raise UserError(
        f"params.yaml: prepare.template_name is {name!r}, but the model's chat templates are "
        f"{names or 'one without a name'}. Set it to {'one of these' if names else 'null'}."
    )


def _unfit(name: str, reason: str) -> UserError:
    return UserError(
        f"params.yaml: prepare.template is {name!r}; {reason}. Choose chatml, guanaco or llama2."
    )


def _has_extras(conversation: Conversation) -> bool:
    """Whether a conversation has tools, thoughts, calls or template arguments."""
    return bool(conversation.tools or conversation.template_kwargs) or any(
        message["role"] == "tool" or not message.keys() <= _PLAIN
        for message in conversation.messages
    )


def _quote(text: str) -> str:
    """A Jinja string: JSON without escapes, as Jinja knows no surrogate pairs."""
    return json.dumps(text, ensure_ascii=False)
