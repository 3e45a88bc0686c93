"""Chat templates: a conversation as text, with the spans of its messages and replies.

The Jinja of the merged model is rendered once per sequence of roles, with placeholders for the
messages. Text is joined from these literals and the messages, so spans are always exact. What has
more than roles and contents, or is rendered differently once turns follow, goes through `turns`.
"""

import contextlib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from stages.shared.chat.conversation import Conversation, Message, RejectedRow, Role
from stages.shared.chat.tokenizer import added_tokens, pattern_of, special_prefix
from stages.shared.chat.turns import CONTEXT, Text, TurnRenderer
from stages.shared.core import bounds, files
from stages.shared.core.errors import UserError, reading

Span = tuple[int, int]
# Literals around the messages; per reply its index, characters written before and after.
_Skeleton = tuple[tuple[str, ...], list[tuple[int, int, int]]]

# `begin` opens a turn of llama2, `end` is the end token; `make` sets both.
# Tools and thoughts as Hermes and Qwen write them.
_CHATML = r"""
{%- if tools -%}
{{- '<|im_start|>system\n' -}}
{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] + '\n\n' -}}{%- endif -%}
{{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' -}}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' -}}
{%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}
{{- '\n</tools>\n\nFor each function call, return a json object with function name and ' -}}
{{- 'arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n' -}}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' + end + '\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'tool' -%}
{%- if loop.previtem is not defined or loop.previtem['role'] != 'tool' -%}
{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\n<tool_response>\n' + message['content'] + '\n</tool_response>' -}}
{%- if loop.nextitem is not defined or loop.nextitem['role'] != 'tool' -%}
{{- end + '\n' -}}{%- endif -%}
{%- elif not (tools and loop.first and message['role'] == 'system') -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['reasoning_content'] -%}
{{- '<think>\n' + message['reasoning_content'] + '\n</think>\n\n' -}}{%- endif -%}
{{- message['content'] -}}
{%- for call in message['tool_calls'] -%}
{{- '\n' if message['content'] or not loop.first -}}
{{- '<tool_call>\n{"name": "' + call['function']['name'] + '", "arguments": ' -}}
{{- (call['function']['arguments'] | tojson) + '}\n</tool_call>' -}}
{%- endfor -%}
{{- end + '\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
# The prompt ends at the colon: the space belongs to the reply's first token.
_GUANACO = r"""
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{- message['content'] + '\n' -}}
{%- elif message['role'] == 'user' -%}{{- '### Human: ' + message['content'] + '\n' -}}
{%- else -%}{{- '### Assistant: ' + message['content'] + end + '\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant:' -}}{%- endif -%}
"""
_LLAMA2 = r"""
{%- set system, turns = '', messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{- begin + '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' -}}
{%- else -%}{{- ' ' + message['content'] + ' ' + end -}}{%- endif -%}
{%- endfor -%}
"""
# With markers that are plain text unless the tokenizer has a token for them.
_JINJA = {
    "chatml": (_CHATML, ("<|im_start|>",)),
    "guanaco": (_GUANACO, ("### Human:", "### Assistant:")),
    "llama2": (_LLAMA2, ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")),
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
_TURNS: tuple[Role, ...] = ("user", "assistant") * 2
_PROBES: tuple[tuple[Role, ...], ...] = (_TURNS, ("system", *_TURNS))
_WRITTEN = 1 << 20  # characters that a template may add to the messages
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
_EXCHANGE = Conversation(
    [{"role": "user", "content": "two"}, {"role": "assistant", "content": "four"}]
)
_CALL = Conversation(
    [
        {"role": "user", "content": "two"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "abcdefghi", "name": "f", "arguments": {"x": 7}}],
        },
        {"role": "tool", "content": "four", "tool_call_id": "abcdefghi", "name": "f"},
        {"role": "assistant", "content": "four", "reasoning": "two"},
    ],
    tools=[
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "two",
                "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
            },
        }
    ],
)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; spans are [start, end) in characters."""

    text: str
    contents: tuple[Span, ...]  # of the messages, and in `turns` of all else that is not template
    replies: tuple[Span, ...]  # from the prompt's end to the end token's end
    owners: tuple[int, ...] | None = None  # messages of the contents; None: one each
    kinds: tuple[str, ...] | None = None  # of the contents, `turns.Part.kind`; None: content
    turn: int | None = None  # index of the message that alone is supervised; None: all replies


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
        self._literals = functools.cache(self._render_literals)
        self._skeleton = functools.cache(self._try_split)
        bos = special_prefix(tokenizer)
        self._begin_with(bos)
        self.control_tokens = self._find_control_tokens()
        self._control = pattern_of(self.control_tokens)
        self.eos_token = self._find_end()
        # Tokens that begin a text and end none; never supervised.
        bos_ids = tokenizer.encode(bos, add_special_tokens=False)
        if markers is None:
            markers = self._find_markers({self.eos_token, bos})
        # Plain text that delimits turns; no message may hold it.
        self.markers = tuple(marker for marker in markers if marker not in self.control_tokens)
        self._turns = TurnRenderer(self._apply, pattern_of({*self.control_tokens, *self.markers}))
        ends = [self.eos_token, *self._probe_turns()]
        self._turns.ends = pattern_of(ends)
        ids = (*(tokenizer.convert_tokens_to_ids(end) for end in ends), tokenizer.eos_token_id)
        self.stop_ids: list[int] = list(dict.fromkeys(ids))  # end a generated reply
        self.bos_ids = [token for token in bos_ids if token not in self.stop_ids]

    def format(self) -> Format:
        """Content of format.json."""
        return Format(
            template=self.name,
            template_name=self.template_name,
            chat_template=self.chat_template,
            eos_token=self.eos_token,
            stop_ids=self.stop_ids,
        )

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether it renders a system message."""
        system: Message = {"role": "system", "content": "is"}
        try:
            self.rows(Conversation([system, *_EXCHANGE.messages]), [2])
        except RejectedRow:
            return False
        return True

    def rows(self, conversation: Conversation, selected: Sequence[int]) -> list[Rendered]:
        """Render a conversation for training.

        One row, where each prompt and reply is rendered as a server has them; else a row for each
        of the `selected` replies (indices of messages), or the whole rendering if none is.
        """
        if not _has_more(conversation):
            try:
                return [self.render(conversation.messages)]
            except RejectedRow:
                if not self.is_own:
                    raise
        elif not self.is_own and self.name != "chatml":
            raise RejectedRow(
                f"prepare.template {self.name!r} renders no tools and no thoughts; choose chatml "
                "or tokenizer, or for thoughts prepare.thinking: drop"
            )
        whole, turns, is_one = self._turns.turns(conversation, selected)
        if is_one or not selected:
            self._require_generation(conversation, [turn.reply for turn in turns])
            replies = [turn.span for turn in turns] if is_one else []
            return [_rendered(whole, replies)]
        for index, turn in zip(selected, turns, strict=True):
            self._require_generation(conversation, [turn.reply], index + 1)
        return [
            _rendered(turn.text, [turn.span], turn=index)
            for index, turn in zip(selected, turns, strict=True)
        ]

    def render_text(self, text: str, end: str) -> Rendered:
        """A plain text as a document: BOS, if the tokenizer has it, and the end token."""
        begin = special_prefix(self._tokenizer)
        span = (len(begin), len(begin) + len(text))
        return Rendered(f"{begin}{text}{end}", (span,), (), (CONTEXT,))

    def prompt(self, conversation: Conversation, count: int) -> Rendered:
        """Render the first messages and the generation prompt."""
        if not _has_more(conversation):
            with contextlib.suppress(RejectedRow):
                return self.render(conversation.messages[:count], prompt=True)
        return _rendered(self._turns.render(conversation, count, prompt=True), [])

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> Rendered:
        """Render normalized messages; a prompt ends with the generation prompt."""
        found = self._skeleton(tuple(m["role"] for m in messages), prompt)
        if isinstance(found, RejectedRow):
            raise RejectedRow(str(found))
        literals, edges = found
        text, contents = literals[0], list[Span]()
        for message, literal in zip(messages, literals[1:], strict=True):
            contents.append((len(text), len(text) + len(message["content"])))
            text += message["content"] + literal
        if self.is_own:
            chat = [{"role": m["role"], "content": m["content"]} for m in messages]
            if self._apply(chat, prompt) != text:
                raise RejectedRow("the model's own chat template alters the text of a message")
        replies = ((contents[i][0] - lead, contents[i][1] + tail) for i, lead, tail in edges)
        return Rendered(text, tuple(contents), tuple(replies))

    def _try_split(self, roles: tuple[Role, ...], prompt: bool) -> _Skeleton | RejectedRow:
        try:
            return self._split(roles, prompt)
        except RejectedRow as reason:
            return reason

    def _split(self, roles: tuple[Role, ...], prompt: bool) -> _Skeleton:
        """Literals around the messages; per reply: index, characters written before and after."""
        literals = self._literals(roles, prompt)
        if not all(text.strip() for text in literals[1:-1]):
            raise RejectedRow(
                "the model's own chat template puts nothing but white space between two messages"
            )
        replies = []
        for i in (i for i, role in enumerate(roles) if role == "assistant"):
            before = self._literals(roles[:i], True)
            after = self._literals(roles[: i + 1], False)
            end = re.match(rf"\s*(?:{self._control.pattern})", literals[i + 1])
            if end is None or not (_begins(literals, before) and _begins(literals, after)):
                raise RejectedRow(
                    "the model's own chat template renders the same turns differently once others "
                    "follow"
                )
            replies.append((i, len(literals[i]) - len(before[-1]), end.end()))
        if not prompt:
            placed = [f"{text}" for _, text in _placeholders(roles)]
            texts = [
                literals[i][len(literals[i]) - lead :] + placed[i] + literals[i + 1][:tail]
                for i, lead, tail in replies
            ]
            messages = [Message(role=r, content=p) for r, p in zip(roles, placed, strict=True)]
            self._require_generation(Conversation(messages), texts)
        return literals, replies

    def _find_end(self) -> str:
        """The token that ends a reply, of a template that has one, and a generation prompt."""
        literals = self._literals(_TURNS, False)
        end = re.match(rf"\s*(?:{self._control.pattern})", literals[-1])
        if end is None or not end[0].strip():
            raise self._unfit("puts no end token after a reply")
        before, after = self._literals(_TURNS[:1], True), self._literals(_TURNS[:2], False)
        if _begins(after, before) and before == self._literals(_TURNS[:1], False):
            lead = after[1][len(before[1]) :]
            if lead.strip():
                raise self._unfit(f"has no generation prompt: the model would write {lead!r}")
        return end[0].strip()

    def _probe_turns(self) -> list[str]:
        """Require a reply as a server prompts for it; find the token that ends a tool call."""
        self._turns.ends = pattern_of([self.eos_token])
        if self.is_own:
            self._turns.turns(_EXCHANGE, [1])
        elif self.name != "chatml":
            return []
        for self._turns.arguments_as_text in (False, True):
            with contextlib.suppress(RejectedRow):
                prompt = self._turns.render(_CALL, 1, prompt=True)
                reply = self._turns.render(_CALL, 2, prompt=False).text[len(prompt.text) :]
                if "'x': 7" not in reply:  # as Python writes an object
                    found = [*self._control.finditer(reply.rstrip())][-1:]
                    ends = [end[0] for end in found if end.end() == len(reply.rstrip())]
                    return ends if self.eos_token not in reply else []
        self._turns.arguments_as_text = False
        return []

    def _require_generation(
        self, conversation: Conversation, replies: Sequence[str], count: int | None = None
    ) -> None:
        """Refuse a template whose `{% generation %}` blocks are not the replies (to the last)."""
        if not _GENERATION.search(self.chat_template):
            return
        tagged = _GENERATION.sub('{{\\1 "\ue003" \\2}}', self.chat_template)
        chat, tools, kwargs = self._turns.arguments(
            conversation, count or len(conversation.messages)
        )
        blocks = self._apply(chat, False, tools, kwargs, tagged).split("\ue003")[1::2]
        blocks = blocks[-len(replies) :] if count else blocks
        agree = [
            block.strip() in (reply.strip(), reply.removesuffix(self.eos_token).strip())
            for block, reply in zip(blocks, replies, strict=False)
        ]
        if len(blocks) != len(replies) or not all(agree):
            raise self._unfit(
                "marks other text by {% generation %} than what follows its generation prompt"
            )

    def _render_literals(self, roles: tuple[Role, ...], prompt: bool) -> tuple[str, ...]:
        chat = [{"role": role, "content": text} for role, text in _placeholders(roles)]
        parts = re.split("\ue000([0-9]+)\ue001", self._apply(chat, prompt))
        if parts[1::2] != [str(i) for i in range(len(roles))]:
            raise RejectedRow("the model's own chat template leaves a message out")
        return tuple(parts[::2])

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
            raise self._unfit(str(exceeded)) from exceeded
        except Exception as error:  # the template is third-party code
            raise RejectedRow(f"the model's own chat template refuses it: {error}") from None

    def _begin_with(self, bos: str) -> None:
        """Prepend BOS to the Jinja, unless it writes BOS."""
        begins = {literals[0].startswith(bos) for literals in self._probe()}
        if len(begins) > 1:
            raise self._unfit(f"begins only some conversations with {bos!r}")
        if begins == {False}:
            self.chat_template = f"{{{{- {_quote(bos)} }}}}{self.chat_template}"
            self._literals.cache_clear()

    def _probe(self) -> list[tuple[str, ...]]:
        """Literals of two exchanges, without and with a system message."""
        rendered = []
        for roles in _PROBES:
            with contextlib.suppress(RejectedRow):  # many templates take no system message
                rendered.append(self._literals(roles, False))
        return rendered

    def _find_control_tokens(self) -> frozenset[str]:
        """Special tokens, and other added tokens that the template writes for any role."""
        # Role tokens may lack the special flag: `<｜User｜>` (DeepSeek), `<|observation|>` (GLM).
        special, other = added_tokens(self._tokenizer)
        names = (re.sub(r"\W", "", token) for token in other)
        roles = dict.fromkeys([*_ROLES, *(name for name in names if re.fullmatch(r"\D+", name))])
        written = set[str]()
        for role in roles if other else ():
            for turns in ((role,), ("user", role), (role, "user"), ("user", "assistant", role)):
                chat = [{"role": name, "content": text} for name, text in _placeholders(turns)]
                with contextlib.suppress(RejectedRow):
                    written.add(self._apply(chat, True))
        # And those of branches that need tools or thoughts: `<tool_call>`, `</think>` (Qwen).
        written.update(t for t in other if re.search(r"\W", t) and t in self.chat_template)
        text = "\n".join(written)
        return special | {token for token in other if token.strip() and token in text}

    def _find_markers(self, ends: set[str]) -> list[str]:
        """Plain text after an end token or BOS that opens a turn of the model's own template."""
        end = pattern_of(ends - {""}).pattern
        literals = (literal for probe in self._probe() for literal in probe[:-1])
        openings = (re.sub(rf"^(?:\s|{end})+", "", literal).strip() for literal in literals)
        return sorted({text for text in openings if text and not self._control.search(text)})

    def _unfit(self, reason: str) -> UserError:
        return _unfit(self.name, f"the chat template {reason}")


