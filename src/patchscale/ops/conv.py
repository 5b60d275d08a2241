"""The short causal convolution in front of the scan, with its SiLU.

One pass over the tokens in blocks that stay in cache, forward and backward, so that neither direction, history nor
suffix costs a copy of the sequence. The backward recomputes the pre-activation instead of storing it.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from patchscale.errors import UserError
from patchscale.ops.dispatch import choose_implementation
from patchscale.ops.reference import causal_conv1d_reference, scan_order

# Elements of one block: 1 MiB in float32, found best on two cores with 2 MiB of L2 each.
_BLOCK_ELEMENTS = 262144
# Sequences up to this length are gathered in scan order as one window: fewer, smaller steps.
_SHORT = 32


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    history: Tensor | None = None,
    reverse: bool = False,
    suffix: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """Depthwise causal convolution and SiLU over tokens, in either scan direction.

    Scan order is left to right, or right to left with ``reverse``; the last ``suffix`` tokens come last in both.
    Nothing is moved in memory: scanning from the right reads ahead instead of back.

    Args:
        x: (batch, length, channels), float32, bfloat16 or float64.
        weight: (channels, width); the last tap meets the current token.
        bias: (channels,).
        history: (batch, width - 1, channels), the tokens before the first one, in scan order; zeros if None.
        reverse: scan right to left.
        suffix: how many trailing tokens are scanned last, left to right.
        implementation: see :func:`patchscale.ops.dispatch.choose_implementation`.

    Returns:
        (batch, length, channels), the dtype of ``x``; summed in float32 at least.

    Raises:
        UserError: shapes that do not fit, or an unknown implementation.
    """
    if weight.ndim != 2:
        raise UserError(f"weight has shape {tuple(weight.shape)}, expected (channels, width)")
    channels, width = weight.shape
    if tuple(bias.shape) != (channels,):
        raise UserError(f"bias has shape {tuple(bias.shape)}, expected {(channels,)}")
    if x.ndim != 3 or x.shape[2] != channels:
        raise UserError(f"x has shape {tuple(x.shape)}, expected (batch, length, {channels}) to fit the weight")
    expected_history = (x.shape[0], width - 1, channels)
    if history is not None and tuple(history.shape) != expected_history:
        raise UserError(f"history has shape {tuple(history.shape)}, expected {expected_history}")
    if not 0 <= suffix <= x.shape[1]:
        raise UserError(f"suffix is {suffix}, expected 0 to the length, {x.shape[1]}")

    if choose_implementation(implementation, x.device).implementation == "reference":
        return causal_conv1d_reference(x, weight, bias, history, reverse, suffix)
    if history is None:
        history = x.new_zeros(expected_history)
    return _causal_conv1d(x, weight, bias, history, reverse, suffix)


@torch.library.custom_op("patchscale::causal_conv1d", mutates_args=())
def _causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, history: Tensor, reverse: bool, suffix: int) -> Tensor:
    work = _work_dtype(x)
    taps, bias = weight.t().to(work).contiguous(), bias.to(work)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for group, start, stop, window, block_taps in _blocks(x, taps, reverse, suffix):
        out[group, start:stop] = F.silu(_convolve(window.to(work), block_taps, bias), inplace=True)
    for indices, from_history, sources in _edges(x, taps, reverse, suffix):
        window = torch.cat([history[:, from_history:], x[:, sources]], dim=1).to(work)
        out[:, indices] = F.silu(_convolve(window, taps, bias)).to(x.dtype)
    return out


@_causal_conv1d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, history: Tensor, reverse: bool, suffix: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("patchscale::causal_conv1d_backward", mutates_args=())
def _causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, history: Tensor, reverse: bool, suffix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    work = _work_dtype(x)
    taps, work_bias = weight.t().to(work).contiguous(), bias.to(work)
    width = taps.shape[0]
    dx = torch.zeros(x.shape, dtype=work, device=x.device)
    dtaps, dbias = torch.zeros_like(taps), torch.zeros_like(work_bias)
    dhistory = torch.zeros(history.shape, dtype=work, device=x.device)
    for group, start, stop, window, block_taps in _blocks(x, taps, reverse, suffix):
        window = window.to(work)
        dpre = _silu_backward(grad[group, start:stop].to(work), _convolve(window, block_taps, work_bias))
        dbias += dpre.sum((0, 1))
        first = start if reverse else start - (width - 1)
        length = stop - start
        for k in range(width):
            dx[group, first + k : first + k + length].addcmul_(dpre, block_taps[k])
            tap = width - 1 - k if reverse else k
            dtaps[tap] += (dpre * window[:, k : k + length]).sum((0, 1))
    for indices, from_history, sources in _edges(x, taps, reverse, suffix):
        window = torch.cat([history[:, from_history:], x[:, sources]], dim=1).to(work)
        dpre = _silu_backward(grad[:, indices].to(work), _convolve(window, taps, work_bias))
        dbias += dpre.sum((0, 1))
        dwindow = torch.zeros_like(window)
        length = dpre.shape[1]
        for k in range(width):
            dwindow[:, k : k + length].addcmul_(dpre, taps[k])
            dtaps[k] += (dpre * window[:, k : k + length]).sum((0, 1))
        reach = window.shape[1] - len(sources)
        dhistory[:, from_history:] += dwindow[:, :reach]
        dx.index_add_(1, torch.tensor(sources, device=x.device), dwindow[:, reach:])
    return dx.to(x.dtype), dtaps.t().to(weight.dtype).contiguous(), dbias.to(bias.dtype), dhistory.to(history.dtype)


@_causal_conv1d_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, history: Tensor, reverse: bool, suffix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
        history.new_empty(history.shape),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.reverse, ctx.suffix = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return *_causal_conv1d_backward(grad, *ctx.saved_tensors, ctx.reverse, ctx.suffix), None, None


_causal_conv1d.register_autograd(_backward, setup_context=_setup_context)


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(x: Tensor, taps: Tensor, reverse: bool, suffix: int) -> Iterator[tuple[slice, int, int, Tensor, Tensor]]:
    """(samples, start, stop, window, taps in memory order) of the outputs whose whole window is in ``x``, by blocks."""
    batch, length, channels = x.shape
    if length <= _SHORT:
        return
    reach = taps.shape[0] - 1
    body = length - suffix if reverse else length
    first, last = (0, body - reach) if reverse else (reach, body)
    taps = taps.flip(0) if reverse else taps
    tokens = max(16, min(last - first, _BLOCK_ELEMENTS // channels))
    samples = max(1, _BLOCK_ELEMENTS // (tokens * channels))
    for sample in range(0, batch, samples):
        group = slice(sample, min(sample + samples, batch))
        for start in range(first, last, tokens):
            stop = min(start + tokens, last)
            window = x[group, start : stop + reach] if reverse else x[group, start - reach : stop]
            yield group, start, stop, window, taps


def _edges(x: Tensor, taps: Tensor, reverse: bool, suffix: int) -> Iterator[tuple[list[int], int, list[int]]]:
    """(outputs, first history entry, tokens of ``x``) of the outputs whose window is not one slice of ``x``.

    These are the first tokens in scan order and, scanning from the right, the suffix; in a short sequence, all. Each
    window is given in scan order: the history from some entry on, then tokens of ``x``.
    """
    length, reach = x.shape[1], taps.shape[0] - 1
    body = length - suffix if reverse else length
    order = scan_order(length, reverse, suffix)
    if length <= _SHORT:
        spans = [(0, length)]
    else:
        spans = [(0, min(body, reach))] + ([(body, length)] if reverse and suffix else [])
    for start, stop in spans:
        yield order[start:stop], min(start, reach), order[max(0, start - reach) : stop]


def _convolve(window: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """(batch, n + width - 1, channels) -> (batch, n, channels)."""
    length = window.shape[1] - taps.shape[0] + 1
    out = torch.addcmul(bias, window[:, :length], taps[0])
    for k in range(1, taps.shape[0]):
        out.addcmul_(window[:, k : k + length], taps[k])
    return out


def _silu_backward(grad: Tensor, pre: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(grad, pre)
