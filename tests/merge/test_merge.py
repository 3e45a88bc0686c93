"""A merged model is what was trained, or it is not written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.merge import merge as merging
from stages.merge import verify
from stages.merge.config import Merge
from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.model import loading
from stages.shared.model.packing import read_examples
from tests import tiny
from tests.train.running import settings, train_on


def trained(folder: Path, precision: str, **changes: Any) -> dict[str, Path]:
    """A trained tiny model and all that its merge reads."""
    data = tiny.prepared(folder / "prepared")
    quantized = tiny.quantize(folder / "quantized", precision)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    train_on(settings(**changes), data, quantized, folder / "adapter")
    (folder / "merged").mkdir()
    return {name: folder / name for name in ("prepared", "quantized", "base", "adapter", "merged")}


def merge(folder: Path, onto: str = "quantized", dtype: str = "fp16") -> dict[str, Any]:
    wanted = Merge.model_validate({"onto": onto, "dtype": dtype})
    weights = {"quantized": folder / "quantized", "original": folder / "base"}
    return merging.merge(
        wanted,
        folder / "adapter",
        weights,
        folder / "tokenizer",
        folder / "prepared",
        folder / "merged",
    )


@pytest.mark.parametrize(
    ("precision", "changes"),
    [
        ("nf4", {}),
        ("fp4", {}),
        ("int8", {}),
        ("fp16", {}),
        ("bf16", {}),
        ("fp32", {}),
    ],
)
def test_a_merge_is_what_was_trained(
    tmp_path: Path, precision: str, changes: dict[str, Any]
) -> None:
    trained(tmp_path, precision, **changes)
    metrics = merge(tmp_path)
    assert metrics["top1_agreement"] >= 0.99
    assert metrics["kl_divergence"] <= 1e-3


def test_merge_and_unload_on_quantized_layers_would_not_pass(tmp_path: Path) -> None:
    """What the project does not do: peft quantizes the sum again. The gate must see it."""
    paths = trained(tmp_path, "nf4")
    unloaded = loading.load_adapted(paths["adapter"], paths["quantized"], torch.device("cpu"))
    requantized = unloaded.merge_and_unload().dequantize(dtype=torch.float32)
    del requantized._weight_conversions
    requantized.save_pretrained(paths["merged"])
    examples = read_examples(paths["prepared"] / "eval.parquet")
    cpu = torch.device("cpu")
    requantized = loading.load_model(paths["merged"], cpu, torch.float32)
    agreement = verify.compare(
        verify.trained_exactly(paths["adapter"], paths["quantized"], examples, cpu),
        verify.log_probabilities(
            loading.load_model(paths["merged"], cpu, torch.float32),
            examples,
            cpu,
            torch.float32,
            "",
        ),
    )
    with pytest.raises(UserError, match="nothing was written"):
        verify.require(agreement, torch.bfloat16)


@pytest.mark.parametrize(
    ("differ", "positions", "passes"),
    [(1, 11, True), (2, 11, False), (2, 150, False), (4, 400, True), (5, 400, False)],
)
def test_one_token_may_differ_however_few_there_are(
    differ: int, positions: int, passes: bool
) -> None:
    agreement = verify.Agreement(1e-9, 1 - differ / positions, positions)
    if passes:
        verify.require(agreement, torch.float16)
        return
    with pytest.raises(UserError, match=r"nothing was written\. Set merge\.dtype to fp32"):
        verify.require(agreement, torch.float16)


def test_a_padding_token_without_a_row_is_replaced_by_the_end_token(tmp_path: Path) -> None:
    """As fine-tuners add it to a tokenizer; a model with such an id cannot be loaded."""
    paths = trained(tmp_path, "nf4")
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 384
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    merge(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(paths["merged"]).config.pad_token_id == 2
    assert AutoTokenizer.from_pretrained(paths["merged"]).pad_token_id == 2


def test_a_merged_model_needs_no_other_package(tmp_path: Path) -> None:
    paths = trained(tmp_path, "nf4")
    merge(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(paths["merged"])
    tokenizer = AutoTokenizer.from_pretrained(paths["merged"])
    assert model.dtype == torch.float16
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**ids, max_new_tokens=12)
    assert tokenizer.decode(output[0]).startswith("<|im_start|>user\nWhat is 3?<|im_end|>\n")


def test_onto_the_original_weights_is_reported_without_a_gate(tmp_path: Path) -> None:
    trained(tmp_path, "nf4")
    metrics = merge(tmp_path, onto="original")
    assert metrics["onto"] == "original"
    assert metrics["kl_divergence"] > 1e-3


def test_a_full_fine_tune_is_linked_and_has_nothing_to_merge(tmp_path: Path) -> None:
    paths = trained(tmp_path, "bf16", train__method="full")
    before = files.folder_sha256(paths["adapter"])
    with pytest.raises(UserError, match=r"merge\.onto is 'original'"):
        merge(tmp_path, onto="original")
    metrics = merge(tmp_path)
    assert metrics["top1_agreement"] == 1.0
    assert metrics["kl_divergence"] == 0.0
    weights = "model.safetensors"
    assert (paths["merged"] / weights).samefile(paths["adapter"] / weights)
    assert files.folder_sha256(paths["adapter"]) == before


def test_models_that_give_no_numbers_do_not_agree() -> None:
    """The largest of 0 and NaN is 0, and the most likely of three NaN the first."""
    nothing = torch.full((2, 3), torch.nan)
    with pytest.raises(UserError, match="gives NaN"):
        verify.compare([nothing], [nothing])


def test_a_token_that_cannot_be_in_either_model_adds_nothing() -> None:
    shut = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert verify.compare([shut], [shut]).kl_divergence == 0.0


def test_kl_and_agreement_by_hand() -> None:
    first = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]]).log()
    second = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.7, 0.1]]).log()
    agreement = verify.compare([first], [second])
    # 0.5 ln 2 - 0.25 ln 2 over two positions; the first position's most likely token differs.
    assert agreement.kl_divergence == pytest.approx(0.25 * 0.6931472 / 2)
    assert agreement.top1_agreement == 0.5
