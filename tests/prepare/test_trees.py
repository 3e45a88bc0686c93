"""Trees of messages: the best path or all, each reply supervised once, split as one."""

from typing import Any

import numpy as np
import pytest

from stages.prepare.forms import parse
from stages.prepare.loss_mask import ExampleEncoder
from stages.shared.chat import templates
from tests import chat_templates, tiny
from tests.prepare.helpers import ROWS, Stage


def node(text: str, *replies: Any, role: str = "assistant", **more: Any) -> dict[str, Any]:
    return {"text": text, "role": role, "replies": [*replies], **more}


def ask(text: str, *replies: Any, **more: Any) -> dict[str, Any]:
    return node(text, *replies, role="prompter", **more)


TREE = ask(
    "two",
    node("is", ask("four", node("plus", rank=1), node("minus", rank=0)), ask("why"), rank=1),
    node("yes", ask("and"), rank=0),
    node("no", rank=2, deleted=True),
    node("last"),
)
PATHS = [["two", "yes"], ["two", "is", "four", "minus"], ["two", "is", "four", "plus"]]
PATHS += [["two", "last"]]


def test_all_paths_of_a_tree() -> None:
    best, every = (parse({"prompt": TREE}, form) for form in ("oasst", "oasst_all"))
    assert [m["content"] for m in best.messages] == PATHS[0]
    assert (best.branches, best.dropped_turn) == ([], True)
    branches = [path for path, _ in every.branches]
    assert [[m["content"] for m in p] for p in (every.messages, *branches)] == PATHS
    assert [shared for _, shared in every.branches] == [1, 3, 1]


def test_language_and_unread_fields_of_a_tree() -> None:
    found = parse({"prompt": TREE | {"lang": "nl", "emojis": {"+1": 1}}, "message_tree_id": "1"})
    assert (found.language, found.form) == ("nl", "oasst")
    assert found.unknown == ["message_tree_id", "messages.emojis"]


@pytest.mark.parametrize("own", [chat_templates.KEPT, chat_templates.DROPPED])
@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_replies_of_a_tree_are_supervised_once(own: str, train_on: Any) -> None:
    tokenizer = chat_templates.tokenizer(own)
    encoder = ExampleEncoder(
        tokenizer, templates.make("tokenizer", tokenizer), train_on, 64, thinking="drop"
    )
    examples = encoder.encode(parse({"prompt": TREE}, "oasst_all"))
    supervised_texts = [tokenizer.decode(one.input_ids[one.loss_mask]) for one in examples]
    replies = [
        text.split("</think>")[-1].strip() for text in "".join(supervised_texts).split("<|im_end|>")
    ]
    expected = ["yes", "is", "minus", "plus", "last", ""]
    assert replies == [one for one in expected if train_on == "assistant" or one != "is"]


@pytest.mark.parametrize("own", [chat_templates.KEPT, chat_templates.DROPPED])
def test_text_that_paths_share_is_supervised_once(own: str) -> None:
    tokenizer = chat_templates.tokenizer(own)
    encoder = ExampleEncoder(tokenizer, templates.make("tokenizer", tokenizer), "all", 64)
    paths = encoder.encode(parse({"prompt": TREE}, "oasst_all"))
    supervised_texts = [tokenizer.decode(one.input_ids[one.loss_mask]) for one in paths]
    assert supervised_texts[0] == paths[0].text.removeprefix("<|im_start|>")
    assert [text.count("two") for text in supervised_texts] == [1, 0, 0, 0]
    assert [
        text.split("<|im_end|>")[0].split("</think>")[-1].strip() for text in supervised_texts[1:]
    ] == [*("is", "plus", "last")]


def test_path_that_is_too_long_is_left_out() -> None:
    tokenizer = tiny.tokenizer()
    encoder = ExampleEncoder(tokenizer, templates.make("chatml", tokenizer), "assistant", 30)
    tree = ask("two", node("four", ask("two " * 40, node("x"), node("y"))))
    examples = encoder.encode(parse({"prompt": tree}, "oasst_all"))
    assert [(len(one.messages), one.truncated) for one in examples] == [(2, True)]


def test_rows_of_a_tree_are_one_conversation(stage: Stage) -> None:
    rows = [{"prompt": ask(f"two {i}", *TREE["replies"])} for i in range(20)]
    figures = stage.prepare([*rows, rows[0]], rows[3:4], format="oasst_all")
    assert (figures["duplicates"], figures["leaked"]) == (1, 1)
    assert figures["train"]["conversations"] == 19
    assert figures["train"]["rows"] == 19 * 4
    train = stage.rows("train")
    assert len({one["conversation_id"] for one in train}) == 19
    assert not stage.questions("train") & stage.questions("eval")
    for one in train:
        weights = np.array(one["weights"] or np.float32(one["loss_mask"]))
        assert np.array_equal(weights > 0, one["loss_mask"])
    alone = stage.prepare(ROWS)
    assert "rows" not in alone["train"]
