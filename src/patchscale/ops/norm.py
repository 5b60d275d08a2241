"""The gated normalisation that closes a Mamba-2 mixer."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMS norm of ``y * silu(z)`` over all channels: gate first, then norm.

    Computed in float32 at least, whatever autocast says.

    Args:
        y: (..., channels), the scan's output.
        z: (..., channels), the gate.
        weight: (channels,).
        eps: added to the mean square.

    Returns:
        (..., channels) in the dtype of ``y``.
    """
    dtype = torch.promote_types(y.dtype, torch.float32)
    gated = y.to(dtype) * F.silu(z.to(dtype))
    return F.rms_norm(gated, weight.shape, weight.to(dtype), eps).to(y.dtype)
