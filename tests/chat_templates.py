"""Chat templates that behave like public ones, and each one's replies rendered in Python."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from stages.shared.chat.conversation import Message
from tests import tiny

CONTROL = ("<|im_start|>", "<|im_end|>", "<|call|>", "[INST]", "[/INST]", "[CALLS]", "[TOOLS]")
WORDS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "<user>", "<bot>")

_CALLS = (
    "{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
)
_TOOL = "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
_SYSTEM = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}Tools:{% for t in tools %}"
    "{{ '\n' + (t | tojson) }}{% endfor %}<|im_end|>\n{% elif messages[0].role == 'system' %}"
    "<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
)
_OTHERS = (
    "{% elif m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'tool' %}" + _TOOL + "{% endif %}{% endfor %}"
)
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Drops the thoughts of turns before the last user's, and opens later ones with a block (Qwen3).
DROPPED = (
    _SYSTEM + "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
    + _CALLS
    + "<|im_end|>\n"
    + _OTHERS
    + _PROMPT.replace(
        "{% endif %}",
        "{% if enable_thinking is defined and not enable_thinking %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    )
)
# Never renders thoughts, but opens a block in its generation prompt (DeepSeek-R1).
OPENED = (
    _SYSTEM + "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{{ m.content }}" + _CALLS + "<|im_end|>\n" + _OTHERS
) + _PROMPT.replace("{% endif %}", "<think>\n{% endif %}")
# Thoughts in every turn; tools in the system turn (Hermes).
KEPT = (
    _SYSTEM + "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}"
    "{% endif %}{{ m.content }}" + _CALLS + "<|im_end|>\n" + _OTHERS + _PROMPT
)
# Tools before the last user's turn, ids of nine characters, no system message (Mistral).
LAST = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif m.role == 'user' %}{% if tools and loop.index0 == ns.last %}[TOOLS]"
    "{{ tools | tojson }}[/INST]{% endif %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOLS]{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{% for c in m.tool_calls or [] %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids need 9 characters') }}{% endif %}[CALLS]"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}"
    "{% endfor %}<|im_end|>{% endif %}{% endfor %}"
)
# A token of its own ends a call, arguments one by one, added tokens as roles (GLM, gpt-oss).
ENDED = (
    "{% for t in tools or [] %}{{ t.function.name + ': ' + t.function.description + '\n' }}"
    "{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}<bot>"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}{{ '\n' + k }}={{ v | tojson }}{% endfor %}"
    "</tool_call>{% endfor %}{{ '<|call|>' if m.tool_calls else '<|im_end|>' }}"
    "{% else %}<user>{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def _hermes(message: Message) -> str:
    calls = [
        f'<tool_call>\n{{"name": "{c["name"]}", '
        f'"arguments": {_json(c["arguments"])}}}\n</tool_call>'
        for c in message.get("tool_calls", ())
    ]
    return "\n".join([*([message["content"]] if message["content"] else []), *calls])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def dropped(m: Message, kwargs: dict[str, Any]) -> str:
    block = f"<think>\n{m.get('reasoning', '')}\n</think>\n\n"
    return ("" if kwargs.get("enable_thinking") is False else block) + _hermes(m) + "<|im_end|>"


def opened(m: Message, _: dict[str, Any]) -> str:
    return f"{m.get('reasoning', '')}\n</think>\n\n{_hermes(m)}<|im_end|>"


def kept(m: Message, _: dict[str, Any]) -> str:
    thought = f"<think>\n{m['reasoning']}\n</think>\n\n" if m.get("reasoning") else ""
    return f"{thought}{_hermes(m)}<|im_end|>"


def last(m: Message, _: dict[str, Any]) -> str:
    calls = "".join(
        "[CALLS]" + _json({k: c[k] for k in ("name", "arguments", "id")})
        for c in m.get("tool_calls", ())
    )
    return f" {m['content']}{calls}<|im_end|>"


def ended(m: Message, _: dict[str, Any]) -> str:
    thought = f"<think>{m['reasoning']}</think>" if m.get("reasoning") else ""
    calls = "".join(
        f"<tool_call>{c['name']}"
        + "".join(f"\n{k}={_json(v)}" for k, v in c["arguments"].items())
        + "</tool_call>"
        for c in m.get("tool_calls", ())
    )
    return f"{thought}{m['content']}{calls}{'<|call|>' if calls else '<|im_end|>'}"


@dataclass(frozen=True)
class Case:
    """A template, its rendering of a reply, and whether it renders reasoning and system."""

    chat_template: str
    reply: Callable[[Message, dict[str, Any]], str]
    thinks: bool = True
    system: bool = True


CASES = {
    "dropped": Case(DROPPED, dropped),
    "opened": Case(OPENED, opened),
    "kept": Case(KEPT, kept),
    "last": Case(LAST, last, thinks=False, system=False),
    "ended": Case(ENDED, ended),
}


def tokenizer(chat_template: Any) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with the tokens of these templates, some not flagged as special."""
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": [*CONTROL[2:]]})
    made.add_tokens([AddedToken(word, special=False) for word in WORDS])
    made.chat_template = chat_template
    return made