def make(
    name: str, tokenizer: PreTrainedTokenizerBase, template_name: str | None = None
) -> Template:
    """Make the template `prepare.template` for a tokenizer, whose vocabulary stays as it is."""
    if tokenizer.eos_token is None:
        raise UserError(
            "models/tokenizer: the tokenizer has no end token. Set eos_token in "
            "tokenizer_config.json, or choose another model."
        )
    if name == "tokenizer":
        chat_template = _own_template(tokenizer, template_name)
        try:
            date = _DATE if "date_string" in chat_template else ""
            clock = _STRFTIME if "strftime_now" in chat_template else ""
            made = Template(name, tokenizer, date + clock + chat_template)
        except RejectedRow as reason:
            raise _unfit(name, str(reason)) from None
        made.template_name = template_name
        return made
    chat_template, markers = _JINJA[name]
    begin = special_prefix(tokenizer) or tokenizer.bos_token or ""
    end = tokenizer.eos_token
    if name == "chatml" and "<|im_end|>" in tokenizer.added_tokens_encoder:
        end = "<|im_end|>"
    head = f"{{%- set begin, end = {_quote(begin)}, {_quote(end)} -%}}"
    return Template(name, tokenizer, head + chat_template.strip("\n"), markers)


def _own_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str:
    """The model's own chat template, of several the one of this name or the default."""
    known = tokenizer.chat_template or {}
    if isinstance(known, str):
        if name is not None:
            raise UserError(
                f"params.yaml: prepare.template_name is {name!r}, but the model has one chat "
                "template, without a name. Set it to null."
            )
        return known
    if (name or "default") not in known:
        if known:
            raise UserError(
                f"params.yaml: prepare.template_name is {name!r}, but the model's chat templates "
                f"are {', '.join(sorted(known))}. Set it to one of these."
            )
        raise _unfit("tokenizer", "the model has no chat template")
    return str(known[name or "default"])


