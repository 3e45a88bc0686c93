"""Where adapters start, what of them learns, and what else learns beside them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    Starcoder2Config,
)

from stages.shared import files, machine, models
from stages.shared.errors import UserError
from stages.shared.precision import autocast
from stages.train import anchored, initialisation, masters, trainable
from stages.train.checkpoints import claim
from stages.train.training import train
from tests import tiny
from tests.train.running import settings, train_on

CPU = torch.device("cpu")
IDS = torch.arange(3, 60)[None]


def load(folder: Path, precision: str = "nf4", **lora: Any) -> Any:
    """A fresh adapter on the tiny model."""
    quantized = folder / precision
    if not quantized.exists():
        tiny.quantize(quantized, precision)
    wanted = settings(**{f"lora__{key}": value for key, value in lora.items()}).lora
    torch.manual_seed(settings().train.seed)
    return trainable.load_for_lora(quantized, wanted, CPU, folder / "base")


def layers(model: Any) -> list[LoraLayer]:
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def update(layer: LoraLayer) -> torch.Tensor:
    """What the adapter adds to the matrix."""
    return layer.get_delta_weight("default").detach()


@torch.no_grad()
def logits(model: Any, dtype: torch.dtype) -> torch.Tensor:
    with autocast(CPU, dtype):
        return model.eval()(IDS).logits.float()


def exactly(folder: Path, model: Any, precision: str) -> torch.Tensor:
    """Logits of the adapter on dequantized weights, in fp32."""
    trainable.save(model, folder / "adapter", torch.bfloat16)
    dequantized = models.load_dequantized(folder / precision)
    return logits(models.attach(dequantized, folder / "adapter"), torch.float32)


def decaying(rows: int, columns: int) -> torch.Tensor:
    """A random matrix whose singular values fall slowly, as those of weights do."""
    torch.manual_seed(3)
    u, _ = torch.linalg.qr(torch.randn(rows, rows))
    v, _ = torch.linalg.qr(torch.randn(columns, columns))
    values = torch.arange(1, min(rows, columns) + 1) ** -0.3
    return u[:, : len(values)] * values @ v[:, : len(values)].T


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_svd_factors_are_close_to_the_best_approximation(shape: tuple[int, int]) -> None:
    matrix, rank, scale = decaying(*shape), 8, 4.0
    a, b = initialisation.svd_factors(matrix, rank, scale)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    best = torch.linalg.norm(matrix - u[:, :rank] * s[:rank] @ v[:rank])
    assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
    assert torch.linalg.norm(matrix - scale * b @ a) <= 1.001 * best
    # Shared evenly: neither factor is larger than the other.
    assert torch.allclose(torch.linalg.norm(a), torch.linalg.norm(b), rtol=1e-4)


def test_qr_factors_are_the_first_of_the_whole_decomposition() -> None:
    matrix = decaying(48, 32)
    q, r = torch.linalg.qr(matrix)
    a, b = initialisation.qr_factors(matrix, 8)
    assert torch.allclose(b, q[:, :8], atol=1e-5)
    assert torch.allclose(a, r[:8], atol=1e-5)


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("lora", [{"init": "pissa"}, {"init": "olora", "rslora": True}])
def test_an_anchored_adapter_starts_at_the_base_and_leaves_it_alone(
    tmp_path: Path, precision: str, lora: dict[str, Any]
) -> None:
    model = load(tmp_path, precision, r=8, **lora)
    base = models.load_model(tmp_path / precision, CPU)
    state = model.get_base_model().state_dict()
    for name, before in base.state_dict().items():
        now = state.get(name, state.get(".base_layer.".join(name.rsplit(".", 1))))
        if isinstance(before, torch.Tensor) and now is not None:
            assert torch.equal(now, before), name
    quantized = models.quantized_layers(base)
    assert len(quantized) == len(models.quantized_layers(model))

    assert torch.equal(logits(model, torch.bfloat16), logits(base, torch.bfloat16))
    expected = logits(models.load_dequantized(tmp_path / precision), torch.float32)
    assert torch.allclose(exactly(tmp_path, model, precision), expected, atol=1e-4)


def test_pissa_trains_from_the_principal_part(tmp_path: Path) -> None:
    model = load(tmp_path, r=8, alpha=8, init="pissa")
    dense = dict(models.load_dequantized(tmp_path / "nf4").named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (
                f["default"].parametrizations.weight.original for f in (layer.lora_A, layer.lora_B)
            )
            matrix = dense[name.removeprefix("base_model.model.")].weight
            best = torch.linalg.svdvals(matrix)[8:].square().sum().sqrt()
            rest = torch.linalg.norm(matrix - layer.scaling["default"] * b @ a)
            assert rest <= 1.002 * best
            assert torch.linalg.norm(update(layer)) < 1e-5 * torch.linalg.norm(matrix)


@pytest.mark.parametrize("rslora", [False, True])
def test_only_the_first_half_of_an_anchored_adapter_learns(tmp_path: Path, rslora: bool) -> None:
    """Weight decay, which needs no gradient, leaves the second half alone as well."""
    start = anchored.ordinary_state(load(tmp_path, init="pissa", rslora=rslora))
    ordinary = load(tmp_path)
    wanted = settings(
        lora__init="pissa", lora__rslora=rslora, train__weight_decay=0.1, train__epochs=1
    )
    data = tiny.prepared(tmp_path / "prepared")
    outcome = train_on(wanted, data, tmp_path / "nf4", tmp_path / "adapter")
    assert outcome.metrics["trainable_parameters"] == sum(
        p.numel() for p in ordinary.parameters() if p.requires_grad
    )
    config = files.read_json(tmp_path / "adapter" / "adapter_config.json")
    assert config["r"] == 8
    loaded = models.load_adapted(tmp_path / "adapter", tmp_path / "nf4", CPU)
    assert layers(loaded)[0].scaling == pytest.approx(
        layers(load(tmp_path, rslora=rslora))[0].scaling
    )
    for name, now in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        dim = 0 if "lora_A" in name else 1
        parts = zip(
            now.chunk(2, dim), start[name[:-7] + ".default.weight"].chunk(2, dim), strict=True
        )
        learnt, held = (torch.equal(*pair) for pair in parts)
        assert (learnt, held) == (False, True), name


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_a_start_is_found_again_to_the_bit(tmp_path: Path, init: str) -> None:
    """A checkpoint holds what learns; what is held still comes from a model made anew."""
    first, second = (anchored.ordinary_state(load(tmp_path, init=init)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first if "lora_" in name)


@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("lora", [{"alpha": 16}, {"alpha": 8, "rslora": True}])
def test_loftq_starts_closer_to_the_original_than_the_quantized_base(
    tmp_path: Path, precision: str, lora: dict[str, Any]
) -> None:
    model = load(tmp_path, precision, r=8, init="loftq", **lora)
    original = models.load_model(tmp_path / "base", CPU, torch.float32)
    dequantized = models.load_dequantized(tmp_path / precision)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            path = name.removeprefix("base_model.model.")
            wanted = original.get_submodule(path).weight
            found = dequantized.get_submodule(path).weight
            with_adapter = torch.linalg.norm(found + update(layer) - wanted)
            assert with_adapter < 0.95 * torch.linalg.norm(found - wanted), name

    wanted = logits(original, torch.float32).log_softmax(-1)
    divergences = [
        torch.nn.functional.kl_div(
            found.log_softmax(-1), wanted, log_target=True, reduction="batchmean"
        )
        for found in (exactly(tmp_path, model, precision), logits(dequantized, torch.float32))
    ]
    assert divergences[0] < 0.9 * divergences[1]


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_dora_starts_at_the_base(tmp_path: Path, init: str) -> None:
    """Peft rounds the magnitudes to the base's bf16: logits then begin 0.09 away from it."""
    model = load(tmp_path, dora=True, init=init)
    expected = logits(models.load_dequantized(tmp_path / "nf4"), torch.float32)
    assert torch.allclose(exactly(tmp_path, model, "nf4"), expected, atol=1e-4)


