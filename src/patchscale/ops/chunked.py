"""The scan in chunks, plain PyTorch on any device, with its own backward.

Within a chunk of Q tokens the recurrence is a masked matrix product (the "dual" form); from chunk to chunk only the
state is passed on. With ``cs`` the running sum of ``dt A`` in scan order inside a chunk,

    y_t   = sum_(s <= t) exp(cs_t - cs_s) (C_t . B_s) dt_s x_s  +  exp(cs_t) H C_t  +  D x_t
    H'    = exp(cs_Q) H + sum_s exp(cs_Q - cs_s) dt_s x_s (outer) B_s

``C B^T`` is shared by all heads and computed once per chunk. The mask is applied before the exponential, so that no
decay, however strong, overflows. Chunks stream through buffers that fit the cache, a few samples at a time; the
backward recomputes them from the states at chunk boundaries, which it recomputes too, so that a forward pass keeps
nothing but its inputs.

Shapes in comments: b = samples in the group, Q = tokens in the chunk, h = heads, p = headdim, n = d_state.
"""

import itertools
import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from patchscale.ops.reference import scan_order

DEFAULT_CHUNK_SIZE = 64

# Elements of one (b, h, Q, Q) buffer: 512 KiB in float32, found best on two cores with 2 MiB of L2 each.
_BUFFER_ELEMENTS = 131072


class _Segment:
    """A chunk: a slice of tokens and the order in which the scan meets them."""

    def __init__(self, start: int, stop: int, reverse: bool, suffix: int, like: Tensor) -> None:
        self.start, self.stop = start, stop
        length = stop - start
        order = torch.tensor(scan_order(length, reverse, suffix), device=like.device)
        place = order.argsort()
        self.order: Tensor | None = order if reverse else None  # None: as they stand
        self.place: Tensor | None = place if reverse else None
        self.last = int(order[-1])
        self.seen = (place[:, None] >= place[None, :]).to(like.dtype)  # (t, s): s is not after t
        self.before = 1 - self.seen  # (s, u): s is before u

    def running_sum(self, values: Tensor) -> Tensor:
        """Inclusive sum over the last dimension, in scan order."""
        if self.order is None or self.place is None:
            return values.cumsum(-1)
        return values[..., self.order].cumsum(-1)[..., self.place]


def _segments(length: int, reverse: bool, suffix: int, chunk_size: int, like: Tensor) -> list[_Segment]:
    """The chunks in scan order, of nearly equal length; a sequence that nearly fits one chunk is one."""
    body, tail = _chunks(length, reverse, suffix, chunk_size)
    if not tail:
        return [_Segment(s, e, reverse, suffix if reverse else 0, like) for s, e in (body[::-1] if reverse else body)]
    # The suffix runs left to right whatever the direction.
    return [
        *(_Segment(s, e, True, 0, like) for s, e in reversed(body)),
        *(_Segment(s, e, False, 0, like) for s, e in tail),
    ]


