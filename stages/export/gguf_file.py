"""GGUF files of a model and of a LoRA adapter, written a tensor at a time and read back.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType

from stages.export.llama_cpp import EXPERT, Architecture, Unsupported, Vocabulary
from stages.shared.chat.templates import Format
from stages.shared.chat.tokenizer import load_tokenizer
from stages.shared.core import display, files
from stages.shared.weights.checkpoint import Weights

F32 = GGMLQuantizationType.F32
FP16_MAX = float(np.finfo(np.float16).max)
ADAPTER_PREFIX = "base_model.model."


class ModelFormat:
    """GGUF of a folder's model, and of others with its shapes; raises `Unsupported`."""

    def __init__(self, folder: Path, form: Format) -> None:
        self.architecture = Architecture(files.read_json(folder / "config.json"))
        self._vocabulary, self._form = Vocabulary(folder), form
        self._tokenizer: Any = load_tokenizer(folder)
        names = ("bos", "eos", "unk", "pad")
        tokens = {name: getattr(self._tokenizer, f"{name}_token") for name in names}
        # llama.cpp ends a reply at `eos` or `eot`.
        ends = {"eot": form.eos_token, "eos": self._vocabulary.texts[form.stop_ids[-1]]}
        self._special = {name: token for name, token in (tokens | ends).items() if token}

    def render(self, messages: list[dict[str, str]]) -> str:
        """Messages up to the reply, as the chat template renders them."""
        options = {"tokenize": False, "add_generation_prompt": True}
        template = self._form.chat_template
        return str(self._tokenizer.apply_chat_template(messages, chat_template=template, **options))

    def write(self, path: Path, weights: Weights, kind: GGMLQuantizationType) -> None:
        """Write a model, with the tokenizer, chat template and end tokens of the folder."""
        architecture = self.architecture
        tied = architecture.config.get("tie_word_embeddings")  # the embedding is then the head
        shapes = {s.name: s.shape for s in weights.parameters if not (tied and "lm_head" in s.name)}
        tensors: dict[str, list[str]] = {}  # an expert's keys in order, else one
        for key in shapes:
            tensors.setdefault(architecture.tensor_name(key), []).append(key)
        types = {name: stored_type(name, shapes[key], kind) for name, (key, *_) in tensors.items()}
        writer = gguf.GGUFWriter(path, architecture.name)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name("tuned")
        writer.add_file_type(LlamaFileType[f"{'ALL' if kind is F32 else 'MOSTLY'}_{kind.name}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        architecture.add_hyperparameters(writer)
        self._vocabulary.add(writer, architecture.config["vocab_size"], self._special)
        writer.add_chat_template(self._form.chat_template)
        total = 0
        for name, keys in tensors.items():
            shape = (*([len(keys)] if EXPERT.search(keys[0]) else []), *shapes[keys[0]])
            nbytes = math.prod(gguf.quant_shape_to_byte_shape(shape, types[name]))
            # The dtype is overruled by the type.
            writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, types[name])
            total += nbytes
        divisors = architecture.rope_divisors()
        if divisors is not None:
            info = (divisors.shape, divisors.dtype, divisors.nbytes)
            writer.add_tensor_info("rope_freqs.weight", *info)
        files.require_space(path.parent, total, f"the file {path.parent.name}")
        bar = display.bar(total=total, desc=path.parent.name, unit="B")
        with closing(writer), bar, ThreadPoolExecutor(torch.get_num_threads()) as pool:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, keys in tensors.items():
                data = np.stack([self._stored(weights, key, types[name], pool) for key in keys])
                writer.write_tensor_data(data)
                bar.update(data.nbytes)
            if divisors is not None:
                writer.write_tensor_data(divisors)

    def _stored(
        self, weights: Weights, key: str, kind: GGMLQuantizationType, pool: ThreadPoolExecutor
    ) -> np.ndarray:
        """A parameter as the file has it, its rows quantized on several threads."""
        rows = self.architecture.reorder(key, weights.tensor(key).float().numpy())
        if kind is GGMLQuantizationType.F16 and np.abs(rows).max() > FP16_MAX:
            raise Unsupported(f"{key} holds weights beyond {FP16_MAX:.0f}, where F16 ends")
        parts = np.array_split(rows, min(len(rows), torch.get_num_threads()))
        done = pool.map(lambda part: gguf.quantize(np.ascontiguousarray(part), kind), parts)
        return np.concatenate([*done])

    def write_adapter(self, path: Path, adapter: Path) -> None:
        """Write the factors of a LoRA adapter in F16 under the names of the base's tensors."""
        config = files.read_json(adapter / "adapter_config.json")
        writer = gguf.GGUFWriter(path, self.architecture.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # llama.cpp scales by alpha / r.
        alpha = config["lora_alpha"] * (math.sqrt(config["r"]) if config.get("use_rslora") else 1)
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        weights = Weights(adapter)
        for key, name in self._adapter_names(weights):
            rows = self.architecture.reorder(key, weights.tensor(key).float().numpy())
            writer.add_tensor(name, np.ascontiguousarray(rows, dtype=np.float16))
        with closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()

    def _adapter_names(self, weights: Weights) -> Iterator[tuple[str, str]]:
        """Keys of an adapter's factors, and llama.cpp's names."""
        for stored in weights.parameters:
            module, _, factor = stored.name.removeprefix(ADAPTER_PREFIX).rpartition(".lora_")
            name = self.architecture.tensor_name(module)
            yield stored.name, f"{name}.weight.lora_{factor[0].lower()}"

    def fill(self, model: torch.nn.Module, path: Path) -> None:
        """Replace every weight of a model by the file's, dequantized."""
        read, architecture = _read(path), self.architecture

        def copy(named: tuple[str, torch.nn.Parameter]) -> None:
            key, parameter = named
            expert = EXPERT.search(key)
            rows = read(architecture.tensor_name(key), int(expert[1]) if expert else None)
            rows = architecture.reorder(key, rows, back=True)
            parameter.data.copy_(torch.from_numpy(rows))

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(copy, model.named_parameters()))  # tied ones once

    def read_adapter(self, path: Path, adapter: Path) -> dict[str, torch.Tensor]:
        """The file's factors under the keys of the adapter that it was written from."""
        read, reorder = _read(path), self.architecture.reorder
        names = self._adapter_names(Weights(adapter))
        return {key: torch.from_numpy(reorder(key, read(name), back=True)) for key, name in names}


class _Reader(gguf.GGUFReader):
    """The package's reader on a plain array: of a memmap each slice takes five times as long."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        return np.frombuffer(self.data, dtype, int(count), int(offset))  # little endian, as x86-64


def _read(path: Path) -> Callable[..., np.ndarray]:
    """Function from llama.cpp's name, and an expert's number, to a dequantized tensor: fp32."""
    tensors = {tensor.name: tensor for tensor in _Reader(path).tensors}

    def tensor(name: str, expert: int | None = None) -> np.ndarray:
        data = tensors[name].data
        rows = gguf.dequantize(data if expert is None else data[expert], tensors[name].tensor_type)
        return np.require(rows, requirements="W")  # F32 is a view of the file

    return tensor


def stored_type(name: str, shape: Sequence[int], kind: GGMLQuantizationType) -> Any:
    """Type of a tensor in a file of `kind`.

    llama.cpp wants vectors and routers in F32. The head, or a tied embedding, suffers most from 4
    bits. Rows that blocks do not divide stay F16.
    """
    if len(shape) < 2 or "ffn_gate_inp" in name:
        return F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if block > 1 and shape[-1] % block:
        return GGMLQuantizationType.F16
    if kind is GGMLQuantizationType.Q4_0 and name in ("token_embd.weight", "output.weight"):
        return GGMLQuantizationType.Q8_0
    return kind
