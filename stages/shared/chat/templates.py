"""Chat templates: a conversation as text, with the spans of its messages and replies.

The Jinja of the merged model is rendered once per sequence of roles, with placeholders for the
messages. Text is joined from these literals and the messages, so spans are always exact.
"""

import contextlib
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from stages.shared.chat.conversation import Message, RejectedRow, Role
from stages.shared.chat.tokenizer import added_tokens, pattern_of, special_prefix
from stages.shared.core import bounds, files
from stages.shared.core.errors import UserError

Span = tuple[int, int]

# `begin` opens a turn of llama2, `end` is the end token; `make` sets both.
_CHATML = r"""
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + end + '\n' -}}
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
_TURNS: tuple[Role, ...] = ("user", "assistant") * 2
_PROBES: tuple[tuple[Role, ...], ...] = (_TURNS, ("system", *_TURNS))
_WRITTEN = 1 << 20  # characters that a template may add to the messages
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; spans are [start, end) in characters."""

    text: str
    contents: tuple[Span, ...]  # of the messages
    replies: tuple[Span, ...]  # from the prompt's end to the end token's end


class Format(BaseModel):
    """`data/prepared/format.json`: the template, for evaluation and the merged model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    template: str
    chat_template: str  # Jinja
    eos_token: str  # ends a reply
    stop_ids: list[int]  # tokens that end a generated reply


def read_format(path: Path) -> Format:
    """Read `format.json`."""
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
        self._tokenizer, self._own = tokenizer, markers is None
        self._literals = functools.cache(self._render_literals)
        self._skeleton = functools.cache(self._split)
        bos = special_prefix(tokenizer)
        self._begin_with(bos)
        self.control_tokens = self._find_control_tokens()
        self._control = pattern_of(self.control_tokens)
        literals, [*_, (_, _, tail)] = self._skeleton(_TURNS, False)
        self.eos_token = literals[-1][:tail].strip()
        ids = [tokenizer.convert_tokens_to_ids(self.eos_token), tokenizer.eos_token_id]
        self.stop_ids: list[int] = list(dict.fromkeys(ids))  # end a generated reply
        # Tokens that begin a text and end none; never supervised.
        bos_ids = tokenizer.encode(bos, add_special_tokens=False)
        self.bos_ids = [token for token in bos_ids if token not in self.stop_ids]
        if markers is None:
            markers = self._find_markers({self.eos_token, bos})
        # Plain text that delimits turns; no message may hold it.
        self.markers = tuple(marker for marker in markers if marker not in self.control_tokens)

    def format(self) -> Format:
        """Content of format.json."""
        return Format(
            template=self.name,
            chat_template=self.chat_template,
            eos_token=self.eos_token,
            stop_ids=self.stop_ids,
        )

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> Rendered:
        """Render normalized messages; a prompt ends with the generation prompt."""
        literals, edges = self._skeleton(tuple(m["role"] for m in messages), prompt)
        text, contents = literals[0], list[Span]()
        for message, literal in zip(messages, literals[1:], strict=True):
            contents.append((len(text), len(text) + len(message["content"])))
            text += message["content"] + literal
        if self._own:
            pairs = [(m["role"], m["content"]) for m in messages]
            if self._apply(pairs, prompt) != text:
                raise RejectedRow("the model's own chat template alters the text of a message")
        replies = ((contents[i][0] - lead, contents[i][1] + tail) for i, lead, tail in edges)
        return Rendered(text, tuple(contents), tuple(replies))

    def _split(
        self, roles: tuple[Role, ...], prompt: bool
    ) -> tuple[tuple[str, ...], list[tuple[int, int, int]]]:
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
            if not (_begins(literals, before) and _begins(literals, after)):
                raise self._unfit("renders the same turns differently once others follow")
            end = re.match(rf"\s*(?:{self._control.pattern})", literals[i + 1])
            if end is None:
                raise self._unfit("puts no end token after a reply")
            lead = literals[i][len(before[-1]) :]
            if lead.strip() and before == self._literals(roles[:i], False):
                raise self._unfit(f"has no generation prompt: the model would write {lead!r}")
            replies.append((i, len(lead), end.end()))
        return literals, replies

    def _render_literals(self, roles: tuple[Role, ...], prompt: bool) -> tuple[str, ...]:
        parts = re.split("\ue000([0-9]+)\ue001", self._apply(_placeholders(roles), prompt))
        if parts[1::2] != [str(i) for i in range(len(roles))]:
            raise RejectedRow("the model's own chat template leaves a message out")
        return tuple(parts[::2])

    def _apply(self, messages: Sequence[tuple[str, str]], prompt: bool) -> str:
        try:
            with bounds.limited():
                text = str(
                    self._tokenizer.apply_chat_template(
                        [{"role": role, "content": content} for role, content in messages],
                        chat_template=self.chat_template,
                        tokenize=False,
                        add_generation_prompt=prompt,
                        # Today's date would change the tokens daily: calling it is an error.
                        **({"strftime_now": None} if self._own else {}),
                    )
                )
            if len(text) > _WRITTEN + 2 * sum(len(content) for _, content in messages):
                raise bounds.Exceeded(f"writes more than {_WRITTEN:,} characters of its own")
            return text
        except bounds.Exceeded as exceeded:
            raise self._unfit(str(exceeded)) from exceeded
        except TypeError as error:
            today = "strftime_now" in self.chat_template
            raise self._unfit("prints today's date" if today else f"fails: {error}") from None
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
                try:
                    written.add(self._apply(_placeholders(turns), True))
                except (RejectedRow, UserError) as error:
                    if isinstance(error.__cause__, bounds.Exceeded):
                        raise
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


def make(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """Make the template `prepare.template` for a tokenizer, whose vocabulary stays as it is."""
    if tokenizer.eos_token is None:
        raise UserError(
            "models/tokenizer: the tokenizer has no end token. Set eos_token in "
            "tokenizer_config.json, or choose another model."
        )
    if name == "tokenizer":
        try:
            chat_template = tokenizer.get_chat_template()
            date = _DATE if "date_string" in chat_template else ""
            return Template(name, tokenizer, date + chat_template)
        except (RejectedRow, ValueError) as error:  # several templates, none of them the default
            reason = str(error) if tokenizer.chat_template else "the model has no chat template"
            raise _unfit(name, reason) from None
    chat_template, markers = _JINJA[name]
    begin = special_prefix(tokenizer) or tokenizer.bos_token or ""
    end = tokenizer.eos_token
    if name == "chatml" and "<|im_end|>" in tokenizer.added_tokens_encoder:
        end = "<|im_end|>"
    head = f"{{%- set begin, end = {_quote(begin)}, {_quote(end)} -%}}"
    return Template(name, tokenizer, head + chat_template.strip("\n"), markers)


def _unfit(name: str, reason: str) -> UserError:
    return UserError(
        f"params.yaml: prepare.template is {name!r}; {reason}. Choose chatml, guanaco or llama2."
    )


def _begins(literals: tuple[str, ...], start: tuple[str, ...]) -> bool:
    last = len(start) - 1
    return literals[:last] == start[:last] and literals[last].startswith(start[last])


def _placeholders(roles: Sequence[str]) -> list[tuple[str, str]]:
    return [(role, f"\ue000{i}\ue001") for i, role in enumerate(roles)]


def _quote(text: str) -> str:
    """A Jinja string: JSON without escapes, as Jinja knows no surrogate pairs."""
    return json.dumps(text, ensure_ascii=False)
