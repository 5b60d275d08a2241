"""The mixer between its two projections, as a row of kernels.

Forward: convolution (writes the activations of x, B and C, in scan order), steps, pass over states, chunk output, gate
and norm. Backward: gate, convolution again (this time with the slope of its SiLU), steps again, pass over the gradients
of states, chunk backward, convolution backward, steps backward.

The activations are written and read again rather than worked out by every kernel that needs them: the scan reads them
two times in either direction, and a SiLU in the midst of its matrix products would be taken again for every layout that
they ask for. Kept for the backward are the inputs, the scan's output and the states before each chunk, but not the
activations: they are half as large as the input, and one kernel brings them back.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from patchscale.ops.triton import scan
from patchscale.ops.triton.conv import check_width, convolve, convolve_backward
from patchscale.ops.triton.gate import gate, gate_backward
from patchscale.ops.triton.steps import steps, steps_backward
from patchscale.ops.triton.tokens import check_dtype, rows_in_memory


def mix_tokens(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    history: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    suffix: int,
    eps: float,
    want_final: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments as :func:`patchscale.ops.mix_tokens`, already checked; the final state is empty if not wanted."""
    sizes = _Sizes(conv_weight.shape, A.shape, norm_weight.shape)
    check_dtype(projected)
    check_width(sizes.width)
    scan.check_sizes(sizes.headdim, sizes.d_state)
    tensors = (projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, history, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    chunk_size = scan.chunk_size(projected, sizes.headdim, sizes.d_state)
    return _mix_tokens(*tensors, reverse, suffix, eps, chunk_size, want_final, keep)[:2]


class _Sizes:
    """The dimensions of a mixer, and how its channels are divided."""

    def __init__(self, conv_shape, heads_shape, norm_shape) -> None:
        self.conv_dim, self.width = conv_shape
        self.d_inner, self.heads = norm_shape[0], heads_shape[0]
        self.headdim, self.d_state = self.d_inner // self.heads, (self.conv_dim - self.d_inner) // 2

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, xBC and dt."""
        z, xBC, dt = projected.split([self.d_inner, self.conv_dim, self.heads], dim=-1)
        return z, xBC, dt

    def split_conv(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x by head, B and C."""
        x, B, C = xBC.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        return self.by_head(x), B, C

    def by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.headdim))

    def of_scan(self, projected_shape) -> tuple[int, ...]:
        """Batch, length, heads, headdim and d_state."""
        return *projected_shape[:2], self.heads, self.headdim, self.d_state


