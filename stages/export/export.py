"""Export of the tuned model to the formats of other programs, each verified as it was written.

What an adapter's formats can hold: https://github.com/ggml-org/llama.cpp, convert_lora_to_gguf.py;
https://github.com/vllm-project/vllm, vllm/lora/peft_helper.py and vllm/config/lora.py.
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.shared.model import loading  # before peft

# isort: split
import pyarrow.parquet as pq
import torch
from gguf import GGMLQuantizationType
from peft.utils import set_peft_model_state_dict
from transformers import PreTrainedModel

from stages.export import modelfile
from stages.export.gguf_file import ADAPTER_PREFIX, ModelFormat
from stages.export.llama_cpp import Unsupported
from stages.shared.chat.templates import read_format
from stages.shared.core import files, machine
from stages.shared.core.errors import UserError
from stages.shared.model import packing, scoring
from stages.shared.verify.agreement import compare, first_positions, log_probabilities
from stages.shared.weights.checkpoint import Weights

POSITIONS = 384  # of a model of 135 million parameters in two seconds on two cores
MIN_TOP1_AGREEMENT = {"gguf-f16": 0.99, "gguf-bf16": 0.98, "gguf-q8_0": 0.98}
MIN_TOP1_AGREEMENT |= {"gguf-lora": 0.99, "vllm-lora": 0.98}  # Q4_0's is reported, whatever it is
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
CPU = torch.device("cpu")
_ANY = ("use_dora", "modules_to_save", "lora_bias")
_REFUSED = {
    "gguf-lora": (*_ANY, "alpha_pattern", "rank_pattern"),
    "vllm-lora": (*_ANY, "layer_replication", "use_qalora"),
}


class Exporter:
    """The models to export, and the held-out conversations that each format is verified on."""

    def __init__(self, merged: Path, adapter: Path, quantized: Path, data: Path) -> None:
        self.merged, self.adapter, self.quantized = merged, adapter, quantized
        self.form = read_format(data / "format.json")
        self.examples = first_positions(packing.read_examples(data / "eval.parquet"), POSITIONS)
        with pq.ParquetFile(data / "eval.parquet") as stored:
            columns = stored.read(["text_bytes", "conversation_id"], use_threads=False)
        scored = columns.slice(0, len(self.examples)).to_pydict()
        self.text_bytes = sum(scored["text_bytes"])
        self.conversations = len({*scored["conversation_id"]})

    def export(self, formats: Sequence[str], folder: Path) -> dict[str, Any]:
        """Write `formats` into folders of their names, and return their metrics.

        Raises:
            Unsupported: a format cannot hold the model or the adapter.
            UserError: a file's model disagrees with the one that it was written from.
        """
        if any(name.startswith("gguf") for name in formats):
            self.gguf = ModelFormat(self.merged, self.form)
            self.texts = modelfile.literals(self.gguf.render)
        adapters = [name for name in formats if name.endswith("-lora")]
        whole = [name for name in formats if name not in adapters]
        if adapters:
            require_adapter(self.adapter, adapters)
        for name in formats:
            (folder / name).mkdir()
        metrics = self._export_merged(whole, folder) if whole else {}
        metrics |= self._export_adapter(adapters, folder) if adapters else {}
        for name in formats:
            metrics[name] = {"bytes": files.folder_bytes(folder / name), **metrics[name]}
        return metrics

    def _export_merged(self, formats: Sequence[str], folder: Path) -> dict[str, Any]:
        """The merged model in one file each."""
        model = loading.load_model(self.merged, CPU, torch.float32)
        expected = self._predictions(model, "merged")
        metrics: dict[str, Any] = {"merged_loss": self._loss(expected)}
        metrics["merged_tokens"] = sum(map(len, expected))
        for name in formats:
            kind = name.removeprefix("gguf-").upper()
            self._write_gguf(folder / name / "model.gguf", self.merged, kind, model)
            metrics[name] = self._verify(name, expected, model)
        return metrics

    def _export_adapter(self, formats: Sequence[str], folder: Path) -> dict[str, Any]:
        """The adapter beside the dequantized base, on which it was trained."""
        metrics, base = {}, folder / "base"
        plain = loading.load_dequantized(self.quantized, machine.device())
        tuned = loading.attach(plain, self.adapter)
        expected = self._predictions(tuned, "adapter")
        self._write_base(tuned.unload(), base)
        del plain, tuned
        for name in formats:
            model = loading.load_model(base, CPU, torch.float32)
            if name == "vllm-lora":
                files.link_folder(base, folder / name / "base")
                write_portable(self.adapter, folder / name / "adapter")
                tuned = loading.attach(model, folder / name / "adapter")
            else:
                path = folder / name / "adapter.gguf"
                self.gguf.write_adapter(path, self.adapter)
                self._write_gguf(path.with_name("base.gguf"), base, "F16", model)
                tuned = loading.attach(model, self.adapter)
                set_peft_model_state_dict(tuned, self.gguf.read_adapter(path, self.adapter))
            metrics[name] = self._verify(name, expected, tuned)
        shutil.rmtree(base)
        return metrics

    def _write_gguf(self, path: Path, source: Path, kind: str, model: PreTrainedModel) -> None:
        """Write a file and its Modelfile; `model` is overwritten with the file's values."""
        self.gguf.write(path, Weights(source), GGMLQuantizationType[kind])
        self.gguf.fill(model, path)
        names = [file.name for file in (path, path.with_name("adapter.gguf")) if file.exists()]
        context = self.gguf.architecture.context_length
        text = modelfile.modelfile(names, self.texts, self.form.eos_token, context)
        files.write_text(path.with_name("Modelfile"), text)

    def _write_base(self, base: PreTrainedModel, folder: Path) -> None:
        """The dequantized base in the merged model's dtype, with its tokenizer and template."""
        dtype = loading.stored_dtype(self.merged)
        size = sum(p.numel() for p in base.parameters()) * dtype.itemsize
        files.require_space(folder, size, "the dequantized base")
        base.to(dtype).save_pretrained(folder)
        for path in sorted(self.merged.iterdir()):
            if "safetensors" not in path.name and path.name != "config.json":
                (folder / path.name).unlink(missing_ok=True)
                files.link_or_copy(path, folder / path.name)
        config = files.read_json(self.merged / "config.json")
        tied = {"tie_word_embeddings": base.config.tie_word_embeddings}
        files.write_json(folder / "config.json", config | tied)

    def _predictions(self, model: Any, desc: str) -> list[torch.Tensor]:
        return log_probabilities(model, self.examples, CPU, torch.float32, f"verify: {desc}")

    def _loss(self, predictions: list[torch.Tensor]) -> float:
        """Mean negative log-likelihood of the supervised tokens in nats."""
        batches = packing.bins(self.examples, scoring.SCORING_TOKENS)
        targets = torch.cat([packing.pack(batch, CPU).targets for batch in batches])
        parts = targets[:, None].split([len(logp) for logp in predictions])
        nats = [
            -logp.gather(1, part).double().sum().item()
            for logp, part in zip(predictions, parts, strict=True)
        ]
        return sum(nats) / sum(map(len, predictions))

    def _verify(self, name: str, expected: list[torch.Tensor], model: Any) -> dict[str, Any]:
        """Metrics of a format, whose values `model` has; too low an agreement is a UserError."""
        predictions = self._predictions(model, name)
        agreement, loss = compare(expected, predictions), self._loss(predictions)
        top1, tokens = agreement.top1_agreement, agreement.positions
        minimum = MIN_TOP1_AGREEMENT.get(name, 0.0)
        if round((1 - top1) * tokens) > max(1, int((1 - minimum) * tokens)):
            raise UserError(
                f"models/exported: {name} agrees with the model in {top1:.4f} of the most likely "
                f"tokens (at least {minimum}); nothing was written. Leave it out of export.formats."
            )
        return {
            "top1_agreement": top1,
            "kl_divergence": agreement.kl_divergence,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss * tokens / math.log(2) / self.text_bytes,
            "tokens": tokens,
            "conversations": self.conversations,
        }


