"""Memory by formula: the instants at which a block's forward or backward pass can be largest.

They are its widest products. What stands there beside what the block saves is written down from
the modules that run; names and letters are those of `stages.shared.blocks`.
"""

from dataclasses import dataclass

from stages.shared.blocks import Saved


@dataclass(frozen=True)
class Instant:
    """What a block holds at one instant.

    Attributes:
        saved: of what it saves, the part that is there; bytes a token.
        extra: what stands only then; bytes a token.
        matrix: what no token scales: a dequantized matrix, a gradient of one; bytes.
    """

    saved: int
    extra: int
    matrix: int = 0


def forward(saved: Saved, workspace: int) -> list[Instant]:
    """At the product down, before and with its adapter, and at the product up with its adapter.

    With an adapter three results of the product's width stand side by side: the product, the
    adapter's, their sum. The dequantized matrix is gone by then.

    Args:
        saved: of the block.
        workspace: bytes of its largest matrix, dequantized; 0 where it need not be.
    """
    block, flow = saved.block, saved.flow
    h, f, c = block.hidden, block.inner, flow.compute
    around = _residual_and_normed(saved)
    gated = c * f  # gate times up
    unsaved_gated = gated if flow.copies and not flow.keeps_input else 0
    before_up = saved.total - saved.down_input - c * f - saved.adapters(f, "down_proj")
    down = around + unsaved_gated + _widened(saved, f, "down_proj")
    up = around + _widened(saved, h, "up_proj")
    found = [
        Instant(saved.total - saved.down_input, around + gated + c * h, workspace),
        Instant(saved.total, down + _results(saved, "down_proj") * h),
        Instant(before_up, up + _results(saved, "up_proj") * f),
    ]
    if flow.dropout:  # what it left of the adapter's input, before that is in half precision again
        found.append(Instant(saved.total, down + _widened(saved, f, "down_proj") + c * h))
    return found


def first_forward(saved: Saved, workspace: int) -> list[Instant]:
    """Of a pass that saves nothing: a checkpointed block the first time, or evaluation.

    At the product up, at gate times up, and at the product down with its adapter.
    """
    block, flow = saved.block, saved.flow
    h, f, c = block.hidden, block.inner, flow.compute
    around = 2 * flow.stream * h
    copy = c * f if flow.copies and flow.adapters("down_proj") else 0
    results = max(copy + c * h, _results(saved, "down_proj") * h)
    down = c * f + _widened(saved, f, "down_proj") + results
    return [
        Instant(0, around + 2 * c * f, workspace),
        Instant(0, around + c * f + max(2 * c, _results(saved, "up_proj")) * f),
        Instant(0, around + down),
    ]


def evaluation(saved: Saved, workspace: int) -> list[Instant]:
    """Of a block that is scored and not trained: as a first pass, but for int8.

    Its products then run in integers: 12·f of their sums, and of these scaled, in fp32.

    Source: bitsandbytes 0.50.2, `MatMul8bitLt.forward`; backends/default/ops.py, `int8_mm_dequant`.
    """
    found = first_forward(saved, workspace)
    block, flow = saved.block, saved.flow
    if flow.keeps_input:
        gate = 2 * flow.stream * block.hidden + flow.compute * block.inner
        found.append(Instant(0, gate + (12 + flow.compute) * block.inner + 3 * block.hidden))
    return found


def backward(saved: Saved, workspace: int, *, recomputed: bool) -> list[Instant]:
    """At the product down, which it comes to first.

    The gradient of its input arrives twice, through the adapter and through the matrix
    (dequantized for it), and the two are added up; then it becomes those of gate and up.

    Args:
        saved: of the block.
        workspace: as for `forward`.
        recomputed: whether the block is checkpointed. What int8 products kept the second time is
            gone again with the graph they kept it for.
    """
    block, flow = saved.block, saved.flow
    h, f, c = block.hidden, block.inner, flow.compute
    gradient = flow.stream * h + (c * h if flow.stream != c else 0)
    if flow.trained:
        return [
            Instant(saved.total, gradient + c * f, weight_gradient_bytes(block.largest_matrix)),
            Instant(saved.total - saved.down_input, gradient + 3 * c * f),
        ]
    there = saved.total - saved.down_input
    if flow.keeps_input and not recomputed:
        there += c * f
    if recomputed and flow.copies:
        kept_by_attention = c * block.query if flow.kernel else 0
        there -= max(0, saved.kept_by_products - c * f - kept_by_attention)
    return [
        Instant(there, gradient + (c * f + 4 * f if flow.widened else 0)),
        Instant(there, gradient + 2 * c * f, workspace),
        Instant(there, gradient + 3 * c * f),
    ]


def weight_gradient_bytes(parameters: int) -> int:
    """4·P: of one trained matrix, in fp32, before it is added to `grad`.

    In half precision it is first a product of 2·P; the half-precision copy of the matrix, that
    autocast made for the product, is let go of as it turns into fp32: 4·P beside that copy again.
    """
    return 4 * parameters


def _results(saved: Saved, name: str) -> int:
    """Bytes an element of a product's width: three results with an adapter, else the one."""
    return saved.flow.compute * (3 if saved.flow.adapters(name) else 1)


def _widened(saved: Saved, width: int, name: str) -> int:
    """4·width: the fp32 input of an adapter that widens it."""
    return 4 * width if saved.flow.widened and saved.flow.adapters(name) else 0


def _residual_and_normed(saved: Saved) -> int:
    """The residual, and the normed input of the feed-forward, where nothing saved is the same."""
    block, flow = saved.block, saved.flow
    stream = flow.stream * block.hidden
    residual = 0 if flow.stream == 4 else stream  # in fp32 it is what the norm saved
    if flow.trained:
        normed_is_saved = flow.compute == flow.stream
    else:
        adapted = flow.adapters("gate_proj", "up_proj") and not flow.copies
        normed_is_saved = bool(adapted) or flow.keeps_input
    return residual + (0 if normed_is_saved else stream)