def biased(folder: Path) -> Path:
    """A tiny model with LayerNorms, biases everywhere, and a tied head, in nf4."""
    torch.manual_seed(2)
    config = Starcoder2Config(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_bias=True,
        sliding_window=None,
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder / "base")
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=four_bit, dtype=torch.bfloat16, device_map={"": "cpu"}
    ).save_pretrained(folder / "nf4")
    return folder


def test_trained_biases_are_masters_that_a_forward_pass_leaves_alone(tmp_path: Path) -> None:
    """Bitsandbytes rounds a bias to its compute dtype in place, a norm takes one dtype only."""
    model = load(biased(tmp_path), bias="all")
    biases = {n: p for n, p in model.named_parameters() if n.endswith(".bias")}
    assert len(biases) == 2 * (4 + 2 + 2) + 1
    for bias in biases.values():
        bias.data += 2.0**-14  # too fine for bf16
    before = {name: bias.detach().clone() for name, bias in biases.items()}
    with autocast(CPU, torch.bfloat16):
        loss = model.train()(IDS, labels=IDS).loss
    loss.backward()
    after = dict(model.named_parameters())
    for name, bias in before.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], bias), name
        assert after[name].grad is not None and after[name].grad.any(), name


def test_what_is_evaluated_is_what_the_file_holds(tmp_path: Path) -> None:
    model = load(biased(tmp_path), bias="all", modules_to_save=["lm_head", "embed_tokens"])
    own = masters.own_weights(model)
    for weight in own:
        weight.data += 2.0**-14
    before = [weight.detach().clone() for weight in own]
    with masters.as_saved(model, torch.bfloat16):
        scored = logits(model, torch.bfloat16)
        trainable.save(model, tmp_path / "adapter", torch.bfloat16)
    assert all(w.dtype == torch.float32 for w in own)
    assert all(torch.equal(w, b) for w, b in zip(own, before, strict=True))
    loaded = models.load_adapted(tmp_path / "adapter", tmp_path / "nf4", CPU)
    assert torch.equal(logits(loaded, torch.bfloat16), scored)


