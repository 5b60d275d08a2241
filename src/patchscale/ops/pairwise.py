"""A chunk of the scan with the decay of every pair of tokens worked out: exact however strong the decay.

The mask is applied before the exponential, so that nothing overflows. Heads come before tokens here: b = samples,
h = heads, Q = tokens of the chunk, p = headdim, n = d_state.
"""

import math

import torch
from torch import Tensor


class Chunk:
    """The heads of one chunk whose decay is too strong for a product of two factors (see `chunked.py`)."""

    def __init__(self, x: Tensor, dt: Tensor, cs: Tensor, total: Tensor, B: Tensor, C: Tensor, seen: Tensor) -> None:
        self.x = x  # (b, h, Q, p)
        self.dt = dt  # (b, h, Q)
        self.cs = cs  # (b, h, Q): running sum of the log-decays in scan order, float64
        self.total = total  # (b, h, 1): its last
        self.work = x.dtype
        self.B, self.C = B, C  # (b, Q, n)
        self.seen = seen  # (t, s): 1 where s is not after t in scan order
        self.xdt = x * dt[..., None]

    def decay(self) -> Tensor:
        """exp(cs_t - cs_s) for s not after t in scan order, 1 for the other pairs: (b, h, t, s)."""
        difference = self.cs[..., :, None] - self.cs[..., None, :]
        return self._exp(difference.clamp_(max=0.0))

    def _exp(self, log_decay: Tensor) -> Tensor:
        """In the working precision; decays under 1e-34 (float32) are held there, as subnormal numbers are but slow."""
        return log_decay.to(self.work).clamp(min=0.9 * math.log(torch.finfo(self.work).tiny)).exp_()

    def products(self) -> Tensor:
        """C_t . B_s for s not after t in scan order, else 0, for all heads: (b, 1, t, s)."""
        return (self.C @ self.B.transpose(1, 2)).mul_(self.seen)[:, None]

    def decayed_B(self) -> Tensor:
        """exp(cs_Q - cs_s) B_s, as the state at the end of the chunk sees it: (b, h, Q, n)."""
        return self.B[:, None] * self._exp(self.total - self.cs)[..., None]

    def decayed_C(self) -> Tensor:
        """exp(cs_t) C_t, as it reads the state before the chunk: (b, h, Q, n)."""
        return self.C[:, None] * self._exp(self.cs)[..., None]

    def next_state(self, state: Tensor) -> Tensor:
        """The state after this chunk from the one before, (b, h, p, n)."""
        return (self.xdt.transpose(2, 3) @ self.decayed_B()).addcmul_(state, self._exp(self.total)[..., None])

    def output(self, state: Tensor) -> Tensor:
        """(b, h, Q, p)."""
        return self.decay().mul_(self.products()) @ self.xdt + self.decayed_C() @ state.transpose(2, 3)

    def backward(self, state: Tensor, dy: Tensor, dstate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients from those of the output and of the state after.

        Returns those of dt x, of the log-decays dt A, of B, C, and of the state before. The gradient of an exponent is
        that of the exponential times the exponential, so each of the four decays gives its share in passing.
        """
        decay, products = self.decay(), self.products()
        before = 1 - self.seen  # (s, u): s is before u

        # Inside the chunk: y_t = sum_s scores_ts xdt_s, with scores = decay * products.
        dxdt = (decay * products).transpose(2, 3) @ dy
        dproducts = (dy @ self.xdt.transpose(2, 3)).mul_(decay)  # (b, h, t, s)
        dproducts_all_heads = dproducts.sum(1).mul_(self.seen)  # (b, t, s)
        dB = dproducts_all_heads.transpose(1, 2) @ self.C
        dC = dproducts_all_heads @ self.B
        # The log-decay of u is in the difference of every pair s before u, t not before u. Summed pair by pair, nothing
        # cancels (as it would in the gradients of cs_t and cs_s): with strong decay only small numbers are left.
        ddifference = dproducts.mul_(products)
        dlog_decay = (ddifference @ before).mul_(self.seen).sum(2)  # (b, h, Q)

        # Out of the state before: y_t += H decayed_C_t.
        decayed_C = self.decayed_C()
        ddecayed_C = dy @ state  # (b, h, Q, n)
        dC += (ddecayed_C * self._exp(self.cs)[..., None]).sum(1)
        dlog_decay += ddecayed_C.mul_(decayed_C).sum(3) @ self.seen
        dstate_before = dy.transpose(2, 3) @ decayed_C  # (b, h, p, n)

        # Into the next state: H' = exp(cs_Q) H + sum_s xdt_s (outer) decayed_B_s.
        decayed_B = self.decayed_B()
        dxdt += decayed_B @ dstate.transpose(2, 3)
        ddecayed_B = self.xdt @ dstate  # (b, h, Q, n)
        dB += (ddecayed_B * self._exp(self.total - self.cs)[..., None]).sum(1)
        dlog_decay += ddecayed_B.mul_(decayed_B).sum(3) @ before
        dcarried = dstate * self._exp(self.total)[..., None]
        dlog_decay += (dcarried * state).sum((2, 3))[..., None]
        dstate_before += dcarried
        return dxdt, dlog_decay, dB, dC, dstate_before

