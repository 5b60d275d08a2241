"""The scan in chunks, plain PyTorch on any device, with its own backward.

Within a chunk of Q tokens the recurrence is a masked matrix product (the "dual" form); from chunk to chunk only the
state is passed on. With ``cs`` the running sum of ``dt A`` in scan order inside a chunk,

    y_t = sum_(s <= t) exp(cs_t - cs_s) (C_t . B_s) dt_s x_s  +  exp(cs_t) H C_t
    H'  = exp(cs_Q) H + sum_s exp(cs_Q - cs_s) dt_s x_s (outer) B_s

The decay of a pair is the product of a factor of each token, exp(cs_t - c) and exp(c - cs_s), so that all heads share
one matrix M = C B^T, masked, and a chunk is three matrix products, whatever the number of heads:

    Y  = exp(cs - c) * ([C | M] @ [G; X'])    with X' = exp(c - cs) dt x  and  G = exp(c) H
    G' = exp(cs_Q - c + c') (G + B^T X')      with c' of the next chunk

With c in the middle of the chunk's decays, the factors stay far from the ends of the number format as long as a head
decays by less than exp(120) in a chunk. Heads that decay more are left out, and computed pair by pair (`pairwise.py`).

Chunks are taken a few at a time, as many as fit the cache: only the passing on of states is one after the other. A
sequence of one chunk that no state enters or leaves has none: of the products only those with M are left.

Shapes in comments: b = samples in the group, k = chunks in the block, Q = tokens in the chunk, h = heads, p = headdim,
n = d_state. States are (b, n, h p) here, so that all heads are one matrix.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from patchscale.ops import pairwise
from patchscale.ops.chunks import Block, Plan, chunk_bounds, cut, is_stateless, work_dtype


class _Buffers:
    """What the matrix products of a block read and write: rows [G; X'], mixing [C | M], and the same for gradients.

    Where there are no states, ``n`` is 0: rows X' and mixing M.
    """

    def __init__(
        self, batch: int, chunks: int, size: int, d_state: int, width: int, like: Tensor, stateless: bool
    ) -> None:
        self.n = n = 0 if stateless else d_state
        self.rows = like.new_empty(batch, chunks, n + size, width)
        self.mixing = like.new_empty(batch, chunks, size, n + size)
        self.B = like.new_empty(batch, chunks, size, d_state)
        self.C = torch.empty_like(self.B) if stateless else self.mixing[:, :, :, :n]
        self.y = like.new_empty(batch * chunks, size, width)
        self.flat_rows, self.flat_mixing = self.rows.flatten(0, 1), self.mixing.flatten(0, 1)
        self.flat_B = self.B.flatten(0, 1)
        self.flat_C, self.flat_products = self.C.flatten(0, 1), self.flat_mixing[:, :, n:]
        self.states = self.rows[:, :, :n].unbind(1)
        self.written = self.rows[:, :, n:]
        self.written_by_chunk = self.written.unbind(1)
        self.B_by_chunk = self.B.transpose(2, 3).unbind(1)
        self.C_by_chunk = self.C.transpose(2, 3).unbind(1)

    def add_gradients(self) -> None:
        """[dG; dP] and [B | M^T], and room for a product over all heads and for one over tokens."""
        n, size = self.n, self.rows.shape[2]
        self.gram = self.rows.new_empty(self.flat_rows.shape[0], size, size)
        self.spare = torch.empty_like(self.y)
        self.spare_state = torch.empty_like(self.rows[:, 0, :n])
        self.grad_rows = torch.empty_like(self.rows)
        self.flat_grad_rows = self.grad_rows.flatten(0, 1)
        self.grad_states = self.grad_rows[:, :, :n].unbind(1)
        self.grad_read = self.grad_rows[:, :, n:]
        self.grad_read_by_chunk = self.grad_read.unbind(1)
        self.back_mixing = torch.empty_like(self.flat_mixing)


class _Strong:
    """Chunks computed pair by pair, and how their states are passed on; all but ``chunks`` by (b, k)."""

    def __init__(self, chunks: pairwise.Chunks, number: int, to_next: Tensor) -> None:
        self.chunks, self.number, self.to_next = chunks, number, to_next
        self.written = chunks.written().unflatten(0, (-1, number))
        self.whole = chunks.whole.unflatten(0, (-1, number))

    def by_token(self, values: Tensor) -> Tensor:
        """(b k, h, Q, ...) -> (b, k Q, h, ...)."""
        return values.transpose(1, 2).unflatten(0, (-1, self.number)).flatten(1, 2)


class Scan:
    """The scan of a group of samples, block by block in scan order; then, for gradients, back again."""

    def __init__(self, dt: Tensor, A: Tensor, plan: Plan, headdim: int, d_state: int, stateless: bool = False) -> None:
        """dt: (b, length, h) and A: (h,), both in the working precision; stateless: see ``chunks.is_stateless``."""
        self.dt, self.A, self.plan, self.d_state, self.stateless = dt, A, plan, d_state, stateless
        self.heads = dt.shape[2], headdim
        # Sums of log-decays in float64: an error in them is a relative error of what they multiply. There are few.
        exact = torch.float32 if dt.device.type == "mps" else torch.float64
        log_decay = F.pad(dt.to(exact) * A.to(exact), (0, 0, 0, 1))
        cs = log_decay[:, plan.padded].cumsum(2)  # (b, chunks, Q, h)
        self.total = cs[:, :, -1]  # (b, chunks, h)
        self.cs = cs.flatten(1, 2)[:, plan.place]  # (b, length, h)

        strong = (self.total < -plan.factor_range[:, None]).any(0)  # (chunks, h)
        any_strong = bool(strong.any())
        middle = self.total / 2
        self.strong: list[Tensor | None] = [None] * len(plan.blocks)  # heads that are computed pair by pair
        if any_strong:
            for i, block in enumerate(plan.blocks):
                strong[block.numbers] = strong[block.numbers].any(0)
                found = strong[block.first].nonzero().squeeze(1)
                self.strong[i] = found if len(found) else None
            middle.masked_fill_(strong, 0.0)
        padded_middle = F.pad(middle, (0, 0, 0, 1))  # nothing is read after the last chunk
        following = list(plan.following)
        self.to_next = padded_middle[:, following].exp().to(dt.dtype)  # (b, chunks, h): from H to G of the next chunk
        self.to_first = padded_middle[:, plan.first].exp().to(dt.dtype)  # (b, h)
        passed_on = self.total - middle + padded_middle[:, following]
        # Below this, exp is no normal number: the rest is multiplied after it.
        floor = 0.9 * math.log(torch.finfo(dt.dtype).tiny)
        rest = passed_on - passed_on.clamp(min=floor)
        self.pass_on = passed_on.clamp_(min=floor).exp_().to(dt.dtype)  # (b, chunks, h)
        self.pass_on_rest = rest.exp_().to(dt.dtype) if bool(rest.any()) else None
        from_middle = self.cs - middle[:, plan.chunk_of]
        if any_strong:
            hidden = strong[plan.chunk_of]  # (length, h)
            from_middle.masked_fill_(hidden, 0.0)
        self.read = from_middle.exp().to(dt.dtype)[..., None]  # (b, length, h, 1): exp(cs - c)
        self.write = from_middle.neg_().exp_().to(dt.dtype)[..., None]  # exp(c - cs)
        if any_strong:
            self.read.masked_fill_(hidden[..., None], 0.0)
            self.write.masked_fill_(hidden[..., None], 0.0)
            self.pass_on.masked_fill_(strong, 0.0)
        self.write_dt = self.write * dt[..., None]
        # G before the next chunk
        self.state = dt.new_zeros(dt.shape[0], 0 if stateless else d_state, dt.shape[2] * headdim)
        self._buffers: dict[tuple[int, int], _Buffers] = {}

    def begin(self, initial_state: Tensor) -> None:
        """initial_state: (b, h, p, n); without this call, zero."""
        torch.mul(initial_state.permute(0, 3, 1, 2), self.to_first[:, None, :, None], out=self._by_head(self.state))

    def final_state(self) -> Tensor:
        """(b, h, p, n), after the last block."""
        return self._by_head(self.state).permute(0, 2, 3, 1)

    def forward(
        self, i: int, x: Tensor, B: Tensor, C: Tensor, y: Tensor, states: Tensor | None = None, pass_on: bool = True
    ) -> None:
        """Block i: write y, and the states that its chunks start from; with ``pass_on``, move the state on.

        x, y: (b, k Q, h, p); B, C: (b, k Q, n); all but y in the working precision. states: (b, k, n, h p).
        """
        block = self.plan.blocks[i]
        buffers = self._prepare(block, x, B, C)
        strong = self._strong_chunks(i, x, buffers)
        order = list(block.in_scan_order)
        if self.state.data_ptr() != buffers.states[order[0]].data_ptr():
            buffers.states[order[0]].copy_(self.state)
        for j, after in itertools.pairwise(order):
            self._pass_on(i, j, buffers, strong, buffers.states[after])
        if states is not None and not self.stateless:
            states.copy_(buffers.rows[:, :, : self.d_state])
        torch.bmm(buffers.flat_mixing, buffers.flat_rows, out=buffers.y)
        torch.mul(buffers.y.view(x.shape), self.read[:, block.tokens], out=y)
        if strong is not None:
            output = strong.chunks.output(self._strong_states(buffers.rows[:, :, : buffers.n], i))
            y[:, :, self.strong[i]] = strong.by_token(output).to(y.dtype)
        self.state = buffers.states[order[-1]]
        if pass_on:
            self._pass_on(i, order[-1], buffers, strong, self.state)

    def _prepare(self, block: Block, x: Tensor, B: Tensor, C: Tensor) -> "_Buffers":
        """Buffers with X', B, C and M of a block."""
        by_chunk = block.chunks, (block.stop - block.start) // block.chunks
        if by_chunk not in self._buffers:
            self._buffers[by_chunk] = _Buffers(
                self.dt.shape[0], *by_chunk, self.d_state, self.heads[0] * self.heads[1], self.dt, self.stateless
            )
        buffers = self._buffers[by_chunk]
        buffers.B.copy_(B.unflatten(1, by_chunk))
        buffers.C.copy_(C.unflatten(1, by_chunk))
        torch.bmm(buffers.flat_C, buffers.flat_B.transpose(1, 2), out=buffers.flat_products)
        buffers.flat_products.mul_(block.seen)
        write = self.write_dt[:, block.tokens].unflatten(1, by_chunk)
        torch.mul(x.unflatten(1, by_chunk), write, out=buffers.written.unflatten(3, self.heads))
        return buffers

    def _pass_on(self, i: int, j: int, buffers: "_Buffers", strong: "_Strong | None", target: Tensor) -> None:
        """G' after chunk j of block i, to ``target``, which may be where G is."""
        before, number = buffers.states[j], self.plan.blocks[i].first + j
        if strong is not None:
            after = strong.written[:, j].addcmul(strong.whole[:, j], self._strong_heads(before, i))
        torch.baddbmm(before, buffers.B_by_chunk[j], buffers.written_by_chunk[j], out=target)
        self._by_head(target).mul_(self.pass_on[:, number, None, :, None])
        if self.pass_on_rest is not None:
            self._by_head(target).mul_(self.pass_on_rest[:, number, None, :, None])
        if strong is not None:
            self._set_strong_heads(target, i, after.mul_(strong.to_next[:, j]))

    def _by_head(self, state: Tensor) -> Tensor:
        return state.unflatten(-1, self.heads)

    def _strong_chunks(self, i: int, x: Tensor, buffers: "_Buffers") -> "_Strong | None":
        """The chunks of block i, with the heads that decay too strongly for factors; None if none does."""
        block, heads = self.plan.blocks[i], self.strong[i]
        if heads is None:
            return None

        def by_head(values: Tensor) -> Tensor:
            """(b, k Q, h, ...) -> (b k, strong heads, Q, ...)."""
            return values.unflatten(1, (block.chunks, -1)).flatten(0, 1)[:, :, heads].transpose(1, 2)

        chunks = pairwise.Chunks(
            by_head(x),
            by_head(self.dt[:, block.tokens]),
            by_head(self.cs[:, block.tokens]),
            buffers.flat_B,
            buffers.flat_C,
            buffers.flat_products,
            block.seen,
        )
        return _Strong(chunks, block.chunks, self.to_next[:, block.numbers, heads, None, None])

    def _strong_heads(self, state: Tensor, i: int) -> Tensor:
        """(..., n, h p) -> (..., strong heads, p, n), a copy; the middle of their decays is 0, so that G is H."""
        return self._by_head(state)[..., self.strong[i], :].movedim(-3, -1)

    def _strong_states(self, states: Tensor, i: int) -> Tensor | None:
        """The same of all chunks, (b k, strong heads, p, n); None if there are no states."""
        return None if self.stateless else self._strong_heads(states, i).flatten(0, 1)

    def _set_strong_heads(self, state: Tensor, i: int, value: Tensor) -> None:
        self._by_head(state)[:, :, self.strong[i]] = value.permute(0, 3, 1, 2)

    def begin_backward(self, grad_final: Tensor | None) -> None:
        """grad_final: (b, h, p, n), or None if nothing depends on the final state."""
        self.grad_state = torch.zeros_like(self.state)
        if grad_final is not None:
            self._by_head(self.grad_state).copy_(grad_final.permute(0, 3, 1, 2))
        self.grad_dt = torch.empty_like(self.dt)
        self.grad_log_decay = torch.empty_like(self.dt)

    def backward(
        self,
        i: int,
        x: Tensor,
        B: Tensor,
        C: Tensor,
        y: Tensor | None,
        dy: Tensor,
        states: Tensor,
        next_state: Tensor | None,
        dx: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Block i, after those that follow it in the scan: write the gradient of x, return those of B and C.

        x, dx, dy and y (computed again if None): (b, k Q, h, p), dx of any precision. states: G before each chunk,
        (b, k, n, h p), and next_state before the next block, None if nothing depends on it.
        """
        block = self.plan.blocks[i]
        buffers = self._prepare(block, x, B, C)
        n = buffers.n
        by_chunk = block.chunks, (block.stop - block.start) // block.chunks
        if not hasattr(buffers, "grad_rows"):
            buffers.add_gradients()
        strong = self._strong_chunks(i, x, buffers)
        factor = self.read[:, block.tokens].unflatten(1, by_chunk)
        torch.mul(dy.unflatten(1, by_chunk), factor, out=buffers.grad_read.unflatten(3, self.heads))

        if strong is not None:
            strong_dy = dy[:, :, self.strong[i]].unflatten(1, by_chunk).flatten(0, 1).transpose(1, 2)
        dtotal = strong_dstates = None
        if not self.stateless:
            read = None if strong is None else strong.chunks.gradient_of_state_read(strong_dy)
            dtotal, strong_dstates = self._pass_back(i, buffers, states, next_state, strong, read)
            buffers.rows[:, :, :n] = states

        # dM = dP X'^T, dC = dP G^T + dM B and dB = X' dG^T + dM^T C, summed over heads by the product itself; all in
        # one, with dG G^T for nothing: libraries are slow at narrow products of this kind. What is masked
        # may be infinite.
        gram = torch.bmm(buffers.flat_grad_rows, buffers.flat_rows.transpose(1, 2), out=buffers.gram)
        dproducts = gram[:, n:, n:].masked_fill_(block.unseen, 0.0)
        if self.stateless:
            dC, dB = torch.bmm(dproducts, buffers.flat_B), torch.bmm(dproducts.transpose(1, 2), buffers.flat_C)
        else:
            dC = gram[:, n:, :n].baddbmm_(dproducts, buffers.flat_B)
            dB = torch.baddbmm(gram[:, :n, n:].transpose(1, 2), dproducts.transpose(1, 2), buffers.flat_C)

        # dX' = [B | M^T] [dG; dP]
        if not self.stateless:
            buffers.back_mixing[:, :, :n] = buffers.flat_B
        buffers.back_mixing[:, :, n:] = buffers.flat_products.transpose(1, 2)
        spare = buffers.spare.view(x.shape)
        if y is None:
            torch.bmm(buffers.flat_mixing, buffers.flat_rows, out=buffers.y)
            dcs = _sum_last(torch.mul(buffers.y, buffers.flat_grad_rows[:, n:], out=buffers.spare).view(x.shape))
        else:
            dcs = _sum_last(torch.mul(dy, y, out=spare))
        dwritten = torch.bmm(buffers.back_mixing, buffers.flat_grad_rows, out=buffers.y).view(x.shape)
        ddt = _sum_last(torch.mul(dwritten, x, out=spare)).mul_(self.write[:, block.tokens, :, 0])  # (b, k Q, h)
        dcs.sub_(ddt * self.dt[:, block.tokens])
        torch.mul(dwritten, self.write_dt[:, block.tokens], out=dx)
        # The log-decay of u is in every cs_t with t not before u.
        # These sums cancel to a large part, hence float64.
        dlog_decay = block.seen.t().to(self.cs.dtype) @ dcs.to(self.cs.dtype).unflatten(1, by_chunk)
        if dtotal is not None:
            dlog_decay.add_(dtotal[:, :, None])
        dlog_decay = dlog_decay.to(self.dt.dtype).flatten(1, 2)
        if strong is not None:
            heads = self.strong[i]
            dxdt, strong_dlog, strong_dB, strong_dC = strong.chunks.backward(
                strong_dy, self._strong_states(states, i), strong_dstates
            )
            dx[:, :, heads] = strong.by_token(dxdt * strong.chunks.dt[..., None]).to(dx.dtype)
            ddt[:, :, heads] = strong.by_token((dxdt * strong.chunks.x).sum(3))
            dlog_decay[:, :, heads] = strong.by_token(strong_dlog)
            dB += strong_dB
            dC += strong_dC
        self.grad_dt[:, block.tokens] = ddt
        self.grad_log_decay[:, block.tokens] = dlog_decay
        return tuple(d.unflatten(0, (-1, block.chunks)).flatten(1, 2) for d in (dB, dC))

    def _pass_back(
        self,
        i: int,
        buffers: _Buffers,
        states: Tensor,
        next_state: Tensor | None,
        strong: _Strong | None,
        read: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """From the last chunk of block i to the first: the gradients of the states, to ``buffers.grad_states``.

        For heads that decay strongly, read: what their chunks' outputs add to the gradient, (b k, h, p, n).

        Returns the share that the factor from one state to the next has in the gradients of all exponents of a chunk,
        (b, k, h), and the gradients of the states after the chunks for heads that decay strongly, (b k, h, p, n).
        """
        block = self.plan.blocks[i]
        dtotal = self.dt.new_zeros(self.dt.shape[0], block.chunks, self.heads[0])
        strong_dstates = None
        if read is not None:
            read = read.unflatten(0, (-1, block.chunks))
            strong_dstates = torch.empty_like(read)
        for j in reversed(block.in_scan_order):
            if strong_dstates is not None:
                torch.mul(self._strong_heads(self.grad_state, i), strong.to_next[:, j], out=strong_dstates[:, j])
            if next_state is not None:
                torch.mul(self.grad_state, next_state, out=buffers.spare_state)
                dtotal[:, j] = buffers.spare_state.sum(1).unflatten(1, self.heads).sum(2)
            pass_on = self.pass_on[:, block.first + j, None, :, None]
            torch.mul(self._by_head(self.grad_state), pass_on, out=self._by_head(buffers.grad_states[j]))
            if self.pass_on_rest is not None:
                self._by_head(buffers.grad_states[j]).mul_(self.pass_on_rest[:, block.first + j, None, :, None])
            torch.baddbmm(
                buffers.grad_states[j], buffers.C_by_chunk[j], buffers.grad_read_by_chunk[j], out=self.grad_state
            )
            if read is not None and strong_dstates is not None:
                dstate = read[:, j].addcmul(strong_dstates[:, j], strong.whole[:, j])
                self._set_strong_heads(self.grad_state, i, dstate)
            next_state = states[:, j]
        return dtotal, None if strong_dstates is None else strong_dstates.flatten(0, 1)

    def end_backward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of dt, (b, length, h), of A, (h,), and of the initial state, (b, h, p, n).

        The last is empty where there are no states.
        """
        dA = (self.grad_log_decay * self.dt).sum((0, 1))
        ddt = self.grad_dt.addcmul_(self.grad_log_decay, self.A)
        dinitial = self._by_head(self.grad_state) * self.to_first[:, None, :, None]
        return ddt, dA, dinitial.permute(0, 2, 3, 1)


def _sum_last(product: Tensor) -> Tensor:
    """Sum over the last dimension, as a matrix product: twice as fast as a sum on a CPU."""
    return torch.mv(product.reshape(-1, product.shape[-1]), product.new_ones(product.shape[-1])).view(
        product.shape[:-1]
    )


@torch.library.custom_op("patchscale::ssd_scan", mutates_args=())
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    suffix: int,
    chunk_size: int,
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
    the_plan, groups = cut(x, heads, headdim, reverse, suffix, chunk_size)
    stateless = is_stateless(the_plan.chunks, initial_state, want_final)
    final_state = torch.empty(final_shape(x, B, want_final), dtype=work, device=x.device)
    kept_chunks = the_plan.chunks if keep_states and not stateless else 0
    states = torch.empty(states_shape(x, B, kept_chunks), dtype=work, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for group in groups:
            scan = Scan(dt[group].to(work), A.to(work), the_plan, headdim, B.shape[2], stateless)
            if initial_state is not None:
                scan.begin(initial_state[group].to(work))
            for i, block in enumerate(the_plan.blocks):
                x_i, B_i, C_i = (t[group, block.tokens].to(work) for t in (x, B, C))
                kept = states[group, block.numbers] if kept_chunks else None
                pass_on = want_final or i + 1 < len(the_plan.blocks)
                scan.forward(i, x_i, B_i, C_i, y[group, block.tokens], kept, pass_on)
            if want_final:
                final_state[group] = scan.final_state()
    return y, final_state, states


def final_shape(x: Tensor, B: Tensor, want_final: bool) -> tuple[int, ...]:
    batch, _, heads, headdim = x.shape
    return (batch, heads, headdim, B.shape[2]) if want_final else (0,)


def gradient_shape(tensor: Tensor | None) -> tuple[int, ...]:
    return (0,) if tensor is None else tuple(tensor.shape)


def states_shape(x: Tensor, B: Tensor, chunks: int) -> tuple[int, ...]:
    batch, _, heads, headdim = x.shape
    return (batch, chunks, B.shape[2], heads * headdim)


@ssd_scan.register_fake
def _(x, dt, A, B, C, initial_state, reverse, suffix, chunk_size, want_final, keep_states):
    work = work_dtype(x)
    chunks = len(chunk_bounds(x.shape[1], reverse, suffix, chunk_size))
    kept_chunks = chunks if keep_states and not is_stateless(chunks, initial_state, want_final) else 0
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(final_shape(x, B, want_final), dtype=work),
        x.new_empty(states_shape(x, B, kept_chunks), dtype=work),
    )


@torch.library.custom_op("patchscale::ssd_scan_backward", mutates_args=())
def ssd_scan_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and initial_state, each in its tensor's dtype (empty for an absent one)."""
    work = work_dtype(x)
    _, _, heads, headdim = x.shape
    d_state = B.shape[2]
    dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
    dA = torch.zeros(heads, dtype=work, device=x.device)
    dinitial = torch.empty(gradient_shape(initial_state), dtype=work, device=x.device)
    the_plan, groups = cut(x, heads, headdim, reverse, suffix, chunk_size)
    stateless = is_stateless(the_plan.chunks, initial_state, final_state.ndim > 1)
    with torch.autocast(x.device.type, enabled=False):
        for group in groups:
            scan = Scan(dt[group].to(work), A.to(work), the_plan, headdim, d_state, stateless)
            scan.begin_backward(None if grad_final is None else grad_final[group].to(work))
            next_state = None if grad_final is None else final_state[group].permute(0, 3, 1, 2).flatten(2)
            for i in reversed(range(len(the_plan.blocks))):
                block = the_plan.blocks[i]
                x_i, B_i, C_i, dy_i = (t[group, block.tokens].to(work) for t in (x, B, C, grad_y))
                y_i = y[group, block.tokens] if y.dtype == work else None
                block_states = states[group, block.numbers]
                dB_dC = scan.backward(i, x_i, B_i, C_i, y_i, dy_i, block_states, next_state, dx[group, block.tokens])
                dB[group, block.tokens], dC[group, block.tokens] = dB_dC
                next_state = None if stateless else block_states[:, block.in_scan_order[0]]
            ddt[group], dA_group, dinitial_group = scan.end_backward()
            dA += dA_group
            if initial_state is not None:
                dinitial[group] = dinitial_group
    return (
        dx,
        ddt,
        dA.to(A.dtype),
        dB,
        dC,
        dinitial if initial_state is None else dinitial.to(initial_state.dtype),
    )


@ssd_scan_backward.register_fake
def _(grad_y, grad_final, x, dt, A, B, C, initial_state, y, final_state, states, reverse, suffix, chunk_size):
    dx, ddt, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C))
    state_dtype = work_dtype(x) if initial_state is None else initial_state.dtype
    dinitial = x.new_empty(gradient_shape(initial_state), dtype=state_dtype)
    return dx, ddt, A.new_empty(A.shape), dB, dC, dinitial


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.reverse, ctx.suffix, ctx.chunk_size, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_y, grad_final, grad_states):
    *tensors, y, final_state, states = ctx.saved_tensors
    grad_y = torch.zeros_like(y) if grad_y is None else grad_y
    grad_final = grad_final if final_state.ndim > 1 else None
    options = ctx.reverse, ctx.suffix, ctx.chunk_size
    grads = ssd_scan_backward(grad_y, grad_final, *tensors, y, final_state, states, *options)
    return (
        *(None if tensor is None else grad for tensor, grad in zip(tensors, grads, strict=True)),
        *[None] * 5,
    )


