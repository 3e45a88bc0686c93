"""The whole stage: one line that names the cause, and a remedy that helps."""

from typing import Any

import pytest
from transformers import BartConfig, GPT2Config, LlamaConfig, RobertaConfig

from stages.shared.core.errors import UserError
from tests.prepare.helpers import ROWS, Stage, row

LONG = [row("two plus " * 99 + str(i)) for i in range(20)]


@pytest.mark.parametrize(
    ("train", "held_out", "changed", "message"),
    [
        (
            [*ROWS, {"text": "### Human: x"}],
            None,
            {},
            "params.yaml: prepare.max_rejected is 0.0; 1 of 21 rows are rejected: no reply (1, "
            "first my/train.jsonl:21). Mend these rows, or raise prepare.max_rejected.",
        ),
        (ROWS, None, {"format": "alpaca"}, "(20, first my/train.jsonl:1). Mend the file"),
        (LONG, None, {}, "params.yaml: prepare.max_length is 64; 20 of 20 rows are rejected: no "),
        (LONG, None, {}, "= 64 (20, first my/train.jsonl:1). Change prepare.max_length."),
        ([*ROWS[:3], *LONG], None, {}, "Change prepare.max_length."),
        ([{"prompt": "two"}], None, {}, "no known form in prompt"),
        (LONG, None, {"max_rejected": 1.0}, "of 20 rows 20 rejected (no supervised token"),
        (ROWS[:1], None, {}, "Add conversations, change prepare.eval_fraction, or"),
        ([row("same", str(i)) for i in range(9)], None, {}, "the split goes by the first message. "
         "Make data.path a folder with train.jsonl and eval.jsonl."),
        (ROWS[:4], ROWS, {}, "train split is empty: of 24 rows 0 rejected, 0 duplicates, 4 "
         "begin like one of eval. Add conversations to the train file."),
        (ROWS, None, {"template": "tokenizer"}, "has no chat template"),
    ],
)  # fmt: skip
def test_too_little_that_can_be_used(
    stage: Stage,
    train: list[Any],
    held_out: list[Any] | None,
    changed: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UserError) as error:
        stage.prepare(train, held_out, **changed)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not any(stage.out.iterdir()) if stage.out.exists() else True


@pytest.mark.parametrize("vocab_size", [384, 100])
def test_ids_beyond_the_embedding_are_refused(stage: Stage, vocab_size: int) -> None:
    LlamaConfig(vocab_size=vocab_size).save_pretrained(stage.raw.parent)
    stage.model = stage.raw.parent / "config.json"
    if vocab_size == 384:
        stage.prepare(ROWS)
        return
    with pytest.raises(UserError, match=r"models/tokenizer: .* embeds 100 .*vocab_size"):
        stage.prepare(ROWS)


@pytest.mark.parametrize("longest", [64, 12])
def test_positions_that_the_model_lacks(
    stage: Stage, longest: int, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.model = stage.raw.parent / "config.json"
    LlamaConfig(vocab_size=384, max_position_embeddings=longest).save_pretrained(stage.model.parent)
    stage.prepare(ROWS)
    assert ("Beyond them it was not trained" in capsys.readouterr().err) == (longest == 12)
    sizes = {"vocab_size": 384, "max_position_embeddings": longest}
    padded = RobertaConfig(**sizes | {"max_position_embeddings": longest + 2}, pad_token_id=1)
    for config in (GPT2Config(vocab_size=384, n_positions=longest), BartConfig(**sizes), padded):
        config.save_pretrained(stage.model.parent)
        if longest == 64:
            stage.prepare(ROWS)
            continue
        with pytest.raises(UserError, match=r"Lower prepare.max_length to 12\."):
            stage.prepare(ROWS)
