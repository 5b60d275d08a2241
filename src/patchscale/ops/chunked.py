"""The scan in chunks, plain PyTorch on any device, forward and backward.

Within a chunk of Q tokens the recurrence is a masked matrix product (the "dual" form); from chunk to chunk only the
state is passed on. With ``cs`` the running sum of ``dt A`` in scan order inside a chunk,

    y_t = sum_(s <= t) exp(cs_t - cs_s) (C_t . B_s) dt_s x_s  +  exp(cs_t) H C_t
    H'  = exp(cs_Q) H + sum_s exp(cs_Q - cs_s) dt_s x_s (outer) B_s

The decay of a pair is the product of a factor of each token, exp(cs_t - c) and exp(c - cs_s), so that all heads share
one matrix M = C B^T, masked, and a chunk is three matrix products, whatever the number of heads:

    Y  = exp(cs - c) * ([C | M] @ [G; X'])    with X' = exp(c - cs) dt x  and  G = exp(c) H
    S  = G + B^T X'                           so that H' = exp(cs_Q - c) S
    G' = exp(cs_Q - c + c') S                 with c' of the next chunk

With c in the middle of the chunk's decays, the factors stay far from the ends of the number format as long as a head
decays by less than exp(120) in a chunk. Heads that decay more are left out, and computed pair by pair (`pairwise.py`).

Chunks are taken a few at a time, as many as fit the cache: only the passing on of states is one after the other. The
views of a block's memory are made once: a view costs as much as a small sum. A sequence of one chunk that no state
enters or leaves has none: of the products only those with M are left.

Shapes in comments: b = samples in the group, k = chunks in the block, Q = tokens in the chunk, h = heads, p = headdim,
n = d_state. States are (b, n, h p) here, so that all heads are one matrix.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchscale.ops import pairwise
from patchscale.ops.chunks import Block, Plan, chunk_bounds, is_stateless, take
from patchscale.ops.decays import Decays


class _Buffers:
    """What the matrix products of a block read and write: rows [G; X'], mixing [C | M], and the same for gradients.

    Where there are no states, ``n`` is 0: rows X' and mixing M.
    """

    def __init__(
        self, batch: int, chunks: int, size: int, d_state: int, heads: tuple[int, int], like: Tensor, stateless: bool
    ) -> None:
        self.by_chunk, self.heads = (chunks, size), heads
        width = heads[0] * heads[1]
        self.n = n = 0 if stateless else d_state
        self.rows = like.new_empty(batch, chunks, n + size, width)
        self.mixing = like.new_empty(batch, chunks, size, n + size)
        self.B = like.new_empty(batch, chunks, size, d_state)
        self.C = torch.empty_like(self.B) if stateless else self.mixing[:, :, :, :n]
        self.y = like.new_empty(batch * chunks, size, width)
        self.y_by_token = self.y.view(batch, chunks * size, *heads)
        self.flat_rows, self.flat_mixing = self.rows.flatten(0, 1), self.mixing.flatten(0, 1)
        self.flat_B, self.flat_C = self.B.flatten(0, 1), self.C.flatten(0, 1)
        self.B_by_token, self.C_by_token = self.B.flatten(1, 2), self.C.flatten(1, 2)
        self.flat_B_turned, self.flat_products = self.flat_B.transpose(1, 2), self.flat_mixing[:, :, n:]
        self.all_states = self.rows[:, :, :n]
        self.states = self.all_states.unbind(1)
        self.written = self.rows[:, :, n:].unflatten(3, heads)
        self.written_by_chunk = self.rows[:, :, n:].unbind(1)
        self.B_by_chunk = self.B.transpose(2, 3).unbind(1)
        self.C_by_chunk = self.C.transpose(2, 3).unbind(1)

    def add_gradients(self) -> None:
        """[dS; dP] and [B | M^T], and room for a product over all heads and for one over tokens."""
        n, size = self.n, self.rows.shape[2]
        self.gram = self.rows.new_empty(self.flat_rows.shape[0], size, size)
        self.flat_rows_turned = self.flat_rows.transpose(1, 2)
        self.spare = torch.empty_like(self.y_by_token)
        self.grad_rows = torch.empty_like(self.rows)
        self.flat_grad_rows = self.grad_rows.flatten(0, 1)
        self.grad_states = self.grad_rows[:, :, :n].unbind(1)
        self.grad_read = self.grad_rows[:, :, n:].unflatten(3, self.heads)
        self.grad_read_by_chunk = self.grad_rows[:, :, n:].unbind(1)
        self.back_mixing = torch.empty_like(self.flat_mixing)
        self.along_states = self.rows.new_zeros(self.rows.shape[0], self.by_chunk[0], self.rows.shape[3])
        self.ones = self.rows.new_ones(self.heads[1])

    def sum_spare(self) -> Tensor:
        """(b, k Q, h), over channels, as a matrix product: twice as fast as a sum on a CPU."""
        return torch.mv(self.spare.view(-1, self.heads[1]), self.ones).view(self.spare.shape[:3])


class _Strong:
    """Chunks computed pair by pair, and what is passed on of their states; all but ``chunks`` by (b, k)."""

    def __init__(self, chunks: pairwise.Chunks, number: int, heads: Tensor) -> None:
        self.chunks, self.number, self.heads = chunks, number, heads
        self.written = chunks.written().unflatten(0, (-1, number))
        self.whole = chunks.whole.unflatten(0, (-1, number))

    def state_read(self, dy: Tensor) -> Tensor:
        """What the outputs of chunks add to the gradients of the states before them: (b, k, h, p, n)."""
        return self.chunks.gradient_of_state_read(dy).unflatten(0, (-1, self.number))

    def by_token(self, values: Tensor) -> Tensor:
        """(b k, h, Q, ...) -> (b, k Q, h, ...)."""
        return values.transpose(1, 2).unflatten(0, (-1, self.number)).flatten(1, 2)


class Scan:
    """The scan of a group of samples, block by block in scan order; then, for gradients, back again."""

    def __init__(self, decays: Decays, headdim: int, d_state: int) -> None:
        dt, plan = decays.dt, decays.plan
        self.decays, self.plan, self.d_state, self.stateless = decays, plan, d_state, decays.enter is None
        self.like, self.heads = dt, (dt.shape[2], headdim)
        if decays.enter is not None:
            self.enter = self._by_chunk(decays.enter)
            self.enter_rest = None if decays.enter_rest is None else self._by_chunk(decays.enter_rest)
        # By block: (b, k Q, h, 1)
        self.read = decays.read[..., None].split(plan.block_tokens, 1)
        self.write_dt = decays.write_dt[..., None].split(plan.block_tokens, 1)
        # S of the last chunk
        self.state = dt.new_zeros(dt.shape[0], 0 if self.stateless else d_state, dt.shape[2] * headdim)
        self._buffers: dict[tuple[int, int], _Buffers] = {}

    def _by_chunk(self, factors: Tensor) -> tuple[Tensor, ...]:
        """(b, 1, h p) each: rows multiply states twice as fast as a number for each head does."""
        return factors.repeat_interleave(self.heads[1], 2)[:, :, None].unbind(1)

    def begin(self, initial_state: Tensor) -> None:
        """initial_state: (b, h, p, n); without this call, zero."""
        self._by_head(self.state).copy_(initial_state.permute(0, 3, 1, 2))

    def final_state(self) -> Tensor:
        """(b, h, p, n), after the last block."""
        self._enter(self.plan.chunks, self.state, self.state)
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
        for j in block.in_scan_order:
            G = buffers.states[j]
            self._enter(block.first + j, self.state, G)
            if not pass_on and j == block.in_scan_order[-1]:
                break
            torch.baddbmm(G, buffers.B_by_chunk[j], buffers.written_by_chunk[j], out=self.state)
            if strong is not None:
                after = strong.written[:, j].addcmul(strong.whole[:, j], self._strong_heads(G, strong))
                self._set_strong_heads(self.state, strong, after)
        if states is not None:
            states.copy_(buffers.all_states)
        torch.bmm(buffers.flat_mixing, buffers.flat_rows, out=buffers.y)
        torch.mul(buffers.y_by_token, self.read[block.place], out=y)
        if strong is not None:
            before = None if self.stateless else buffers.all_states
            output = strong.chunks.output(self._strong_states(before, strong))
            y[:, :, strong.heads] = strong.by_token(output).to(y.dtype)

    def _prepare(self, block: Block, x: Tensor, B: Tensor, C: Tensor) -> _Buffers:
        """Buffers with X', B, C and M of a block."""
        by_chunk = block.chunks, (block.stop - block.start) // block.chunks
        buffers = self._buffers.get(by_chunk)
        if buffers is None:
            buffers = _Buffers(self.like.shape[0], *by_chunk, self.d_state, self.heads, self.like, self.stateless)
            self._buffers[by_chunk] = buffers
        buffers.B_by_token.copy_(B)
        buffers.C_by_token.copy_(C)
        torch.bmm(buffers.flat_C, buffers.flat_B_turned, out=buffers.flat_products)
        buffers.flat_products.mul_(block.seen)
        write_dt = self.write_dt[block.place].unflatten(1, by_chunk)
        torch.mul(x.unflatten(1, by_chunk), write_dt, out=buffers.written)
        return buffers

    def _enter(self, number: int, state: Tensor, target: Tensor) -> None:
        """From S of the chunk before this one in scan order to its G; of gradients, the other way."""
        if self.stateless:
            return
        torch.mul(state, self.enter[number], out=target)
        if self.enter_rest is not None:
            target.mul_(self.enter_rest[number])

    def _by_head(self, state: Tensor) -> Tensor:
        return state.unflatten(-1, self.heads)

    def _strong_chunks(self, i: int, x: Tensor, buffers: _Buffers) -> _Strong | None:
        """The chunks of block i, with the heads that decay too strongly for factors; None if none does."""
        block, heads = self.plan.blocks[i], self.decays.strong[i]
        if heads is None:
            return None

        def by_head(values: Tensor) -> Tensor:
            """(b, k Q, h, ...) -> (b k, strong heads, Q, ...)."""
            return values.unflatten(1, (block.chunks, -1)).flatten(0, 1)[:, :, heads].transpose(1, 2)

        chunks = pairwise.Chunks(
            by_head(x),
            by_head(self.decays.dt[:, block.tokens]),
            by_head(self.decays.cs[:, block.tokens]),
            buffers.flat_B,
            buffers.flat_C,
            buffers.flat_products,
            block.seen,
        )
        return _Strong(chunks, block.chunks, heads)

    def _strong_heads(self, state: Tensor, strong: _Strong) -> Tensor:
        """(..., n, h p) -> (..., strong heads, p, n), a copy; the middle of their decays is 0, so that G is H."""
        return self._by_head(state)[..., strong.heads, :].movedim(-3, -1)

    def _strong_states(self, states: Tensor | None, strong: _Strong) -> Tensor | None:
        """The same of all chunks, (b k, strong heads, p, n); None if there are no states."""
        return None if states is None else self._strong_heads(states, strong).flatten(0, 1)

    def _set_strong_heads(self, state: Tensor, strong: _Strong, value: Tensor) -> None:
        self._by_head(state)[:, :, strong.heads] = value.permute(0, 3, 1, 2)

    def begin_backward(self, grad_final: Tensor | None) -> None:
        """grad_final: (b, h, p, n), or None if nothing depends on the final state."""
        # Of G of the chunk that follows in scan order, whose number is ``following``; at first, of the last H
        self.grad_state = torch.zeros_like(self.state)
        self.following = self.plan.chunks
        if grad_final is not None:
            self._by_head(self.grad_state).copy_(grad_final.permute(0, 3, 1, 2))
        # For every token the sums over a head's channels of dy y and of dX' x, and for every chunk of dG G of the next
        self.along_y, self.along_x = torch.empty_like(self.like), torch.empty_like(self.like)
        self.along_y_by_block, self.along_x_by_block = (
            t.split(self.plan.block_tokens, 1) for t in (self.along_y, self.along_x)
        )
        self.along_states = self.like.new_zeros(self.like.shape[0], self.plan.chunks, self.like.shape[2])
        self.strong_gradients: list[tuple[slice, Tensor, Tensor, Tensor]] = []

    def backward(
        self,
        i: int,
        x: Tensor,
        B: Tensor,
        C: Tensor,
        y: Tensor | None,
        dy: Tensor,
        states: Tensor | None,
        next_state: Tensor | None,
        dx: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Block i, after those that follow it in the scan: write the gradient of x, return those of B and C.

        x, dx, dy and y (computed again if None): (b, k Q, h, p), dx of any precision. states: G before each chunk,
        (b, k, n, h p), None if there are none, and next_state before the next block, None if nothing depends on it.
        """
        block = self.plan.blocks[i]
        buffers = self._prepare(block, x, B, C)
        n, by_chunk = buffers.n, buffers.by_chunk
        if not hasattr(buffers, "grad_rows"):
            buffers.add_gradients()
        strong = self._strong_chunks(i, x, buffers)
        torch.mul(dy.unflatten(1, by_chunk), self.read[block.place].unflatten(1, by_chunk), out=buffers.grad_read)

        if strong is not None:
            strong_dy = dy[:, :, strong.heads].unflatten(1, by_chunk).flatten(0, 1).transpose(1, 2)
        strong_dstates = None
        if states is not None:
            read = None if strong is None else strong.state_read(strong_dy)
            strong_dstates = self._pass_back(block, buffers, states, next_state, strong, read)
            buffers.all_states.copy_(states)

        # dM = dP X'^T, dC = dP G^T + dM B and dB = X' dS^T + dM^T C, summed over heads by the product itself; all in
        # one, with dS G^T for nothing: libraries are slow at narrow products of this kind. What is masked
        # may be infinite.
        gram = torch.bmm(buffers.flat_grad_rows, buffers.flat_rows_turned, out=buffers.gram)
        dproducts = gram[:, n:, n:].masked_fill_(block.unseen, 0.0)
        if self.stateless:
            dC, dB = torch.bmm(dproducts, buffers.flat_B), torch.bmm(dproducts.transpose(1, 2), buffers.flat_C)
        else:
            dC = gram[:, n:, :n].baddbmm_(dproducts, buffers.flat_B)
            dB = torch.baddbmm(gram[:, :n, n:].transpose(1, 2), dproducts.transpose(1, 2), buffers.flat_C)

        # dX' = [B | M^T] [dS; dP]
        if not self.stateless:
            buffers.back_mixing[:, :, :n] = buffers.flat_B
        buffers.back_mixing[:, :, n:] = buffers.flat_products.transpose(1, 2)
        if y is None:
            torch.bmm(buffers.flat_mixing, buffers.flat_rows, out=buffers.y)
            y = buffers.y_by_token.mul_(self.read[block.place])
        torch.mul(dy, y, out=buffers.spare)
        self.along_y_by_block[block.place].copy_(buffers.sum_spare())
        torch.bmm(buffers.back_mixing, buffers.flat_grad_rows, out=buffers.y)
        dwritten = buffers.y_by_token
        torch.mul(dwritten, x, out=buffers.spare)
        self.along_x_by_block[block.place].copy_(buffers.sum_spare())
        torch.mul(dwritten, self.write_dt[block.place], out=dx)
        if strong is not None:
            dxdt, dlog_decay, strong_dB, strong_dC = strong.chunks.backward(
                strong_dy, self._strong_states(states, strong), strong_dstates
            )
            dx[:, :, strong.heads] = strong.by_token(dxdt * strong.chunks.dt[..., None]).to(dx.dtype)
            ddt = strong.by_token((dxdt * strong.chunks.x).sum(3))
            self.strong_gradients.append((block.tokens, strong.heads, ddt, strong.by_token(dlog_decay)))
            dB += strong_dB
            dC += strong_dC
        return tuple(d.unflatten(0, (-1, block.chunks)).flatten(1, 2) for d in (dB, dC))

    def _pass_back(
        self,
        block: Block,
        buffers: _Buffers,
        states: Tensor,
        next_state: Tensor | None,
        strong: _Strong | None,
        read: Tensor | None,
    ) -> Tensor | None:
        """From the last chunk of a block to the first: the gradients of S, to ``buffers.grad_states``.

        For heads that decay strongly, read: what their chunks' outputs add to the gradients of H, (b, k, h, p, n).
        Returns the gradients of H after the chunks, (b k, h, p, n).
        """
        strong_dstates = None if read is None else torch.empty_like(read)
        for j in reversed(block.in_scan_order):
            dS = buffers.grad_states[j]
            if next_state is not None:
                torch.sum(torch.mul(self.grad_state, next_state, out=dS), 1, out=buffers.along_states[:, j])
            self._enter(self.following, self.grad_state, dS)
            torch.baddbmm(dS, buffers.C_by_chunk[j], buffers.grad_read_by_chunk[j], out=self.grad_state)
            if strong is not None and read is not None and strong_dstates is not None:
                strong_dstates[:, j] = self._strong_heads(dS, strong)
                dstate = read[:, j].addcmul(strong_dstates[:, j], strong.whole[:, j])
                self._set_strong_heads(self.grad_state, strong, dstate)
            self.following, next_state = block.first + j, states[:, j]
        torch.sum(buffers.along_states.unflatten(2, self.heads), 3, out=self.along_states[:, block.numbers])
        return None if strong_dstates is None else strong_dstates.flatten(0, 1)

    def end_backward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of dt, (b, length, h), of A, (h,), and of the initial state, (b, h, p, n).

        The last is empty where there are no states.
        """
        ddt, dA = self.decays.gradients(self.along_x, self.along_y, self.along_states, self.strong_gradients)
        self._enter(self.following, self.grad_state, self.grad_state)
        return ddt, dA, self._by_head(self.grad_state).permute(0, 2, 3, 1)


def forward(
    plan: Plan,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    y: Tensor,
    final_state: Tensor | None,
    states: Tensor | None,
) -> None:
    """Scan a batch: write y and, where they are wanted, the final state and the states at chunk boundaries.

    x, y: (batch, length, h, p); B, C: (batch, length, n); of any precision. dt: (batch, length, h); A: (h,).
    initial_state, final_state: (batch, h, p, n). states: (batch, chunks, n, h p).
    """
    work, stateless = dt.dtype, is_stateless(plan.chunks, initial_state, final_state is not None)
    for group in plan.groups(x.shape[0]):
        scan = Scan(Decays(dt[group], A, plan, stateless), x.shape[3], B.shape[2])
        if initial_state is not None:
            scan.begin(initial_state[group])
        xs, Bs, Cs, ys = (t[group].split(plan.block_tokens, 1) for t in (x, B, C, y))
        kept = None if states is None else states[group].split(plan.block_chunks, 1)
        for i, place in enumerate(block.place for block in plan.blocks):
            x_i, B_i, C_i = (t[place].to(work) for t in (xs, Bs, Cs))
            pass_on = final_state is not None or i + 1 < len(plan.blocks)
            scan.forward(i, x_i, B_i, C_i, ys[place], None if kept is None else kept[place], pass_on)
        if final_state is not None:
            final_state[group] = scan.final_state()


def backward(
    plan: Plan,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    grad_final: Tensor | None,
    final_state: Tensor | None,
    y: Tensor,
    states: Tensor | None,
    dy: Tensor,
    dx: Tensor,
    dB: Tensor,
    dC: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write dx, dB and dC; returns the gradients of dt, A and the initial state, empty if there is none.

    grad_final, final_state: None if nothing depends on the final state. states: None if there are none.
    """
    ddt, dA, dinitial = torch.empty_like(dt), torch.zeros_like(A), dt.new_empty(gradient_shape(initial_state))
    for group in plan.groups(x.shape[0]):
        scan = Scan(Decays(dt[group], A, plan, states is None), x.shape[3], B.shape[2])
        _group_backward(scan, *take(group, grad_final, final_state, x, B, C, y, states, dy, dx, dB, dC))
        ddt[group], dA_group, dinitial_group = scan.end_backward()
        dA += dA_group
        if initial_state is not None:
            dinitial[group] = dinitial_group
    return ddt, dA, dinitial


def _group_backward(
    scan: Scan,
    grad_final: Tensor | None,
    final_state: Tensor | None,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    y: Tensor,
    states: Tensor | None,
    dy: Tensor,
    dx: Tensor,
    dB: Tensor,
    dC: Tensor,
) -> None:
    plan, work = scan.plan, scan.like.dtype
    scan.begin_backward(grad_final)
    next_state = None if final_state is None else final_state.permute(0, 3, 1, 2).flatten(2)
    read = [t.split(plan.block_tokens, 1) for t in (x, B, C, dy, y)]
    written = [t.split(plan.block_tokens, 1) for t in (dx, dB, dC)]
    kept = None if states is None else states.split(plan.block_chunks, 1)
    for i, block in reversed([*enumerate(plan.blocks)]):
        x_i, B_i, C_i, dy_i = (t[block.place].to(work) for t in read[:4])
        y_i = read[4][block.place] if y.dtype == work else None
        dx_i, *dB_dC = (t[block.place] for t in written)
        block_states = None if kept is None else kept[block.place]
        results = scan.backward(i, x_i, B_i, C_i, y_i, dy_i, block_states, next_state, dx_i)
        for gradient, result in zip(dB_dC, results, strict=True):
            gradient.copy_(result)
        next_state = None if block_states is None else block_states[:, block.in_scan_order[0]]


def gradient_shape(tensor: Tensor | None) -> tuple[int, ...]:
    return (0,) if tensor is None else tuple(tensor.shape)


def matrix_flops(
    x_shape: Sequence[int],
    d_state: int,
    reverse: bool,
    suffix: int,
    chunk_size: int,
    initial: Any,
    want_final: bool,
) -> tuple[int, int, int]:
    """FLOPs of the chunks' products: C B^T (all heads at once), scores times x, and a pass over the states.

    initial: None if there is no initial state.
    """
    batch, length, heads, headdim = x_shape
    bounds = chunk_bounds(length, reverse, suffix, chunk_size)
    pairs = batch * sum((stop - start) ** 2 for start, stop in bounds)
    states = 0 if is_stateless(len(bounds), initial, want_final) else 2 * batch * length * heads * headdim * d_state
    return 2 * pairs * d_state, 2 * pairs * heads * headdim, states
