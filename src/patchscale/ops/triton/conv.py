"""The short causal convolution with its SiLU.

One program takes a block of tokens by a block of channels and reads it once for every tap: all reads but the first are
met in the cache, so that memory sees each token read once and written once.

The backward is linear in the gradient of what the SiLU was taken of, d: with x_t weighed by tap k in the output of
t + width - 1 - k,

    dx_t = sum_k weight_k d_(t + width - 1 - k)      dweight_k = sum_t x_t d_(t + width - 1 - k)      dbias = sum_t d_t

so that the same four reads of d serve both, with one read of x; t runs over the history too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchscale.errors import UserError
from patchscale.ops.triton import tuning
from patchscale.ops.triton.tokens import (
    aligned,
    check_dtype,
    launch,
    load_rows,
    place,
    power_of_two,
    rows_in_memory,
    sigmoid,
)

WIDEST = 4
_TOKENS, _CHANNELS = 32, 128
_BACKWARD_TOKENS, _BACKWARD_CHANNELS = 16, 128
# Blocks of tokens that one program of the backward adds up, at most: 5 numbers a channel are written for so many.
_BACKWARD_BLOCKS = 32


@triton.jit
def _load_tokens(
    x, history, t, c, length, body, channels, x_token, h_token,
    REVERSE: tl.constexpr, HISTORY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """float32 (tokens, channels); tokens before the first are those of the history, or zero."""
    value = load_rows(x, place(t, body, REVERSE), c, x_token, (t >= 0) & (t < length), channels)
    if HISTORY:
        value += load_rows(history, t + WIDTH - 1, c, h_token, (t < 0) & (t >= 1 - WIDTH), channels)
    return value


@triton.jit(do_not_specialize=["length", "body", "blocks", "x_batch"])
def _convolve(
    x, history, weight, bias, out, slope,
    length, body, channels, blocks, x_batch, x_token, h_batch, h_token, o_batch, o_token,
    UNIT: tl.constexpr, REVERSE: tl.constexpr, OUT_REVERSE: tl.constexpr, HISTORY: tl.constexpr, SLOPE: tl.constexpr,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    t = (program % blocks) * TOKENS + tl.arange(0, TOKENS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    x += sample * x_batch * UNIT
    history += sample * h_batch
    value = tl.zeros((TOKENS, CHANNELS), tl.float32)
    value += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(WIDTH):
        tap = tl.load(weight + c * WIDTH + k, mask=c < channels, other=0.0).to(tl.float32)
        met = _load_tokens(
            x, history, t - (WIDTH - 1 - k), c, length, body, channels, x_token * UNIT, h_token,
            REVERSE, HISTORY, WIDTH,
        )  # fmt: skip
        value += tap[None, :] * met
    opening = sigmoid(value)
    mask = (t < length)[:, None] & (c < channels)[None, :]
    to = sample * o_batch + place(t, body, OUT_REVERSE)[:, None] * o_token + c[None, :]
    tl.store(out + to, value * opening, mask=mask)
    if SLOPE:
        tl.store(slope + to, opening * (1.0 + value * (1.0 - opening)), mask=mask)


@triton.jit(do_not_specialize=["length", "body", "splits", "blocks", "x_batch", "dx_batch"])
def _convolve_backward(
    x, history, weight, gradient, dx, dhistory, sums,
    length, body, channels, splits, blocks, x_batch, x_token, h_batch, h_token, g_batch, g_token, dx_batch, dx_token,
    UNIT: tl.constexpr, REVERSE: tl.constexpr, GRADIENT_REVERSE: tl.constexpr, HISTORY: tl.constexpr,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample = program // splits
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    x += sample * x_batch * UNIT
    gradient += sample * g_batch
    dx += sample * dx_batch * UNIT
    history += sample * h_batch
    # By how many tokens the output is ahead. Summed over tokens only after the last block.
    sum_0 = tl.zeros((TOKENS, CHANNELS), tl.float32)
    sum_1 = tl.zeros((TOKENS, CHANNELS), tl.float32)
    sum_2 = tl.zeros((TOKENS, CHANNELS), tl.float32)
    sum_3 = tl.zeros((TOKENS, CHANNELS), tl.float32)
    sum_bias = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for block in range(blocks):
        t = ((program % splits) * blocks + block) * TOKENS + tl.arange(0, TOKENS) - (WIDTH - 1)
        met = _load_tokens(
            x, history, t, c, length, body, channels, x_token * UNIT, h_token, REVERSE, HISTORY, WIDTH
        )  # fmt: skip
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for ahead in tl.static_range(WIDTH):
            s = t + ahead
            d = load_rows(gradient, place(s, body, GRADIENT_REVERSE), c, g_token, (s >= 0) & (s < length), channels)
            tap = tl.load(weight + c * WIDTH + (WIDTH - 1 - ahead), mask=c < channels, other=0.0).to(tl.float32)
            total += tap[None, :] * d
            if ahead == 0:
                sum_0 += met * d
                sum_bias += d
            if ahead == 1:
                sum_1 += met * d
            if ahead == 2:
                sum_2 += met * d
            if ahead == 3:
                sum_3 += met * d
        rows = place(t, body, REVERSE)
        mask = ((t >= 0) & (t < length))[:, None] & (c < channels)[None, :]
        tl.store(dx + rows[:, None] * (dx_token * UNIT) + c[None, :], total, mask=mask)
        if HISTORY:
            rows = (sample * (WIDTH - 1) + t + WIDTH - 1)[:, None]
            tl.store(dhistory + rows * channels + c[None, :], total, mask=(t < 0)[:, None] & (c < channels)[None, :])
    sums += program * (WIDTH + 1) * channels + c
    tl.store(sums + WIDTH * channels, tl.sum(sum_bias, 0), mask=c < channels)
    tl.store(sums + (WIDTH - 1) * channels, tl.sum(sum_0, 0), mask=c < channels)
    if WIDTH > 1:
        tl.store(sums + (WIDTH - 2) * channels, tl.sum(sum_1, 0), mask=c < channels)
    if WIDTH > 2:
        tl.store(sums + (WIDTH - 3) * channels, tl.sum(sum_2, 0), mask=c < channels)
    if WIDTH > 3:
        tl.store(sums + (WIDTH - 4) * channels, tl.sum(sum_3, 0), mask=c < channels)


def check_width(width: int) -> None:
    if not 1 <= width <= WIDEST:
        raise UserError(
            f"the convolution is {width} taps wide, the Triton kernels take 1 to {WIDEST}; "
            "choose implementation='torch'"
        )


def convolve(
    x: Tensor,
    history: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    reverse: bool,
    suffix: int,
    *,
    slope: Tensor | None = None,
    out_reverse: bool = False,
) -> None:
    """Write ``out``, (batch, length, channels), in scan order, or with ``out_reverse`` where its tokens stand.

    With ``slope``, laid out as ``out``, write there the derivative of the SiLU. x, where its tokens stand, and history
    are dense in their last dimension.
    """
    batch, length, channels = x.shape
    width = weight.shape[1]
    tokens = min(_TOKENS, power_of_two(length))
    size = min(_CHANNELS, power_of_two(channels))
    blocks = triton.cdiv(length, tokens)
    unit, *x_strides = aligned(x.stride(0), x.stride(1))
    launch(
        _convolve, (batch * blocks, triton.cdiv(channels, size)),
        x, x if history is None else history, weight.contiguous(), bias.contiguous(),
        out, out if slope is None else slope,
        length, length - suffix if reverse else length, channels, blocks,
        *x_strides, *_strides(history), *_strides(out),
        UNIT=unit, REVERSE=reverse, OUT_REVERSE=out_reverse, HISTORY=history is not None and width > 1,
        SLOPE=slope is not None, WIDTH=width, TOKENS=tokens, CHANNELS=size,
    )  # fmt: skip


def convolve_backward(
    x: Tensor,
    history: Tensor | None,
    weight: Tensor,
    gradient: Tensor,
    dx: Tensor,
    reverse: bool,
    suffix: int,
    *,
    gradient_reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write ``dx``, where its tokens stand; return float32 gradients of weight and bias, and that of the history.

    gradient: (batch, length, channels), of what the SiLU was taken of, in scan order, or with ``gradient_reverse``
    where its tokens stand. The history's gradient is in its dtype, empty for None.
    """
    batch, length, channels = x.shape
    width = weight.shape[1]
    tokens = min(_BACKWARD_TOKENS, power_of_two(length + width - 1))
    size = min(_BACKWARD_CHANNELS, power_of_two(channels))
    every, channel_blocks = length + width - 1, triton.cdiv(channels, size)
    blocks = min(_BACKWARD_BLOCKS, triton.cdiv(every, tokens))
    while blocks > 1 and batch * triton.cdiv(every, tokens * blocks) * channel_blocks < tuning.ENOUGH_PROGRAMS:
        blocks = (blocks + 1) // 2
    splits = triton.cdiv(every, tokens * blocks)
    dhistory = x.new_empty(0) if history is None else history.new_empty(history.shape)
    sums = x.new_empty(batch * splits, width + 1, channels, dtype=torch.float32)
    unit, x_batch, x_token, dx_batch, dx_token = aligned(x.stride(0), x.stride(1), dx.stride(0), dx.stride(1))
    launch(
        _convolve_backward, (batch * splits, channel_blocks),
        x, x if history is None else history, weight.contiguous(), gradient, dx, dhistory, sums,
        length, length - suffix if reverse else length, channels, splits, blocks,
        x_batch, x_token, *_strides(history), *_strides(gradient), dx_batch, dx_token,
        UNIT=unit, REVERSE=reverse, GRADIENT_REVERSE=gradient_reverse,
        HISTORY=history is not None and width > 1,
        WIDTH=width, TOKENS=tokens, CHANNELS=size,
    )  # fmt: skip
    total = sums.sum(0)
    return total[:width].t(), total[width], dhistory


