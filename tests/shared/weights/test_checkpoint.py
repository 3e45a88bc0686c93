"""Safetensors files: what is stored, and that a damaged one is loaded by no stage."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.evaluate.evaluate import evaluate
from stages.evaluate.inputs import Evaluate
from stages.merge.merge import merge
from stages.quantize.convert import convert
from stages.shared.core.errors import UserError
from stages.shared.model import loading
from stages.shared.step import adapter as adapters
from stages.shared.weights.checkpoint import Weights, read_header
from tests import tiny
from tests.architectures import BESIDES, saved
from tests.train.running import settings, train_on

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"
LORA = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"
Tensors = dict[str, torch.Tensor]


def missing(tensors: Tensors, name: str) -> None:
    del tensors[name]


def renamed(tensors: Tensors, name: str) -> None:
    tensors[name.replace("up_proj", "upward").replace("lm_head", "head")] = tensors.pop(name)


def misshapen(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].flatten()[:-1].clone()


def cut(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name][:-1].clone()


def not_finite(tensors: Tensors, name: str) -> None:
    tensors[name].view(-1)[-1] = torch.inf


def added(tensors: Tensors, name: str) -> None:
    tensors[f"{name}.gate"] = torch.zeros(3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, quantized in two ways, an adapter, a full fine-tune, and their data."""
    folder = tmp_path_factory.mktemp("made")
    for precision in ("bf16", "nf4", "int8"):
        tiny.quantize(folder / precision, precision)
    data = tiny.prepared(folder / "prepared", 8, 8)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    once = {"train__epochs": 1, "lora__modules_to_save": ["lm_head"]}
    train_on(settings(**once), data, folder / "nf4", folder / "adapter")
    full = settings(train__epochs=1, train__method="full")
    train_on(full, data, folder / "bf16", folder / "full")
    return folder


def damage(folder: Path, change: Callable[[Tensors, str], None], name: str) -> Path:
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors, name)
    path.unlink()  # it may be linked
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("load", [loading.load_model, loading.load_dequantized])
@pytest.mark.parametrize(
    ("precision", "change", "name", "fault"),
    [
        ("bf16", missing, UP, f"{UP} is missing"),
        ("bf16", missing, "model.embed_tokens.weight", "model.embed_tokens.weight is missing"),
        ("bf16", renamed, UP, f"{UP} is missing"),
        ("bf16", added, "model.norm", "model.norm.gate is no weight of this model"),
        ("bf16", cut, UP, f"{UP} has shape [127, 64], but config.json makes it [128, 64]"),
        ("bf16", not_finite, UP, f"{UP} holds NaN or infinity"),
        ("nf4", missing, "model.norm.weight", "model.norm.weight is missing"),
        ("nf4", missing, UP, f"{UP} is missing, but its constants are there"),
        ("nf4", missing, f"{UP}.absmax", f"{UP} lacks its absmax"),
        ("nf4", missing, f"{UP}.nested_absmax", f"{UP} lacks its nested_absmax"),
        ("nf4", missing, STATE, f"{UP} lacks its quant_state"),
        ("nf4", misshapen, STATE, f"{STATE} is damaged"),
        ("nf4", renamed, f"{UP}.quant_map", f"{UP} lacks its quant_map"),
        ("nf4", added, "model.norm", "model.norm.gate is no weight of this model"),
        ("nf4", misshapen, UP, f"{UP} has the wrong shape"),
        ("nf4", misshapen, f"{UP}.absmax", f"{UP}.absmax has the wrong shape"),
        ("nf4", misshapen, f"{UP}.nested_quant_map", "nested_quant_map has the wrong shape"),
        ("nf4", not_finite, f"{UP}.nested_absmax", "nested_absmax holds NaN or infinity"),
        ("nf4", not_finite, f"{UP}.quant_map", "quant_map holds NaN or infinity"),
        ("int8", missing, UP.replace("weight", "SCB"), f"{UP} lacks its SCB"),
        ("int8", cut, UP, "SCB has the wrong shape"),
        ("int8", not_finite, UP.replace("weight", "SCB"), "SCB holds NaN or infinity"),
    ],
)
def test_load_refuses_damaged_weights(
    made: Path,
    tmp_path: Path,
    load: Callable[..., Any],
    precision: str,
    change: Callable[[Tensors, str], None],
    name: str,
    fault: str,
) -> None:
    path = damage(shutil.copytree(made / precision, tmp_path / precision), change, name)
    with pytest.raises(UserError) as raised:
        load(tmp_path / precision, CPU)
    assert str(raised.value).startswith(f"{path}: ")
    assert fault in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "step",
    ["core_model_loading._materialize_copy", "integrations.bitsandbytes.Bnb4bitQuantize.convert"],
)
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 4 bytes")])
def test_lack_of_memory_is_no_missing_tensor(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, step: str
) -> None:
    """While a tensor is read, or quantized."""

    def lacking(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(f"transformers.{step}", lacking)
    with pytest.raises(type(error), match=r"^$|can't allocate"):
        convert(made / "base", tmp_path, tiny.quantization("nf4"), CPU)


def merged(root: Path, adapter: str) -> dict[str, Any]:
    weights = {"quantized": root / "nf4", "original": root / "base"}
    inputs = (root / adapter, weights, root / "tokenizer", root / "prepared", root / "out")
    return merge("quantized", "fp16", *inputs)


def evaluated(root: Path, folder: str) -> Any:
    few = Evaluate(generate_rows=1, max_new_tokens=1, prompts=1, seed=0)
    tokenizer, data = root / "tokenizer", root / "prepared"
    return evaluate(folder, root / folder, root / "nf4", tokenizer, data, few)


def quantized(root: Path) -> Any:
    return convert(root / "base", root / "out", tiny.quantization("nf4"), CPU)


def trained(root: Path, init: str = "default") -> Any:
    lora = settings(lora__init=init).lora
    return adapters.load_for_lora(root / "nf4", lora, CPU, root / "base")


HEAD = "base_model.model.lm_head.weight"
# A stage, the folder that is damaged, and a tensor of it.
LOADS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "quantize": (quantized, "base", UP),
    "evaluate base": (lambda root: evaluated(root, "base"), "base", UP),
    "train": (trained, "nf4", f"{UP}.nested_absmax"),
    "train loftq": (lambda root: trained(root, "loftq"), "base", UP),
    "train full": (lambda root: adapters.load_for_full(root / "bf16", CPU), "bf16", UP),
    "merge": (lambda root: merged(root, "adapter"), "adapter", LORA),
    "merge head": (lambda root: merged(root, "adapter"), "adapter", HEAD),
    "merge full": (lambda root: merged(root, "full"), "full", UP),
    "evaluate adapter": (lambda root: evaluated(root, "adapter"), "adapter", LORA),
    "evaluate head": (lambda root: evaluated(root, "adapter"), "adapter", HEAD),
    "evaluate full": (lambda root: evaluated(root, "full"), "full", UP),
}


