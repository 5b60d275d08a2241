"""The state-space-dual scan of Mamba-2 (arXiv 2405.21060), for one B and C shared by all heads."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from patchscale.errors import UserError
from patchscale.ops import chunked
from patchscale.ops.chunks import DEFAULT_CHUNK_SIZE, chunk_bounds, cut, is_stateless, work_dtype
from patchscale.ops.dispatch import choose_implementation, refuse_forward_mode
from patchscale.ops.native import scan as native_scan
from patchscale.ops.reference import ssd_scan_reference


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    suffix: int = 0,
    final_state: bool = True,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scan a sequence: ``h_t = exp(dt_t A) h_(t-1) + dt_t x_t (outer) B_t``, ``y_t = h_t C_t + D x_t``.

    Scan order is left to right, or right to left with ``reverse``; the last ``suffix`` tokens come last in both (a
    class token that stands at the end). Nothing is moved in memory for either. Decays and states are float32 also for
    bfloat16 inputs, and under autocast; float64 inputs are computed in float64.

    Args:
        x: (batch, length, heads, headdim).
        dt: (batch, length, heads), positive step sizes.
        A: (heads,), negative decay rates.
        B: (batch, length, d_state), written to the state.
        C: (batch, length, d_state), read from the state.
        D: (heads,), the skip; none if None.
        initial_state: (batch, heads, headdim, d_state); zeros if None.
        reverse: scan right to left.
        suffix: how many trailing tokens are scanned last, left to right.
        final_state: whether the state after the last token is wanted.
        chunk_size: tokens per chunk, nearly; chosen if None. Changes the arithmetic's order, not the result.
        implementation: see :func:`patchscale.ops.dispatch.choose_implementation`.

    Returns:
        y, (batch, length, heads, headdim) in the dtype of ``x``, and the state after the last token,
        (batch, heads, headdim, d_state), float32 (float64 for float64 inputs), None if ``final_state`` is False.

    Raises:
        UserError: shapes that do not fit, or an unknown implementation.
    """
    if x.ndim != 4:
        raise UserError(f"x has shape {tuple(x.shape)}, expected (batch, length, heads, headdim)")
    batch, length, heads, headdim = x.shape
    d_state = B.shape[-1]
    _expect("dt", dt, (batch, length, heads))
    _expect("A", A, (heads,))
    _expect("B", B, (batch, length, d_state))
    _expect("C", C, (batch, length, d_state))
    if D is not None:
        _expect("D", D, (heads,))
    if initial_state is not None:
        _expect("initial_state", initial_state, (batch, heads, headdim, d_state))
    if not 0 <= suffix <= length:
        raise UserError(f"suffix is {suffix}, expected 0 to the length, {length}")
    if chunk_size is not None and chunk_size < 1:
        raise UserError(f"chunk_size is {chunk_size}, expected at least 1")

    sizes = {"heads": heads, "headdim": headdim, "d_state": d_state}
    chosen = choose_implementation(implementation, x.device, x.dtype, **sizes).implementation
    refuse_forward_mode("ssd_scan", chosen)
    if chosen == "triton":
        from patchscale.ops.triton.scan import ssd_scan as triton_scan

        y, state = triton_scan(x, dt, A, B, C, D, initial_state, reverse, suffix, final_state)
    elif chosen == "reference":
        y, state = ssd_scan_reference(x, dt, A, B, C, D, initial_state, reverse, suffix)
    else:
        differentiated = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, dt, A, B, C, initial_state)
        )
        chunk_size = chunk_size or DEFAULT_CHUNK_SIZE
        if chosen == "native":  # its kernels read one precision
            B, C = B.to(x.dtype), C.to(x.dtype)
        options = reverse, suffix, chunk_size, chosen == "native"
        y, state, _ = _ssd_scan(x, dt, A, B, C, initial_state, *options, final_state, differentiated)
        if D is not None:
            y = torch.addcmul(y, x, D[:, None]).to(x.dtype)
    return y, state if final_state else None


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


