"""Which implementation of an operator runs, and why."""

import functools
import os
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchscale.errors import UserError
from patchscale.ops import native, triton

ENVIRONMENT_VARIABLE = "PATCHSCALE_OPS"
IMPLEMENTATIONS = ("triton", "torch", "native", "reference")


class Choice(NamedTuple):
    implementation: str
    reason: str


def choose_implementation(
    implementation: str | None, device: torch.device, dtype: torch.dtype = torch.float32, **sizes: int
) -> Choice:
    """Choose the implementation of an operator: explicit argument, else environment variable, else device.

    Args:
        implementation: ``"triton"`` (fused kernels, the default on NVIDIA GPUs that can run them), ``"torch"``
            (chunked, plain PyTorch, the default elsewhere), ``"native"`` (C++ for CPUs, built when first asked for: the
            mixer in float32 and bfloat16, the scan in float32; the convolution alone is plain PyTorch),
            ``"reference"`` (token by token, for checking), or None.
        device: where the tensors are.
        dtype: of the activations.
        sizes: ``heads``, ``headdim`` and ``d_state`` of the scan, if there is one, and ``taps`` of the convolution.

    Raises:
        UserError: the argument or ``PATCHSCALE_OPS`` names no implementation, or one that cannot run here.
    """
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE)
    if implementation is not None:
        choice = Choice(implementation, "asked for by the caller")
    elif from_environment:
        choice = Choice(from_environment, f"set by {ENVIRONMENT_VARIABLE}")
    elif device.type != "cuda":
        return Choice("torch", f"the default on {device.type}")
    else:
        return _choose_on_gpu(device, triton.unfit(dtype, sizes))
    if choice.implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"unknown operator implementation {choice.implementation!r} ({choice.reason}); "
            f"choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    kernels = {"triton": triton, "native": native}.get(choice.implementation)
    obstacle = kernels and (kernels.available(device) or kernels.unfit(dtype, sizes))
    if obstacle:
        raise UserError(
            f"implementation {choice.implementation!r} ({choice.reason}) cannot run: {obstacle}; choose 'torch'"
        )
    return choice


@functools.cache
def _choose_on_gpu(device: torch.device, unfit: str | None) -> Choice:
    obstacle = triton.available(device) or unfit
    if obstacle is None:
        return Choice("triton", f"the default on {device.type}")
    warnings.warn(f"patchscale's operators run in plain PyTorch, slower: {obstacle}", stacklevel=2)
    return Choice("torch", obstacle)


def is_plain(tensor: Tensor) -> bool:
    """Not a subclass with operators of its own, as quantised and distributed ones have, nor without data."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


def is_traced() -> bool:
    """Whether a compiler, TorchScript, torch.func or forward-mode differentiation wants to see PyTorch's operators."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def refuse_forward_mode(operator: str, implementation: str) -> None:
    """Raise where a tangent is wanted: an operator's own gradients are for the backward, and tangents would be lost.

    Raises:
        UserError: forward-mode differentiation is on, and the implementation is not the reference.
    """
    if torch.autograd.forward_ad._current_level >= 0 and implementation != "reference":
        raise UserError(
            f"{operator} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad) in the "
            f"implementation {implementation!r}; choose 'reference', or differentiate backwards"
        )


def is_watched() -> bool:
    """Whether operators are traced, or seen by a dispatch mode, such as a FLOP counter."""
    return is_traced() or torch._C._len_torch_dispatch_stack() > 0