ADAPTED = ("merge", "merge head", "evaluate adapter", "evaluate head")
CASES = [(load, change) for load in LOADS for change in (missing, not_finite)]
CASES += [(load, change) for load in ADAPTED for change in (renamed, cut, added)]


@pytest.mark.parametrize(("load", "change"), CASES)
def test_stage_refuses_damaged_weights(
    made: Path, tmp_path: Path, load: str, change: Callable[[Tensors, str], None]
) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "out").mkdir()
    run, folder, name = LOADS[load]
    path = damage(tmp_path / folder, change, name)
    with pytest.raises(UserError) as raised:
        run(tmp_path)
    assert str(raised.value).startswith(f"{path}: ")
    assert re.search(r"upward|up_proj|lm_head|head", str(raised.value))


def test_load_accepts_what_models_rightly_lack_or_ignore(tmp_path: Path) -> None:
    """A tied head; masks and rotary frequencies that checkpoints of older versions hold."""
    llama = tiny.save(tmp_path / "llama")
    assert "lm_head.weight" not in load_file(llama / "model.safetensors")
    damage(llama, lambda t, name: t.update({name: torch.zeros(8)}), "model.rotary_emb.inv_freq")
    loading.load_model(llama, CPU)
    gpt2 = saved(tmp_path / "gpt2", "gpt2", BESIDES["gpt2"])
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    damage(gpt2, lambda t, _: t.update(masks), "")
    loading.load_model(gpt2, CPU)


@pytest.mark.parametrize("size", [4, 60, -1])
def test_cut_file_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(9)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="is no whole safetensors file"):
        read_header(path)


def weights_of(folder: Path, **shards: Tensors) -> Weights:
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return Weights(folder)


def test_parts_are_counted_with_their_weight(tmp_path: Path) -> None:
    weights = weights_of(
        tmp_path,
        one={
            "q.weight": torch.tensor([[127, -127], [0, 64]], dtype=torch.int8),
            "q.SCB": torch.tensor([1.0, 254.0]),
            "q.weight_format": torch.tensor(0, dtype=torch.uint8),
            "q.bias": torch.zeros(2, dtype=torch.bfloat16),
        },
        two={"norm.weight": torch.ones(3)},
    )
    stored = {p.name: p for p in weights.parameters}
    assert {name: (p.kind, p.shape, p.bytes) for name, p in stored.items()} == {
        "norm.weight": ("fp32", (3,), 12),
        "q.bias": ("bf16", (2,), 4),
        "q.weight": ("int8", (2, 2), 4 + 8 + 1),
    }
    assert weights.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    values = weights.values(stored["q.weight"], CPU)
    assert torch.allclose(values, torch.tensor([[1.0, -1.0], [0.0, 128.0]]))


def test_parameters_come_in_order_and_without_the_prefix(tmp_path: Path) -> None:
    names = [f"h.{i}.weight" for i in (10, 2, 1)] + ["embed.weight"]
    weights = weights_of(tmp_path, model={name: torch.zeros(1) for name in names})
    in_order = ["embed.weight", "h.1.weight", "h.2.weight", "h.10.weight"]
    assert [p.name for p in weights.parameters] == in_order
    assert weights.find("transformer.h.1.weight", "transformer") == "h.1.weight"
    assert weights.find("h.1.weight", "transformer") == "h.1.weight"
    assert weights.find("h.0.weight", "transformer") is None


def test_every_dtype_and_shape_is_read_as_by_safetensors(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
    dtypes += [torch.float8_e5m2, torch.int64, torch.int32, torch.int16]
    tensors = {str(dtype): torch.arange(6).view(2, 3).to(dtype) for dtype in dtypes} | {
        "scalar": torch.tensor(7, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
        "odd": torch.arange(5, dtype=torch.int8),
        "flags": torch.tensor([[True], [False]]),
    }
    weights = weights_of(tmp_path, model=tensors)
    for name, expected in tensors.items():
        tensor = weights.tensor(name)
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))
