"""Step sizes, and the running sums of their log-decays within chunks.

They are few (one a head and token) and read by every kernel of the scan, so they are worked out once and laid out by
head: (batch, heads, chunks * chunk size), float32, in scan order. What stands beyond the last token does nothing: its
step is 0 and its sum that of the whole chunk.

An error in a sum is a relative error of what it multiplies. So they are summed in float64, and no token adds more than
makes its decay zero: behind one that decays by exp(-1000), differences of float32 sums would know four digits less.
"""

import triton
import triton.language as tl
from torch import Tensor

from patchscale.ops.triton.tokens import launch, place, power_of_two, sigmoid

_HEADS = 8
_LEAST = tl.constexpr(-104.0)  # exp of less is zero in float32


@triton.jit
def _softplus(v):
    """log(1 + exp(v)), to float32 precision also where it is small: step sizes of 0.001 are common.

    With e = exp(-|v|), log(1 + e) = 2 artanh(e / (2 + e)); its series in s <= 1/3 ends below float32's rounding.
    """
    e = tl.exp(-tl.abs(v))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15))))))
    return tl.maximum(v, 0.0) + 2.0 * s * series


@triton.jit(do_not_specialize=["length", "body", "chunks", "raw_batch"])
def _steps(
    raw, bias, A, dt, cs, length, body, heads, chunks, raw_batch, raw_token,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, chunk = program // chunks, program % chunks
    t = chunk * Q + tl.arange(0, Q)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    known = h < heads
    mask = (t < length)[:, None] & known[None, :]
    step = tl.load(
        raw + sample * raw_batch + place(t, body, REVERSE)[:, None] * raw_token + h[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    if SOFTPLUS:
        step = _softplus(step + tl.load(bias + h, mask=known, other=0.0).to(tl.float32)[None, :])
    step = tl.where(mask, step, 0.0)
    rate = tl.load(A + h, mask=known, other=0.0).to(tl.float64)
    decay = tl.cumsum(tl.maximum(step.to(tl.float64) * rate[None, :], _LEAST), 0)
    offsets = (sample * heads + h)[None, :] * (chunks * Q) + t[:, None]
    tl.store(dt + offsets, step, mask=known[None, :])
    tl.store(cs + offsets, decay, mask=known[None, :])


@triton.jit(do_not_specialize=["length", "body", "chunks", "raw_batch", "draw_batch"])
def _steps_backward(
    raw, bias, ddt, draw, sums, length, body, heads, chunks, raw_batch, raw_token, draw_batch, draw_token,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, chunk = program // chunks, program % chunks
    t = chunk * Q + tl.arange(0, Q)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    known = h < heads
    mask = (t < length)[:, None] & known[None, :]
    rows = place(t, body, REVERSE)[:, None]
    gradient = tl.load(ddt + (sample * heads + h)[None, :] * (chunks * Q) + t[:, None], mask=mask, other=0.0)
    if SOFTPLUS:
        step = tl.load(raw + sample * raw_batch + rows * raw_token + h[None, :], mask=mask, other=0.0).to(tl.float32)
        gradient *= sigmoid(step + tl.load(bias + h, mask=known, other=0.0).to(tl.float32)[None, :])
        tl.store(sums + program * heads + h, tl.sum(gradient, 0), mask=known)
    tl.store(draw + sample * draw_batch + rows * draw_token + h[None, :], gradient, mask=mask)


def steps(
    raw: Tensor, bias: Tensor | None, A: Tensor, chunk_size: int, reverse: bool, suffix: int
) -> tuple[Tensor, Tensor]:
    """Step sizes and running log-decays, both (batch, heads, chunks * chunk size), float32, in scan order.

    raw: (batch, length, heads) where the tokens stand; with a ``bias``, (heads,), the step is softplus(raw + bias).
    """
    batch, length, heads = raw.shape
    chunks = triton.cdiv(length, chunk_size)
    dt, cs = (A.new_empty(batch, heads, chunks * chunk_size) for _ in range(2))
    size = min(_HEADS, power_of_two(heads))
    launch(
        _steps, (batch * chunks, triton.cdiv(heads, size)),
        raw, A if bias is None else bias.contiguous(), A, dt, cs,
        length, length - suffix if reverse else length, heads, chunks, raw.stride(0), raw.stride(1),
        REVERSE=reverse, SOFTPLUS=bias is not None, Q=chunk_size, HEADS=size,
    )  # fmt: skip
    return dt, cs


def steps_backward(
    ddt: Tensor, raw: Tensor, bias: Tensor | None, draw: Tensor, chunk_size: int, reverse: bool, suffix: int
) -> Tensor | None:
    """Write ``draw``, shaped as ``raw``, from the gradient of the step sizes; return that of the bias, float32."""
    batch, length, heads = raw.shape
    chunks = triton.cdiv(length, chunk_size)
    sums = ddt.new_empty(batch * chunks, heads if bias is not None else 0)
    size = min(_HEADS, power_of_two(heads))
    launch(
        _steps_backward, (batch * chunks, triton.cdiv(heads, size)),
        raw, ddt if bias is None else bias.contiguous(), ddt, draw, sums,
        length, length - suffix if reverse else length, heads, chunks,
        raw.stride(0), raw.stride(1), draw.stride(0), draw.stride(1),
        REVERSE=reverse, SOFTPLUS=bias is not None, Q=chunk_size, HEADS=size,
    )  # fmt: skip
    return None if bias is None else sums.sum(0)
