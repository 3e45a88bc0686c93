"""Tools of a row, and its own arguments for the chat template."""

from typing import Any

from stages.prepare.messages import loaded, says
from stages.prepare.rows import kind_of, present
from stages.shared.chat.conversation import RejectedRow

TOOLS = ("tools", "functions")
KWARGS = "chat_template_kwargs"
# Arguments of apply_chat_template that prepare sets.
_RESERVED = {"messages", "conversation", "tools", "documents", "chat_template", "tokenize"}
_RESERVED |= {"add_generation_prompt", "continue_final_message", "strftime_now"}


def parse_tools(fields: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Parse function schemas, OpenAI's or bare ones, also as JSON text."""
    lists = [loaded(fields[name]) for name in TOOLS if says(fields.get(name))]
    if not lists:
        return None
    values = [value if isinstance(value, list) else [value] for value in lists]
    tools = [[_tool(number, one) for number, one in enumerate(some, start=1)] for some in values]
    if tools[0] != tools[-1]:
        raise RejectedRow("`tools` and `functions` differ; remove one")
    return tools[0]


def _tool(number: int, value: Any) -> dict[str, Any]:
    value = loaded(value)
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value, name = {"type": "function"} | value, value["function"].get("name")
    elif isinstance(value, dict):
        value, name = {"type": "function", "function": value}, value.get("name")
    else:
        raise RejectedRow(f"tool {number} is {kind_of(value)}, expected a function's schema")
    if not isinstance(name, str) or not name or value["type"] != "function":
        raise RejectedRow(f"tool {number} is no schema of a function with a name")
    return value


def parse_kwargs(fields: dict[str, Any]) -> dict[str, Any]:
    """Parse the row's own arguments for the chat template."""
    value = loaded(fields.get(KWARGS))
    if not says(value):
        return {}
    if not isinstance(value, dict):
        raise RejectedRow(f"`{KWARGS}` is {kind_of(value)}, expected an object")
    if reserved := sorted(value.keys() & _RESERVED):
        raise RejectedRow(f"`{KWARGS}` sets `{reserved[0]}`, which the row or prepare gives")
    return present(value)