@torch.library.custom_op("patchscale::mix_tokens_triton", mutates_args=())
def _mix_tokens(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    history: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    suffix: int,
    eps: float,
    chunk_size: int,
    want_final: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Out, the final state, and with ``keep`` the scan's output in scan order and the states before each chunk."""
    sizes = _Sizes(conv_weight.shape, A.shape, norm_weight.shape)
    projected = rows_in_memory(projected)
    history = None if history is None else rows_in_memory(history)
    batch, length, _ = projected.shape
    z, xBC, dt = sizes.split(projected)
    activated = projected.new_empty(batch, length, sizes.conv_dim)
    convolve(xBC, history, conv_weight, conv_bias, activated, reverse, suffix)
    step_sizes = steps(dt, dt_bias, A.float().contiguous(), chunk_size, reverse, suffix)
    tokens = scan.Tokens(*sizes.split_conv(activated), *step_sizes, chunk_size, False, 0)
    final_shape, _ = scan.kept_shapes(sizes.of_scan(projected.shape), chunk_size, want_final, keep)
    final = projected.new_empty(final_shape, dtype=torch.float32)
    states = tokens.pass_states(tokens.x, tokens.B, initial_state, final if want_final else None, False)
    y, out = (projected.new_empty(batch, length, sizes.d_inner) for _ in range(2))
    tokens.output(states, D, sizes.by_head(y))
    gate(y, z, norm_weight.contiguous(), out, eps, reverse, suffix)
    if not keep:
        y, states = projected.new_empty(0), projected.new_empty(0)
    return out, final, y, states


@_mix_tokens.register_fake
def _(
    projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, history, initial_state,
    reverse, suffix, eps, chunk_size, want_final, keep,
):  # fmt: skip
    sizes = _Sizes(conv_weight.shape, A.shape, norm_weight.shape)
    final, states = scan.kept_shapes(sizes.of_scan(projected.shape), chunk_size, want_final, keep)
    out = projected.new_empty(*projected.shape[:2], sizes.d_inner)
    y = projected.new_empty(out.shape if keep else 0)
    return out, projected.new_empty(final, dtype=torch.float32), y, projected.new_empty(states)


@torch.library.custom_op("patchscale::mix_tokens_triton_backward", mutates_args=())
def _mix_tokens_backward(
    dout: Tensor,
    dfinal: Tensor | None,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    history: Tensor | None,
    initial_state: Tensor | None,
    y: Tensor,
    states: Tensor,
    reverse: bool,
    suffix: int,
    eps: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the forward's tensors, each in its dtype; empty for an absent one."""
    sizes = _Sizes(conv_weight.shape, A.shape, norm_weight.shape)
    projected, dout = rows_in_memory(projected), rows_in_memory(dout)
    history = None if history is None else rows_in_memory(history)
    batch, length, _ = projected.shape
    dprojected = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
    (z, xBC, dt), (dz, dxBC, ddt) = sizes.split(projected), sizes.split(dprojected)
    dy = torch.empty_like(y)
    dnorm_weight = gate_backward(dout, y, z, norm_weight.contiguous(), dy, dz, eps, reverse, suffix)

    activated, slope = (projected.new_empty(batch, length, sizes.conv_dim) for _ in range(2))
    convolve(xBC, history, conv_weight, conv_bias, activated, reverse, suffix, slope=slope)
    rates = A.float().contiguous()
    step_sizes = steps(dt, dt_bias, rates, chunk_size, reverse, suffix)
    tokens = scan.Tokens(*sizes.split_conv(activated), *step_sizes, chunk_size, False, 0)
    dinitial = None if initial_state is None else torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    by_head = sizes.by_head(dy)
    dstates = tokens.pass_states(by_head, tokens.C, dfinal, dinitial, True)
    # Each program reads the slopes of its own tokens before it writes their gradients: these may take their place.
    slopes, dpre = sizes.split_conv(slope), slope
    dsteps, sums = tokens.backward(by_head, rates, D, states, dstates, *slopes, slopes)

    dconv_weight, dconv_bias, dhistory = convolve_backward(xBC, history, conv_weight, dpre, dxBC, reverse, suffix)
    ddt_bias = steps_backward(dsteps, dt, dt_bias, ddt, chunk_size, reverse, suffix)
    return (
        dprojected,
        dconv_weight.to(conv_weight.dtype).contiguous(),
        dconv_bias.to(conv_bias.dtype, copy=True),
        ddt_bias.to(dt_bias.dtype),
        sums[:, 0].to(A.dtype, copy=True),
        sums[:, 1].to(D.dtype, copy=True),
        dnorm_weight.to(norm_weight.dtype),
        dhistory,
        projected.new_empty(0) if dinitial is None else dinitial,
    )


@_mix_tokens_backward.register_fake
def _(dout, dfinal, projected, *args):
    tensors = (projected, *args[:8])
    return tuple(projected.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.reverse, ctx.suffix, ctx.eps, ctx.chunk_size, ctx.want_final, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])


def _backward(ctx, dout, dfinal, _, __):
    *tensors, y, states = ctx.saved_tensors
    dout = torch.zeros_like(y) if dout is None else dout
    dfinal = dfinal if ctx.want_final else None
    options = ctx.reverse, ctx.suffix, ctx.eps, ctx.chunk_size
    grads = _mix_tokens_backward(dout, dfinal, *tensors, y, states, *options)
    return *(None if t is None else g for t, g in zip(tensors, grads, strict=True)), *[None] * 6


_mix_tokens.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.patchscale.mix_tokens_triton)
def _forward_flops(projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, *args, out_shape=None, **kw) -> int:
    return scan.forward_flops(_Sizes(conv_weight, A, norm_weight).of_scan(projected), args[5])


@register_flop_formula(torch.ops.patchscale.mix_tokens_triton_backward)
def _backward_flops(
    dout, dfinal, projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, *args, out_shape=None, **kw
) -> int:
    return scan.backward_flops(_Sizes(conv_weight, A, norm_weight).of_scan(projected), args[-1])
