"""Adventurer's block: a Mamba-2 token mixer that opens with the average of all tokens, then a SwiGLU."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import register_notrace_module
from torch import Tensor, nn

from patchscale.errors import UserError
from patchscale.ops import causal_conv1d, gated_rms_norm, ssd_scan

CONV_WIDTH = 4
MLP_RATIO = 2.5
NORM_EPS = 1e-5


@register_notrace_module
class Mamba2Mixer(nn.Module):
    """(batch, patches + 1, embed_dim) -> the same; the last token is the class token, scanned last.

    Equal to the published order (prepend the mean token, flip the patches, scan, flip back, drop the first output)
    without any of its copies: the mean token's whole effect on the others is the state it leaves and its place in the
    convolution's history; a flip is a scan from the right.
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
        conv_dim = d_inner + 2 * d_state
        self.in_proj = nn.Linear(embed_dim, d_inner + conv_dim + self.nheads, bias=False, **dd)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, CONV_WIDTH, groups=conv_dim, **dd)  # holds weights, is not called
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **dd))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **dd))
        self.D = nn.Parameter(torch.empty(self.nheads, **dd))
        self.norm = nn.RMSNorm(d_inner, eps=NORM_EPS, **dd)  # holds a weight, is not called
        self.out_proj = nn.Linear(d_inner, embed_dim, bias=False, **dd)
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
        z, xBC, dt = self._project(u)
        # in_proj is linear: the projection of the mean is the mean of the projections.
        _, mean_xBC, mean_dt = self._project(u.mean(1, keepdim=True))
        A = -torch.exp(self.A_log.to(dt.dtype))
        taps, bias = self.conv1d.weight.squeeze(1), self.conv1d.get_parameter("bias")

        # Nothing comes before the mean token: of the convolution it meets the last tap alone.
        mean_x, mean_B, _ = self._split(F.silu(mean_xBC * taps[:, -1] + bias))
        written = mean_x.to(A.dtype) * mean_dt[..., None]
        state = written[:, 0, :, :, None] * mean_B[:, 0, None, None].to(A.dtype)

        history = F.pad(mean_xBC, (0, 0, CONV_WIDTH - 2, 0))
        xBC = causal_conv1d(xBC, taps, bias, history=history, reverse=self.reverse, suffix=1)
        x, B, C = self._split(xBC)
        y, _ = ssd_scan(x, dt, A, B, C, self.D, initial_state=state, reverse=self.reverse, suffix=1, final_state=False)
        return self.out_proj(gated_rms_norm(y.flatten(2), z, self.norm.weight, NORM_EPS))

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate, what the convolution takes, and the step sizes (float32 at least)."""
        z, xBC, dt = self.in_proj(u).split([self.d_inner, self.d_inner + 2 * self.d_state, self.nheads], dim=-1)
        return z, xBC, F.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)) + self.dt_bias)

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, B, C = xBC.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        return x.unflatten(-1, (self.nheads, self.headdim)), B, C


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), hidden width 2.5 times the model's, all three with bias."""

    def __init__(self, embed_dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = int(embed_dim * MLP_RATIO)
        self.w1 = nn.Linear(embed_dim, hidden, **dd)
        self.w2 = nn.Linear(embed_dim, hidden, **dd)
        self.w3 = nn.Linear(hidden, embed_dim, **dd)

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