@pytest.mark.parametrize(
    ("saved", "tied", "copies"),
    [
        (["lm_head"], True, 1),
        (["embed_tokens"], True, 1),
        (["lm_head", "embed_tokens"], True, 1),
        (["lm_head", "embed_tokens"], False, 2),
    ],
)
def test_a_tie_of_which_both_ends_are_trained_stays_one_matrix(
    tmp_path: Path, saved: list[str], tied: bool, copies: int
) -> None:
    config = tiny.model().config
    config.tie_word_embeddings = tied
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = load(tmp_path, modules_to_save=saved)
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert [tuple(p.shape) for p in trained] == [(384, 64)] * copies
    assert all(p.dtype == torch.float32 for p in trained)


@pytest.mark.parametrize(
    ("precision", "lora", "expected"),
    [
        ("bf16", {"init": "loftq"}, "lora.init is 'loftq'"),
        ("nf4", {"init": "pissa", "r": 40}, "at most r 32 in a layer of 64→32"),
        ("nf4", {"init": "olora", "target_modules": ["embed_tokens"]}, "a linear layer"),
        ("int8", {"dora": True}, "lora.dora is true on int8 weights"),
        ("nf4", {"modules_to_save": ["q_proj"]}, "lora.modules_to_save names 'q_proj'"),
        ("nf4", {"modules_to_save": ["lm_head", "hed"]}, "lora.modules_to_save names 'hed'"),
        ("nf4", {"target_modules": ["q_proj", "typo"]}, "lora.target_modules names 'typo'"),
        ("nf4", {"bias": "all"}, "lora.bias is 'all'"),
        ("nf4", {"bias": "lora_only"}, "no bias in any layer"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    tmp_path: Path, precision: str, lora: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, precision, **lora)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["", [], "(q_proj"])
def test_a_target_that_can_match_nothing_is_refused_before_any_weight(value: Any) -> None:
    with pytest.raises(ValueError, match="all-linear"):
        settings(lora__target_modules=value)


@pytest.mark.parametrize(
    "lora",
    [
        {"lora__init": "pissa", "lora__dora": True},
        {"lora__bias": "all", "lora__modules_to_save": ["lm_head", "embed_tokens"]},
        {"lora__modules_to_save": ["embed_tokens"]},  # an fp32 one, before norms in bf16
    ],
)
def test_a_variant_that_goes_on_from_a_checkpoint_ends_in_the_same_bytes(
    tmp_path: Path, lora: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_CHECKPOINT_STEPS", "2")
    machine.machine.cache_clear()
    data = tiny.prepared(tmp_path / "prepared")
    inputs = {"train": data / "train.parquet", "eval": data / "eval.parquet"}
    inputs["model"] = biased(tmp_path) / "nf4"
    wanted = settings(train__epochs=1, **lora)
    with claim(tmp_path, "a-training", keep=9) as checkpoints:
        train(wanted, inputs, checkpoints)
        whole = files.folder_sha256(checkpoints.best)
        for later in sorted(checkpoints.folder.glob("step-*"))[1:]:
            shutil.rmtree(later)
        outcome = train(wanted, inputs, checkpoints)
        assert outcome.metrics["resumed_from_step"] == 2
        assert files.folder_sha256(checkpoints.best) == whole
    machine.machine.cache_clear()
