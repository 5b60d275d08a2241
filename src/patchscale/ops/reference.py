"""The operators as their definitions read, token by token: the truth that every implementation is tested against.

Run them in float64. They are ordinary autograd code, so their gradients are a truth too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def scan_order(length: int, reverse: bool, suffix: int) -> list[int]:
    """Token indices in the order in which the scan meets them; the last ``suffix`` tokens come last either way."""
    body = range(length - suffix)
    return [*(reversed(body) if reverse else body), *range(length - suffix, length)]


def ssd_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    suffix: int = 0,
) -> tuple[Tensor, Tensor]:
    """The Mamba-2 recurrence (arXiv 2405.21060, section 2); arguments as :func:`patchscale.ops.ssd_scan`."""
    batch, length, heads, headdim = x.shape
    state_dtype = torch.promote_types(x.dtype, torch.float32)
    h = x.new_zeros(batch, heads, headdim, B.shape[2], dtype=state_dtype)
    if initial_state is not None:
        h = h + initial_state
    if not length:
        return x.clone(), h
    y: list[Tensor] = [x] * length
    for t in scan_order(length, reverse, suffix):
        x_t, dt_t = x[:, t].to(state_dtype), dt[:, t].to(state_dtype)
        decay = torch.exp(dt_t * A)
        h = h * decay[..., None, None] + (dt_t[..., None] * x_t)[..., None] * B[:, t, None, None].to(state_dtype)
        y_t = (h * C[:, t, None, None].to(state_dtype)).sum(-1)
        y[t] = y_t if D is None else y_t + D[:, None] * x_t
    return torch.stack(y, dim=1).to(x.dtype), h


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None = None,
    reverse: bool = False,
    suffix: int = 0,
) -> Tensor:
    """y_t = silu(bias + sum_k weight[k] x_(t - width + 1 + k)); arguments as :func:`patchscale.ops.causal_conv1d`."""
    width = weight.shape[1]
    work = torch.promote_types(x.dtype, torch.float32)
    if history is None:
        history = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    seen = [history[:, i].to(work) for i in range(width - 1)]
    if not x.shape[1]:
        return x.clone()
    y: list[Tensor] = [x] * x.shape[1]
    for t in scan_order(x.shape[1], reverse, suffix):
        seen.append(x[:, t].to(work))
        y[t] = F.silu(bias + sum(weight[:, k] * seen[k - width] for k in range(width)))
    return torch.stack(y, dim=1).to(x.dtype)


def mix_tokens_reference(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    history: Tensor | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    suffix: int = 0,
    heading: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """A Mamba-2 mixer between its projections; arguments as :func:`patchscale.ops.mix_tokens`."""
    if heading:
        last = projected.shape[1] - 1
        order = torch.tensor([last, *scan_order(last, reverse, suffix)], device=projected.device)
        parameters = conv_weight, conv_bias, dt_bias, A, D, norm_weight
        out, state = mix_tokens_reference(projected[:, order], *parameters, history, initial_state, eps=eps)
        return out[:, order.argsort()][:, :last], state
    d_inner, heads = norm_weight.shape[0], A.shape[0]
    d_state = (conv_weight.shape[0] - d_inner) // 2
    work = torch.promote_types(projected.dtype, torch.float32)
    z, xBC, dt = projected.to(work).split([d_inner, conv_weight.shape[0], heads], dim=-1)
    xBC = causal_conv1d_reference(xBC, conv_weight, conv_bias, history, reverse, suffix)
    x, B, C = xBC.split([d_inner, d_state, d_state], dim=-1)
    x = x.unflatten(-1, (heads, d_inner // heads))
    y, state = ssd_scan_reference(x, F.softplus(dt + dt_bias), A, B, C, D, initial_state, reverse, suffix)
    gated = y.flatten(2) * F.silu(z)
    scale = torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + eps)
    return (gated * scale * norm_weight).to(projected.dtype), state
