"""A step of a mixture: the guarantees of dense models, with experts that few tokens reach."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from stages.quantize.convert import convert
from stages.shared.core.errors import UserError
from stages.shared.model import loading, packing, scoring
from stages.shared.model.packing import read_examples
from stages.shared.parallel import launcher
from stages.shared.parallel.group import Group
from stages.shared.parallel.shards import Shards
from stages.shared.step import adapter, gradient, targets
from stages.shared.step.fused.patch import fuse
from stages.shared.step.router_loss import RouterLoss, weight_of
from stages.shared.weights import experts
from tests import tiny
from tests.architectures import MIXTURES, saved
from tests.shared.step.adapters import CPU, IDS, Gradients, distance, gradients_of, moved
from tests.train.running import settings

KINDS = ("mixtral", "qwen3_moe")
ROWS = (5, 0, 9, 3)
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("mixtures")
    models = {kind: saved(root / kind, kind, MIXTURES[kind]) for kind in KINDS}
    return models | {"data": tiny.prepared(root / "prepared")}


def by_the_book(folders: Folders, kind: str, weight: float) -> Gradients:
    """Each conversation alone, the library's own load-balancing loss beside its loss."""
    model = moved(folders[kind])
    examples = read_examples(folders["data"] / "train.parquet")
    supervised = sum(examples[row].supervised_tokens for row in ROWS)
    for row in ROWS:
        example = examples[row]
        ids = torch.tensor(example.input_ids)[None, : example.input_tokens + 1]
        output = model(input_ids=ids[:, :-1], output_router_logits=True)
        mask = torch.tensor(example.loss_mask[1 : ids.shape[1]])
        loss = cross_entropy(output.logits[0][mask], ids[0, 1:][mask], reduction="sum")
        loss += weight * output.aux_loss * example.supervised_tokens
        (loss / supervised).backward()
    return gradients_of(model)


def step(
    folders: Folders,
    kind: str,
    tokens: int,
    *,
    checkpointing: bool = False,
    weight: float = 0.0,
    fused: bool = True,
    group: Group | None = None,
    sharded: bool = False,
) -> tuple[float, Gradients]:
    """A step of the project's, shared by a group; returns the router's loss and the gradients."""
    group = group or Group()
    model = moved(folders[kind])
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if fused:
        fuse(model)
    if sharded:
        Shards(model, group, CPU)
    examples = [read_examples(folders["data"] / "train.parquet")[row] for row in ROWS]
    router = RouterLoss(model, weight)
    gradient.accumulate(
        model,
        packing.even_passes(packing.partition(examples, tokens, group.size), True)[group.rank],
        sum(example.supervised_tokens for example in examples),
        dtype=torch.float32,
        fused=fused,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        all_reduce=group.all_reduce,
        router=router if weight else None,
    )
    return router.total.item(), gradients_of(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_gradient_of_a_mixture_is_that_of_each_conversation(
    folders: Folders, kind: str, weight: float
) -> None:
    expected = by_the_book(folders, kind, weight)
    losses = []
    for tokens, checkpointing, fused in (
        (4096, False, True),
        (70, True, True),
        (1, False, True),
        (4096, False, False),
        (70, True, False),
    ):
        how: dict[str, Any] = {"checkpointing": checkpointing, "weight": weight, "fused": fused}
        loss, gradients = step(folders, kind, tokens, **how)
        losses.append(loss)
        assert gradients.keys() >= expected.keys()
        unhit = [name for name in gradients if name not in expected]
        assert all(not gradients[name].any() for name in unhit)
        assert distance({n: gradients[n] for n in expected}, expected) < 1e-5
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-5)
    assert (losses[0] > 1) == (weight > 0)


def on_each(group: Group, _: torch.device, folders: Folders) -> list[Any]:
    """A step of each mixture with whole weights, and with sharded ones."""
    return [
        [step(folders, kind, 70, weight=0.5, group=group, sharded=way) for way in (False, True)]
        for kind in sorted(folders.keys() - {"data"})
    ]


def test_gradient_of_a_mixture_is_the_same_on_two_devices(folders: Folders, tmp_path: Path) -> None:
    """Of sharded weights, nf4 among them, the bits are those of whole ones."""
    every = dict(folders)
    for kind in KINDS:
        every[f"{kind} nf4"] = tmp_path / kind
        convert(folders[kind], tmp_path / kind, tiny.quantization("nf4"), CPU)
    shared = launcher.launch(2, CPU, on_each, every)
    for kind, (whole, sharded) in zip(sorted(every.keys() - {"data"}), shared, strict=True):
        assert sharded[0] == whole[0]
        assert all(torch.equal(sharded[1][name], one) for name, one in whole[1].items()), kind
        if kind in KINDS:
            loss, expected = step(folders, kind, 70, weight=0.5)
            assert whole[0] == pytest.approx(loss, rel=1e-6)
            hit = [name for name, one in expected.items() if one.any()]
            assert all(name in hit or not one.any() for name, one in whole[1].items())
            assert distance(*({n: g[n] for n in hit} for g in (whole[1], expected))) < 1e-5


@pytest.mark.parametrize("rank", [0, 1])
def test_idle_passes_use_no_expert(folders: Folders, rank: int) -> None:
    model = loading.load_model(folders["mixtral"], CPU)
    examples = read_examples(folders["data"] / "eval.parquet")[:1]
    with experts.counted(model) as use:
        scoring.score(model, examples, CPU, torch.float32, "", (rank, 2))
    assert use.sum().item() == (0 if rank else 2 * 2 * examples[0].input_tokens)


