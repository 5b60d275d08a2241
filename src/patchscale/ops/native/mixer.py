"""The mixer in C++: `mixer_blocks.py`, with kernels in the place of blocks."""

import torch
from torch import Tensor

from patchscale.ops import chunked
from patchscale.ops.chunks import Plan
from patchscale.ops.mixer_blocks import Gradients, Parameters, Sizes
from patchscale.ops.native import calls


def forward(
    sizes: Sizes,
    parameters: Parameters,
    plan: Plan,
    projected: Tensor,
    history: Tensor,
    initial_state: Tensor | None,
    out: Tensor,
    final_state: Tensor | None,
    ys: Tensor | None,
    states: Tensor | None,
) -> None:
    """See ``mixer_blocks.forward``; states are kept in an order that only the kernels read."""
    written = {"out": out, "final_state": final_state, "y": ys, "states": states}
    given = _given(sizes, parameters, projected, history, initial_state)
    calls.run(False, plan, _sizes(sizes, parameters), given | written)


def backward(
    sizes: Sizes,
    parameters: Parameters,
    plan: Plan,
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
    dhistory = ys.new_empty(history.shape)
    dinitial = ys.new_empty(chunked.gradient_shape(initial_state))
    # In the order of Sums in `call.hpp`
    lengths = [sizes.width * sizes.conv_dim, sizes.conv_dim, sizes.heads, sizes.heads, sizes.d_inner, sizes.d_inner]
    dparameters = ys.new_zeros(torch.get_num_threads(), sum(lengths))
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
        "dparameters": dparameters,
        "dinitial_state": None if initial_state is None else dinitial,
    }
    given = _given(sizes, parameters, projected, history, initial_state)
    calls.run(True, plan, _sizes(sizes, parameters), given | others)
    dtaps, dconv_bias, ddt_bias, dA, dD, dnorm_weight = (part.sum(0) for part in dparameters.split(lengths, 1))
    dtaps = dtaps.view(sizes.width, sizes.conv_dim).t().contiguous()
    return Gradients(dtaps, dconv_bias, ddt_bias, dA, dD.view(sizes.by_head).sum(1), dnorm_weight, dhistory, dinitial)


def _sizes(sizes: Sizes, parameters: Parameters) -> dict[str, float]:
    return {
        "heads": sizes.heads,
        "headdim": sizes.headdim,
        "d_state": sizes.d_state,
        "taps": sizes.width,
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
        "conv_weight": parameters.taps.t().contiguous(),
        "conv_bias": parameters.conv_bias.contiguous(),
        "history": history.contiguous(),
        "D": parameters.D.repeat_interleave(sizes.headdim),
        "norm_weight": parameters.norm_weight.contiguous(),
        "initial_state": None if initial_state is None else initial_state.contiguous(),
    }
