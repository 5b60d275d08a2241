"""The scan in chunks (arXiv 2405.21060, section 6), forward and backward, with B and C shared by all heads.

With cs the running sum of dt A within a chunk of Q tokens, and H the state (headdim, d_state) before it,

    y_t = sum_(s <= t) exp(cs_t - cs_s) (C_t . B_s) dt_s x_s  +  exp(cs_t) H C_t  +  D x_t
    H'  = exp(cs_Q) H + sum_s exp(cs_Q - cs_s) dt_s x_s (outer) B_s

Forward is two kernels. `_pass_states` carries the state of one head through all chunks in registers, in float32, and
leaves a copy before each chunk (in the precision of x: a matrix product would round it to that anyway).
`_chunk_output` takes a chunk: C B^T once, then head by head. Backward is two more: `_pass_states` again, from the last
chunk to the first, carries the gradient of the state; `_chunk_backward` takes a chunk with all that meets it.

Memory sees, in elements a token with d = heads * headdim and n = d_state: forward reads x and B and writes d n / Q of
states, then reads x, B, C and the states and writes y, 3 d + 2 d n / Q + 3 n in all. Backward reads dy and C and writes
d n / Q, then reads x, B, C, dy, two times d n / Q and the slopes, and writes dx, dB and dC: 5 d + 3 d n / Q + 7 n. The
states before chunks are kept for the backward: d n / Q, and working them out again would read x again as well.

Every exponential is of a difference masked to be at most zero: a decay can vanish, never overflow. The gradient of a
log-decay is summed over the pairs of tokens that it lies between, all of them small when the decay is strong, and never
taken as a difference of running sums.

Shapes in comments: Q = tokens in the chunk, P = headdim, N = d_state; t, s and u number tokens in scan order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from patchscale.errors import UserError
from patchscale.ops.triton.steps import steps, steps_backward
from patchscale.ops.triton.tokens import (
    check_dtype,
    dot,
    launch,
    place,
    power_of_two,
    precision,
    rows_in_memory,
)
from patchscale.ops.triton.tuning import Config, config, default_chunk_size, head_groups, headdim_block

LARGEST = 128  # of headdim and d_state: tiles beyond it do not fit the shared memory of a multiprocessor


@triton.jit
def _tile(pointer, chunk, q, columns, stride, body, REVERSE: tl.constexpr, Q: tl.constexpr):
    """Pointers to the tokens of a chunk, (Q, columns)."""
    if REVERSE:
        return pointer + place(chunk * Q + q, body, REVERSE)[:, None] * stride + columns[None, :]
    else:
        # The same, with one 64-bit offset for all: registers are short.
        return pointer + chunk * Q * stride + (q[:, None] * stride + columns[None, :])


@triton.jit
def _load_tile(pointer, chunk, q, columns, stride, valid, body, REVERSE: tl.constexpr, Q: tl.constexpr):
    """(Q, columns) of a chunk's tokens, zero where there is none."""
    return tl.load(_tile(pointer, chunk, q, columns, stride, body, REVERSE, Q), mask=valid[:, None], other=0.0)


