"""Each kind of adapter through the whole pipeline: trained, saved, scored again, merged, proven."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from stages.merge import merge as merging
from stages.shared.core import files
from stages.shared.core.errors import UserError
from stages.shared.model import loading, scoring
from stages.shared.model.packing import read_examples
from tests import tiny
from tests.train.running import settings, train_on

CPU = torch.device("cpu")
BOTH_ENDS = ["embed_tokens", "lm_head"]


@dataclass(frozen=True)
class Variant:
    """Parameters of an adapter, and what follows for the merged model."""

    lora: dict[str, Any]
    precision: str = "nf4"
    config: dict[str, Any] = field(default_factory=dict)  # of the base model
    tied: bool = True  # the merged model's embedding and head


BIASED = {"attention_bias": True, "mlp_bias": True}
UNTIED = {"tie_word_embeddings": False}
VARIANTS = {
    "pissa": Variant({"init": "pissa"}),
    "pissa int8": Variant({"init": "pissa"}, "int8"),
    "pissa bf16 rslora": Variant({"init": "pissa", "rslora": True}, "bf16"),
    "olora": Variant({"init": "olora"}),
    "olora dora": Variant({"init": "olora", "dora": True}),
    "loftq": Variant({"init": "loftq"}),
    "loftq fp4 dora": Variant({"init": "loftq", "dora": True}, "fp4"),
    "loftq int8 rslora": Variant({"init": "loftq", "rslora": True}, "int8"),
    "dora": Variant({"dora": True}),
    "dora bf16": Variant({"dora": True}, "bf16"),
    "rslora": Variant({"rslora": True}),
    "a list": Variant({"target_modules": ["q_proj", "down_proj"]}),
    "a pattern": Variant({"target_modules": r".*layers\.1\..*proj"}),
    "every bias": Variant({"bias": "all"}, config=BIASED),
    "every bias dora": Variant({"bias": "all", "dora": True}, config=BIASED),
    "adapted layers' biases int8": Variant(
        {"bias": "lora_only", "target_modules": ["v_proj"]}, "int8", BIASED
    ),
    "head": Variant({"modules_to_save": ["lm_head"]}, tied=False),
    "embedding": Variant({"modules_to_save": ["embed_tokens"]}, tied=False),
    "both ends of a tie": Variant({"modules_to_save": BOTH_ENDS}),
    "both ends, untied": Variant({"modules_to_save": BOTH_ENDS}, "int8", UNTIED, tied=False),
    "adapter on the head": Variant({"target_modules": ["q_proj", "lm_head"]}, tied=False),
    "adapter on the embedding": Variant({"target_modules": ["embed_tokens"]}, tied=False),
    "adapters on both ends": Variant({"target_modules": BOTH_ENDS}, tied=False),
    "pissa on the head": Variant({"init": "pissa", "target_modules": ["lm_head"]}, tied=False),
}


def base(folder: Path, variant: Variant) -> Path:
    """A tiny model in the variant's shape, its biases not zero, and quantized beside it."""
    config = tiny.model().config
    config.update(variant.config)
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(weight, std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return tiny.quantize(folder / "quantized", variant.precision)


def trained(folder: Path, variant: Variant) -> dict[str, Any]:
    """Train the variant; returns the metrics."""
    lora = {f"lora__{key}": value for key, value in variant.lora.items()}
    data, quantized = tiny.prepared(folder / "prepared"), base(folder, variant)
    wanted = settings(train__epochs=1, **lora)
    outcome = train_on(wanted, data, quantized, folder / "adapter", folder / "base")
    assert outcome.metrics["eval_loss"] < outcome.history.rows[0]["eval_loss"] - 0.2
    return outcome.metrics


def merge(folder: Path, onto: str = "quantized") -> dict[str, Any]:
    (folder / "merged").mkdir()
    return merging.merge(
        onto,
        "fp32",  # no rounding hides a difference
        folder / "adapter",
        {"quantized": folder / "quantized", "original": folder / "base"},
        folder / "tokenizer",
        folder / "prepared",
        folder / "merged",
    )


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_trained_scored_and_merged_adapter_agree(tmp_path: Path, variant: Variant) -> None:
    metrics = trained(tmp_path, variant)
    before = files.folder_sha256(tmp_path / "quantized")

    loaded = loading.load_adapted(tmp_path / "adapter", tmp_path / "quantized", CPU)
    held_out = read_examples(tmp_path / "prepared" / "eval.parquet")
    dtype = loading.compute_dtype(tmp_path / "quantized", CPU)
    score = scoring.mean_loss(*scoring.score(loaded, held_out, CPU, dtype, "test"))
    assert score == pytest.approx(metrics["eval_loss"], abs=1e-6)

    proof = merge(tmp_path)
    assert proof["top1_agreement"] >= 0.99
    assert proof["kl_divergence"] <= 1e-6
    assert files.folder_sha256(tmp_path / "quantized") == before

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    assert merged.config.tie_word_embeddings == variant.tied
    assert (head.weight is embedding.weight) == variant.tied


@pytest.mark.parametrize("name", ["pissa", "olora", "loftq", "both ends of a tie"])
def test_variant_trained_twice_is_the_same_bytes(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        monkeypatch.chdir(folder)  # the adapter's config names the model's folder
        trained(Path(), VARIANTS[name])
        hashes.append(files.folder_sha256(Path("adapter")))
    assert hashes[0] == hashes[1]


def test_loftq_is_not_merged_onto_the_original(tmp_path: Path) -> None:
    trained(tmp_path, VARIANTS["loftq"])
    with pytest.raises(UserError, match=r"merge\.onto is 'original'.*loftq"):
        merge(tmp_path, onto="original")


def test_pissa_fits_the_original_weights(tmp_path: Path) -> None:
    trained(tmp_path, VARIANTS["pissa"])
    assert merge(tmp_path, onto="original")["kl_divergence"] < 1
