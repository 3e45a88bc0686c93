"""Export of the tuned model to the formats of other programs, each verified as it was written."""

import math
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stages.shared.model import loading  # before peft

# isort: split
import pyarrow.parquet as pq
import torch
from gguf import GGMLQuantizationType
from peft.utils import set_peft_model_state_dict
from transformers import PreTrainedModel

from stages.export import gguf_file, modelfile, vllm
from stages.export.architecture import Architecture, Unsupported
from stages.export.config import DEFAULT, refusal
from stages.export.vocabulary import Vocabulary
from stages.shared.chat.templates import Format, read_format
from stages.shared.chat.tokenizer import load_tokenizer
from stages.shared.core import files, machine
from stages.shared.core.errors import UserError
from stages.shared.model import packing, scoring
from stages.shared.verify.agreement import compare, first_positions, log_probabilities
from stages.shared.weights.checkpoint import Weights

POSITIONS = 384  # of a model of 135 million parameters in two seconds on two cores
MIN_TOP1_AGREEMENT = {"gguf-f16": 0.99, "gguf-bf16": 0.98, "gguf-q8_0": 0.98}
MIN_TOP1_AGREEMENT |= {"gguf-lora": 0.99, "vllm-lora": 0.98}  # Q4_0's is reported, whatever it is
CPU = torch.device("cpu")


