"""A Mamba-2 token mixer between its two projections: convolution, scan, skip, gate and norm in one operator.

For the backward it keeps the scan's output and the states at chunk boundaries. The work is done in plain PyTorch
(`mixer_blocks.py`), in C++ (`native/`) or in Triton (`triton/`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from patchscale.errors import UserError
from patchscale.ops import chunked, mixer_blocks
from patchscale.ops.chunks import (
    DEFAULT_CHUNK_SIZE,
    chunk_bounds,
    cut,
    cut_into_runs,
    group_and_block,
    is_stateless,
    work_dtype,
)
from patchscale.ops.conv import tokens_before_next
from patchscale.ops.dispatch import choose_implementation, is_plain, is_watched, refuse_forward_mode
from patchscale.ops.mixer_blocks import Parameters, Sizes
from patchscale.ops.native import mixer as native_mixer
from patchscale.ops.reference import mix_tokens_reference


def mix_tokens(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    *,
    history: Tensor | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    suffix: int = 0,
    heading: bool = False,
    eps: float = 1e-5,
    final_state: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What a Mamba-2 mixer does between in_proj and out_proj (arXiv 2405.21060, section 7; the norm follows the gate).

    ``x, B, C = split(silu(causal_conv1d(xBC)))``, ``y = ssd_scan(x, softplus(dt + dt_bias), A, B, C, D)``,
    ``rms_norm(y * silu(z)) * norm_weight``. Scan order is left to right, or right to left with ``reverse``; the last
    ``suffix`` tokens come last in both, and a heading token first. Decays, states and sums are float32 at least, also
    under autocast.

    Args:
        projected: (batch, length, 2 d_inner + 2 d_state + heads): z, x, B, C and dt, as in_proj gives them.
        conv_weight: (d_inner + 2 d_state, width), over x, B and C.
        conv_bias: (d_inner + 2 d_state,).
        dt_bias: (heads,), added to dt before softplus.
        A: (heads,), negative decay rates.
        D: (heads,), the skip.
        norm_weight: (d_inner,).
        history: (batch, width - 1, d_inner + 2 d_state), what the convolution meets before the first token, in scan
            order; zeros if None.
        initial_state: (batch, heads, d_inner / heads, d_state); zeros if None.
        reverse: scan right to left.
        suffix: how many trailing tokens are scanned last, left to right.
        heading: the token after these, the last of all, is scanned before all others, and has no output itself.
        eps: added to the mean square.
        final_state: whether the state after the last token is wanted.
        implementation: see :func:`patchscale.ops.dispatch.choose_implementation`.

    Returns:
        (batch, length, d_inner), one token less with a heading token, in the dtype of ``projected``; and the state
        after the last token, shaped as ``initial_state``, float32 at least, or None.

    Raises:
        UserError: shapes that do not fit, or an unknown implementation.
    """
    ranks = (
        ("projected", projected, 3, "(batch, length, channels)"),
        ("conv_weight", conv_weight, 2, "(channels, width)"),
        ("A", A, 1, "(heads,)"),
        ("norm_weight", norm_weight, 1, "(d_inner,)"),
    )
    for name, required, rank, words in ranks:
        if required.ndim != rank:
            raise UserError(f"{name} has shape {tuple(required.shape)}, expected {words}")
    d_inner, heads = norm_weight.shape[0], A.shape[0]
    batch, length, channels = projected.shape
    conv_dim = conv_weight.shape[0]
    d_state = (conv_dim - d_inner) // 2
    if not heads or d_inner % heads or channels != d_inner + conv_dim + heads or d_inner + 2 * d_state != conv_dim:
        raise UserError(
            f"projected has {channels} channels, conv_weight {conv_dim}, norm_weight {d_inner} and A {heads}; expected "
            "d_inner + 2 d_state in conv_weight, and d_inner and one a head more in projected"
        )
    expected = {
        "conv_bias": (conv_bias, (conv_dim,)),
        "dt_bias": (dt_bias, (heads,)),
        "D": (D, (heads,)),
        "history": (history, (batch, conv_weight.shape[1] - 1, conv_dim)),
        "initial_state": (initial_state, (batch, heads, d_inner // heads, d_state)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if heading and not length:
        raise UserError("projected has no tokens, expected a heading token at least")
    if not 0 <= suffix <= length - heading:
        others = ", less the heading token" if heading else ""
        raise UserError(f"suffix is {suffix}, expected 0 to the length{others}, {length - heading}")

    parameters = conv_weight, conv_bias, dt_bias, A, D, norm_weight
    sizes = Sizes(conv_weight, A, norm_weight)
    of_kernels = {"heads": heads, "headdim": sizes.headdim, "d_state": d_state, "taps": sizes.width}
    chosen = choose_implementation(implementation, projected.device, projected.dtype, **of_kernels).implementation
    refuse_forward_mode("mix_tokens", chosen)
    if chosen == "triton":
        from patchscale.ops.triton.mixer import mix_tokens as triton_mix

        if heading:
            projected, first = projected.split([length - 1, 1], dim=1)
            _, initial_state = triton_mix(first, *parameters, history, initial_state, False, 0, eps, True)
            history = tokens_before_next(sizes.split(first)[1], _history(history, first, sizes), False)
        out, state = triton_mix(projected, *parameters, history, initial_state, reverse, suffix, eps, final_state)
    elif chosen == "reference":
        out, state = mix_tokens_reference(projected, *parameters, history, initial_state, reverse, suffix, heading, eps)
    else:
        tensors = projected, *parameters, history, initial_state
        given = [t for t in tensors if t is not None]
        differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        options = reverse, suffix, heading, eps, DEFAULT_CHUNK_SIZE, chosen == "native"
        mix = _mix_tokens if is_watched() or not all(is_plain(t) for t in given) else MixTokens.apply
        out, state, _, _ = mix(*tensors, *options, final_state, differentiated)
    return out, state if final_state else None


def _forward(
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
    heading: bool,
    eps: float,
    chunk_size: int,
    native: bool,
    want_final: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Out, the final state, and with ``keep`` the scan's output and the states at chunk boundaries (else empty)."""
    sizes, work = Sizes(conv_weight, A, norm_weight), work_dtype(projected)
    apart = _is_apart(heading, native)
    plan = cut(projected, projected.shape[1] - apart, sizes.d_inner, reverse, suffix, chunk_size)
    tensors = conv_weight, conv_bias, dt_bias, A, D, norm_weight
    parameters = Parameters._make([*(_convert(t, work) for t in tensors), eps])
    out = projected.new_empty(projected.shape[0], projected.shape[1] - heading, sizes.d_inner)
    stateless = is_stateless(plan.chunks + apart, initial_state, want_final)
    kept_chunks = plan.chunks + apart if keep and not stateless else 0
    shapes = _kept_shapes(projected, sizes, apart, kept_chunks, want_final, keep)
    final_state, ys, states = (projected.new_empty(shape, dtype=work) for shape in shapes)
    (native_mixer if native else mixer_blocks).forward(
        sizes,
        parameters,
        plan,
        heading,
        projected,
        _history(history, projected, sizes),
        None if initial_state is None else initial_state.to(work),
        out,
        final_state if want_final else None,
        ys if keep else None,
        states if kept_chunks else None,
    )
    return out, final_state, ys, states


def _convert(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Even to ask for what is already so takes time, of which a call on a few hundred tokens has little.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _is_apart(heading: bool, native: bool) -> bool:
    """Whether there is a heading token that is no token of the plan, but a chunk of its own, as the kernels have it."""
    return heading and native


def _kept_shapes(
    projected: Tensor, sizes: Sizes, apart: bool, chunks: int, want_final: bool, keep: bool
) -> list[tuple[int, ...]]:
    """Of the final state, of the scan's output and of the states; empty where not wanted."""
    batch, length, _ = projected.shape
    return [
        (batch, sizes.heads, sizes.headdim, sizes.d_state) if want_final else (0,),
        (batch, length - apart, sizes.d_inner) if keep else (0,),
        (batch, chunks, sizes.d_state, sizes.d_inner),
    ]


def _history(history: Tensor | None, projected: Tensor, sizes: Sizes) -> Tensor:
    """(batch, width - 1, conv_dim), zeros for None."""
    if history is None:
        return projected.new_zeros(projected.shape[0], sizes.width - 1, sizes.conv_dim)
    return history.to(projected.dtype)


_mix_tokens = torch.library.custom_op("patchscale::mix_tokens", _forward, mutates_args=())


@_mix_tokens.register_fake
def _(
    projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, history, initial_state,
    reverse, suffix, heading, eps, chunk_size, native, want_final, keep,
):  # fmt: skip
    sizes, work = Sizes(conv_weight, A, norm_weight), work_dtype(projected)
    apart = _is_apart(heading, native)
    chunks = len(chunk_bounds(projected.shape[1] - apart, reverse, suffix, chunk_size)) + apart
    kept_chunks = chunks if keep and not is_stateless(chunks, initial_state, want_final) else 0
    out = projected.new_empty(projected.shape[0], projected.shape[1] - heading, sizes.d_inner)
    shapes = _kept_shapes(projected, sizes, apart, kept_chunks, want_final, keep)
    return out, *(projected.new_empty(s, dtype=work) for s in shapes)


def _gradients(
    grad_out: Tensor,
    grad_final: Tensor | None,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    history: Tensor | None,
    initial_state: Tensor | None,
    final_state: Tensor,
    ys: Tensor,
    states: Tensor,
    reverse: bool,
    suffix: int,
    heading: bool,
    eps: float,
    chunk_size: int,
    native: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first nine tensors of the forward, each in its dtype (empty for an absent one)."""
    sizes, work = Sizes(conv_weight, A, norm_weight), work_dtype(projected)
    apart = _is_apart(heading, native)
    plan = cut(projected, projected.shape[1] - apart, sizes.d_inner, reverse, suffix, chunk_size)
    tensors = conv_weight, conv_bias, dt_bias, A, D, norm_weight
    parameters = Parameters._make([*(_convert(t, work) for t in tensors), eps])
    want_final = final_state.ndim > 1
    dprojected = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
    gradients = (native_mixer if native else mixer_blocks).backward(
        sizes,
        parameters,
        plan,
        heading,
        projected,
        _history(history, projected, sizes),
        initial_state,
        None if grad_final is None else grad_final.to(work).contiguous(),
        None if grad_final is None else final_state,
        ys,
        None if is_stateless(plan.chunks + apart, initial_state, want_final) else states,
        grad_out,
        dprojected,
    )
    given = *tensors, history, initial_state
    found: Any = (
        projected.new_empty(0, dtype=work) if tensor is None else _convert(gradient, tensor.dtype)
        for tensor, gradient in zip(given, gradients, strict=True)
    )
    return dprojected, *found


_mix_tokens_backward = torch.library.custom_op("patchscale::mix_tokens_backward", _gradients, mutates_args=())


@_mix_tokens_backward.register_fake
def _(
    grad_out, grad_final, projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, history, initial_state,
    final_state, ys, states, reverse, suffix, heading, eps, chunk_size, native,
):  # fmt: skip
    present = projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight
    work = work_dtype(projected)
    return (
        *(t.new_empty(t.shape) for t in present),
        *(
            projected.new_empty(chunked.gradient_shape(t), dtype=work if t is None else t.dtype)
            for t in (history, initial_state)
        ),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, reverse, suffix, heading, eps, chunk_size, native, _, _ = inputs
    ctx.options = reverse, suffix, heading, eps, chunk_size, native
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.shape = output[0].shape


def _backward(ctx, *grads):
    return _back_through(_mix_tokens_backward, ctx, *grads)


def _back_through(operator, ctx, grad_out, grad_final, *_):
    saved = ctx.saved_tensors
    tensors, kept = saved[:-3], saved[-3:]
    grad_out = tensors[0].new_zeros(ctx.shape) if grad_out is None else grad_out
    grad_final = grad_final if kept[0].ndim > 1 else None
    grads = operator(grad_out, grad_final, *tensors, *kept, *ctx.options)
    return *(None if t is None else g for t, g in zip(tensors, grads, strict=True)), *[None] * 8


_mix_tokens.register_autograd(_backward, setup_context=_setup_context)


class MixTokens(torch.autograd.Function):
    """The same operator where nothing looks on: what a custom operator adds takes as long as a hundred tokens."""

    @staticmethod
    def forward(ctx, *inputs):
        """See ``_forward``."""
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        """See ``_gradients``."""
        return _back_through(_gradients, ctx, *grads)


def _scan_flops(projected_shape, conv_shape, A_shape, norm_shape, *options) -> tuple[int, int, int]:
    batch, length, _ = projected_shape
    d_inner, heads = norm_shape[0], A_shape[0]
    d_state = (conv_shape[0] - d_inner) // 2
    return chunked.matrix_flops((batch, length, heads, d_inner // heads), d_state, *options)


@register_flop_formula(torch.ops.patchscale.mix_tokens)
def _forward_flops(projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, *args, out_shape=None, **kw) -> int:
    _, initial, reverse, suffix, _, _, chunk_size, _, want_final, _ = args
    options = reverse, suffix, chunk_size, initial, want_final
    products, inside, states = _scan_flops(projected, conv_weight, A, norm_weight, *options)
    return products + inside + 2 * states


@register_flop_formula(torch.ops.patchscale.mix_tokens_backward)
def _backward_flops(
    grad_out, grad_final, projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, *args, out_shape=None, **kw
) -> int:
    _, initial, final, _, _, reverse, suffix, _, _, chunk_size, _ = args
    options = reverse, suffix, chunk_size, initial, len(final) > 1
    products, inside, states = _scan_flops(projected, conv_weight, A, norm_weight, *options)
    return 3 * products + 2 * inside + 4 * states


def workspace_bytes(
    batch: int,
    length: int,
    d_inner: int,
    heads: int,
    d_state: int,
    itemsize: int,
    backward: bool,
    stateless: bool,
    reverse: bool,
    suffix: int,
) -> int:
    """Memory that the plain implementation needs while it runs, beside what it is given and gives; within a tenth.

    Args:
        batch: samples.
        length: tokens, a heading token among them.
        d_inner: channels of x.
        heads: of the scan.
        d_state: state size.
        itemsize: bytes of a number in the working precision.
        backward: of the backward pass.
        stateless: neither initial nor final states; see :func:`patchscale.ops.chunks.is_stateless`.
        reverse, suffix: see :func:`mix_tokens`.
    """
    conv_dim = d_inner + 2 * d_state
    size, n = min(DEFAULT_CHUNK_SIZE, length), 0 if stateless else d_state
    samples, most_chunks = group_and_block(batch, length, d_inner, DEFAULT_CHUNK_SIZE)
    # Buffers stay for every length of a block.
    runs = cut_into_runs(length, reverse, suffix, DEFAULT_CHUNK_SIZE, most_chunks)
    blocks = {(len(run.chunks), run.size): len(run.chunks) * run.size for run in runs}.values()
    buffers = 2 * d_inner + d_inner * n // size + 2 * d_state + size  # y, rows of x and of states, B, C and products
    rooms = 2 * d_inner + conv_dim  # silu and gated, and the convolution's window
    passing = conv_dim  # its result
    if backward:
        buffers += 2 * d_inner + d_inner * n // size + n + size + (n + size) ** 2 // size
        rooms += d_inner + 2 * conv_dim  # products, act and dact
        passing += 2 * conv_dim
    decays = 8 * (2 + 3) + 2 * itemsize * backward  # two sums in float64; five factors, and two gradients
    elements = (buffers + rooms) * sum(blocks) + passing * max(blocks, default=0)
    per_token = decays * heads * length + itemsize * elements
    return samples * (per_token + itemsize * (1 + 2 * backward) * d_inner * n)