def _chunks(
    length: int, reverse: bool, suffix: int, chunk_size: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(start, stop) of the chunks, and of those that hold nothing but a suffix that follows a reversed body."""
    suffix = suffix if reverse else 0
    if length <= chunk_size + suffix:
        return ([(0, length)] if length else []), []
    body = length - suffix
    count = max(1, round(body / chunk_size))
    bounds = itertools.pairwise(body * i // count for i in range(count + 1))
    return list(bounds), [(s, min(s + chunk_size, length)) for s in range(body, length, chunk_size)]


def _groups(batch: int, heads: int, chunk_size: int) -> list[slice]:
    size = max(1, _BUFFER_ELEMENTS // (heads * chunk_size * chunk_size))
    return [slice(s, min(s + size, batch)) for s in range(0, batch, size)]


class _Chunk:
    """What forward and backward both need of one chunk of one group of samples, heads before tokens."""

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, group: slice, segment: _Segment) -> None:
        work = A.dtype
        tokens = slice(segment.start, segment.stop)
        self.segment = segment
        self.x = x[group, tokens].transpose(1, 2).to(work)  # (b, h, Q, p)
        self.dt = dt[group, tokens].transpose(1, 2).to(work).contiguous()  # (b, h, Q)
        self.B = B[group, tokens].to(work)  # (b, Q, n)
        self.C = C[group, tokens].to(work)  # (b, Q, n)
        self.cs = segment.running_sum(self.dt * A[:, None])  # (b, h, Q)
        self.total = self.cs[..., segment.last, None]  # (b, h, 1)
        self.xdt = self.x * self.dt[..., None]  # (b, h, Q, p)

    def decay(self) -> Tensor:
        """exp(cs_t - cs_s) for s not after t in scan order, 1 for the other pairs: (b, h, t, s)."""
        difference = self.cs[..., :, None] - self.cs[..., None, :]
        return difference.clamp_(_log_floor(self.cs.dtype), 0.0).exp_()

    def products(self) -> Tensor:
        """C_t . B_s for s not after t in scan order, else 0, for all heads: (b, 1, t, s)."""
        return (self.C @ self.B.transpose(1, 2)).mul_(self.segment.seen)[:, None]

    def decayed_B(self) -> Tensor:
        """exp(cs_Q - cs_s) B_s, as the state at the end of the chunk sees it: (b, h, Q, n)."""
        return self.B[:, None] * _exp(self.total - self.cs)[..., None]

    def decayed_C(self) -> Tensor:
        """exp(cs_t) C_t, as it reads the state before the chunk: (b, h, Q, n)."""
        return self.C[:, None] * _exp(self.cs)[..., None]

    def next_state(self, state: Tensor | None) -> Tensor:
        """The state after this chunk, (b, h, p, n)."""
        written = self.xdt.transpose(2, 3) @ self.decayed_B()
        return written if state is None else written.addcmul_(state, _exp(self.total)[..., None])

    def output(self, state: Tensor | None) -> Tensor:
        """Without the skip: (b, h, Q, p)."""
        scores = self.decay().mul_(self.products())
        y = scores @ self.xdt
        return y if state is None else _add_matmul(y, self.decayed_C(), state.transpose(2, 3))


def _add_matmul(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out += left @ right, in place, over the two batch dimensions (b, h)."""
    out.flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1))
    return out


def _log_floor(dtype: torch.dtype) -> float:
    """Decays below this, 1e-34 in float32, are held there: subnormal numbers are nothing but slow."""
    return 0.9 * math.log(torch.finfo(dtype).tiny)


def _exp(log_decay: Tensor) -> Tensor:
    return log_decay.clamp(min=_log_floor(log_decay.dtype)).exp_()


