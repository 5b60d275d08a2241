"""Adventurer's block: a Mamba-2 token mixer that opens with the average of all tokens, then a SwiGLU."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import register_notrace_module
from torch import Tensor, nn

from patchscale.errors import UserError
from patchscale.ops import mix_tokens
from patchscale.ops.chunks import is_one_chunk
from patchscale.ops.conv import tokens_before_next
from patchscale.ops.dispatch import is_traced
from patchscale.ops.linear import Linear
from patchscale.ops.sequence_parallel import BLOCK_TOKENS, SequenceGroup, decay_and_state, states_between

CONV_WIDTH = 4
MLP_RATIO = 2.5
NORM_EPS = 1e-5
# Where the operators scan a heading token themselves; on GPUs, what it leaves is worked out before.
_SCAN_A_HEADING = ("cpu",)
# Inference on a CPU takes so many tokens at a time through a layer: enough for its matrix products, few for the cache.
STREAM_TOKENS = 1024


def append_mean(u: Tensor) -> Tensor:
    """(batch, tokens, channels) -> (batch, tokens + 1, channels): their mean after the tokens."""
    return torch.cat([u, u.mean(1, keepdim=True)], dim=1) if is_traced() else _AppendMean.apply(u)


class _AppendMean(torch.autograd.Function):
    """Reads the gradient once, where those of ``cat`` and ``mean`` and their sum do so three times."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return torch.cat([u, u.mean(1, keepdim=True)], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        tokens, mean = grads[0].split_with_sizes([grads[0].shape[1] - 1, 1], 1)
        return torch.add(tokens, mean, alpha=1 / tokens.shape[1])