def _unfit(name: str, reason: str) -> UserError:
    return UserError(
        f"params.yaml: prepare.template is {name!r}; {reason}. Choose chatml, guanaco or llama2."
    )


def _begins(literals: tuple[str, ...], start: tuple[str, ...]) -> bool:
    last = len(start) - 1
    return literals[:last] == start[:last] and literals[last].startswith(start[last])


def _placeholders(roles: Sequence[str]) -> list[tuple[str, str]]:
    return [(role, f"\ue000{i}\ue001") for i, role in enumerate(roles)]


def _has_more(conversation: Conversation) -> bool:
    """Whether a conversation has more than roles and contents."""
    return bool(conversation.tools or conversation.template_kwargs) or any(
        message["role"] == "tool" or not message.keys() <= _PLAIN
        for message in conversation.messages
    )


def _rendered(text: Text, replies: Sequence[Span], turn: int | None = None) -> Rendered:
    return Rendered(
        text.text,
        tuple((part.start, part.end) for part in text.parts),
        tuple(replies),
        tuple(part.owner for part in text.parts),
        tuple(part.kind for part in text.parts),
        turn,
    )


def _quote(text: str) -> str:
    """A Jinja string: JSON without escapes, as Jinja knows no surrogate pairs."""
    return json.dumps(text, ensure_ascii=False)
