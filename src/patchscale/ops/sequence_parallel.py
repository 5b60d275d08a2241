"""One sequence cut over the processes of a group: what they have to tell each other, differentiably.

A slice of tokens does to the state that enters it one thing: it decays it and adds what it writes, ``h' = decay * h +
written`` (arXiv 2405.21060, section 8). Such pairs compose, so every process finds its own pair from a state of zero,
the pairs are gathered, and each process composes the state that its slice starts from. Beside it a slice needs the
last tokens of the one before it, for the convolution.

What is gathered is gathered by all, and its gradient is summed over all: the gradients of the processes add up to
those of the sum of their losses, whatever they compute from what they gathered.
"""

import itertools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from patchscale.errors import UserError
from patchscale.ops.conv import causal_conv1d, tokens_before_next

# Tokens of which a slice's pair is computed at a time, and computed again for gradients.
BLOCK_TOKENS = 1024


class SequenceGroup:
    """The processes that share a sequence: the first in the group holds its first tokens, and so on.

    Attributes:
        group: the process group; a copy of this object keeps it, since process groups cannot be copied.
        rank: of this process in the group.
        size: how many processes there are.

    Raises:
        UserError: no process group, or one that this process does not belong to.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise UserError(
                "sequence_group is given, but this process belongs to no group: start the processes with torchrun and "
                "call torch.distributed.init_process_group first"
            )
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise UserError(
                f"sequence_group does not hold this process (rank {dist.get_rank()} of {dist.get_world_size()}): give "
                "each process the group that it belongs to"
            )
        if not isinstance(group, dist.ProcessGroup):
            raise UserError(
                f"sequence_group is {group!r}, expected a process group: what torch.distributed.new_group gives"
            )
        if dist.get_rank(group) < 0:
            raise UserError("sequence_group is of an earlier init_process_group, or does not hold this process")
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict) -> "SequenceGroup":
        return self

    def slice_of(self, length: int, least: int = 1) -> slice:
        """This process's part of so many tokens, as even as they allow.

        Raises:
            UserError: a process would have fewer than ``least``.
        """
        if length // self.size < least:
            raise UserError(
                f"{length} patches are too few for {self.size} processes, which need {least} each: cut the sequence "
                f"over {max(1, length // least)} or fewer"
            )
        return slice(length * self.rank // self.size, length * (self.rank + 1) // self.size)

    def gather(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Every process's tensors, each (size, *shape) in the order of ranks; shapes and dtypes are alike on all.

        One message for all of them. The gradient of a process's tensor is the sum over what all make of it: all have
        to take part in the backward.
        """
        message = torch.cat([t.reshape(-1) for t in tensors])
        gathered = _Gather.apply(message, self.group).view(self.size, -1)
        parts = gathered.split([t.numel() for t in tensors], dim=1)
        return tuple(p.view(self.size, *t.shape).to(t.dtype) for p, t in zip(parts, tensors, strict=True))

    def sum_and_count(self, tokens: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """The sum of all processes' tokens and their number; others are gathered with them.

        Args:
            tokens: (batch, tokens, channels), of any number on each process.
            others: see :meth:`gather`.

        Returns:
            (batch, channels) and (1,), float32 at least, and what is gathered of the others.
        """
        work = torch.promote_types(tokens.dtype, torch.float32)
        own = tokens.sum(1, dtype=work)
        sums, counts, *rest = self.gather(own, own.new_full((1,), tokens.shape[1]), *others)
        return sums.sum(0), counts.sum(0), *rest

    @torch.no_grad()
    def require_alike(self, image: Tensor) -> None:
        """Meet the mistake that nothing else would show: a data loader that gives each process another image.

        Raises:
            UserError: the processes' images differ in shape or in sum.
        """
        sizes = image.new_tensor(image.shape, dtype=torch.float64)
        (seen,) = self.gather(torch.cat([sizes, image.sum(dtype=torch.float64)[None]]))
        # Processes may add in another order, hence not equal to the last bit.
        differ = ~torch.isclose(seen, seen[0], rtol=1e-9, atol=1e-9, equal_nan=True).all(1)
        if differ.any():
            other = int(differ.nonzero()[0])
            raise UserError(
                f"process {other} of the sequence group was given another image than process 0 (sizes and sum "
                f"{seen[other].tolist()}, not {seen[0].tolist()}): give all of them the same batch"
            )


class _Gather(torch.autograd.Function):
    """(n,) -> (size * n,); backward, the sum over processes of what is this one's."""

    @staticmethod
    def forward(ctx, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = own.new_empty(dist.get_world_size(group) * own.numel())
        dist.all_gather_into_tensor(gathered, own, group=group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_empty(grad.numel() // dist.get_world_size(ctx.group))
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None


def decay_and_state(
    blocks: Iterable[Tensor],
    history: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    d_state: int,
    *,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """What a mixer's scan of a slice makes of a state ``h``: ``decay * h + written``.

    The arguments are those of :func:`patchscale.ops.mix_tokens`, less z, C, D and the norm, on which the state does
    not depend. For the backward a block is computed again.

    Args:
        blocks: the slice in blocks of tokens, (batch, tokens, d_inner + 2 d_state + heads): x, B, C and dt as in_proj
            gives them; one after the other in scan order.
        history: (batch, width - 1, d_inner + 2 d_state), the tokens before the slice, in scan order.
        conv_weight: (d_inner + 2 d_state, width).
        conv_bias: (d_inner + 2 d_state,).
        dt_bias: (heads,).
        A: (heads,), negative decay rates.
        d_state: size of the state.
        reverse: the slice is scanned from the right.

    Returns:
        decay, (batch, heads, 1, 1), and written, (batch, heads, headdim, d_state), float32 at least.
    """
    parts = []
    for block in blocks:
        # C does not count.
        taps, bias = conv_weight[:-d_state], conv_bias[:-d_state]
        arguments = block, history[..., :-d_state], taps, bias, dt_bias, A, d_state, reverse
        parts.append(checkpoint(_of_block, *arguments, use_reentrant=False, preserve_rng_state=False))
        history = tokens_before_next(block[..., : conv_weight.shape[0]], history, reverse)
    *_, whole = itertools.accumulate(parts, compose)
    return whole


def compose(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The (decay, written) of two slices together, the second after the first in scan order; associative."""
    return first[0] * second[0], first[1] * second[0] + second[1]


def states_between(state: Tensor, decays: Tensor, written: Tensor) -> Tensor:
    """The state before each slice, and after the last.

    Args:
        state: (batch, heads, headdim, d_state), before the first.
        decays: (slices, batch, heads, 1, 1), in scan order.
        written: (slices, batch, heads, headdim, d_state).

    Returns:
        (slices + 1, batch, heads, headdim, d_state).
    """
    pairs = zip(decays, written, strict=True)
    start = torch.ones_like(decays[0]), state
    return torch.stack([h for _, h in itertools.accumulate(pairs, compose, initial=start)])


def _of_block(
    block: Tensor, history: Tensor, taps: Tensor, bias: Tensor, dt_bias: Tensor, A: Tensor, d_state: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The pair of a block: written is the sum of exp(dt A summed over later tokens) dt x (outer) B."""
    work = torch.promote_types(block.dtype, torch.float32)
    with torch.autocast(block.device.type, enabled=False):
        xB = causal_conv1d(block[..., : taps.shape[0]], taps, bias, history=history.to(block.dtype), reverse=reverse)
        x, B = xB.to(work).split([taps.shape[0] - d_state, d_state], dim=-1)
        dt = F.softplus(block[..., taps.shape[0] + d_state :].to(work) + dt_bias)
        # Sums of log-decays in float64: an error in them is a relative error of what they multiply.
        log_decay = dt.double() * A.double()
        # Summed from the end, not as differences of sums from the start, whose gradients would cancel.
        from_end = F.pad(log_decay if reverse else log_decay.flip(1), (0, 0, 1, 0)).cumsum(1)
        later, total = from_end[:, :-1], from_end[:, -1]
        later = later if reverse else later.flip(1)
        weighted = x.unflatten(-1, (A.shape[0], -1)) * (later.exp().to(work) * dt)[..., None]
        written = (weighted.flatten(2).transpose(1, 2) @ B).unflatten(1, (A.shape[0], -1))
        return total.exp().to(work)[..., None, None], written
