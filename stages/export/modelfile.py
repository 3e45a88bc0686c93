"""Ollama's Modelfile, with the chat template in Go's template language.

A chat template writes a text before each message that depends on its role and on the role before
it, and one before the reply. Both are read off the Jinja, so that any template can be written that
depends on nothing else.

Sources: https://github.com/ollama/ollama, docs/modelfile.md and template/template.go.
"""

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from stages.export.llama_cpp import Unsupported

LONGEST_CONTEXT = 8192  # Ollama reserves memory for all of it
Messages = list[dict[str, str]]


class Literals(NamedTuple):
    """Texts of a chat template, by the role before ("" at the start) and the role after."""

    between: dict[tuple[str, str], str]
    prompt: str  # after the last message, before the reply


def literals(render: Callable[[Messages], str]) -> Literals:
    """Read the texts off a function that renders messages up to the reply.

    Raises:
        Unsupported: the texts depend on more than two neighbouring roles.
    """
    turns = ["user", "assistant", "user", "assistant", "user"]
    between: dict[tuple[str, str], str] = {}
    prompts = set()
    for roles in (turns, turns[:1], ["system", *turns], ["system", "user"]):
        try:
            text = render([{"role": r, "content": f"\ue000{i}\ue001"} for i, r in enumerate(roles)])
        except Exception:  # the template is third-party code; many refuse a system message
            if "system" in roles:
                continue
            raise
        *parts, prompt = re.split("\ue000[0-9]+\ue001", text)
        prompts.add(prompt)
        pairs = zip(pairwise(["", *roles]), parts, strict=False)
        same = all(between.setdefault(pair, part) == part for pair, part in pairs)
        if not same or len(parts) != len(roles) or len(prompts) > 1:
            raise Unsupported("its chat template is none that Ollama's Modelfile can hold")
    return Literals(between, prompts.pop())


def go_template(texts: Literals) -> str:
    """Go template of the texts; they stand in it as string literals, which nothing can end."""
    branches = {
        f"and (eq .Role {_quote(role)}) (eq $last {_quote(before)})": text
        for (before, role), text in texts.between.items()
    }
    for (_, role), text in sorted(texts.between.items(), reverse=True):  # the start's, "", is last
        branches[f"eq .Role {_quote(role)}"] = text
    lines = [
        f"{{{{- {'else ' if number else ''}if {when} }}}}{_write(text)}"
        for number, (when, text) in enumerate(branches.items())
    ]
    lines = ['{{- $last := "" }}', "{{- range .Messages }}", *lines, "{{- end }}"]
    lines += ["{{- .Content }}{{ $last = .Role }}", "{{- end }}" + _write(texts.prompt)]
    return "\n".join(lines)


def _write(text: str) -> str:
    return f"{{{{ {_quote(text)} }}}}" if text else ""


def _quote(text: str) -> str:
    """A Go string: JSON's escapes are Go's."""
    return json.dumps(text, ensure_ascii=False)


def modelfile(names: Sequence[str], texts: Literals, end: str, context: int) -> str:
    """Modelfile of a model's file, and an adapter's, with greedy decoding, as they were measured.

    Ollama's default repeat_penalty, 1.1, would change replies. A model that goes on by itself is
    stopped where the next turn begins, too.
    """
    next_turn = texts.between["assistant", "user"].replace(end, "").strip().splitlines()[:1]
    stops = dict.fromkeys([end, *(line for line in next_turn if '"' not in line)])
    lines = [f"{word} ./{name}" for word, name in zip(("FROM", "ADAPTER"), names, strict=False)]
    lines.append(f'TEMPLATE """{go_template(texts)}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines.append(f"PARAMETER num_ctx {min(context, LONGEST_CONTEXT)}")
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1.0"]
    return "\n".join(lines) + "\n"