ssd_scan.register_autograd(_backward, setup_context=_setup_context)


def matrix_flops(
    x_shape: Sequence[int], d_state: int, reverse: bool, suffix: int, chunk_size: int, initial: Any, want_final: bool
) -> tuple[int, int, int]:
    """FLOPs of the chunks' products: C B^T (all heads at once), scores times x, and a pass over the states.

    initial: None if there is no initial state.
    """
    batch, length, heads, headdim = x_shape
    bounds = chunk_bounds(length, reverse, suffix, chunk_size)
    pairs = batch * sum((stop - start) ** 2 for start, stop in bounds)
    states = 0 if is_stateless(len(bounds), initial, want_final) else 2 * batch * length * heads * headdim * d_state
    return 2 * pairs * d_state, 2 * pairs * heads * headdim, states


@register_flop_formula(torch.ops.patchscale.ssd_scan)
def _forward_flops(x_shape, dt_shape, A_shape, B_shape, *args, out_shape=None, **kwargs) -> int:
    _, initial, reverse, suffix, chunk_size, want_final, _ = args
    products, inside, states = matrix_flops(x_shape, B_shape[2], reverse, suffix, chunk_size, initial, want_final)
    return products + inside + 2 * states


@register_flop_formula(torch.ops.patchscale.ssd_scan_backward)
def _backward_flops(
    grad_y_shape, grad_final_shape, x_shape, dt_shape, A_shape, B_shape, *args, out_shape=None, **kwargs
) -> int:
    _, initial, _, final, _, reverse, suffix, chunk_size = args
    sizes = x_shape, B_shape[2], reverse, suffix, chunk_size, initial, len(final) > 1
    products, inside, states = matrix_flops(*sizes)
    return 3 * products + 2 * inside + 4 * states
