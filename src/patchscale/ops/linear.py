"""Linear layers, in the faster of the two matrix libraries that PyTorch holds for CPUs.

PyTorch computes float32 products on x86 by MKL, which leaves AVX-512 to Intel's processors: on AMD's, oneDNN, which is
in every x86 build of PyTorch too, is about twice as fast (README, Speed).
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from patchscale.ops.dispatch import is_plain, is_traced

# Multiplications of a product below which it takes oneDNN longer to be called than it saves: forward and backward were
# equally fast in both libraries at 2 million on an AMD EPYC, and at a thirtieth of that MKL was three times as fast.
_FEWEST_MULTIPLICATIONS = 2**21
# A weight's gradient is a sum over rows: of so many at a time, which stay in the cache.
_SUMMED_ROWS = 2048

# The operator that :func:`linear` calls where it does not call PyTorch's own, if this build of PyTorch has it.
PRODUCTS = [torch.ops.mkldnn._linear_pointwise.default] if torch.backends.mkldnn.is_available() else []


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, in oneDNN where that is faster; the same but for rounding.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,), or None.

    Returns:
        (..., out).
    """
    if not is_traced() and mkl_is_slow() and _fits(x, weight, bias):
        return _OneDNN.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """``torch.nn.Linear``, computed by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(input, self.weight, self.bias)


def convert_linear(module: nn.Module) -> nn.Module:
    """Have the linear layers in a module, another library's perhaps, computed by :func:`linear`; returns the module."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
    return module


@functools.cache
def mkl_is_slow() -> bool:
    """Whether PyTorch's default float32 products leave half of this processor unused."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    processor = torch.cpu.get_capabilities()
    return bool(processor.get("avx512_f")) and "AMD" in str(processor.get("cpu_name"))


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        is_plain(x)
        and is_plain(weight)
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and (bias is None or (bias.dtype == torch.float32 and bias.shape == weight.shape[:1]))
        and x.ndim > 1
        and x.shape[-1] == weight.shape[1]
        and x.numel() * weight.shape[0] >= _FEWEST_MULTIPLICATIONS
        and not torch.is_autocast_enabled("cpu")
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # At a weight with gaps between its rows, or between its columns, oneDNN is a thousand times slower.
    if not weight.is_contiguous() and weight.stride() != (1, weight.shape[0]):
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()  # its stride would not be looked at
    out = torch.ops.mkldnn._linear_pointwise.default(x.flatten(0, -2), weight, bias, "none", [], "")
    # What autograd took for a view could not be written over.
    return out if x.ndim == 2 else torch.ops.aten._unsafe_view(out, (*x.shape[:-1], weight.shape[0]))


class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _product(grad, weight.t()) if for_x else None,
            _weight_gradient(rows, x.flatten(0, -2)) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T, differentiable if that is wanted of a gradient."""
    return _OneDNN.apply(x, weight, None) if torch.is_grad_enabled() else _multiply(x, weight)


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """(rows, out), (rows, in) -> (out, in)."""
    if grad.shape[1] > x.shape[1]:  # oneDNN is faster at few rows of many columns
        return _weight_gradient(x, grad).t()
    grad, x = grad.t(), x.t()
    total = _product(grad[:, :_SUMMED_ROWS], x[:, :_SUMMED_ROWS])
    for start in range(_SUMMED_ROWS, grad.shape[1], _SUMMED_ROWS):
        rows = slice(start, start + _SUMMED_ROWS)
        total += _product(grad[:, rows], x[:, rows])
    return total


# A later PyTorch may know it.
@register_flop_formula([op.overloadpacket for op in PRODUCTS if op.overloadpacket not in flop_registry])
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * weight_shape[0] * torch.Size(x_shape).numel()
