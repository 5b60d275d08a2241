"""Chunks of the scan with the decay of every pair of tokens worked out: exact however strong the decay.

For the heads that decay too strongly for a product of two factors (see `chunked.py`). The mask is applied before the
exponential, so that nothing overflows. Heads come before tokens here: c = samples times chunks, h = heads, Q = tokens
of a chunk, p = headdim, n = d_state.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Chunks:
    """Some heads of some chunks."""

    def __init__(self, x: Tensor, dt: Tensor, cs: Tensor, B: Tensor, C: Tensor, products: Tensor, seen: Tensor) -> None:
        """``cs``, the running sums of the log-decays in scan order, may be of higher precision than the rest.

        x: (c, h, Q, p); dt, cs: (c, h, Q); B, C: (c, Q, n); products: C_t . B_s for s not after t, else 0, (c, t, s);
        seen: 1 where s is not after t in scan order, else 0, (t, s).
        """
        self.x, self.dt, self.B, self.C = x, dt, B[:, None], C[:, None]
        self.products, self.seen = products[:, None], seen
        self.xdt = x * dt[..., None]
        total = cs.amin(2, keepdim=True)
        self.decay = _decay_factor((cs[..., :, None] - cs[..., None, :]).clamp_(max=0.0), x.dtype)  # (c, h, t, s)
        self.from_start = _decay_factor(cs, x.dtype)[..., None]  # (c, h, Q, 1)
        self.to_end = _decay_factor(total - cs, x.dtype)[..., None]
        self.whole = _decay_factor(total, x.dtype)[..., None]  # (c, h, 1, 1)

    def written(self) -> Tensor:
        """What a chunk adds to the state, of which it leaves ``whole``: (c, h, p, n)."""
        return self.xdt.transpose(2, 3) @ (self.B * self.to_end)

    def output(self, state: Tensor | None) -> Tensor:
        """(c, h, Q, p), from the states before the chunks, (c, h, p, n); None if there are none."""
        inside = (self.decay * self.products) @ self.xdt
        return inside if state is None else inside + (self.C * self.from_start) @ state.transpose(2, 3)

    def gradient_of_state_read(self, dy: Tensor) -> Tensor:
        """What a chunk's output adds to the gradient of the state before it: (c, h, p, n)."""
        return dy.transpose(2, 3) @ (self.C * self.from_start)

    def backward(
        self, dy: Tensor, state: Tensor | None, dstate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of dt x, of the log-decays dt A, of B and of C.

        From the gradients of the chunks' outputs, the states before them and the gradients of the states after them
        (both None if there are none). The gradient of an exponent is that of the exponential times the exponential,
        so each decay gives its share.
        """
        before = 1 - self.seen  # (s, u): s is before u

        # Inside the chunk: y_t = sum_s scores_ts xdt_s, with scores = decay * products.
        dxdt = (self.decay * self.products).transpose(2, 3) @ dy
        dproducts = (dy @ self.xdt.transpose(2, 3)).mul_(self.decay)  # (c, h, t, s)
        dproducts_all_heads = dproducts.sum(1).mul_(self.seen)  # (c, t, s)
        dB = dproducts_all_heads.transpose(1, 2) @ self.C[:, 0]
        dC = dproducts_all_heads @ self.B[:, 0]
        # The log-decay of u is in the difference of every pair s before u, t not before u. Summed pair by pair, nothing
        # cancels (as it would in the gradients of cs_t and cs_s): with strong decay only small numbers are left.
        ddifference = dproducts.mul_(self.products)
        dlog_decay = (ddifference @ before).mul_(self.seen).sum(2)  # (c, h, Q)
        if state is None or dstate is None:
            return dxdt, dlog_decay, dB, dC

        # Out of the state before: y_t += exp(cs_t) H C_t.
        dread = (dy @ state).mul_(self.from_start)  # (c, h, Q, n)
        dC += dread.sum(1)
        dlog_decay += (dread * self.C).sum(3) @ self.seen

        # Into the next state: H' = exp(cs_Q) H + sum_s exp(cs_Q - cs_s) xdt_s (outer) B_s.
        dxdt += (self.B * self.to_end) @ dstate.transpose(2, 3)
        dwritten = (self.xdt @ dstate).mul_(self.to_end)  # (c, h, Q, n)
        dB += dwritten.sum(1)
        dlog_decay += (dwritten * self.B).sum(3) @ before
        dlog_decay += (dstate * state * self.whole).sum((2, 3))[..., None]
        return dxdt, dlog_decay, dB, dC


def _decay_factor(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    """exp, but 0 for decays to nothing (3e-27 in float32): what is left would become subnormal, which is slow."""
    cutoff = 0.7 * math.log(torch.finfo(dtype).tiny)
    return F.threshold(log_decay.to(dtype).clamp(min=cutoff).exp_(), 1.0001 * math.exp(cutoff), 0.0, inplace=True)
