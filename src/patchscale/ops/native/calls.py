"""Handing tensors to the C++ kernels: what `call.hpp` calls a Call."""

import ctypes
import functools
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from patchscale.ops.chunks import Plan
from patchscale.ops.native.library import library

# Field by field the Call of `call.hpp`: integers, a double, where chunks start, and tensors: a pointer, and where only
# channels need be consecutive the strides of samples and of rows.
_INTEGERS = (
    "batch", "body", "reverse", "heads", "headdim", "d_state", "taps", "chunks", "longest", "threads", "heading",
    "last", "in_bfloat16",
)  # fmt: skip
_TENSORS = (
    "x", "B", "C", "z", "dt", "dt_bias", "A", "conv_weight", "conv_bias", "history", "D", "norm_weight",
    "initial_state", "final_state", "states", "y", "out", "grad_final", "dinitial_state", "dout", "dz", "dx", "dB",
    "dC", "ddt", "dhistory", "dconv_weight", "dconv_bias", "ddt_bias", "dA", "dD", "dnorm_weight",
)  # fmt: skip
_IN_BFLOAT16 = {"x", "z", "dt", "history", "out", "dout", "dz", "dx", "ddt"}  # a mixer's, if its tokens are
_BY_ROWS = {"x", "B", "C", "z", "dt", "y", "out", "dout", "dz", "dx", "dB", "dC", "ddt"}
_CALL = struct.Struct(f"={len(_INTEGERS)}qd{1 + len(_TENSORS) + 2 * len(_BY_ROWS)}q")


def run(backward: bool, plan: Plan, sizes: Mapping[str, Any], tensors: Mapping[str, Tensor | None]) -> None:
    """Run the kernels on a batch of tokens.

    Args:
        backward: or forward.
        plan: of the tokens.
        sizes: heads, headdim and d_state; with a convolution taps, with a norm eps; and heading, if there is such a
            token beside those of the plan.
        tensors: those of a Call, by name.
    """
    assert tensors.keys() <= set(_TENSORS), tensors.keys()
    x = tensors["x"]
    assert x is not None
    numbers = {
        **sizes,
        "batch": x.shape[0],
        "body": plan.body,
        "reverse": plan.reverse,
        "chunks": plan.chunks + sizes.get("heading", 0),
        "longest": plan.padded.shape[1],
        "threads": torch.get_num_threads(),
        "last": x.shape[1] - 1,
        "in_bfloat16": x.dtype == torch.bfloat16,
    }
    places: list[int] = []
    for name in _TENSORS:
        tensor = tensors.get(name)
        if tensor is None:
            places += (0, 0, 0) if name in _BY_ROWS else (0,)
            continue
        assert tensor.dtype == (x.dtype if name in _IN_BFLOAT16 else torch.float32), (name, tensor.dtype)
        if name in _BY_ROWS:
            batch, row, channel = tensor.stride()
            assert channel == 1 or tensor.numel() == 0, name
            places += tensor.data_ptr(), batch, row
        else:
            assert tensor.is_contiguous(), name
            places.append(tensor.data_ptr())
    integers = (numbers.get(name, 0) for name in _INTEGERS)
    call = _CALL.pack(*integers, numbers.get("eps", 0.0), plan.starts.data_ptr(), *places)
    scratch = torch.empty(kernels().patchscale_scratch(call, backward), dtype=torch.float32, device="cpu")
    (kernels().patchscale_backward if backward else kernels().patchscale_forward)(call, scratch.data_ptr())


@functools.cache
def kernels() -> ctypes.CDLL:
    """The library with its functions' types."""
    loaded = library()
    loaded.patchscale_scratch.restype = loaded.patchscale_call_bytes.restype = ctypes.c_int64
    loaded.patchscale_scratch.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    for function in (loaded.patchscale_forward, loaded.patchscale_backward):
        function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_void_p], None
    assert loaded.patchscale_call_bytes() == _CALL.size
    return loaded
