"""The state-space-dual scan of Mamba-2 (arXiv 2405.21060), for one B and C shared by all heads."""

import torch
from torch import Tensor

from patchscale.errors import UserError
from patchscale.ops import chunked
from patchscale.ops.chunks import DEFAULT_CHUNK_SIZE
from patchscale.ops.dispatch import choose_implementation
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

    chosen = choose_implementation(implementation, x.device, x.dtype, headdim=headdim, d_state=d_state).implementation
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
        y, state, _ = chunked.ssd_scan(
            x, dt, A, B, C, initial_state, reverse, suffix, chunk_size, final_state, differentiated
        )
        if D is not None:
            y = torch.addcmul(y, x, D[:, None]).to(x.dtype)
    return y, state if final_state else None


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
