"""The scan in C++: what `chunked.py` does for a group of samples, with kernels in the place of blocks.

States are kept in an order that only this file reads.
"""

from torch import Tensor

from patchscale.ops.decays import Decays
from patchscale.ops.native.calls import Kernels


def forward(
    decays: Decays,
    initial_state: Tensor | None,
    want_final: bool,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    y: Tensor,
    states: Tensor | None,
) -> Tensor | None:
    """See ``chunked.forward``."""
    read = _rows(x=x, B=B, C=C)
    return Kernels(decays, x.shape[3], B.shape[2]).forward(initial_state, want_final, states, y=y.flatten(2), **read)


def backward(
    decays: Decays,
    has_initial: bool,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``chunked.backward``."""
    read = _rows(x=x, B=B, C=C, dout=dy)
    return Kernels(decays, x.shape[3], B.shape[2]).backward(
        grad_final, final_state, has_initial, states, y=y.flatten(2), dx=dx.flatten(2), dB=dB, dC=dC, **read
    )


def _rows(**tensors: Tensor) -> dict[str, Tensor]:
    """(b, length, channels) each, consecutive channels: copies where they are not."""
    flat = {name: tensor.flatten(2) for name, tensor in tensors.items()}
    return {name: tensor if tensor.stride(2) == 1 else tensor.contiguous() for name, tensor in flat.items()}