@torch.library.custom_op("patchscale::ssd_scan", mutates_args=())
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
    chunk_size: int,
    want_final: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments and result as :func:`patchscale.ops.ssd_scan`, already checked; no final state is an empty tensor."""
    batch, length, heads, _ = x.shape
    work = torch.promote_types(x.dtype, torch.float32)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final_state = torch.empty(_final_shape(x, B, want_final), dtype=work, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        A, D = A.to(work), D if D is None else D.to(work)
        segments = _segments(length, reverse, suffix, chunk_size, A)
        for group in _groups(batch, heads, min(chunk_size, max(1, length))):
            state: Tensor | None = None if initial_state is None else initial_state[group].to(work)
            for segment in segments:
                chunk = _Chunk(x, dt, A, B, C, group, segment)
                out = y[group, segment.start : segment.stop].transpose(1, 2)
                out.copy_(chunk.output(state)) if D is None else torch.addcmul(
                    chunk.output(state), chunk.x, D[:, None, None], out=out
                )
                if want_final or segment is not segments[-1]:
                    state = chunk.next_state(state)
            if want_final:
                final_state[group] = torch.zeros(()) if state is None else state
    return y, final_state


def _final_shape(x: Tensor, B: Tensor, want_final: bool) -> tuple[int, ...]:
    batch, _, heads, headdim = x.shape
    return (batch, heads, headdim, B.shape[2]) if want_final else (0,)


@ssd_scan.register_fake
def _(x, dt, A, B, C, D, initial_state, reverse, suffix, chunk_size, want_final):
    state = x.new_empty(_final_shape(x, B, want_final), dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x, memory_format=torch.contiguous_format), state


@torch.library.custom_op("patchscale::ssd_scan_backward", mutates_args=())
def ssd_scan_backward(
    grad_y: Tensor,
    grad_final: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D and initial_state, each in its tensor's dtype (zeros for an absent one)."""
    work = torch.promote_types(x.dtype, torch.float32)
    batch, length, heads, headdim = x.shape
    dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
    dA = torch.zeros(heads, dtype=work, device=x.device)
    dD = torch.zeros(heads, dtype=work, device=x.device)
    dinitial = torch.zeros(batch, heads, headdim, B.shape[2], dtype=work, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        work_A, work_D = A.to(work), D if D is None else D.to(work)
        segments = _segments(length, reverse, suffix, chunk_size, work_A)
        for group in _groups(batch, heads, min(chunk_size, max(1, length))):
            state = None if initial_state is None else initial_state[group].to(work)
            states = []
            for segment in segments:
                states.append(state)
                if segment is not segments[-1]:
                    state = _Chunk(x, dt, work_A, B, C, group, segment).next_state(state)
            dstate = grad_final[group].to(work) if want_final else None
            for segment in reversed(segments):
                tokens = slice(segment.start, segment.stop)
                chunk = _Chunk(x, dt, work_A, B, C, group, segment)
                dy = grad_y[group, tokens].transpose(1, 2).to(work)
                dxdt, dlog_decay, dB_c, dC_c, dstate = _chunk_backward(chunk, states.pop(), dy, dstate)
                dx_c = dxdt * chunk.dt[..., None]
                if work_D is not None:
                    dD += (dy * chunk.x).sum((0, 2, 3))
                    dx_c.addcmul_(dy, work_D[:, None, None])
                ddt_c = dxdt.mul_(chunk.x).sum(3).addcmul_(dlog_decay, work_A[:, None])
                dA += (dlog_decay * chunk.dt).sum((0, 2))
                dx[group, tokens] = dx_c.transpose(1, 2)
                ddt[group, tokens] = ddt_c.transpose(1, 2)
                dB[group, tokens], dC[group, tokens] = dB_c, dC_c
            if dstate is not None:
                dinitial[group] = dstate
    return (
        dx,
        ddt,
        dA.to(A.dtype),
        dB,
        dC,
        dD if D is None else dD.to(D.dtype),
        dinitial if initial_state is None else dinitial.to(initial_state.dtype),
    )


def _chunk_backward(
    chunk: _Chunk, state: Tensor | None, dy: Tensor, dstate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of one chunk from those of its output and of the state after it (None: nothing depends on it).

    Returns those of dt x, dt A, B, C, and of the state before the chunk. The gradient of an exponent is that of the
    exponential times the exponential, so each of the four decays gives its share to ``dlog_decay`` in passing.
    """
    decay, products = chunk.decay(), chunk.products()

    # Inside the chunk: y_t = sum_s scores_ts xdt_s, with scores = decay * products.
    dxdt = (decay * products).transpose(2, 3) @ dy
    dscores = dy @ chunk.xdt.transpose(2, 3)  # (b, h, t, s)
    dproducts = dscores.mul_(decay)
    dproducts_all_heads = dproducts.sum(1).mul_(chunk.segment.seen)  # (b, t, s)
    dB = dproducts_all_heads.transpose(1, 2) @ chunk.C
    dC = dproducts_all_heads @ chunk.B
    # The log-decay of u is in the difference of every pair s before u, t not before u. Summed pair by pair, nothing
    # cancels (as it would in the gradients of cs_t and cs_s): with strong decay only small numbers are left.
    ddifference = dproducts.mul_(products)
    dlog_decay = (ddifference @ chunk.segment.before).mul_(chunk.segment.seen).sum(2)  # (b, h, Q)

    # Out of the state before: y_t += H decayed_C_t.
    decayed_C = chunk.decayed_C()
    dstate_before = dy.transpose(2, 3) @ decayed_C  # (b, h, p, n)
    if state is not None:
        ddecayed_C = dy @ state  # (b, h, Q, n)
        dC += (ddecayed_C * _exp(chunk.cs)[..., None]).sum(1)
        dlog_decay += ddecayed_C.mul_(decayed_C).sum(3) @ chunk.segment.seen

    # Into the next state: H' = exp(cs_Q) H + sum_s xdt_s (outer) decayed_B_s.
    if dstate is not None:
        decayed_B = chunk.decayed_B()
        _add_matmul(dxdt, decayed_B, dstate.transpose(2, 3))
        ddecayed_B = chunk.xdt @ dstate  # (b, h, Q, n)
        dB += (ddecayed_B * _exp(chunk.total - chunk.cs)[..., None]).sum(1)
        dlog_decay += ddecayed_B.mul_(decayed_B).sum(3) @ chunk.segment.before
        dcarried = dstate * _exp(chunk.total)[..., None]
        if state is not None:
            dlog_decay += (dcarried * state).sum((2, 3))[..., None]
        dstate_before += dcarried

    return dxdt, dlog_decay, dB, dC, dstate_before


@ssd_scan_backward.register_fake
def _(grad_y, grad_final, x, dt, A, B, C, D, initial_state, reverse, suffix, chunk_size, want_final):
    work = torch.promote_types(x.dtype, torch.float32)
    batch, _, heads, headdim = x.shape
    dx, ddt, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C))
    dD = x.new_empty(heads, dtype=work if D is None else D.dtype)
    state_dtype = work if initial_state is None else initial_state.dtype
    dinitial = x.new_empty(batch, heads, headdim, B.shape[2], dtype=state_dtype)
    return dx, ddt, A.new_empty(A.shape), dB, dC, dD, dinitial


def _setup_context(ctx, inputs, output) -> None:
    x, dt, A, B, C, D, initial_state, *ctx.options = inputs
    ctx.save_for_backward(x, dt, A, B, C, D, initial_state)


def _backward(ctx, grad_y, grad_final):
    saved = ctx.saved_tensors
    grads = ssd_scan_backward(grad_y, grad_final, *saved, *ctx.options)
    return (
        *(None if tensor is None else grad for tensor, grad in zip(saved, grads, strict=True)),
        None,
        None,
        None,
        None,
    )


ssd_scan.register_autograd(_backward, setup_context=_setup_context)


def _matrix_flops(x_shape, d_state: int, reverse: bool, suffix: int, chunk_size: int) -> tuple[int, int, int]:
    """FLOPs of the chunks' products: C B^T (all heads at once), scores times x, and a pass over the states."""
    batch, length, heads, headdim = x_shape
    body, tail = _chunks(length, reverse, suffix, chunk_size)
    pairs = batch * sum((stop - start) ** 2 for start, stop in body + tail)
    return 2 * pairs * d_state, 2 * pairs * heads * headdim, 2 * batch * length * heads * headdim * d_state


@register_flop_formula(torch.ops.patchscale.ssd_scan)
def _forward_flops(x_shape, dt_shape, A_shape, B_shape, *args, out_shape=None, **kwargs) -> int:
    *_, reverse, suffix, chunk_size, _ = args
    products, inside, states = _matrix_flops(x_shape, B_shape[2], reverse, suffix, chunk_size)
    return products + inside + 2 * states


@register_flop_formula(torch.ops.patchscale.ssd_scan_backward)
def _backward_flops(
    grad_y_shape, grad_final_shape, x_shape, dt_shape, A_shape, B_shape, *args, out_shape=None, **kwargs
) -> int:
    # The gradient of the decays sums over pairs by a product with zeros and ones; sums are not counted.
    *_, reverse, suffix, chunk_size, _ = args
    products, inside, states = _matrix_flops(x_shape, B_shape[2], reverse, suffix, chunk_size)
    return 3 * products + 2 * inside + 5 * states