@triton.jit(do_not_specialize=["chunks", "length", "body"])
def _pass_states(
    x, B, dt, cs, first, states, last,
    chunks, length, body, heads, x_batch, x_token, x_head, b_batch, b_token,
    REVERSE: tl.constexpr, GRADIENT: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A head's state through all chunks; with GRADIENT its gradient, backwards, with dy for x and C for B."""
    program = tl.program_id(0).to(tl.int64)
    sample, head = program // heads, program % heads
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q, n = tl.arange(0, Q), tl.arange(0, N)
    offsets = p[:, None] * N + n[None, :]
    x += sample * x_batch + head * x_head
    B += sample * b_batch
    dt += program * chunks * Q
    cs += program * chunks * Q
    low = states.dtype.element_ty
    state = tl.zeros((BLOCK, N), tl.float32)
    if FIRST:
        state += tl.load(first + program * P * N + offsets).to(tl.float32)
    for number in range(chunks):
        chunk = tl.cast(number, tl.int64)
        if GRADIENT:
            chunk = chunks - 1 - chunk
        tl.store(states + ((sample * chunks + chunk) * heads + head) * P * N + offsets, state.to(low))
        valid = chunk * Q + q < length
        decay = tl.load(cs + chunk * Q + q)
        total = tl.load(cs + chunk * Q + Q - 1)
        weight = decay
        if not GRADIENT:
            weight = tl.minimum(total - decay, 0.0)
        weight = tl.exp(weight)
        if not GRADIENT:
            weight *= tl.load(dt + chunk * Q + q)
        written = _load_tile(x, chunk, q, p, x_token, valid, body, REVERSE, Q).to(tl.float32) * weight[:, None]
        B_tile = _load_tile(B, chunk, q, n, b_token, valid, body, REVERSE, Q)
        state = dot(tl.trans(written.to(low)), B_tile, state * tl.exp(total), PRECISION)
    if LAST:
        tl.store(last + program * P * N + offsets, state)


@triton.jit(do_not_specialize=["chunks", "length", "body", "heads_each"])
def _chunk_output(
    x, B, C, dt, cs, D, states, y,
    chunks, length, body, heads, heads_each, x_batch, x_token, x_head, b_batch, b_token, y_batch, y_token, y_head,
    REVERSE: tl.constexpr, SKIP: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample, chunk = program // chunks, program % chunks
    q, p, n = tl.arange(0, Q), tl.arange(0, P), tl.arange(0, N)
    valid = chunk * Q + q < length
    low = x.dtype.element_ty
    C_tile = _load_tile(C + sample * b_batch, chunk, q, n, b_token, valid, body, REVERSE, Q)
    B_tile = _load_tile(B + sample * b_batch, chunk, q, n, b_token, valid, body, REVERSE, Q)
    products = dot(C_tile, tl.trans(B_tile), tl.zeros((Q, Q), tl.float32), PRECISION)  # (t, s)
    seen = q[:, None] >= q[None, :]
    first_head = tl.program_id(1).to(tl.int64) * heads_each
    for head in range(first_head, tl.minimum(first_head + heads_each, heads)):
        at = ((sample * heads + head) * chunks + chunk) * Q
        decay, step = tl.load(cs + at + q), tl.load(dt + at + q)
        x_tile = _load_tile(x + sample * x_batch + head * x_head, chunk, q, p, x_token, valid, body, REVERSE, Q)
        state = tl.load(states + (program * heads + head) * P * N + (p[:, None] * N + n[None, :]))
        total = dot(C_tile, tl.trans(state), tl.zeros((Q, P), tl.float32), PRECISION) * tl.exp(decay)[:, None]
        between = tl.where(seen, tl.minimum(decay[:, None] - decay[None, :], 0.0), float("-inf"))
        scores = products * tl.exp(between) * step[None, :]
        total = dot(scores.to(low), x_tile, total, PRECISION)
        if SKIP:
            total += tl.load(D + head).to(tl.float32) * x_tile.to(tl.float32)
        to = _tile(y + sample * y_batch + head * y_head, chunk, q, p, y_token, body, REVERSE, Q)
        tl.store(to, total, mask=valid[:, None])


@triton.jit(do_not_specialize=["chunks", "length", "body", "heads_each"])
def _chunk_backward(
    x, B, C, dy, dt, cs, A, D, states, dstates, x_slope, B_slope, C_slope, dx, dB, dC, ddt, sums,
    chunks, length, body, heads, heads_each,
    x_batch, x_token, x_head, b_batch, b_token, dy_batch, dy_token, dy_head,
    dx_batch, dx_token, dx_head, db_group, db_batch, db_token,
    REVERSE: tl.constexpr, SLOPE: tl.constexpr, SKIP: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's x, B, C and dt, and its share of those of A and D.

    With SLOPE, dx, dB and dC are multiplied by the slopes, laid out as x, B and C.
    """
    program = tl.program_id(0).to(tl.int64)
    sample, chunk = program // chunks, program % chunks
    q, p, n = tl.arange(0, Q), tl.arange(0, P), tl.arange(0, N)
    valid = chunk * Q + q < length
    low = x.dtype.element_ty
    B_tile = _load_tile(B + sample * b_batch, chunk, q, n, b_token, valid, body, REVERSE, Q)
    C_tile = _load_tile(C + sample * b_batch, chunk, q, n, b_token, valid, body, REVERSE, Q)
    seen = q[:, None] >= q[None, :]
    before = (q[:, None] < q[None, :]).to(tl.float32).to(low)  # (s, u)
    dB_tile = tl.zeros((Q, N), tl.float32)
    dC_tile = tl.zeros((Q, N), tl.float32)
    first_head = tl.program_id(1).to(tl.int64) * heads_each
    for head in range(first_head, tl.minimum(first_head + heads_each, heads)):
        where = (program * heads + head) * P * N
        state = tl.load(states + where + (p[:, None] * N + n[None, :]))  # before the chunk
        dstate = tl.load(dstates + where + (p[:, None] * N + n[None, :]))  # of the state after it
        at = ((sample * heads + head) * chunks + chunk) * Q
        decay, step = tl.load(cs + at + q), tl.load(dt + at + q)
        total = tl.load(cs + at + Q - 1)
        from_start, to_end = tl.exp(decay), tl.exp(tl.minimum(total - decay, 0.0))
        of_total = tl.sum(state.to(tl.float32) * dstate.to(tl.float32)) * tl.exp(total)
        dy_tile = _load_tile(dy + sample * dy_batch + head * dy_head, chunk, q, p, dy_token, valid, body, REVERSE, Q)
        x_tile = _load_tile(x + sample * x_batch + head * x_head, chunk, q, p, x_token, valid, body, REVERSE, Q)

        # Inside the chunk: y_t = sum_s scores_ts dt_s x_s.
        between = tl.exp(tl.where(seen, tl.minimum(decay[:, None] - decay[None, :], 0.0), float("-inf")))
        # C B^T for every head anew: kept for all of them it would fill a quarter of the registers.
        scores = between * dot(C_tile, tl.trans(B_tile), tl.zeros((Q, Q), tl.float32), PRECISION)
        dscores = dot(dy_tile, tl.trans(x_tile), tl.zeros((Q, Q), tl.float32), PRECISION) * step[None, :]
        pairs = (dscores * scores).to(low)  # the gradient of every cs_t - cs_s
        dproducts = (dscores * between).to(low)
        dC_tile = dot(dproducts, B_tile, dC_tile, PRECISION)
        dB_tile = dot(tl.trans(dproducts), C_tile, dB_tile, PRECISION)

        # Out of the state before: y_t += exp(cs_t) H C_t.
        dy_wide = dy_tile.to(tl.float32) * from_start[:, None]
        dC_tile = dot(dy_wide.to(low), state, dC_tile, PRECISION)
        read = dot(C_tile, tl.trans(state), tl.zeros((Q, P), tl.float32), PRECISION)
        of_read = tl.sum(read * dy_wide, 1)

        # Into the state after: sum_s exp(cs_Q - cs_s) dt_s x_s (outer) B_s.
        x_wide = x_tile.to(tl.float32)
        dB_tile = dot((x_wide * (to_end * step)[:, None]).to(low), dstate, dB_tile, PRECISION)
        dwritten = dot(B_tile, tl.trans(dstate), tl.zeros((Q, P), tl.float32), PRECISION) * to_end[:, None]
        of_written = tl.sum(dwritten * x_wide, 1) * step

        dwritten = dot(tl.trans(scores.to(low)), dy_tile, dwritten, PRECISION)  # the gradient of dt_s x_s
        of_step = tl.sum(dwritten * x_wide, 1)

        # The log-decay of u lies between all s before u and t not before u, between the state before and such t,
        # between such s and the state after, and between the two states.
        between_pairs = dot(pairs, before, tl.zeros((Q, Q), tl.float32), PRECISION)  # (t, u): summed over s before u
        dlog_decay = of_total + tl.sum(tl.where(seen, between_pairs + of_read[:, None], of_written[:, None]), 0)

        tl.store(ddt + at + q, of_step + dlog_decay * tl.load(A + head))
        share = sums + (program * heads + head) * 2
        tl.store(share, tl.sum(dlog_decay * step))
        dx_tile = dwritten * step[:, None]
        if SKIP:
            dy_wide = dy_tile.to(tl.float32)
            dx_tile += tl.load(D + head).to(tl.float32) * dy_wide
            tl.store(share + 1, tl.sum(dy_wide * x_wide))
        if SLOPE:
            dx_tile *= _load_tile(
                x_slope + sample * x_batch + head * x_head, chunk, q, p, x_token, valid, body, REVERSE, Q
            ).to(tl.float32)
        to = _tile(dx + sample * dx_batch + head * dx_head, chunk, q, p, dx_token, body, REVERSE, Q)
        tl.store(to, dx_tile, mask=valid[:, None])
    if SLOPE:
        slope = _load_tile(B_slope + sample * b_batch, chunk, q, n, b_token, valid, body, REVERSE, Q)
        dB_tile *= slope.to(tl.float32)
        slope = _load_tile(C_slope + sample * b_batch, chunk, q, n, b_token, valid, body, REVERSE, Q)
        dC_tile *= slope.to(tl.float32)
    to = tl.program_id(1).to(tl.int64) * db_group + sample * db_batch
    tl.store(_tile(dB + to, chunk, q, n, db_token, body, REVERSE, Q), dB_tile, mask=valid[:, None])
    tl.store(_tile(dC + to, chunk, q, n, db_token, body, REVERSE, Q), dC_tile, mask=valid[:, None])


def check_sizes(headdim: int, d_state: int) -> None:
    for name, size in (("headdim", headdim), ("d_state", d_state)):
        if not 16 <= size <= LARGEST or size & (size - 1):
            raise UserError(
                f"{name} is {size}, the Triton kernels take powers of two from 16 to {LARGEST}; "
                "choose one of these, or implementation='torch'"
            )


def chunk_size(x: Tensor, headdim: int, d_state: int) -> int:
    """Tokens in a chunk for the tokens of x, (batch, length, ...)."""
    size = default_chunk_size(x.dtype, headdim, d_state, x.device)
    return size if x.shape[1] >= size else max(16, power_of_two(x.shape[1]))


def number_of_chunks(length: int, chunk_size: int) -> int:
    return -(-length // chunk_size)


class Tokens:
    """The tokens of a scan: x (batch, length, heads, headdim), B and C (batch, length, d_state), dense at the end."""

    def __init__(
        self, x: Tensor, B: Tensor, C: Tensor, dt: Tensor, cs: Tensor, chunk_size: int, reverse: bool, suffix: int
    ) -> None:
        """dt, cs: see `steps.py`. With ``reverse`` the tensors are not in scan order."""
        self.batch, self.length, self.heads, self.headdim = x.shape
        self.d_state, self.chunk_size = B.shape[2], chunk_size
        self.chunks = number_of_chunks(self.length, chunk_size)
        if B.stride() != C.stride():
            B, C = B.contiguous(), C.contiguous()
        self.x, self.B, self.C, self.dt, self.cs, self.reverse = x, B, C, dt, cs, reverse
        self.body = self.length - suffix if reverse else self.length
        self.config: Config = config(x.dtype, self.headdim, self.d_state, x.device)
        self.groups = head_groups(self.batch * self.chunks, self.heads)
        self.sizes = {"Q": chunk_size, "P": self.headdim, "N": self.d_state, "PRECISION": precision()}

    def pass_states(
        self, values: Tensor, rows: Tensor, first: Tensor | None, last: Tensor | None, gradient: bool
    ) -> Tensor:
        """The states before each chunk, (batch, chunks, heads, headdim, d_state); writes the one after all to ``last``.

        From x and B; with ``gradient`` from dy and C, the gradients of the states after each chunk, and of the first.
        """
        states = torch.empty(
            self.batch, self.chunks, self.heads, self.headdim, self.d_state, dtype=values.dtype, device=values.device
        )
        programs = self.batch * self.heads
        block = headdim_block(self.config, programs, self.headdim)
        launch(
            _pass_states, (programs, self.headdim // block),
            values, rows, self.dt, self.cs, values if first is None else first.contiguous(), states,
            values if last is None else last,
            self.chunks, self.length, self.body, self.heads, *values.stride()[:3], *rows.stride()[:2],
            REVERSE=self.reverse, GRADIENT=gradient, FIRST=first is not None, LAST=last is not None,
            BLOCK=block, **self.sizes, warps=self.config.pass_warps, stages=self.config.pass_stages,
        )  # fmt: skip
        return states

    def output(self, states: Tensor, D: Tensor | None, y: Tensor) -> None:
        """Write y, shaped and ordered as x."""
        launch(
            _chunk_output, (self.batch * self.chunks, self.groups),
            self.x, self.B, self.C, self.dt, self.cs, self.dt if D is None else D.contiguous(), states, y,
            self.chunks, self.length, self.body, self.heads, -(-self.heads // self.groups),
            *self.x.stride()[:3], *self.B.stride()[:2], *y.stride()[:3],
            REVERSE=self.reverse, SKIP=D is not None,
            **self.sizes, warps=self.config.output_warps, stages=self.config.output_stages,
        )  # fmt: skip

    def backward(
        self, dy: Tensor, A: Tensor, D: Tensor | None, states: Tensor, dstates: Tensor,
        dx: Tensor, dB: Tensor, dC: Tensor,
        slopes: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Write dx, dB and dC, ordered as x; return the gradients of dt, laid out as it is, and of A and D.

        The latter are (heads, 2), float32; without D its column means nothing. dB and dC have equal strides.
        The slopes, laid out as x, B and C, are factors of dx, dB and dC.
        """
        many = self.groups > 1
        if many:  # a partial sum of each group of heads
            partial = torch.empty(2, self.groups, *dB.shape, dtype=torch.float32, device=dB.device)
            to_B, to_C = partial
        else:
            to_B, to_C = dB[None], dC[None]
        ddt = torch.empty_like(self.dt)
        sums = torch.empty(self.batch * self.chunks, self.heads, 2, dtype=torch.float32, device=dy.device)
        launch(
            _chunk_backward, (self.batch * self.chunks, self.groups),
            self.x, self.B, self.C, dy, self.dt, self.cs, A, A if D is None else D.contiguous(), states, dstates,
            *(slopes or (self.x, self.B, self.C)), dx, to_B, to_C, ddt, sums,
            self.chunks, self.length, self.body, self.heads, -(-self.heads // self.groups),
            *self.x.stride()[:3], *self.B.stride()[:2], *dy.stride()[:3], *dx.stride()[:3], *to_B.stride()[:3],
            REVERSE=self.reverse, SLOPE=slopes is not None, SKIP=D is not None,
            **self.sizes, warps=self.config.backward_warps, stages=self.config.backward_stages,
        )  # fmt: skip
        if many:
            dB.copy_(to_B.sum(0))
            dC.copy_(to_C.sum(0))
        return ddt, sums.sum(0)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    suffix: int,
    want_final: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments as :func:`patchscale.ops.ssd_scan`, already checked; the final state is empty if not wanted."""
    check_dtype(x)
    check_sizes(x.shape[3], B.shape[2])
    tensors = (x, dt, A, B.to(x.dtype), C.to(x.dtype), D, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    size = chunk_size(x, x.shape[3], B.shape[2])
    return _ssd_scan(*tensors, reverse, suffix, size, want_final, keep)[:2]


def kept_shapes(
    sizes: Sequence[int], chunk_size: int, want_final: bool, keep: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the final state and of the states before chunks; empty where not wanted.

    sizes: batch, length, heads, headdim and d_state.
    """
    batch, length, heads, headdim, d_state = sizes
    chunks = number_of_chunks(length, chunk_size)
    return (
        (batch, heads, headdim, d_state) if want_final else (0,),
        (batch, chunks, heads, headdim, d_state) if keep else (0,),
    )


@torch.library.custom_op("patchscale::ssd_scan_triton", mutates_args=())
def _ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    suffix: int,
    chunk_size: int,
    want_final: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and with ``keep`` the states before each chunk (else empty)."""
    tokens = _tokens(x, dt, A, B, C, chunk_size, reverse, suffix)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shape, _ = kept_shapes((*x.shape, B.shape[2]), chunk_size, want_final, keep)
    final = torch.empty(shape, dtype=torch.float32, device=x.device)
    states = tokens.pass_states(tokens.x, tokens.B, initial_state, final if want_final else None, False)
    tokens.output(states, D, y)
    return y, final, states if keep else x.new_empty(0)


def _tokens(x, dt, A, B, C, chunk_size: int, reverse: bool, suffix: int) -> Tokens:
    x, B, C, dt = (rows_in_memory(tensor) for tensor in (x, B, C, dt))
    return Tokens(
        x, B, C, *steps(dt, None, A.float().contiguous(), chunk_size, reverse, suffix), chunk_size, reverse, suffix
    )


@_ssd_scan.register_fake
def _(x, dt, A, B, C, D, initial_state, reverse, suffix, chunk_size, want_final, keep):
    final, states = kept_shapes((*x.shape, B.shape[2]), chunk_size, want_final, keep)
    return x.new_empty(x.shape), x.new_empty(final, dtype=torch.float32), x.new_empty(states)


@torch.library.custom_op("patchscale::ssd_scan_triton_backward", mutates_args=())
def _ssd_scan_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    reverse: bool,
    suffix: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D and initial_state, each in its dtype; empty for an absent one."""
    tokens = _tokens(x, dt, A, B, C, chunk_size, reverse, suffix)
    dy = rows_in_memory(dy)
    dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
    dinitial = None if initial_state is None else torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    dstates = tokens.pass_states(dy, tokens.C, dfinal, dinitial, True)
    dsteps, sums = tokens.backward(dy, A.float().contiguous(), D, states, dstates, dx, dB, dC)
    steps_backward(dsteps, dt, None, ddt, chunk_size, reverse, suffix)
    return (
        dx,
        ddt,
        sums[:, 0].to(A.dtype, copy=True),
        dB,
        dC,
        x.new_empty(0) if D is None else sums[:, 1].to(D.dtype, copy=True),
        x.new_empty(0) if dinitial is None else dinitial,
    )


@_ssd_scan_backward.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, initial_state, states, reverse, suffix, chunk_size):
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, dt, A, B, C, D, initial_state))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.reverse, ctx.suffix, ctx.chunk_size, ctx.want_final, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx, dy, dfinal, _):
    *tensors, states = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    dfinal = dfinal if ctx.want_final else None
    grads = _ssd_scan_backward(dy, dfinal, *tensors, states, ctx.reverse, ctx.suffix, ctx.chunk_size)
    return *(None if t is None else g for t, g in zip(tensors, grads, strict=True)), *[None] * 5


