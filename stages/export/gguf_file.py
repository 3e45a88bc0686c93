"""GGUF files of a model and of a LoRA adapter, written a tensor at a time and read back.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType

from stages.export.architecture import Architecture, Unsupported
from stages.export.vocabulary import Vocabulary
from stages.shared.chat.templates import Format
from stages.shared.core import files, progress
from stages.shared.weights.checkpoint import Weights

F32 = GGMLQuantizationType.F32
FP16_MAX = float(np.finfo(np.float16).max)
ADAPTER_PREFIX = "base_model.model."
# What an adapter file has no place for.
_NO_PLACE = ("use_dora", "modules_to_save", "lora_bias", "alpha_pattern", "rank_pattern")


def stored_type(name: str, shape: Sequence[int], kind: GGMLQuantizationType) -> Any:
    """Type of a tensor in a file of `kind`.

    llama.cpp wants vectors in F32. The head, or a tied embedding, suffers most from 4 bits. Rows
    that blocks do not divide stay F16.
    """
    if len(shape) < 2:
        return F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if block > 1 and shape[-1] % block:
        return GGMLQuantizationType.F16
    if kind is GGMLQuantizationType.Q4_0 and name in ("token_embd.weight", "output.weight"):
        return GGMLQuantizationType.Q8_0
    return kind


def write_model(
    path: Path,
    weights: Weights,
    architecture: Architecture,
    vocabulary: Vocabulary,
    form: Format,
    kind: GGMLQuantizationType,
) -> None:
    """Write the model of a folder, with its tokenizer, chat template and end tokens."""
    config = architecture.config
    tied = config.get("tie_word_embeddings")  # llama.cpp then uses the embedding as the head
    keys = {s.name: s.shape for s in weights.parameters if not (tied and "lm_head" in s.name)}
    names = {key: architecture.tensor_name(key) for key in keys}
    types = {key: stored_type(names[key], shape, kind) for key, shape in keys.items()}
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("tuned")
    writer.add_file_type(LlamaFileType[f"{'ALL' if kind is F32 else 'MOSTLY'}_{kind.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    architecture.add_hyperparameters(writer)
    special = special_tokens(weights.folder, form)
    vocabulary.add(writer, config["vocab_size"], special)
    writer.add_chat_template(form.chat_template)
    total = 0
    for key, shape in keys.items():
        block, size = gguf.GGML_QUANT_SIZES[types[key]]
        nbytes = math.prod(shape) // block * size
        dtype = np.dtype(np.float32)  # overruled by the type
        writer.add_tensor_info(names[key], shape, dtype, nbytes, types[key])
        total += nbytes
    divisors = architecture.rope_divisors()
    if divisors is not None:
        info = (divisors.shape, divisors.dtype, divisors.nbytes)
        writer.add_tensor_info("rope_freqs.weight", *info)
    files.require_space(path.parent, total, f"the file {path.parent.name}")
    with closing(writer), progress.bar(total=total, desc=path.parent.name, unit="B") as bar:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key in keys:
            rows = architecture.reorder(key, weights.tensor(key).float().numpy())
            if types[key] is GGMLQuantizationType.F16 and np.abs(rows).max() > FP16_MAX:
                raise Unsupported(f"{key} holds weights beyond {FP16_MAX:.0f}, where F16 ends")
            data = gguf.quantize(np.ascontiguousarray(rows), types[key])
            writer.write_tensor_data(data)
            bar.update(data.nbytes)
        if divisors is not None:
            writer.write_tensor_data(divisors)


def special_tokens(folder: Path, form: Format) -> dict[str, str]:
    """Special tokens by llama.cpp's names; it ends a reply at `eos` or `eot`."""
    config = files.read_json(folder / "tokenizer_config.json")
    tokens = {name: config.get(f"{name}_token") for name in ("bos", "unk", "pad")}
    texts = {name: t["content"] if isinstance(t, dict) else t for name, t in tokens.items() if t}
    vocabulary = files.read_json(folder / "tokenizer.json")
    by_id = {token["id"]: token["content"] for token in vocabulary["added_tokens"]}
    by_id |= {i: text for text, i in vocabulary["model"]["vocab"].items()}
    return texts | {"eot": form.eos_token, "eos": by_id[form.stop_ids[-1]]}


def write_adapter(
    path: Path, adapter: Path, architecture: Architecture, config: dict[str, Any]
) -> None:
    """Write the factors of a LoRA adapter in F16 under the names of the base's tensors."""
    require_plain_lora(config)
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp scales by alpha / r.
    alpha = config["lora_alpha"] * (math.sqrt(config["r"]) if config.get("use_rslora") else 1)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for key, name, factor in adapter_tensors(Weights(adapter), architecture):
        rows = factor.float().numpy()
        rows = architecture.reorder(key, rows) if name.endswith("b") else rows
        writer.add_tensor(name, np.ascontiguousarray(rows, dtype=np.float16))
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def require_plain_lora(config: dict[str, Any]) -> None:
    """Raise `Unsupported` for an adapter that is more than two factors of each matrix."""
    unfit = [name for name in _NO_PLACE if config.get(name)]
    unfit += ["bias"] if config.get("bias", "none") != "none" else []
    if unfit:
        raise Unsupported(f"an adapter with {', '.join(unfit)} has no place in the file")


def adapter_tensors(
    weights: Weights, architecture: Architecture
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Key, llama.cpp's name and factor of all LoRA weights of an adapter."""
    for stored in weights.parameters:
        module, _, factor = stored.name.removeprefix(ADAPTER_PREFIX).rpartition(".lora_")
        if factor not in ("A.weight", "B.weight") or module.endswith(("lm_head", "embed_tokens")):
            raise Unsupported(f"{stored.name} has no place in the file")
        name = f"{architecture.tensor_name(module)}.weight.lora_{factor[0].lower()}"
        yield stored.name, name, weights.tensor(stored.name)


class Reader:
    """Tensors of a file under transformers' names, dequantized."""

    def __init__(self, path: Path, architecture: Architecture) -> None:
        self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        self._architecture = architecture

    def tensor(self, key: str, name: str | None = None) -> torch.Tensor:
        """A tensor by its key in safetensors, or by its `name` in the file: fp32."""
        found = self._tensors[name or self._architecture.tensor_name(key)]
        rows = gguf.dequantize(found.data, found.tensor_type)
        if name is None or name.endswith("lora_b"):
            rows = self._architecture.reorder(key, rows, back=True)
        # F32 is a view of the file, which is read-only.
        return torch.from_numpy(rows if rows.flags.writeable else rows.copy())
