"""Other architectures and targets than the default's, from the quantized to the merged model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.evaluate.evaluate import evaluate
from stages.evaluate.inputs import Evaluate
from stages.merge import verify
from stages.merge.merge import merge
from stages.quantize.__main__ import Quantize
from stages.quantize.convert import convert
from stages.shared.core.errors import UserError
from stages.shared.step.adapter import load_for_lora
from tests import tiny
from tests.architectures import BESIDES, MIXTURES, OTHERS, saved
from tests.train.running import settings, train_on


# Matrices stored [in, out]; a head of another name in files; capped scores; convolutions; and
# every module that peft may wrap: embeddings, positions, heads, tied and untied, adapted or copied.
@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("gemma2", {}),
        ("lfm2", {}),
        ("mixtral", {}),
        ("qwen3_moe", {}),
        ("gpt_oss", {}),
        ("mixtral", {"init": "pissa", "rslora": True}),
        ("qwen3_moe", {"dora": True}),
        ("gpt2", {"target_modules": ["wte", "c_attn"]}),
        ("gpt2", {"target_modules": ["wpe", "lm_head"]}),
        ("gpt2", {"modules_to_save": ["wte", "wpe"]}),
        ("gpt_neox", {"target_modules": ["embed_in", "lm_head", "dense"]}),
        ("llama", {"target_modules": ["embed_tokens"]}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("gpt2", {"modules_to_save": ["wte", "lm_head"]}),  # tied, by names that peft does not know
    ],
)
def test_pipeline_of_an_architecture_agrees(
    tmp_path: Path, kind: str, lora: dict[str, Any]
) -> None:
    base = saved(tmp_path / "base", kind, BESIDES.get(kind) or OTHERS.get(kind, {}))
    quantized, merged = tmp_path / "quantized", tmp_path / "merged"
    quantized.mkdir()
    merged.mkdir()
    nf4 = Quantize(precision="nf4", double_quant=True, compute_dtype="bf16")
    convert(base, quantized, nf4, torch.device("cpu"))
    data, adapter = tiny.prepared(tmp_path / "prepared"), tmp_path / "adapter"
    tokenizer = tmp_path / "tokenizer"
    tiny.tokenizer().save_pretrained(tokenizer)

    changes = {f"lora__{key}": value for key, value in lora.items()}
    trained = train_on(settings(**changes), data, quantized, adapter).metrics
    weights = {"quantized": quantized, "original": base}
    proof = merge("quantized", "fp32", adapter, weights, tokenizer, data, merged)
    few = Evaluate(generate_rows=4, max_new_tokens=4, prompts=1, seed=1)
    before, _ = evaluate("quantized", quantized, quantized, tokenizer, data, few)
    found, _ = evaluate("adapter", adapter, quantized, tokenizer, data, few)
    after, _ = evaluate("merged", merged, merged, tokenizer, data, few)

    assert trained["eval_loss"] < 0.95 * before["loss"]
    assert found["loss"] == pytest.approx(trained["eval_loss"], abs=1e-12)
    assert after["loss"] == pytest.approx(found["loss"], rel=0.01)
    assert proof["top1_agreement"] >= 0.99
    assert proof.get("expert_error", 0.0) < 1e-5
    assert ("expert_error" in proof) == ("expert_use" in trained) == (kind in MIXTURES)
    AutoModelForCausalLM.from_pretrained(merged)


def test_embedding_called_with_a_mask_is_no_target(tmp_path: Path) -> None:
    base = saved(tmp_path, "opt", BESIDES["opt"])
    lora = settings(lora__target_modules=["embed_positions", "q_proj"]).lora
    with pytest.raises(UserError, match=r"lora\.target_modules: .*embed_positions is a OPT"):
        load_for_lora(base, lora, torch.device("cpu"))


def test_merge_refuses_an_expert_that_no_conversation_reaches() -> None:
    outputs = [torch.randn(4, 2, 8)]
    wrong = [outputs[0].clone()]
    wrong[0][3] = wrong[0][2]
    exact = verify.Agreement(0.0, 1.0, 100)
    verify.require(exact, torch.float16, verify.largest_error(outputs, outputs))
    with pytest.raises(UserError, match="an expert's output differs"):
        verify.require(exact, torch.float16, verify.largest_error(outputs, wrong))