_ssd_scan.register_autograd(_backward, setup_context=_setup_context)


def forward_flops(sizes: Sequence[int], chunk_size: int) -> int:
    """Of the matrix products, on whole chunks: C B^T for a group of heads, scores times x, two with the states."""
    batch, length, heads, headdim, d_state = sizes
    chunks = batch * number_of_chunks(length, chunk_size)
    products = head_groups(chunks, heads) * chunk_size * d_state
    return 2 * chunks * chunk_size * (products + heads * (chunk_size * headdim + 2 * headdim * d_state))


def backward_flops(sizes: Sequence[int], chunk_size: int) -> int:
    """Of a head's products: C B^T and its two gradients, two with dy, one of pairs, five with the states."""
    batch, length, heads, headdim, d_state = sizes
    number = batch * number_of_chunks(length, chunk_size) * chunk_size
    inside = chunk_size * (3 * d_state + 2 * headdim + chunk_size)
    return 2 * number * heads * (inside + 5 * headdim * d_state)


@register_flop_formula(torch.ops.patchscale.ssd_scan_triton)
def _forward_flops(x, dt, A, B, *args, out_shape=None, **kwargs) -> int:
    return forward_flops((*x, B[2]), args[5])


@register_flop_formula(torch.ops.patchscale.ssd_scan_triton_backward)
def _backward_flops(dy, dfinal, x, dt, A, B, *args, out_shape=None, **kwargs) -> int:
    return backward_flops((*x, B[2]), args[-1])
