"""The scan in C++: `chunked.py`, with kernels in the place of blocks."""

import torch
from torch import Tensor

from patchscale.ops import chunked
from patchscale.ops.chunks import Plan
from patchscale.ops.native import calls


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
    """See ``chunked.forward``; states are kept in an order that only the kernels read."""
    written = {"y": y.flatten(2), "final_state": final_state, "states": states}
    calls.run(False, plan, _sizes(x, B), _given(x, dt, A, B, C, initial_state) | written)


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
    """See ``chunked.backward``."""
    ddt, dA = dt.new_empty(dt.shape), A.new_empty(A.shape)
    dinitial = dt.new_empty(chunked.gradient_shape(initial_state))
    others = {
        "grad_final": grad_final,
        "final_state": final_state,
        "y": y.flatten(2),
        "states": states,
        "dout": _rows(dy.flatten(2)),
        "dx": dx.flatten(2),
        "dB": dB,
        "dC": dC,
        "ddt": ddt,
        "dA": dA,
        "dinitial_state": None if initial_state is None else dinitial,
    }
    calls.run(True, plan, _sizes(x, B), _given(x, dt, A, B, C, initial_state) | others)
    return ddt, dA, dinitial


def _sizes(x: Tensor, B: Tensor) -> dict[str, int]:
    return {"heads": x.shape[2], "headdim": x.shape[3], "d_state": B.shape[2]}


def _given(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None
) -> dict[str, Tensor | None]:
    """By their names in a Call."""
    return {
        "x": _rows(x.flatten(2)),
        "B": _rows(B),
        "C": _rows(C),
        "dt": _rows(dt),
        "A": A.contiguous(),
        "initial_state": None if initial_state is None else initial_state.contiguous(),
    }


def _rows(tensor: Tensor) -> Tensor:
    """Its channels are consecutive: a copy where they are not."""
    # contiguous() would leave the stride of a single channel as it is.
    return tensor if tensor.stride(2) == 1 else tensor.clone(memory_format=torch.contiguous_format)
