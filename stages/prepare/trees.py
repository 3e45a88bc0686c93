"""Message trees of OpenAssistant exports, as paths from the prompt to a leaf."""

import math
from collections.abc import Iterator
from typing import Any

from stages.prepare.rows import kind_of, present
from stages.shared.chat.conversation import RejectedRow

_TREE = {"text", "role", "replies", "rank", "lang", "deleted"}


def paths(root: Any, *, every: bool) -> Iterator[list[dict[str, Any]]]:
    """Paths in OpenAI's form, best ranked replies first; without `every`, the first alone."""
    pending = [[_Node(root, 1)]]
    while pending:
        path = pending.pop()
        if replies := path[-1].replies():
            pending += [[*path, reply] for reply in (replies[::-1] if every else replies[:1])]
        else:
            yield [node.message for node in path]


class _Node:
    def __init__(self, value: Any, number: int) -> None:
        if not isinstance(value, dict):
            raise RejectedRow(f"message {number} of the tree is {kind_of(value)}")
        self.fields, self.number = present(value), number
        rest = {name: self.fields[name] for name in self.fields.keys() - _TREE}
        own = {"role": self.fields.get("role"), "content": self.fields.get("text")}
        self.message: dict[str, Any] = {**own, **rest}

    def replies(self) -> list["_Node"]:
        """Replies that were not deleted, best ranked first."""
        replies = self.fields.get("replies", [])
        if not isinstance(replies, list):
            where = f"`replies` of message {self.number} of the tree"
            raise RejectedRow(f"{where} is {kind_of(replies)}")
        kept = [r for r in replies if not (isinstance(r, dict) and r.get("deleted"))]
        return [_Node(reply, self.number + 1) for reply in sorted(kept, key=_rank)]


def _rank(reply: Any) -> float:
    rank = reply.get("rank") if isinstance(reply, dict) else None
    return float(rank) if isinstance(rank, int | float) else math.inf
