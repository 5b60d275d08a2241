"""What the chunked scan knows of its decays before it starts, and their gradients after it went back.

A chunk's decays are cut into factors of each token around the middle of the chunk (see `chunked.py`). The factors are
made for all tokens at once: there is one for a head, where there are ``headdim`` channels.

Shapes in comments: b = samples in the group, h = heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from patchscale.ops.chunks import Plan

# A token's log-decay up to which factors serve. The gradient of a decay is a difference of numbers that know nothing of
# it, and loses as many digits as it has; it is then multiplied by that token's step, which is large among small ones.
_STEEPEST = 8.0


def _factor_range(dtype: torch.dtype) -> float:
    """The log-decay of a chunk up to which it may be cut into factors: 120 in float32.

    The factors then stay within exp(60) either way, 1e26, so that what they multiply may be 1e11 times as large as 1
    and as small.
    """
    return 1.35 * math.log(torch.finfo(dtype).max)


class Decays:
    """Factors of the decays of a group of samples.

    Attributes:
        read, write: exp(cs - c) and exp(c - cs), (b, length, h).
        write_dt: the second times dt.
        enter, enter_rest: from S of the chunk before (before the first, from H) to G of every chunk, then from the last
            S to H, (b, chunks + 1, h); the second is None, or to be multiplied after the first. None without states.
        cs: sums of log-decays inside a chunk, (b, length, h).
        strong: for each block, the heads whose decays are no product of factors, or None.
        strong_in: whether a head is one of them, (chunks, h); None if none is.
    """

    def __init__(self, dt: Tensor, A: Tensor, plan: Plan, stateless: bool = False) -> None:
        """dt: (b, length, h) and A: (h,), both in the working precision; stateless: see ``chunks.is_stateless``."""
        self.dt, self.A, self.plan = dt, A, plan
        # Sums of log-decays in float64: an error in them is a relative error of what they multiply. There are few.
        exact = torch.float32 if dt.device.type == "mps" else torch.float64
        log_decay = F.pad(dt.to(exact) * A.to(exact), (0, 0, 0, 1))
        log_decay = log_decay[:, plan.padded]  # (b, chunks, Q, h)
        cs = log_decay.cumsum(2)
        total = cs[:, :, -1]  # (b, chunks, h)
        self.cs = cs.flatten(1, 2)[:, plan.place]

        strong = (total < -_factor_range(dt.dtype)) | (log_decay.amin(2) < -_STEEPEST)
        strong = strong.any(0)  # (chunks, h)
        self.strong_in = strong if bool(strong.any()) else None
        middle = total / 2
        left = total - middle  # from S to H'
        self.strong: list[Tensor | None] = [None] * len(plan.blocks)
        if self.strong_in is not None:
            for i, block in enumerate(plan.blocks):
                strong[block.numbers] = strong[block.numbers].any(0)
                found = strong[block.first].nonzero().squeeze(1)
                self.strong[i] = found if len(found) else None
            # Their G is H, and their S is H'.
            middle.masked_fill_(strong, 0.0)
            left.masked_fill_(strong, 0.0)
        self.enter: Tensor | None = None
        self.enter_rest: Tensor | None = None
        if not stateless:
            self.enter, self.enter_rest = self._between_chunks(left, middle)
        from_middle = self.cs - middle[:, plan.chunk_of]
        if self.strong_in is not None:
            hidden = strong[plan.chunk_of]  # (length, h)
            from_middle.masked_fill_(hidden, 0.0)
        decay = from_middle.exp_()
        self.read, self.write = decay.to(dt.dtype), decay.reciprocal().to(dt.dtype)
        if self.strong_in is not None:
            self.read.masked_fill_(hidden, 0.0)
            self.write.masked_fill_(hidden, 0.0)
        self.write_dt = self.write * dt

    def _between_chunks(self, left: Tensor, middle: Tensor) -> tuple[Tensor, Tensor | None]:
        """left, middle: log-decays, (b, chunks, h)."""
        # Nothing is left before the first chunk, or read after the last.
        entered = F.pad(left, (0, 0, 0, 1))[:, self.plan.preceding] + F.pad(middle, (0, 0, 0, 1))
        # Below this, exp is no normal number.
        floor = 0.9 * math.log(torch.finfo(self.dt.dtype).tiny)
        rest = entered - entered.clamp(min=floor)
        some_rest = rest.exp_().to(self.dt.dtype) if bool(rest.any()) else None
        return entered.clamp_(min=floor).exp_().to(self.dt.dtype), some_rest

    def gradients(
        self,
        along_x: Tensor,
        along_y: Tensor,
        along_states: Tensor,
        strong: list[tuple[slice, Tensor, Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Gradients of dt, (b, length, h), and of A, (h,).

        Args:
            along_x: sums over a head's channels of dX' x, (b, length, h); written over.
            along_y: of dy y; written over.
            along_states: for every chunk the sum of dG G of the one that follows, (b, chunks, h).
            strong: tokens, heads and their gradients of dt and of log-decays, for those that had no factors.
        """
        ddt = along_x.mul_(self.write)
        dcs = along_y.addcmul_(ddt, self.dt, value=-1)
        # The log-decay of a token is in every cs of its chunk that is not before it, and in what passes the state on.
        # These sums cancel to a large part, hence float64.
        dcs = F.pad(dcs.to(self.cs.dtype), (0, 0, 0, 1))[:, self.plan.padded]  # (b, chunks, Q, h)
        up_to = dcs.cumsum(2)
        from_here = dcs.add_(up_to[:, :, -1:] + along_states[:, :, None]).sub_(up_to)
        dlog_decay = from_here.flatten(1, 2)[:, self.plan.place].to(self.dt.dtype)
        for tokens, heads, strong_ddt, strong_dlog_decay in strong:
            ddt[:, tokens, heads] = strong_ddt
            dlog_decay[:, tokens, heads] = strong_dlog_decay
        dA = (dlog_decay * self.dt).sum((0, 1))
        return ddt.addcmul_(dlog_decay, self.A), dA
