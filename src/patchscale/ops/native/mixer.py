"""The mixer in C++: `mixer_blocks.py`, with kernels in the place of blocks."""

import torch
from torch import Tensor

from patchscale.ops import chunked
from patchscale.ops.chunks import Plan
from patchscale.ops.mixer_blocks import Gradients, Parameters, Sizes
from patchscale.ops.native import calls

# By their names in a Call, in the order of the parameters
_GRADIENTS = ("dconv_weight", "dconv_bias", "ddt_bias", "dA", "dD", "dnorm_weight")


def forward(
    sizes: Sizes,
    parameters: Parameters,
    plan: Plan,
    heading: bool,
    projected: Tensor,
    history: Tensor,
    initial_state: Tensor | None,
    out: Tensor,
    final_state: Tensor | None,
    ys: Tensor | None,
    states: Tensor | None,
) -> None:
    """See ``mixer_blocks.forward``; states are kept in an order that only the kernels read.

    A heading token is not in the plan, nor in ys.
    """
    written = {"out": out, "final_state": final_state, "y": ys, "states": states}
    given = _given(sizes, parameters, projected, history, initial_state)
    calls.run(False, plan, _sizes(sizes, parameters, heading), given | written)


def backward(
    sizes: Sizes,
    parameters: Parameters,
    plan: Plan,
    heading: bool,
    projected: Tensor,
    history: Tensor,
    initial_state: Tensor | None,
    grad_final: Tensor | None,
    final_state: Tensor | None,
    ys: Tensor,
    states: Tensor | None,
    dout: Tensor,
    dprojected: Tensor,
) -> Gradients:
    """See ``mixer_blocks.backward``."""
    dz, dxBC, ddt = sizes.split(dprojected)
    dhistory = ys.new_zeros(history.shape)  # without tokens there is nothing to write
    dinitial = ys.new_empty(chunked.gradient_shape(initial_state))
    *tensors, _ = parameters
    found = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    others = {
        "grad_final": grad_final,
        "final_state": final_state,
        "y": ys,
        "states": states,
        "dout": dout if dout.stride(2) == 1 else dout.contiguous(),
        "dz": dz,
        "dx": dxBC,
        "ddt": ddt,
        "dhistory": dhistory,
        "dinitial_state": None if initial_state is None else dinitial,
        **dict(zip(_GRADIENTS, found, strict=True)),
    }
    given = _given(sizes, parameters, projected, history, initial_state)
    calls.run(True, plan, _sizes(sizes, parameters, heading), given | others)
    return Gradients._make([*found, dhistory, dinitial])


def _sizes(sizes: Sizes, parameters: Parameters, heading: bool) -> dict[str, float]:
    return {
        "heads": sizes.heads,
        "headdim": sizes.headdim,
        "d_state": sizes.d_state,
        "taps": sizes.width,
        "heading": heading,
        "eps": parameters.eps,
    }


def _given(
    sizes: Sizes, parameters: Parameters, projected: Tensor, history: Tensor, initial_state: Tensor | None
) -> dict[str, Tensor | None]:
    """By their names in a Call."""
    projected = projected if projected.stride(2) == 1 else projected.contiguous()
    z, xBC, dt = sizes.split(projected)
    return {
        "x": xBC,
        "z": z,
        "dt": dt,
        "dt_bias": parameters.dt_bias.contiguous(),
        "A": parameters.A.contiguous(),
        "conv_weight": parameters.taps.contiguous(),
        "conv_bias": parameters.conv_bias.contiguous(),
        "history": history.contiguous(),
        "D": parameters.D.contiguous(),
        "norm_weight": parameters.norm_weight.contiguous(),
        "initial_state": None if initial_state is None else initial_state.contiguous(),
    }