def require_adapter(adapter: Path, formats: Sequence[str]) -> None:
    """Raise `Unsupported` for an adapter that is more than two factors of linear layers."""
    if not (adapter / "adapter_config.json").is_file():
        raise Unsupported("train.method full leaves no adapter")
    config = files.read_json(adapter / "adapter_config.json")
    for name in formats:
        unfit = [key for key in _REFUSED[name] if config.get(key)]
        unfit += ["bias"] if config.get("bias", "none") != "none" else []
        if name == "vllm-lora" and config["r"] > VLLM_RANKS[-1]:
            unfit.append(f"rank {config['r']}")
        if unfit:
            raise Unsupported(f"{name} has no place for an adapter with {', '.join(unfit)}")
    for stored in Weights(adapter).parameters:
        module, _, factor = stored.name.rpartition(".lora_")
        linear = module.startswith(ADAPTER_PREFIX) and factor in ("A.weight", "B.weight")
        if not linear or module.endswith(("lm_head", "embed_tokens")):
            raise Unsupported(f"{formats[0]} has no place for {stored.name}")


def write_portable(adapter: Path, folder: Path) -> None:
    """Link the weights, and write a configuration that depends on no folder of this machine.

    `init_lora_weights` says how training began; vLLM would take a base altered by it for granted.
    """
    folder.mkdir()
    weights = "adapter_model.safetensors"
    files.link_or_copy(adapter / weights, folder / weights)
    config = files.read_json(adapter / "adapter_config.json")
    portable = {"base_model_name_or_path": "../base", "init_lora_weights": True}
    files.write_json(folder / "adapter_config.json", config | portable)


def serving(folder: Path) -> str:
    """The command that serves an exported format."""
    if folder.name != "vllm-lora":
        return f"ollama create tuned -f {folder}/Modelfile && ollama run tuned"
    config = files.read_json(folder / "adapter/adapter_config.json")
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])  # as vLLM counts
    rank = min(allowed for allowed in VLLM_RANKS if allowed >= rank)
    options = f"--enable-lora --max-lora-rank {rank} --lora-modules tuned={folder}/adapter"
    return f"vllm serve {folder}/base {options}"
