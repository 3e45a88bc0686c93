"""The resident memory of this process: now, and the most of a stretch of work."""

from pathlib import Path

from benchmarks.measured import peak_bytes
from stages.quantize.heap import resident_bytes

__all__ = ["forget_peak", "peak_bytes", "resident_bytes"]


def forget_peak() -> None:
    """Let `peak_bytes` begin at what is resident now: how a model was loaded is another matter.

    Source: proc(5), /proc/pid/clear_refs, value 5.
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