@register_notrace_module
class Mamba2Mixer(nn.Module):
    """(batch, patches + 1, embed_dim) -> the same; the last token is the class token, scanned last.

    With a ``sequence_group`` the patches are this process's slice of the sequence, CONV_WIDTH - 1 at least, and the
    class token is on every process.

    Equal to the published order (prepend the mean token, flip the patches, scan, flip back, drop the first output)
    without any of its copies: the mean token's whole effect on the others is the state it leaves and its place in the
    convolution's history; a flip is a scan from the right. So few tokens as fit a chunk do take the published order: a
    state costs as much as d_state of them, and copies of their embeddings next to nothing.
    """

    def __init__(
        self,
        embed_dim: int,
        d_state: int = 64,
        headdim: int = 64,
        expand: int = 2,
        reverse: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_inner = expand * embed_dim
        if d_inner % headdim:
            raise UserError(
                f"expand * embed_dim is {expand} * {embed_dim} = {d_inner}, which headdim {headdim} does not divide; "
                f"choose embed_dim a multiple of {headdim // math.gcd(headdim, expand)}"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_inner, self.d_state, self.headdim = d_inner, d_state, headdim
        self.nheads = d_inner // headdim
        self.reverse = reverse
        self.sequence_group: SequenceGroup | None = None
        self.conv_dim = conv_dim = d_inner + 2 * d_state
        self.in_proj = Linear(embed_dim, d_inner + conv_dim + self.nheads, bias=False, **dd)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, CONV_WIDTH, groups=conv_dim, **dd)  # holds weights, is not called
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **dd))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **dd))
        self.D = nn.Parameter(torch.empty(self.nheads, **dd))
        self.norm = nn.RMSNorm(d_inner, eps=NORM_EPS, **dd)  # holds a weight, is not called
        self.out_proj = Linear(d_inner, embed_dim, bias=False, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A uniform in 1 to 16, steps log-uniform in 0.001 to 0.1 (mamba-ssm's defaults), D and norm 1."""
        for module in (self.in_proj, self.conv1d, self.norm, self.out_proj):
            module.reset_parameters()
        self.A_log.uniform_(1, 16).log_()
        dt = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
        dt += torch.log(-torch.expm1(-dt))  # the inverse of softplus
        self.D.fill_(1)

    def forward(self, u: Tensor) -> Tensor:
        """(batch, patches + 1, embed_dim) -> (batch, patches + 1, embed_dim)."""
        if self.sequence_group is not None:
            return self._forward_slice(u, self.sequence_group)
        if is_one_chunk(u.shape[1] + 1):
            if _streams(u):
                return torch.cat([self._forward_chunk(group) for group in u.split(_samples_at_a_time(u))])
            return self._forward_chunk(u)
        if u.device.type in _SCAN_A_HEADING and not _streams(u):
            # One product, and one gradient of its weight, instead of two.
            out, _ = self._mix(self.in_proj(append_mean(u)), reverse=self.reverse, suffix=1, heading=True)
            return self.out_proj(out)
        # in_proj is linear: the projection of the mean is the mean of the projections.
        history, state = self._heading(self.in_proj(u.mean(1, keepdim=True)))
        if _streams(u):
            return self._stream(u, history, state, self.reverse, suffix=1)
        out, _ = self._mix(self.in_proj(u), history, state, self.reverse, suffix=1)
        return self.out_proj(out)

    def _forward_chunk(self, u: Tensor) -> Tensor:
        """The same without any state: the mean token first, the others after it in scan order."""
        in_scan_order = self._reverse_patches(u)
        projected = self.in_proj(torch.cat([u.mean(1, keepdim=True), in_scan_order], dim=1))
        out, _ = self._mix(projected)
        return self._reverse_patches(self.out_proj(out[:, 1:]))

    def _reverse_patches(self, u: Tensor) -> Tensor:
        """From the order of tokens to that of the scan, and back."""
        return torch.cat([u[:, :-1].flip(1), u[:, -1:]], dim=1) if self.reverse else u

    def _forward_slice(self, u: Tensor, group: SequenceGroup) -> Tensor:
        """The same on every process of a group; all compute the step of the class token, from the same numbers."""
        patches, class_token = u.split([u.shape[1] - 1, 1], dim=1)
        width = CONV_WIDTH - 1
        edge = patches[:, :width].flip(1) if self.reverse else patches[:, -width:]  # scanned last, in scan order
        total, count, edges = group.sum_and_count(patches, edge)
        mean = ((total + class_token[:, 0]) / (count + 1)).to(u.dtype)
        history, state = self._heading(self.in_proj(mean[:, None]))
        turn = group.size - 1 - group.rank if self.reverse else group.rank
        # Every process takes its row of the same tensors, so that all have the same graph: in the backward, too, they
        # meet at every exchange.
        xBC = self.in_proj(edges)[..., self.d_inner : self.d_inner + self.conv_dim]
        befores = torch.cat([history[None], self._in_scan_order(xBC)])
        streams = _streams(u)
        if streams:
            spans = _spans(patches.shape[1], self.reverse)
            blocks = (self.in_proj(patches[:, start:stop]) for start, stop, _ in spans)
        else:
            projected, projected_class = self.in_proj(u).split([u.shape[1] - 1, 1], dim=1)
            in_order = projected.split(BLOCK_TOKENS, dim=1)
            blocks = iter(in_order[::-1] if self.reverse else in_order)
        pair = decay_and_state(
            (block[..., self.d_inner :] for block in blocks),
            befores[turn],
            *self._convolution(),
            self.dt_bias,
            -torch.exp(self.A_log.to(state.dtype)),
            self.d_state,
            reverse=self.reverse,
        )
        states = states_between(state, *(self._in_scan_order(t) for t in group.gather(*pair)))
        if streams:
            mixed = self._stream(patches, befores[turn], states[turn], self.reverse)
            return torch.cat([mixed, self._stream(class_token, befores[-1], states[-1], False)], dim=1)
        out, _ = self._mix(projected, befores[turn], states[turn], self.reverse)
        out_class, _ = self._mix(projected_class, befores[-1], states[-1], False)
        return torch.cat([self.out_proj(out), self.out_proj(out_class)], dim=1)

    def _in_scan_order(self, of_processes: Tensor) -> Tensor:
        return of_processes.flip(0) if self.reverse else of_processes

    def _heading(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """What the mean token, scanned first, leaves: the convolution's history and the scan's first state."""
        _, xBC, dt = mean.split([self.d_inner, self.conv_dim, self.nheads], dim=-1)
        work = torch.promote_types(dt.dtype, torch.float32)
        # Nothing comes before the mean token: of the convolution it meets the last tap alone.
        taps, bias = self._convolution()
        met = F.silu(xBC * taps[:, -1] + bias)
        x, B, _ = met[:, 0].to(work).split([self.d_inner, self.d_state, self.d_state], dim=-1)
        written = x.unflatten(-1, (self.nheads, self.headdim)) * F.softplus(dt.to(work) + self.dt_bias)[:, 0, :, None]
        return F.pad(xBC, (0, 0, CONV_WIDTH - 2, 0)), written[..., None] * B[:, None, None]

    def _convolution(self) -> tuple[Tensor, Tensor]:
        """Taps (channels, width) and bias, be they parameters or what a wrapper puts in their place."""
        bias = self.conv1d.bias
        assert bias is not None
        return self.conv1d.weight.squeeze(1), bias

    def _mix(
        self,
        projected: Tensor,
        history: Tensor | None = None,
        state: Tensor | None = None,
        reverse: bool = False,
        suffix: int = 0,
        heading: bool = False,
        final: bool = False,
    ) -> tuple[Tensor, Any]:
        return mix_tokens(
            projected,
            *self._convolution(),
            self.dt_bias,
            -torch.exp(self.A_log.to(torch.promote_types(projected.dtype, torch.float32))),
            self.D,
            self.norm.weight,
            history=history,
            initial_state=state,
            reverse=reverse,
            suffix=suffix,
            heading=heading,
            eps=NORM_EPS,
            final_state=final,
        )

    def _stream(self, u: Tensor, history: Tensor, state: Tensor, reverse: bool, suffix: int = 0) -> Tensor:
        """The same as one pass over all tokens, in little memory: some tokens of some samples at a time."""
        batch, length, _ = u.shape
        out = torch.empty_like(u, dtype=history.dtype)  # as in_proj has it, under autocast too
        samples = _samples_at_a_time(u)
        for group in (slice(s, s + samples) for s in range(0, batch, samples)):
            before, group_state = history[group], state[group]
            for start, stop, from_right in _spans(length, reverse, suffix):
                projected = self.in_proj(u[group, start:stop])
                mixed, group_state = self._mix(projected, before, group_state, from_right, final=True)
                out[group, start:stop] = self.out_proj(mixed)
                xBC = projected[..., self.d_inner : self.d_inner + self.conv_dim]
                before = tokens_before_next(xBC, before, from_right)
        return out


def _streams(u: Tensor) -> bool:
    """Whether tokens are taken some at a time."""
    return (
        not torch.is_grad_enabled()
        and u.device.type == "cpu"
        and u.shape[0] * u.shape[1] > STREAM_TOKENS
        and not torch.compiler.is_compiling()
    )


def _samples_at_a_time(u: Tensor) -> int:
    return max(1, STREAM_TOKENS // u.shape[1])


def _spans(length: int, reverse: bool, suffix: int = 0) -> list[tuple[int, int, bool]]:
    """(start, stop, scanned from the right) of streamed tokens in scan order; a suffix is last in both."""
    body = length - suffix if reverse else length
    spans = [(s, min(s + STREAM_TOKENS, body), reverse) for s in range(0, body, STREAM_TOKENS)]
    return [*reversed(spans), *([(body, length, False)] if body < length else [])] if reverse else spans


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), hidden width 2.5 times the model's, all three with bias."""

    def __init__(self, embed_dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(embed_dim * MLP_RATIO)
        self.w1 = Linear(embed_dim, hidden, **dd)
        self.w2 = Linear(embed_dim, hidden, **dd)
        self.w3 = Linear(hidden, embed_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(..., embed_dim) -> (..., embed_dim)."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    """Token mixer, then channel mixer, each behind an RMS norm and added to the stream."""

    def __init__(
        self,
        embed_dim: int,
        d_state: int,
        headdim: int,
        expand: int,
        reverse: bool,
        drop_path: float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        # In the published order: saved optimiser states number parameters by it.
        self.mixer = Mamba2Mixer(embed_dim, d_state, headdim, expand, reverse, **dd)
        self.norm = nn.RMSNorm(embed_dim, eps=NORM_EPS, **dd)
        self.mlp = SwiGLU(embed_dim, **dd)
        self.norm_mlp = nn.RMSNorm(embed_dim, eps=NORM_EPS, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, patches + 1, embed_dim) -> the same."""
        x = x + self.drop_path(self.mixer(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm_mlp(x)))
