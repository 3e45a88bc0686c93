"""How much memory `quantize` needs for a model of a billion parameters.

Reads:  nothing; random weights are written to a temporary folder, a layer a shard, and deleted
Writes: the table, to standard output
Run:    python -m benchmarks.quantize

The bound is the quantized model, two layers and the embedding. Each precision runs in a process of
its own, whose resident set is sampled every 5 ms; what it was after the imports is subtracted.
Pages of mapped files count, though the system could take them back. `convert` is the writing of
the model, `s` its seconds; `stage` also measures its errors, over fewer matrices (`--compared`).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.shared.heap import resident_bytes

PRECISIONS = {"nf4, double quant": ("nf4", True), "nf4": ("nf4", False)} | {
    precision: (precision, False) for precision in ("int8", "bf16")
}
BYTES = 2  # of a weight of the base, in bf16


def write_base(folder: Path, hidden: int, layers: int) -> None:
    """A Llama of random weights in bf16, a layer a shard; no more than a layer is in memory."""
    import torch  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 512,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in LlamaForCausalLM(config).state_dict().items()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(name.split(".")[2] if ".layers." in name else name, []).append(name)
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards.values(), start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        weights = {n: torch.randn(shapes[n], dtype=torch.bfloat16) * 0.02 for n in names}
        save_file(weights, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@contextmanager
def peak_resident_bytes() -> Iterator[list[int]]:
    """A list whose only element is the largest resident set while the block runs."""
    peak, done = [resident_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def measure(base: Path, precision: str, double_quant: bool, compared: int) -> dict[str, Any]:
    """Quantize in this process; bytes and seconds."""
    import torch  # noqa: PLC0415

    from stages.quantize import __main__ as stage  # noqa: PLC0415
    from stages.quantize import chart, comparison, convert  # noqa: PLC0415, F401
    from stages.quantize.settings import Quantize  # noqa: PLC0415
    from stages.quantize.stored import Weights  # noqa: PLC0415

    comparison.COMPARED_PARAMETERS = compared
    settings = Quantize.model_validate(
        {"precision": precision, "double_quant": double_quant, "compute_dtype": "bf16"}
    )
    cpu = torch.device("cpu")
    result: dict[str, Any] = {}
    start = resident_bytes()
    with tempfile.TemporaryDirectory(dir=base.parent) as folder:
        began = time.perf_counter()
        with peak_resident_bytes() as peak:
            convert.convert(base, Path(folder), settings, cpu)
        result |= {"convert": peak[0] - start, "seconds": time.perf_counter() - began}
        result["quantized"] = Weights(Path(folder)).bytes
    with tempfile.TemporaryDirectory(dir=base.parent) as folder, peak_resident_bytes() as peak:
        stage.quantize(base, Path(folder) / "model", Path(folder) / "levels.svg", settings, cpu)
    return result | {"stage": peak[0] - start}


def main() -> None:
    """Write a base, quantize it in each precision, print a line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--compared", type=int, default=50_000_000, help="parameters")
    parser.add_argument("--measure", nargs=2, metavar=("BASE", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        base, name = args.measure
        print(json.dumps(measure(Path(base), *PRECISIONS[name], args.compared)))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        write_base(base, args.hidden, args.layers)
        from stages.quantize.stored import Weights  # noqa: PLC0415

        parameters = Weights(base).parameters
        layer = BYTES * sum(p.parameters for p in parameters if ".layers.0." in p.name)
        embedding = BYTES * next(p.parameters for p in parameters if "embed" in p.name)
        count = sum(p.parameters for p in parameters)
        print(f"{count / 1e9:.2f}B parameters, {BYTES * count / 1e6:,.0f} MB of bf16; in MB:")
        columns = f"{'quantized':>10}{'bound':>8}{'convert':>9}{'stage':>7}{'of bound':>10}{'s':>6}"
        print(f"{'':18}{columns}", flush=True)
        for name in PRECISIONS:
            command = [sys.executable, "-m", "benchmarks.quantize", "--measure", str(base), name]
            command += ["--compared", str(args.compared)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout  # noqa: S603
            found = json.loads(output)
            bound = found["quantized"] + 2 * layer + embedding
            peak = max(found["convert"], found["stage"])
            print(
                f"{name:18}{found['quantized'] / 1e6:10,.0f}{bound / 1e6:8,.0f}"
                f"{found['convert'] / 1e6:9,.0f}{found['stage'] / 1e6:7,.0f}"
                f"{peak / bound:10.0%}{found['seconds']:6.0f}",
                flush=True,
            )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
