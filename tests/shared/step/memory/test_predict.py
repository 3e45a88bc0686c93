"""Counts of a step without values against real steps, and their cache."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import Gemma3TextConfig

from benchmarks import memory
from benchmarks.memory import Setting
from stages.plan.config import CONFIGS
from stages.shared.core.errors import UserError
from stages.shared.parallel.placement import GIB
from stages.shared.step.memory import dry_run, fake_model, predict
from stages.shared.step.memory.predict import StepCounter
from stages.shared.step.memory.setup import MOST_COUNTED, MicroBatch, TrainingSetup, decisive
from tests.shared.step.adapters import LORA

LENGTHS = (40, 90, 50)
LEFT_OUT = "lora.target_modules leave out a linear layer"
WITH_HEAD = "lora.target_modules take in the head"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(
    ("model", "setting"),
    [
        ("whole heads", Setting("nf4", 8, False, LENGTHS)),
        ("whole heads", Setting("nf4", 64, True, LENGTHS, double_quant=False)),
        ("whole heads", Setting("int8", 8, True, LENGTHS)),
        ("whole heads", Setting("bf16", 8, False, LENGTHS, optimizer="adamw_8bit")),
        ("whole heads", Setting("bf16", None, True, LENGTHS)),
        ("whole heads", Setting("nf4", 8, False, LENGTHS, dora=True)),
        ("whole heads", Setting("nf4", 8, True, LENGTHS, dropout=0.1)),
        ("whole heads", Setting("bf16", 8, False, LENGTHS, init="pissa")),
        ("GPT-2", Setting("bf16", 8, False, LENGTHS)),
        ("GPT-2", Setting("nf4", 8, False, LENGTHS)),  # its Conv1D are quantized too
        ("Qwen3-MoE", Setting("nf4", 8, False, LENGTHS)),
        ("Mixtral", Setting("nf4", 8, True, LENGTHS, router_aux_loss=0.1)),
        ("Gemma", Setting("nf4", 8, False, LENGTHS)),
        ("Qwen3", Setting("nf4", 8, False, LENGTHS)),
    ],
    ids=str,
)
def test_count_equals_a_real_step(work: Path, model: str, setting: Setting) -> None:
    base = work / model
    if not base.exists():
        memory.random_base(memory.MODELS[model], base)
    measured = memory.measure(base, setting)
    predicted = memory.predict(base / "config.json", setting)
    off = 0.015 if setting.init == "pissa" else 0.001  # its gradients share a storage by halves
    if model in ("Mixtral", "Qwen3-MoE"):  # counted as if all tokens went to the same experts
        assert 0.999 * measured <= predicted.total_bytes <= 1.1 * measured
    else:
        assert predicted.total_bytes == pytest.approx(measured, rel=off)


@pytest.mark.parametrize(
    ("name", "setting", "gib"),
    [
        ("Llama-3-8B", Setting("nf4", 16, False, (2048,) * 4, share=1.0), 29.53),
        ("Llama-3-8B", Setting("nf4", 16, True, (2048,) * 4, share=1.0), 9.10),
        ("Mistral-7B", Setting("nf4", 16, True, (32_768,), share=1.0), 17.13),
        ("Llama-3-70B", Setting("nf4", 16, False, (512, 300), share=1.0), 51.58),
    ],
    ids=["8B", "8B, checkpointed", "7B, longer than its window", "70B, short"],
)
def test_count_of_a_gpu_equals_all_blocks_on_meta(name: str, setting: Setting, gib: float) -> None:
    """What all blocks held on the meta device, operation by operation."""
    predicted = memory.predict(CONFIGS / f"{name}.json", setting, "cuda")
    assert predicted.total_bytes / GIB == pytest.approx(gib, abs=0.006)


def test_blocks_that_alternate_are_extended_by_their_period() -> None:
    config = Gemma3TextConfig(
        hidden_size=192,
        num_attention_heads=4,
        vocab_size=3000,
        intermediate_size=384,
        num_hidden_layers=13,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=64,
    )
    pattern = fake_model.pattern_of(config)
    assert (pattern.run, pattern.period, pattern.repeats) == (13, 1, 0)
    config.layer_types = config.layer_types[:6] * 5
    config.num_hidden_layers = 26
    config.layer_types = config.layer_types[:26]
    pattern = fake_model.pattern_of(config)
    assert (pattern.run, pattern.period, pattern.repeats) == (8, 6, 3)
    assert [config.layer_types[i] for i in pattern.repeated] == config.layer_types[1:7]


def test_scoring_full_weights_copies_them(work: Path) -> None:
    config = work / "config.json"
    memory.MODELS["whole heads"].save_pretrained(work)
    setup = TrainingSetup("bf16", None, device="cpu")
    with StepCounter(config) as counter:
        rounded = counter.predict_scoring(setup, MicroBatch((90, 40), 60))
        exact = counter.predict_scoring(replace(setup, stored="fp32"), MicroBatch((90, 40), 60))
        parameters = counter.model()["parameters"]["parameters"]
    assert rounded.parts["gradients"] == exact.parts["gradients"] == 0
    assert rounded.parts["workspace"] >= 2 * parameters > exact.parts["workspace"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_dora_is_counted_in_every_precision(work: Path, device: Literal["cpu", "cuda"]) -> None:
    config = work / "config.json"
    memory.MODELS["whole heads"].save_pretrained(work)
    with StepCounter(config) as counter:
        for precision in ("nf4", "int8", "bf16"):
            plain, dora = (
                counter.predict(
                    TrainingSetup(precision, LORA | {"dora": dora}, device=device),
                    MicroBatch((90, 40), 60),
                )
                for dora in (False, True)
            )
            assert dora.total_bytes > plain.total_bytes


def test_answers_are_cached_by_config_setup_and_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "root", lambda: tmp_path)
    config, setup = tmp_path / "config.json", TrainingSetup("nf4", LORA, device="cpu")
    memory.MODELS["whole heads"].save_pretrained(tmp_path)
    with StepCounter(config) as counter:
        first = counter.persistent(setup)
    questions: list[dict[str, object]] = []

    def ask(question: dict[str, object]) -> dict[str, object]:
        questions.append(question)
        return {}

    monkeypatch.setattr(predict.DryRun, "ask", ask)
    counter = StepCounter(config)
    assert counter.persistent(setup) == first
    assert not questions
    cached = next((tmp_path / ".counts").iterdir())
    cached.write_text("{")  # by a process that was killed
    counter.persistent(setup)
    counter.persistent(replace(setup, double_quant=True))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 96}))
    counter.persistent(setup)
    assert len(questions) == 3


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "not found"),
        ({"model_type": "no-such-model"}, "no-such-model"),
        ({}, "model_type"),
        ({"model_type": "llama", "num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"model_type": "llama", "num_hidden_layers": 10**5}, "num_hidden_layers is 100000"),
        (
            {"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4},
            r"\(65\) is not a multiple",
        ),
        (
            {"model_type": "mixtral", "num_experts_per_tok": 9},
            "is 9, more than num_local_experts, 8",
        ),
        ("[" * 10**5, "recursion depth"),
    ],
    ids=lambda one: str(one)[:40],
)
def test_config_of_no_language_model_is_one_line(
    tmp_path: Path, config: dict[str, Any] | str | None, reason: str
) -> None:
    path = tmp_path / "config.json"
    if config is not None:
        path.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(UserError, match=reason) as error:
        StepCounter(path).model()
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"fused": False}, "QLORA_FUSED is false"),
        ({"lora": None, "precision": "bf16"}, "train.method is full"),
        ({"precision": "int8"}, "quantize.precision is int8"),
        ({"lora": LORA | {"dropout": 0.1}}, "lora.dropout is not 0"),
        ({"lora": LORA | {"dora": True}}, "lora.dora is true"),
        ({"lora": LORA | {"init": "olora"}}, "lora.init is pissa or olora"),
        ({"lora": LORA | {"modules_to_save": ["norm"]}}, "lora.modules_to_save are trained too"),
        ({"lora": LORA | {"bias": "all"}}, "lora.bias is not none"),
        ({"lora": LORA | {"target_modules": ["q_proj"]}}, LEFT_OUT),
        ({"lora": LORA | {"target_modules": r".*layers\.1\..*proj"}}, LEFT_OUT),
        ({"lora": LORA | {"target_modules": r".*(proj|lm_head)"}}, WITH_HEAD),
    ],
)
def test_fused_functions_cover_plain_lora_alone(changes: dict, reason: str | None) -> None:
    setup = replace(TrainingSetup("nf4", LORA), **changes)
    model = dry_run.prepare(memory.MODELS["whole heads"], setup)
    assert dry_run.unfused_because(setup, model) == reason
    gpt2 = dry_run.prepare(memory.MODELS["GPT-2"], TrainingSetup("nf4", LORA))
    assert dry_run.unfused_because(TrainingSetup("nf4", LORA), gpt2) is not None


def test_decisive_micro_batches_are_few_and_the_largest_in_each_size() -> None:
    batches = [MicroBatch((2 * n, 200 - n), 300 - 2 * n) for n in range(20, 60)]
    chosen = decisive([*batches, *(MicroBatch((n, 50), n) for n in range(20))])  # dominated
    assert len(chosen) == MOST_COUNTED and set(chosen) < set(batches)
    for size in range(5):
        assert max(b.sizes[size] for b in chosen) == max(b.sizes[size] for b in batches)
    assert sorted(decisive(batches[:3]), key=batches.index) == batches[:3]
    assert decisive([]) == []


@pytest.mark.parametrize(
    ("targets", "blocks"),
    [(r".*layers\.[45]\..*q_proj", 2), (["layers.4.self_attn.q_proj"], 1), (["q_proj"], 6)],
)
def test_adapter_on_some_blocks_is_counted(work: Path, targets: str | list[str], blocks: int):
    memory.MODELS["whole heads"].save_pretrained(work)
    setup = TrainingSetup("nf4", LORA | {"target_modules": targets})
    with StepCounter(work / "config.json") as counter:
        assert counter.persistent(setup)["trainable"] == blocks * 16 * (192 + 192)
        assert counter.predict(setup, MicroBatch((90,), 60)).parts["adapter"]


def test_embedding_without_a_decomposition_is_counted() -> None:
    """Training refuses it, by name."""
    lora = LORA | {"init": "pissa", "target_modules": ["wte"]}
    assert dry_run.prepare(memory.MODELS["GPT-2"], TrainingSetup("bf16", lora)) is not None
