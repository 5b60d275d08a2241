"""How kernels find tokens, and how they are launched.

Numbers that change with the batch or the length are kernel arguments that Triton does not specialise on: a new length
finds the kernels compiled.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchscale.errors import UserError

DTYPES = (torch.float32, torch.bfloat16)


@triton.jit
def place(t, body, REVERSE: tl.constexpr):
    """Where in memory the tokens stand that are scanned t-th; with REVERSE the first ``body`` are scanned backwards."""
    if REVERSE:
        return tl.where(t < body, body - 1 - t, t)
    else:
        return t


@triton.jit
def sigmoid(v):
    """Of float32, without overflow."""
    small = tl.exp(-tl.abs(v))
    return tl.where(v >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def load_rows(pointer, rows, columns, stride, valid, width):
    """float32 (rows, columns) of a matrix in memory; zero where a row is not valid or a column is beyond the width."""
    mask = valid[:, None] & (columns < width)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc. Triton's interpreter has no product of bfloat16: "interpreted" hands it the numbers as float32."""
    if PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc=acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc=acc, input_precision=PRECISION)


def precision() -> str:
    """Of float32 products: as float32. Without meaning for bfloat16."""
    return "interpreted" if triton.knobs.runtime.interpret else "ieee"


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 3, **constants: Any) -> None:
    """Run a kernel on the device of its first argument; nothing for an empty grid.

    Multiplications and additions may be fused: said here, because Triton is about to change its own default.
    """
    if 0 in grid:
        return
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def rows_in_memory(x: Tensor) -> Tensor:
    """(batch, tokens, ...) as it is, or a copy, if the last dimension is not dense or tokens lie too far apart.

    Within a chunk of up to 256 tokens, offsets from its first token are 32-bit.
    """
    return x if x.stride(-1) == 1 and x.stride(1) < 2**23 else x.contiguous()


def aligned(*strides: int) -> tuple[int, ...]:
    """The largest power of two up to 16 that divides all strides, and the strides in units of it.

    Kernels multiply it back in: so the compiler knows that rows start at whole vectors, also for widths such as
    3224 = 8 * 403, and loads 16 bytes at a time.
    """
    unit = math.gcd(16, *strides)
    return unit, *(stride // unit for stride in strides)


def power_of_two(n: int) -> int:
    """The least that is not under n."""
    return 1 << max(0, n - 1).bit_length()


def check_dtype(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise UserError(
            f"the Triton kernels take float32 and bfloat16, not {x.dtype}; convert, or choose implementation='torch'"
        )
