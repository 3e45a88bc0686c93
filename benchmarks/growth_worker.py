"""Steps of our training on one conversation of random tokens: any length, rank and model.

Run:    by benchmarks.growth, which tells it when (see benchmarks.paced)
"""

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import stages.shared.models  # noqa: F401  (before peft is imported, as the stage has it)

# isort: split
import torch
from peft import PeftModel
from transformers import LlamaConfig

from benchmarks import resident, training_ours
from benchmarks.paced import Channel
from benchmarks.random_quantized import qlora_model
from benchmarks.training_data import training_params
from benchmarks.training_step import Setting, micro_batch
from stages.shared.precision import computed_in
from stages.shared.step import adapter
from stages.train.computing import Computing
from stages.train.loop import Data
from stages.train.settings import Params

CPU = torch.device("cpu")
DTYPE = computed_in(torch.bfloat16, CPU.type)


def load(model: str | dict[str, int], settings: Params) -> PeftModel:
    """A quantized model of a folder, or random weights of a Llama's sizes; with an adapter."""
    if isinstance(model, str):
        return adapter.load_for_lora(Path(model), settings.lora, CPU)
    return qlora_model(LlamaConfig(**model), settings.lora.r, CPU, dtype=DTYPE)


def main() -> None:
    """Load, then a step whenever one is asked for."""
    channel = Channel()
    job: dict[str, Any] = channel.hear()
    settings = training_params(lora__r=job["rank"], train__batch_size=1)
    torch.manual_seed(settings.train.seed)
    model = load(job["model"], settings)
    setting = Setting("nf4", job["rank"], False, (job["length"],))
    vocabulary = model.get_input_embeddings().num_embeddings
    data = Data(micro_batch(setting, vocabulary), [])
    how = Computing(CPU, DTYPE, job["length"], gradient_checkpointing=False)
    loop = training_ours.make_loop(model, data, settings, how, [[0]] * job["steps"])
    resident.forget_peak(CPU)
    channel.tell({"before_bytes": resident.now_bytes(CPU)})
    while True:
        channel.hear()
        channel.tell(training_ours.take_step(loop))


if __name__ == "__main__":
    main()
