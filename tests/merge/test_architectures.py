"""Other architectures than the default's, from the quantized model to the merged one."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.evaluate.evaluation import evaluate
from stages.evaluate.settings import Evaluate
from stages.merge.proven import merge_and_prove
from stages.merge.settings import Merge
from stages.quantize.convert import convert
from stages.quantize.settings import Quantize
from tests import tiny
from tests.architectures import BESIDES, OTHERS, saved
from tests.train.running import settings, train_on


# Matrices stored [in, out]; a head of another name in files; capped scores; convolutions.
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "gemma2", "lfm2"])
def test_an_architecture_is_trained_merged_and_evaluated(tmp_path: Path, kind: str) -> None:
    base = saved(tmp_path / "base", kind, (BESIDES | OTHERS).get(kind, {}))
    quantized, merged = tmp_path / "quantized", tmp_path / "merged"
    quantized.mkdir()
    merged.mkdir()
    nf4 = Quantize(precision="nf4", double_quant=True, compute_dtype="bf16")
    convert(base, quantized, nf4, torch.device("cpu"))
    data, adapter = tiny.prepared(tmp_path / "prepared"), tmp_path / "adapter"
    tokenizer = tmp_path / "tokenizer"
    tiny.tokenizer().save_pretrained(tokenizer)

    trained = train_on(settings(), data, quantized, adapter).metrics
    weights = {"quantized": quantized, "original": base}
    proof = merge_and_prove(
        Merge(onto="quantized", dtype="fp16"), adapter, weights, tokenizer, data, merged
    )
    few = Evaluate(generate_rows=4, max_new_tokens=4, prompts=1, seed=1)
    before, _ = evaluate("quantized", quantized, quantized, tokenizer, data, few)
    found, _ = evaluate("adapter", adapter, quantized, tokenizer, data, few)
    after, _ = evaluate("merged", merged, merged, tokenizer, data, few)

    assert trained["eval_loss"] < 0.9 * before["loss"]
    assert found["loss"] == pytest.approx(trained["eval_loss"], abs=1e-12)
    assert after["loss"] == pytest.approx(found["loss"], rel=0.01)
    assert proof["top1_agreement"] >= 0.99
    AutoModelForCausalLM.from_pretrained(merged)
