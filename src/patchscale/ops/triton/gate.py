"""Gate and norm: rms_norm(y * silu(z)) * weight over all channels, a program for a row, or a few narrow ones.

Forward reads y and z and writes the result, each once. Backward reads the gradient, y and z, works the mean square out
again (cheaper than keeping it: the row is there anyway) and writes the gradients of y and z; programs take many rows
each, so that few partial sums of the weight's gradient are written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchscale.ops.triton.tokens import aligned, launch, load_rows, place, power_of_two, sigmoid

_BACKWARD_PROGRAMS = 1024  # a few for each multiprocessor


@triton.jit(do_not_specialize=["rows", "length", "body", "z_batch"])
def _gate(
    y, z, weight, out, rows, length, body, width, eps, y_row, z_batch, z_token, out_row,
    UNIT: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    valid = number < rows
    mask = valid[:, None] & (c < width)[None, :]
    sample = number // length
    row = place(number % length, body, REVERSE)
    gate = load_rows(z, sample * z_batch + row * z_token, c, UNIT, valid, width)
    gated = load_rows(y, number, c, y_row, valid, width) * gate * sigmoid(gate)
    scale = 1.0 / tl.sqrt(tl.sum(gated * gated, 1) / width + eps)
    gain = tl.load(weight + c, mask=c < width, other=0.0).to(tl.float32)
    to = (sample * length + row)[:, None] * out_row + c[None, :]
    tl.store(out + to, gated * scale[:, None] * gain[None, :], mask=mask)


@triton.jit(do_not_specialize=["rows", "length", "body", "dout_batch", "z_batch", "dz_batch"])
def _gate_backward(
    dout, y, z, weight, dy, dz, sums,
    rows, length, body, width, eps, dout_batch, dout_token, y_row, z_batch, z_token, dz_batch, dz_token,
    UNIT: tl.constexpr, DOUT_UNIT: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    gain = tl.load(weight + c, mask=c < width, other=0.0).to(tl.float32)[None, :]
    dgain = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        number = (first + tl.arange(0, ROWS)).to(tl.int64)
        valid = number < rows
        mask = valid[:, None] & (c < width)[None, :]
        sample = number // length
        row = place(number % length, body, REVERSE)
        gate = load_rows(z, sample * z_batch + row * z_token, c, UNIT, valid, width)
        value = load_rows(y, number, c, y_row, valid, width)
        gradient = load_rows(dout, sample * dout_batch + row * dout_token, c, DOUT_UNIT, valid, width)
        opening = sigmoid(gate)
        gated = value * gate * opening
        scale = 1.0 / tl.sqrt(tl.sum(gated * gated, 1) / width + eps)[:, None]
        dgain += gradient * gated * scale
        gradient *= gain
        along = tl.sum(gradient * gated, 1)[:, None] * scale * scale / width
        dgated = scale * (gradient - gated * along)
        tl.store(dy + number[:, None] * y_row + c[None, :], dgated * gate * opening, mask=mask)
        slope = opening * (1.0 + gate * (1.0 - opening))
        to = (sample * dz_batch + row * dz_token)[:, None] * UNIT + c[None, :]
        tl.store(dz + to, dgated * value * slope, mask=mask)
    tl.store(sums + program * width + c, tl.sum(dgain, 0), mask=c < width)


def gate(y: Tensor, z: Tensor, weight: Tensor, out: Tensor, eps: float, reverse: bool, suffix: int) -> None:
    """Write ``out``, (batch, length, width), contiguous, where the tokens stand.

    y: (batch, length, width), contiguous, in scan order; z: the same where the tokens stand, its last dimension dense.
    """
    batch, length, width = y.shape
    rows = _rows(batch * length, width)
    unit, z_batch, z_token = aligned(z.stride(0), z.stride(1))
    launch(
        _gate, (triton.cdiv(batch * length, rows),), y, z, weight, out,
        batch * length, length, length - suffix if reverse else length, width, eps,
        y.stride(1), z_batch, z_token, out.stride(1),
        UNIT=unit, REVERSE=reverse, ROWS=rows, BLOCK=power_of_two(width),
        warps=_warps(rows, width),
    )  # fmt: skip


def gate_backward(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, dy: Tensor, dz: Tensor, eps: float, reverse: bool, suffix: int
) -> Tensor:
    """Write ``dy``, as y, and ``dz``, as z; return the gradient of the weight, float32."""
    batch, length, width = y.shape
    rows = _rows(batch * length, width)
    programs = min(_BACKWARD_PROGRAMS, triton.cdiv(batch * length, rows))
    sums = y.new_empty(programs, width, dtype=torch.float32)
    dout_unit, dout_batch, dout_token = aligned(dout.stride(0), dout.stride(1))
    unit, z_batch, z_token, dz_batch, dz_token = aligned(z.stride(0), z.stride(1), dz.stride(0), dz.stride(1))
    launch(
        _gate_backward, (programs,), dout, y, z, weight, dy, dz, sums,
        batch * length, length, length - suffix if reverse else length, width, eps,
        dout_batch, dout_token, y.stride(1), z_batch, z_token, dz_batch, dz_token,
        UNIT=unit, DOUT_UNIT=dout_unit, REVERSE=reverse, ROWS=rows, BLOCK=power_of_two(width),
        warps=_warps(rows, width),
    )  # fmt: skip
    return sums.sum(0)


def _rows(rows: int, width: int) -> int:
    """Of a program: one, or several narrow ones."""
    return min(power_of_two(rows), max(1, 2048 // power_of_two(width)))


def _warps(rows: int, width: int) -> int:
    """16 channels a thread."""
    return max(1, min(16, rows * power_of_two(width) // 512))
