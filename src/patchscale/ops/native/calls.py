"""Handing tensors to the C++ kernels: what `call.hpp` calls a Call."""

import ctypes
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from patchscale.ops.chunks import Plan
from patchscale.ops.native.library import library


class _Rows(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("batch", ctypes.c_int64), ("row", ctypes.c_int64)]


_NUMBERS = (
    "batch", "body", "reverse", "heads", "headdim", "d_state", "taps", "chunks", "longest", "threads", "heading",
    "last", "in_bfloat16",
)  # fmt: skip


class _Call(ctypes.Structure):
    """Field by field the Call of `call.hpp`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("eps", ctypes.c_double),
        ("starts", ctypes.c_void_p),
        *((name, _Rows) for name in ("x", "B", "C", "z", "dt")),
        *((name, ctypes.c_void_p) for name in ("dt_bias", "A", "conv_weight", "conv_bias", "history")),
        *((name, ctypes.c_void_p) for name in ("D", "norm_weight", "initial_state", "final_state", "states")),
        *((name, _Rows) for name in ("y", "out")),
        *((name, ctypes.c_void_p) for name in ("grad_final", "dinitial_state")),
        *((name, _Rows) for name in ("dout", "dz", "dx", "dB", "dC", "ddt")),
        *((name, ctypes.c_void_p) for name in ("dhistory", "dparameters", "scratch")),
    ]


_ARE_ROWS = {field[0] for field in _Call._fields_ if field[1] is _Rows}


def run(backward: bool, plan: Plan, sizes: Mapping[str, Any], tensors: Mapping[str, Tensor | None]) -> None:
    """Run the kernels on a batch of tokens.

    Args:
        backward: or forward.
        plan: of the tokens.
        sizes: heads, headdim and d_state; with a convolution taps, and with a norm eps.
        tensors: those of a Call, by name.
    """
    x = tensors["x"]
    assert x is not None
    call = _Call(
        **sizes,
        batch=x.shape[0],
        body=plan.body,
        reverse=plan.reverse,
        chunks=plan.chunks,
        longest=plan.padded.shape[1],
        threads=torch.get_num_threads(),
        heading=plan.heading,
        last=x.shape[1] - 1,
        in_bfloat16=x.dtype == torch.bfloat16,
        starts=plan.starts.data_ptr(),
    )
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if name in _ARE_ROWS:
            batch, row, channel = tensor.stride()
            assert tensor.numel() == 0 or channel == 1, name
            setattr(call, name, _Rows(tensor.data_ptr(), batch, row))
        else:
            assert tensor.is_contiguous(), name
            setattr(call, name, tensor.data_ptr())
    scratch = torch.empty(kernels().patchscale_scratch(ctypes.byref(call), backward), dtype=torch.float32)
    call.scratch = scratch.data_ptr()
    (kernels().patchscale_backward if backward else kernels().patchscale_forward)(ctypes.byref(call))


@functools.cache
def kernels() -> ctypes.CDLL:
    """The library with its functions' types."""
    loaded = library()
    loaded.patchscale_scratch.restype = loaded.patchscale_call_bytes.restype = ctypes.c_int64
    loaded.patchscale_scratch.argtypes = [ctypes.POINTER(_Call), ctypes.c_int64]
    for function in (loaded.patchscale_forward, loaded.patchscale_backward):
        function.argtypes, function.restype = [ctypes.POINTER(_Call)], None
    assert loaded.patchscale_call_bytes() == ctypes.sizeof(_Call)
    return loaded
