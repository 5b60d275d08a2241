"""The mixer in C++: `mixer_blocks.py`, with kernels in the place of blocks."""

from torch import Tensor

from patchscale.ops.decays import Decays
from patchscale.ops.mixer_blocks import Gradients, Parameters, Sizes
from patchscale.ops.native.calls import Kernels


class NativeMixer:
    """The work on groups of samples; arguments and results are those of ``mixer_blocks.Blocks``.

    States are kept in an order that only this class reads.
    """

    def __init__(self, sizes: Sizes, parameters: Parameters) -> None:
        self.sizes, self.eps = sizes, parameters.eps
        self.tensors = {
            "conv_weight": parameters.taps.t().contiguous(),
            "conv_bias": parameters.conv_bias.contiguous(),
            "D": parameters.D.repeat_interleave(sizes.headdim),
            "norm_weight": parameters.norm_weight.contiguous(),
        }

    def forward(
        self,
        decays: Decays,
        history: Tensor,
        initial_state: Tensor | None,
        want_final: bool,
        z: Tensor,
        xBC: Tensor,
        ys: Tensor | None,
        states: Tensor | None,
        out: Tensor,
    ) -> Tensor | None:
        return self._kernels(decays).forward(
            initial_state, want_final, states, history=history.contiguous(), x=xBC, z=z, y=ys, out=out, **self.tensors
        )

    def backward(
        self,
        decays: Decays,
        history: Tensor,
        has_initial: bool,
        grad_final: Tensor | None,
        final_state: Tensor | None,
        z: Tensor,
        xBC: Tensor,
        ys: Tensor,
        states: Tensor | None,
        dout: Tensor,
        dz: Tensor,
        dxBC: Tensor,
    ) -> Gradients:
        sizes, kernels = self.sizes, self._kernels(decays)
        dtaps, dconv_bias = kernels.by_worker(sizes.width, sizes.conv_dim), kernels.by_worker(sizes.conv_dim)
        dnorm_weight, dD = kernels.by_worker(sizes.d_inner), kernels.by_worker(sizes.d_inner)
        dhistory = decays.dt.new_empty(history.shape)
        ddt, dA, dinitial = kernels.backward(
            grad_final,
            final_state,
            has_initial,
            states,
            history=history.contiguous(),
            x=xBC,
            z=z,
            y=ys,
            dout=dout if dout.stride(2) == 1 else dout.contiguous(),
            dz=dz,
            dx=dxBC,
            dconv_weight=dtaps,
            dconv_bias=dconv_bias,
            dnorm_weight=dnorm_weight,
            dD=dD,
            dhistory=dhistory,
            **self.tensors,
        )
        dD = dD.sum(0).view(sizes.by_head).sum(1)
        dparameters = dtaps.sum(0).t(), dconv_bias.sum(0), dD, dnorm_weight.sum(0)
        return Gradients(ddt, dA, *dparameters, dhistory, dinitial)

    def _kernels(self, decays: Decays) -> Kernels:
        return Kernels(decays, self.sizes.headdim, self.sizes.d_state, self.sizes.width, self.eps)
