"""A merged model is what was trained, or it is not written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stages.merge import merge as merging
from stages.merge import verify
from stages.merge.config import Merge
from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.model import loading
from stages.shared.model.packing import read_examples
from stages.shared.weights.precision import DTYPES
from tests import tiny
from tests.architectures import BESIDES, OTHERS, saved
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


@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8", "fp16", "bf16", "fp32"])
def test_merge_is_what_was_trained(tmp_path: Path, precision: str) -> None:
    trained(tmp_path, precision)
    metrics = merge(tmp_path)
    assert metrics["top1_agreement"] >= 0.99
    assert metrics["kl_divergence"] <= 1e-3


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_default_load_computes_with_the_verified_numbers(tmp_path: Path, dtype: str) -> None:
    paths = trained(tmp_path, "nf4")
    metrics = merge(tmp_path, dtype=dtype)
    stored = {t.dtype for t in load_file(paths["merged"] / "model.safetensors").values()}
    loaded = AutoModelForCausalLM.from_pretrained(paths["merged"])
    assert stored == {loaded.dtype} == {DTYPES[dtype]}
    assert metrics["dtype"] == files.read_json(paths["merged"] / "config.json")["dtype"]
    assert metrics["dtype"] == str(loaded.dtype).removeprefix("torch.")


def test_activations_beyond_fp16_are_refused(tmp_path: Path) -> None:
    """Between the two matrices of an MLP; weights and results are in range."""
    model = tiny.model()
    model.model.layers[0].mlp.up_proj.weight.data *= 6e4
    model.model.layers[0].mlp.down_proj.weight.data /= 6e4
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    trained(tmp_path, "bf16")
    with pytest.raises(UserError, match=r"merge\.dtype is fp16, .* activations reach \d"):
        merge(tmp_path)
    assert merge(tmp_path, dtype="fp32")["dtype"] == "float32"


def test_merged_folder_is_read_by_transformers_4(tmp_path: Path) -> None:
    """By its class of tokenizer and its names of rotary parameters; seen with 4.57.6."""
    paths, tokenizer = trained(tmp_path, "nf4"), tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    merge(tmp_path)
    written = files.read_json(paths["merged"] / "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|tool|>"]
    assert not {"backend", "is_local", "local_files_only", "extra_special_tokens"} & set(written)
    text = "<|im_start|>user\n two<|tool|>¿二?"
    assert AutoTokenizer.from_pretrained(paths["merged"]).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("kind", "rope", "names"),
    [
        ("llama", {"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ("llama", {"rope_type": "linear", "factor": 2.0}, {"rope_scaling": 2.0}),
        ("gpt_neox", {"partial_rotary_factor": 0.5}, {"rotary_pct": 0.5}),
        ("gemma3_text", {}, {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
        ("phi3", OTHERS["phi3"]["rope_parameters"], {"rope_scaling": 4.0}),
    ],
)
def test_rope_is_named_as_transformers_4_does(
    tmp_path: Path, kind: str, rope: dict[str, Any], names: dict[str, Any]
) -> None:
    parameters = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | rope}
    base = saved(tmp_path, kind, BESIDES.get(kind, {}) | (parameters if rope else {}))
    before, path = AutoConfig.from_pretrained(base), base / "config.json"
    config = files.read_json(path)
    files.write_json(path, config | merging._v4_rope(config))
    written = files.read_json(path)
    for name, value in names.items():
        assert value in (written[name], written[name]["factor"] if "scaling" in name else None)
    assert AutoConfig.from_pretrained(base).rope_parameters == before.rope_parameters


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