def _strides(x: Tensor | None) -> tuple[int, int]:
    """From sample to sample and from token to token."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, history: Tensor | None, reverse: bool, suffix: int
) -> Tensor:
    """Arguments as :func:`patchscale.ops.causal_conv1d`, already checked; width 1 to 4, float32 or bfloat16."""
    check_dtype(x)
    check_width(weight.shape[1])
    return _causal_conv1d(x, weight, bias, history, reverse, suffix)


@torch.library.custom_op("patchscale::causal_conv1d_triton", mutates_args=())
def _causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, history: Tensor | None, reverse: bool, suffix: int
) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    history = None if history is None else rows_in_memory(history)
    convolve(rows_in_memory(x), history, weight, bias, out, reverse, suffix, out_reverse=reverse)
    return out


@_causal_conv1d.register_fake
def _(x, weight, bias, history, reverse, suffix):
    return x.new_empty(x.shape)


@torch.library.custom_op("patchscale::causal_conv1d_triton_backward", mutates_args=())
def _causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, history: Tensor | None, reverse: bool, suffix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and history, each in its dtype; empty for an absent history."""
    x = rows_in_memory(x)
    history = None if history is None else rows_in_memory(history)
    dx, spare, slope = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(3))
    convolve(x, history, weight, bias, spare, reverse, suffix, slope=slope, out_reverse=reverse)
    dpre = slope.mul_(grad)
    dweight, dbias, dhistory = convolve_backward(
        x, history, weight, dpre, dx, reverse, suffix, gradient_reverse=reverse
    )
    return dx, dweight.to(weight.dtype).contiguous(), dbias.to(bias.dtype, copy=True), dhistory


@_causal_conv1d_backward.register_fake
def _(grad, x, weight, bias, history, reverse, suffix):
    dhistory = x.new_empty(0) if history is None else history.new_empty(history.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape), dhistory


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.reverse, ctx.suffix = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    tensors = ctx.saved_tensors
    grads = _causal_conv1d_backward(grad, *tensors, ctx.reverse, ctx.suffix)
    return *(None if t is None else g for t, g in zip(tensors, grads, strict=True)), None, None


_causal_conv1d.register_autograd(_backward, setup_context=_setup_context)
