"""The short causal convolution in front of the scan, with its SiLU.

One pass over the tokens in blocks that stay in cache, forward and backward, so that neither direction, history nor
suffix costs a copy of the sequence: a block is convolved together with the few tokens before it in scan order. The
backward recomputes the pre-activation instead of storing it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from patchscale.errors import UserError
from patchscale.ops.dispatch import choose_implementation, refuse_forward_mode
from patchscale.ops.reference import causal_conv1d_reference

# Elements of one block: 1 MiB in float32, found best on two cores with 1 MiB of L2 each.
_BLOCK_ELEMENTS = 262144


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

    chosen = choose_implementation(implementation, x.device, x.dtype).implementation
    refuse_forward_mode("causal_conv1d", chosen)
    if chosen == "triton":
        from patchscale.ops.triton.conv import causal_conv1d as triton_conv

        return triton_conv(x, weight, bias, history, reverse, suffix)
    if chosen == "reference":
        return causal_conv1d_reference(x, weight, bias, history, reverse, suffix)
    if history is None:
        history = x.new_zeros(expected_history)
    return _causal_conv1d(x, weight, bias, history, reverse, suffix)


@torch.library.custom_op("patchscale::causal_conv1d", mutates_args=())
def _causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, history: Tensor, reverse: bool, suffix: int) -> Tensor:
    work = _work_dtype(x)
    weight, bias = weight.to(work), bias.to(work)
    flipped = weight.flip(1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    groups, blocks = _cut(x, reverse, suffix)
    for group in groups:
        before = history[group].to(x.dtype)
        for tokens, from_right in blocks:
            window = window_of(x[group, tokens], before, from_right).to(work)
            before = tokens_before_next(x[group, tokens], before, from_right)
            with torch.autocast(x.device.type, enabled=False):
                pre = convolve(window, flipped if from_right else weight, bias)
            out[group, tokens] = F.silu(pre, inplace=True)
    return out


@_causal_conv1d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, history: Tensor, reverse: bool, suffix: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("patchscale::causal_conv1d_backward", mutates_args=())
def _causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, history: Tensor, reverse: bool, suffix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    work = _work_dtype(x)
    work_weight, work_bias = weight.to(work), bias.to(work)
    flipped = work_weight.flip(1)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias = torch.zeros_like(work_weight), torch.zeros_like(work_bias)
    dhistory = torch.zeros(history.shape, dtype=history.dtype, device=x.device)
    groups, blocks = _cut(x, reverse, suffix)
    for group in groups:
        befores = [history[group].to(x.dtype)]
        for tokens, from_right in blocks:
            befores.append(tokens_before_next(x[group, tokens], befores[-1], from_right))
        dafter = torch.zeros_like(befores[0], dtype=work)
        for i in reversed(range(len(blocks))):
            tokens, from_right = blocks[i]
            window = window_of(x[group, tokens], befores[i], from_right).to(work)
            taps = flipped if from_right else work_weight
            with torch.autocast(x.device.type, enabled=False):
                pre = convolve(window, taps, work_bias)
            dpre = torch.ops.aten.silu_backward(grad[group, tokens].to(work), pre)
            dwindow, dtaps, dblock_bias = convolve_backward(dpre, window, taps)
            dweight += dtaps.flip(1) if from_right else dtaps
            dbias += dblock_bias
            dblock, dafter = gradients_of_window(dwindow, dafter, befores[i].shape[1], from_right)
            dx[group, tokens] = dblock
        dhistory[group] = dafter
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), dhistory


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


def _cut(x: Tensor, reverse: bool, suffix: int) -> tuple[list[slice], list[tuple[slice, bool]]]:
    """Groups of samples, and blocks of tokens in scan order with whether they are scanned from the right."""
    batch, length, channels = x.shape
    size = max(16, _BLOCK_ELEMENTS // channels)
    body = length - suffix if reverse else length
    blocks = [(slice(s, min(s + size, body)), reverse) for s in range(0, body, size)]
    if reverse:
        blocks.reverse()
    blocks += [(slice(s, min(s + size, length)), False) for s in range(body, length, size)]
    samples = max(1, size // max(1, length))
    return [slice(s, min(s + samples, batch)) for s in range(0, batch, samples)], blocks


def window_of(block: Tensor, before: Tensor, reverse: bool, out: Tensor | None = None) -> Tensor:
    """What the convolution of a block reads, as tokens stand: (batch, tokens + width - 1, channels).

    ``before`` (batch, width - 1 at least, channels) are the tokens before this block, in scan order: of more than
    width - 1, the last of them are convolved as well.
    """
    parts = [block, before.flip(1)] if reverse else [before, block]
    if out is None:
        return torch.cat(parts, 1)
    for room, part in zip(out.split([part.shape[1] for part in parts], 1), parts, strict=True):
        room.copy_(part)
    return out


def tokens_before_next(block: Tensor, before: Tensor, reverse: bool) -> Tensor:
    """The tokens before the block that comes next, in scan order, from those before this one."""
    reach = before.shape[1]
    if block.shape[1] < reach:
        block = window_of(block, before, reverse)
    return block[:, :reach].flip(1) if reverse else block[:, block.shape[1] - reach :]


def gradients_of_window(dwindow: Tensor, dafter: Tensor, before: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """Gradients of a block and of the tokens before it, from those of its window and of the tokens before the next.

    before: how many tokens there are before it.
    """
    reach, total = dafter.shape[1], dwindow.shape[1]
    if reverse:
        dwindow[:, :reach] += dafter.flip(1)
        return dwindow[:, : total - before], dwindow[:, total - before :].flip(1)
    dwindow[:, total - reach :] += dafter
    return dwindow[:, before:], dwindow[:, :before].clone()


def convolve(window: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """(batch, n + width - 1, channels), (channels, width) -> (batch, n, channels), by memory order."""
    if _library_is_faster(window):
        image, kernel = window.transpose(1, 2)[:, :, None], taps[:, None, None]
        return F.conv2d(image, kernel, bias, groups=taps.shape[0]).squeeze(2).transpose(1, 2)
    length, taps = window.shape[1] - taps.shape[1] + 1, taps.t().contiguous()
    out = torch.addcmul(bias, window[:, :length], taps[0])
    for k in range(1, taps.shape[0]):
        out.addcmul_(window[:, k : k + length], taps[k])
    return out


def convolve_backward(dout: Tensor, window: Tensor, taps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the window, the taps and the bias of :func:`convolve`."""
    length, width = dout.shape[1], taps.shape[1]
    rows = taps.t().contiguous()
    dwindow = torch.zeros_like(window)
    dtaps = torch.empty_like(rows)
    product = torch.empty_like(dout)
    for k in range(width):
        dwindow[:, k : k + length].addcmul_(dout, rows[k])
        torch.mul(dout, window[:, k : k + length], out=product)
        dtaps[k] = product.sum((0, 1))
    return dwindow, dtaps.t(), dout.sum((0, 1))


def _library_is_faster(window: Tensor) -> bool:
    """oneDNN's depthwise kernel reads a window once; for a few tokens its call costs more than it saves."""
    few = window.shape[0] * window.shape[1] < 128
    return (
        window.device.type == "cpu"
        and window.dtype == torch.float32
        and not few
        and torch.backends.mkldnn.is_available()
    )
