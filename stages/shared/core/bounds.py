"""Bounds on foreign code and data: CPU time, memory, panics of native code, no code of the hub."""

import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

# `kernels`, where installed, fetches code from the hub and runs it: transformers asks it unless
# this is set, bitsandbytes always on a CPU with AVX512-BF16. With None an import of it fails.
os.environ["USE_HUB_KERNELS"] = "NO"
sys.modules["kernels"] = None  # type: ignore[assignment]

SECONDS = 10.0  # of CPU: another busy process makes no difference
MEMORY = 1 << 30  # bytes
# Sizes of a model's config: beyond these, no model could be built within minutes.
SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim")
LARGEST = dict.fromkeys(SIZES, 10**8) | {"num_hidden_layers": 1000}
# Those that transformers does not compare: the smaller, or the divisor, first.
AT_MOST = [("num_experts_per_tok", f"{kind}_experts") for kind in ("n_routed", "num_local", "num")]
AT_MOST += [("top_k_experts", "num_experts"), ("topk_group", "n_group")]
DIVISORS = [("num_key_value_heads", "num_attention_heads"), ("n_group", "n_routed_experts")]


class Exceeded(Exception):  # noqa: N818  (the message completes a sentence)
    """Foreign data or code took too much: "takes more than 10 seconds of CPU time"."""


@contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """Raise `Exceeded` where the block takes more CPU seconds, or `MEMORY` more than before.

    The process's timer and RLIMIT_DATA bound a regular expression and a decoder in C too. Only a
    main thread hears signals: in others nothing is bounded.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise Exceeded(f"takes more than {seconds:g} seconds of CPU time")

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    limits = [limit for limit in (used + MEMORY, soft) if limit != resource.RLIM_INFINITY]
    handler = signal.signal(signal.SIGPROF, stop)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
        signal.setitimer(signal.ITIMER_PROF, seconds, 1)  # again, where a library swallowed it
        yield
    except MemoryError:
        raise Exceeded(f"takes more than {MEMORY / 1e9:.1f} GB of memory") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGPROF, handler)


def require_possible_sizes(config: Any) -> None:
    """Raise ValueError for sizes of a `PretrainedConfig` that no model has, or that contradict.

    Otherwise a forward pass would fail, stages later. One expert means none (Jamba).
    """
    text = config.get_text_config()
    if isinstance(text, dict):  # a key of the file that the architecture has no use for
        return
    sizes = vars(text)  # not by `getattr`, which raises where they differ from block to block
    sizes = sizes | {name: sizes.get(own) for name, own in text.attribute_map.items()}
    sizes = {name: size for name, size in sizes.items() if isinstance(size, int)}
    if "kv_lora_rank" in sizes:  # latent attention has no key-value heads (DeepSeek)
        sizes["num_key_value_heads"] = 1
    for name, largest in LARGEST.items():
        if not 0 < sizes.get(name, 1) <= largest:
            raise ValueError(f"{name} is {sizes[name]}")
    for pairs, relation in ((AT_MOST, "more than"), (DIVISORS, "no divisor of")):
        for name, other in pairs:
            size, whole = sizes.get(name, 1), sizes.get(other, 1)
            if whole > 1 and (size > whole if pairs is AT_MOST else whole % max(1, size)):
                raise ValueError(f"{name} is {size}, {relation} {other}, {whole}")


@contextmanager
def without_panic_output() -> Iterator[None]:
    """Hold back stderr, and drop it where the block raises: Rust prints its panics itself."""
    stderr = os.dup(2)
    with TemporaryFile() as output:
        os.dup2(output.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
        output.seek(0)
        print(output.read().decode(errors="replace"), end="", file=sys.stderr)
