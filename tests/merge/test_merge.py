"""A merged model is what was trained, in a default load too, or it is not written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from stages.merge import merge as merging
from stages.merge import verify
from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.model import loading
from stages.shared.model.packing import read_examples
from stages.shared.weights.precision import DTYPES
from tests import tiny
from tests.architectures import BESIDES, OTHERS, saved
from tests.train.running import settings, train_on

CPU = torch.device("cpu")


def trained(folder: Path, precision: str, **changes: Any) -> Path:
    """A trained tiny model, and everything else that its merge reads."""
    data = tiny.prepared(folder / "prepared")
    quantized = tiny.quantize(folder / "quantized", precision)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    train_on(settings(**changes), data, quantized, folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def nf4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("nf4"), "nf4")


def merge(
    folder: Path,
    out: Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    onto: str = "quantized",
    dtype: str = "fp16",
) -> dict[str, Any]:
    """Merge into `out / "merged"`, with the folder's tokenizer or another."""
    (out / "merged").mkdir()
    if tokenizer is not None:
        tokenizer.save_pretrained(out / "tokenizer")
    return merging.merge(
        onto,
        dtype,
        folder / "adapter",
        {"quantized": folder / "quantized", "original": folder / "base"},
        (folder if tokenizer is None else out) / "tokenizer",
        folder / "prepared",
        out / "merged",
    )


@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8", "fp16", "bf16", "fp32"])
def test_merge_is_what_was_trained(tmp_path: Path, precision: str) -> None:
    metrics = merge(trained(tmp_path, precision), tmp_path)
    assert metrics["top1_agreement"] >= 0.99
    assert metrics["kl_divergence"] <= 1e-3


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_default_load_computes_with_the_verified_numbers(
    nf4: Path, tmp_path: Path, dtype: str
) -> None:
    metrics = merge(nf4, tmp_path, dtype=dtype)
    merged = tmp_path / "merged"
    stored = {t.dtype for t in load_file(merged / "model.safetensors").values()}
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert stored == {model.dtype} == {DTYPES[dtype]}
    assert metrics["dtype"] == files.read_json(merged / "config.json")["dtype"]
    assert metrics["dtype"] == str(model.dtype).removeprefix("torch.")

    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**ids, max_new_tokens=12)
    assert tokenizer.decode(output[0]).startswith("<|im_start|>user\nWhat is 3?<|im_end|>\n")


def test_activations_beyond_fp16_are_refused(tmp_path: Path) -> None:
    """Between the two matrices of an MLP; weights and results are in range."""
    model = tiny.model()
    model.model.layers[0].mlp.up_proj.weight.data *= 6e4
    model.model.layers[0].mlp.down_proj.weight.data /= 6e4
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    trained(tmp_path, "bf16")
    with pytest.raises(UserError, match=r"merge\.dtype is fp16, .* activations reach \d"):
        merge(tmp_path, tmp_path)
    (tmp_path / "fp32").mkdir()
    assert merge(tmp_path, tmp_path / "fp32", dtype="fp32")["dtype"] == "float32"


def test_merged_tokenizer_is_read_by_transformers_4(nf4: Path, tmp_path: Path) -> None:
    """For the same ids; seen with 4.57.6. A padding token without a row becomes the end token."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"], "pad_token": "[PAD]"})
    merge(nf4, tmp_path, tokenizer)
    merged = tmp_path / "merged"
    written = files.read_json(merged / "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|end|>"]
    assert not {"backend", "is_local", "local_files_only", "extra_special_tokens"} & set(written)
    text = "<|im_start|>user\n two<|end|>¿二?"
    assert AutoTokenizer.from_pretrained(merged).encode(text) == tokenizer.encode(text)
    assert AutoTokenizer.from_pretrained(merged).pad_token_id == 2
    assert AutoModelForCausalLM.from_pretrained(merged).config.pad_token_id == 2


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


def test_merge_and_unload_would_not_pass(nf4: Path, tmp_path: Path) -> None:
    """On quantized layers, peft quantizes the sum again."""
    unloaded = loading.load_adapted(nf4 / "adapter", nf4 / "quantized", CPU)
    requantized = unloaded.merge_and_unload().dequantize(dtype=torch.float32)
    del requantized._weight_conversions
    requantized.save_pretrained(tmp_path)
    examples = read_examples(nf4 / "prepared/eval.parquet")
    trained = verify.load_trained(nf4 / "adapter", nf4 / "quantized", CPU)
    models = (trained, loading.load_model(tmp_path, CPU, torch.float32))
    agreement = verify.compare(
        *(verify.log_probabilities(m, examples, CPU, torch.float32, "test") for m in models)
    )
    with pytest.raises(UserError, match="nothing was written"):
        verify.require(agreement, torch.bfloat16)


@pytest.mark.parametrize(
    ("differ", "positions", "passes"),
    [(1, 11, True), (2, 11, False), (2, 150, False), (4, 400, True), (5, 400, False)],
)
def test_one_token_may_differ_however_few(differ: int, positions: int, passes: bool) -> None:
    agreement = verify.Agreement(1e-9, 1 - differ / positions, positions)
    if passes:
        verify.require(agreement, torch.float16)
        return
    with pytest.raises(UserError, match=r"nothing was written\. Set merge\.dtype to fp32"):
        verify.require(agreement, torch.float16)


def test_original_weights_are_reported_without_a_gate(nf4: Path, tmp_path: Path) -> None:
    metrics = merge(nf4, tmp_path, onto="original")
    assert metrics["onto"] == "original"
    assert metrics["kl_divergence"] > 1e-3


def test_full_fine_tune_is_linked(tmp_path: Path) -> None:
    adapter = trained(tmp_path, "bf16", train__method="full") / "adapter"
    before = files.folder_sha256(adapter)
    with pytest.raises(UserError, match=r"merge\.onto is 'original'"):
        merging.refuse_original(adapter, "original")
    metrics = merge(tmp_path, tmp_path)
    assert (metrics["top1_agreement"], metrics["kl_divergence"]) == (1.0, 0.0)
    assert metrics["dtype"] == "bfloat16"
    weights = "model.safetensors"
    assert (tmp_path / "merged" / weights).samefile(adapter / weights)
    assert files.folder_sha256(adapter) == before


def test_agreement_by_hand() -> None:
    first = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]]).log()
    second = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.7, 0.1]]).log()
    agreement = verify.compare([first], [second])
    # 0.5 ln 2 - 0.25 ln 2 over two positions; the first position's most likely token differs.
    assert agreement.kl_divergence == pytest.approx(0.25 * 0.6931472 / 2)
    assert agreement.top1_agreement == 0.5
    impossible = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert verify.compare([impossible], [impossible]).kl_divergence == 0.0
    # The largest of 0 and NaN is 0, and the most likely of three NaN the first.
    nan = torch.full((2, 3), torch.nan)
    with pytest.raises(UserError, match="gives NaN"):
        verify.compare([nan], [nan])