@torch.library.custom_op("patchscale::ssd_scan", mutates_args=())
def _ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    suffix: int,
    chunk_size: int,
    native: bool,
    want_final: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as :func:`patchscale.ops.ssd_scan`, already checked, less the skip.

    Returns y, the final state, and with ``keep_states`` the states at chunk boundaries that the backward starts from,
    (batch, chunks, n, h p); empty tensors where not wanted.
    """
    _, _, heads, headdim = x.shape
    work = work_dtype(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    plan = cut(x, x.shape[1], heads * headdim, reverse, suffix, chunk_size)
    final_state = torch.empty(_final_shape(x, B, want_final), dtype=work, device=x.device)
    stateless = is_stateless(plan.chunks, initial_state, want_final)
    kept_chunks = plan.chunks if keep_states and not stateless else 0
    states = torch.empty(_states_shape(x, B, kept_chunks), dtype=work, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        (native_scan if native else chunked).forward(
            plan,
            x,
            dt.to(work),
            A.to(work),
            B,
            C,
            None if initial_state is None else initial_state.to(work),
            y,
            final_state if want_final else None,
            states if kept_chunks else None,
        )
    return y, final_state, states


def _final_shape(x: Tensor, B: Tensor, want_final: bool) -> tuple[int, ...]:
    batch, _, heads, headdim = x.shape
    return (batch, heads, headdim, B.shape[2]) if want_final else (0,)


def _states_shape(x: Tensor, B: Tensor, chunks: int) -> tuple[int, ...]:
    batch, _, heads, headdim = x.shape
    return (batch, chunks, B.shape[2], heads * headdim)


@_ssd_scan.register_fake
def _(x, dt, A, B, C, initial_state, reverse, suffix, chunk_size, native, want_final, keep_states):
    work = work_dtype(x)
    chunks = len(chunk_bounds(x.shape[1], reverse, suffix, chunk_size))
    kept_chunks = chunks if keep_states and not is_stateless(chunks, initial_state, want_final) else 0
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(_final_shape(x, B, want_final), dtype=work),
        x.new_empty(_states_shape(x, B, kept_chunks), dtype=work),
    )


@torch.library.custom_op("patchscale::ssd_scan_backward", mutates_args=())
def _ssd_scan_backward(
    grad_y: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    y: Tensor,
    final_state: Tensor,
    states: Tensor,
    reverse: bool,
    suffix: int,
    chunk_size: int,
    native: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and initial_state, each in its tensor's dtype (empty for an absent one)."""
    work = work_dtype(x)
    _, _, heads, headdim = x.shape
    dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, B, C))
    plan = cut(x, x.shape[1], heads * headdim, reverse, suffix, chunk_size)
    with torch.autocast(x.device.type, enabled=False):
        ddt, dA, dinitial = (native_scan if native else chunked).backward(
            plan,
            x,
            dt.to(work),
            A.to(work),
            B,
            C,
            None if initial_state is None else initial_state.to(work),
            None if grad_final is None else grad_final.to(work).contiguous(),
            None if grad_final is None else final_state,
            y,
            None if is_stateless(plan.chunks, initial_state, final_state.ndim > 1) else states,
            grad_y,
            dx,
            dB,
            dC,
        )
    return (
        dx,
        ddt.to(dt.dtype),
        dA.to(A.dtype),
        dB,
        dC,
        dinitial if initial_state is None else dinitial.to(initial_state.dtype),
    )


@_ssd_scan_backward.register_fake
def _(grad_y, grad_final, x, dt, A, B, C, initial_state, y, final_state, states, reverse, suffix, chunk_size, native):
    dx, ddt, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C))
    state_dtype = work_dtype(x) if initial_state is None else initial_state.dtype
    dinitial = x.new_empty(chunked.gradient_shape(initial_state), dtype=state_dtype)
    return dx, ddt, A.new_empty(A.shape), dB, dC, dinitial


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.reverse, ctx.suffix, ctx.chunk_size, ctx.native, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_y, grad_final, grad_states):
    *tensors, y, final_state, states = ctx.saved_tensors
    grad_y = torch.zeros_like(y) if grad_y is None else grad_y
    grad_final = grad_final if final_state.ndim > 1 else None
    options = ctx.reverse, ctx.suffix, ctx.chunk_size, ctx.native
    grads = _ssd_scan_backward(grad_y, grad_final, *tensors, y, final_state, states, *options)
    return (
        *(None if tensor is None else grad for tensor, grad in zip(tensors, grads, strict=True)),
        *[None] * 6,
    )


_ssd_scan.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.patchscale.ssd_scan)
def _forward_flops(x_shape, dt_shape, A_shape, B_shape, *args, out_shape=None, **kwargs) -> int:
    _, initial, reverse, suffix, chunk_size, _, want_final, _ = args
    products, inside, states = chunked.matrix_flops(
        x_shape, B_shape[2], reverse, suffix, chunk_size, initial, want_final
    )
    return products + inside + 2 * states


@register_flop_formula(torch.ops.patchscale.ssd_scan_backward)
def _backward_flops(
    grad_y_shape, grad_final_shape, x_shape, dt_shape, A_shape, B_shape, *args, out_shape=None, **kwargs
) -> int:
    _, initial, _, final, _, reverse, suffix, chunk_size, _ = args
    sizes = x_shape, B_shape[2], reverse, suffix, chunk_size, initial, len(final) > 1
    products, inside, states = chunked.matrix_flops(*sizes)
    return 3 * products + 2 * inside + 4 * states