class Export:
    """One export: the models that it reads, and how a format is compared with them."""

    def __init__(self, merged: Path, adapter: Path, quantized: Path, data: Path) -> None:
        self.merged, self.adapter, self.quantized = merged, adapter, quantized
        self.form: Format = read_format(data / "format.json")
        self.config = files.read_json(merged / "config.json")
        examples = packing.read_examples(data / "eval.parquet")
        self.examples = first_positions(examples, POSITIONS)
        sizes = pq.read_table(data / "eval.parquet", columns=["text_bytes"])["text_bytes"]
        self.text_bytes = sum(sizes.to_pylist()[: len(self.examples)])

    def run(self, formats: Sequence[str], folder: Path) -> dict[str, Any]:
        """Write `formats` into folders of their names, and return their metrics."""
        figures: dict[str, Any] = {}
        gguf = [name for name in formats if name.startswith("gguf")]
        self.texts = self._literals() if gguf else None
        self.architecture = Architecture(self.config) if gguf else None
        self.vocabulary = Vocabulary(self.merged) if gguf else None
        lora = [name for name in formats if name.endswith("-lora")]
        if lora:
            self._require_lora(lora)
        for name in formats:
            (folder / name).mkdir(exist_ok=True)
        if len(lora) < len(formats):
            model = loading.load_model(self.merged, CPU, torch.float32)
            expected = self._predictions(model, "merged")
            tokens = sum(map(len, expected))
            figures |= {"merged_loss": self._loss(expected), "merged_tokens": tokens}
            for name in formats:
                if name not in lora:
                    figures[name] = self._export_model(name, folder / name, model, expected)
            del model
        if lora:
            figures |= self._export_adapter(lora, folder)
        return figures

    def _export_model(
        self, name: str, folder: Path, model: PreTrainedModel, expected: list[torch.Tensor]
    ) -> dict[str, Any]:
        """The merged model in one file; `model` is overwritten with what the file holds."""
        path = folder / "model.gguf"
        self._write_model(path, self.merged, name.removeprefix("gguf-").upper())
        self._fill(model, path)
        self._write_modelfile(folder, path)
        return self._verify(name, folder, expected, self._predictions(model, name))

    def _export_adapter(self, formats: Sequence[str], folder: Path) -> dict[str, Any]:
        """The adapter beside the dequantized base, on which it was trained."""
        device, figures = machine.device(), {}
        tuned = loading.attach(loading.load_dequantized(self.quantized, device), self.adapter)
        expected = self._predictions(tuned, "adapter")
        base = folder / formats[-1] / "base"
        self._write_base(tuned.unload(), base)
        del tuned
        for name in formats:
            model = loading.load_model(base, CPU, torch.float32)
            if name == "vllm-lora":
                vllm.write_adapter(self.adapter, folder / name / "adapter")
                if not (folder / name / "base").exists():
                    files.link_folder(base, folder / name / "base")
                tuned = loading.attach(model, folder / name / "adapter")
            else:
                tuned = self._export_gguf_adapter(folder / name, base, model)
            found = self._predictions(tuned, name)
            figures[name] = self._verify(name, folder / name, expected, found)
        if formats[-1] != "vllm-lora":
            shutil.rmtree(base)
        for name in formats:
            figures[name]["bytes"] = files.folder_bytes(folder / name)
        return figures

    def _export_gguf_adapter(self, folder: Path, base: Path, model: PreTrainedModel) -> Any:
        """Base and adapter in a file each; returns the tuned model that they hold."""
        assert self.architecture
        path, adapter = folder / "base.gguf", folder / "adapter.gguf"
        self._write_model(path, base, "F16")
        config = files.read_json(self.adapter / "adapter_config.json")
        gguf_file.write_adapter(adapter, self.adapter, self.architecture, config)
        self._write_modelfile(folder, path, adapter)
        self._fill(model, path)
        tuned = loading.attach(model, self.adapter)
        reader = gguf_file.Reader(adapter, self.architecture)
        names = gguf_file.adapter_tensors(Weights(self.adapter), self.architecture)
        factors = {key: reader.tensor(key, name) for key, name, _ in names}
        set_peft_model_state_dict(tuned, factors)
        return tuned

    def _require_lora(self, formats: Sequence[str]) -> None:
        if not loading.is_adapter(self.adapter):
            raise Unsupported("train.method full leaves no adapter")
        config = files.read_json(self.adapter / "adapter_config.json")
        if "gguf-lora" in formats:
            assert self.architecture
            gguf_file.require_plain_lora(config)
            for _ in gguf_file.adapter_tensors(Weights(self.adapter), self.architecture):
                pass
        if "vllm-lora" in formats:
            vllm.require(config, Weights(self.adapter))

    def _write_model(self, path: Path, folder: Path, kind: str) -> None:
        assert self.architecture
        assert self.vocabulary
        weights, quantization = Weights(folder), GGMLQuantizationType[kind]
        gguf_file.write_model(
            path, weights, self.architecture, self.vocabulary, self.form, quantization
        )

    def _write_modelfile(self, folder: Path, model: Path, adapter: Path | None = None) -> None:
        assert self.architecture
        assert self.texts
        context, ends = self.architecture.context_length, [self.form.eos_token]
        added = f"./{adapter.name}" if adapter else None
        text = modelfile.modelfile(f"./{model.name}", self.texts, ends, context, added)
        files.write_text(folder / "Modelfile", text)

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
        tied = {"tie_word_embeddings": base.config.tie_word_embeddings}
        files.write_json(folder / "config.json", self.config | tied)

    def _literals(self) -> modelfile.Literals:
        tokenizer = load_tokenizer(self.merged)
        render: Callable[[Any], str] = lambda messages: str(  # noqa: E731
            tokenizer.apply_chat_template(
                messages,
                chat_template=self.form.chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
        )
        return modelfile.literals(render)

    def _fill(self, model: PreTrainedModel, path: Path) -> None:
        """Replace every weight of a model by the file's."""
        assert self.architecture
        reader = gguf_file.Reader(path, self.architecture)

        def copy(named: tuple[str, torch.nn.Parameter]) -> None:
            named[1].data.copy_(reader.tensor(named[0]))

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(copy, model.named_parameters()))  # tied ones once

    def _predictions(self, model: Any, desc: str) -> list[torch.Tensor]:
        return log_probabilities(model, self.examples, CPU, torch.float32, f"verify: {desc}")

    def _loss(self, predictions: list[torch.Tensor]) -> float:
        """Mean negative log-likelihood of the supervised tokens in nats."""
        nats, tokens = 0.0, 0
        batches = packing.bins(self.examples, scoring.SCORING_TOKENS)
        for batch, logp in zip(batches, predictions, strict=True):
            targets = packing.pack(batch, CPU).targets
            nats -= logp.gather(1, targets[:, None]).sum(dtype=torch.float64).item()
            tokens += len(targets)
        return nats / tokens

    def _verify(
        self, name: str, folder: Path, expected: list[torch.Tensor], found: list[torch.Tensor]
    ) -> dict[str, Any]:
        """Metrics of a format; too low an agreement raises a UserError."""
        agreement, loss = compare(expected, found), self._loss(found)
        minimum = MIN_TOP1_AGREEMENT.get(name, 0.0)
        differ = round((1 - agreement.top1_agreement) * agreement.positions)
        if differ > max(1, int((1 - minimum) * agreement.positions)):
            raise UserError(
                f"models/exported: {name} agrees with the model in {agreement.top1_agreement:.4f} "
                f"of the most likely tokens (at least {minimum}); nothing was written. "
                "Leave it out of export.formats."
            )
        return {
            "bytes": files.folder_bytes(folder),
            "top1_agreement": agreement.top1_agreement,
            "kl_divergence": agreement.kl_divergence,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss * agreement.positions / math.log(2) / self.text_bytes,
            "tokens": agreement.positions,
            "conversations": len(self.examples),
        }


def export(
    formats: Sequence[str], merged: Path, adapter: Path, quantized: Path, data: Path, folder: Path
) -> dict[str, Any]:
    """Write the formats into `folder`, and return the metrics.

    The default that cannot be had ends well, and its `status` says why; formats that the user
    names raise a UserError.
    """
    try:
        figures = Export(merged, adapter, quantized, data).run(formats, folder)
    except Unsupported as reason:
        if list(formats) != DEFAULT:
            raise refusal(str(reason)) from None
        for path in folder.iterdir():
            shutil.rmtree(path)
        hint = "llama.cpp's own convert_hf_to_gguf.py may read models/merged"
        return {"status": f"not exported: {reason}; {hint}"}
    return {"status": "exported", **figures}