def test_an_expert_without_tokens_has_a_zero_gradient(folders: Folders) -> None:
    model = moved(folders["mixtral"])
    for layer in experts.layers(model):
        layer.register_forward_pre_hook(lambda _, args: (args[0], args[1].clamp(max=2), args[2]))
    examples = read_examples(folders["data"] / "train.parquet")[:2]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    options: dict[str, Any] = {"dtype": torch.float32, "fused": False, "scaler": scaler}
    gradient.accumulate(model, [examples], 20, **options)
    found = {name: bool(g.any()) for name, g in gradients_of(model).items() if ".experts." in name}
    assert {n for n, moves in found.items() if not moves} == {n for n in found if "experts.3." in n}


@pytest.mark.parametrize("kind", [*KINDS, "deepseek_v3"])
def test_adapter_lies_on_experts_and_dense_parts_alike(tmp_path: Path, kind: str) -> None:
    base = saved(tmp_path, kind, MIXTURES[kind])
    dense = {"attention", "experts"} | ({"mlp", "shared_experts"} if "deepseek" in kind else set())
    for chosen, frozen in ((None, set()), (False, {"experts"})):
        model = adapter.load_for_lora(base, settings(lora__experts=chosen).lora, CPU)
        kinds = targets.trainable_by_kind(model)
        assert {k for k, n in kinds.items() if n} == dense - frozen
        assert (
            targets.left_out(model)
            == f"lora: no adapter on {', '.join(k for k in kinds if not kinds[k])}"
        )
        assert not kinds["router"]


def test_mixture_without_sparse_layers_is_adapted_as_a_dense_model(tmp_path: Path) -> None:
    base = saved(
        tmp_path / "base", "qwen3_moe", MIXTURES["qwen3_moe"] | {"mlp_only_layers": [0, 1]}
    )
    model = moved(base).eval()
    assert {kind for kind, n in targets.trainable_by_kind(model).items() if n} == {
        "attention",
        "mlp",
    }
    adapter.save(model, tmp_path / "adapter", torch.float32)
    again = loading.attach(loading.load_model(base, CPU), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("lora", "kinds"),
    [
        ({"target_modules": ["q_proj"]}, {"attention"}),
        ({"target_modules": ["q_proj"], "experts": True}, {"attention", "experts"}),
        ({"target_modules": ".*q_proj", "experts": True}, {"attention", "experts"}),
        ({"target_modules": ["q_proj", "gate"]}, {"attention", "router"}),
        ({"modules_to_save": ["gate"], "experts": False}, {"attention", "router"}),
        ({"target_modules": ["w2"], "rslora": True, "dora": True}, {"experts"}),
    ],
)
def test_kinds_of_a_mixture_are_chosen(
    folders: Folders, tmp_path: Path, lora: dict[str, Any], kinds: set[str]
) -> None:
    params = settings(**{f"lora__{key}": value for key, value in lora.items()}).lora
    model = adapter.load_for_lora(folders["mixtral"], params, CPU)
    assert {kind for kind, n in targets.trainable_by_kind(model).items() if n} == kinds
    adapter.save(model, tmp_path / "adapter", torch.float32)
    again = loading.attach(loading.load_model(folders["mixtral"], CPU), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize(
    ("kind", "rslora"),
    [("mixtral", True), *((kind, False) for kind in MIXTURES)],
)
def test_peft_reads_the_adapter_on_fused_experts(tmp_path: Path, kind: str, rslora: bool) -> None:
    base, random = saved(tmp_path / "base", kind, MIXTURES[kind]), torch.manual_seed(1)
    model = adapter.load_for_lora(base, settings(lora__rslora=rslora).lora, CPU)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=random)
    adapter.save(model, tmp_path / "adapter", torch.float32)
    expert = {"mixtral": "block_sparse_moe.experts.0.w1", "qwen3_moe": "mlp.experts.0.gate_proj"}
    if kind in expert:
        name = f"base_model.model.model.layers.0.{expert[kind]}.lora_A.weight"
        assert name in load_file(tmp_path / "adapter/adapter_model.safetensors")
    again = loading.attach(loading.load_model(base, CPU), tmp_path / "adapter")
    fused = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for one in (model, again):
        one.set_attn_implementation(fused.config._attn_implementation)
    with torch.no_grad():
        plain = fused.eval()(IDS).logits
        tuned = PeftModel.from_pretrained(fused, tmp_path / "adapter").eval()(IDS).logits
        found = model.eval()(IDS).logits
        assert torch.equal(again(IDS).logits, found)
    assert (tuned - found).abs().max() < 1e-4 < (tuned - plain).abs().max()


def test_experts_and_router_loss_are_refused_without_experts(tmp_path: Path) -> None:
    dense = tiny.quantize(tmp_path / "quantized", "fp32")
    with pytest.raises(UserError, match=r"lora\.experts: this model has no experts"):
        adapter.load_for_lora(dense, settings(lora__experts=True).lora, CPU)
    config = loading.load_model(dense, CPU).config
    with pytest.raises(UserError, match=r"train\.router_aux_loss: .*no load-balancing loss"):
        weight_of(config, 0.1)
    assert weight_of(config, None) == weight_of(config, 0.0) == 0


def test_router_loss_has_the_weight_of_the_config(folders: Folders) -> None:
    config = loading.load_model(folders["mixtral"], CPU).config
    assert weight_of(config, None) == 0
    config.output_router_logits = True
    assert weight_of(config, None) == config.router_aux_loss_coef > 0
    assert (weight_of(config, 0.0), weight_of(config, 0.2)) == (0.0, 0.2)
