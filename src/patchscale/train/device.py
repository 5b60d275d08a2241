"""Where a run computes, in which precision, and how it keeps its memory."""

import ctypes
import os
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from patchscale.errors import UserError, first_line


def resolve_device(name: str | None) -> torch.device:
    """The device of that name; the GPU where there is one, else the CPU, if None.

    Raises:
        UserError: no such device.
    """
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device {name!r} cannot be used: {first_line(e)}") from e
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """bfloat16 matrix products for ``bf16-mixed``; parameters, decays, states and the loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16-mixed" else nullcontext()


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether a device is an x86 processor without instructions for bfloat16, where float32 is faster."""
    known = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return known.get("architecture") == "x86_64" and not (known.get("avx512_bf16") or known.get("amx_bf16"))


def default_workers(device: torch.device) -> int:
    """Loader processes: on a CPU, where they compete with training for cores, two at most."""
    cores = os.cpu_count() or 1
    return min(2, cores - 1) if device.type == "cpu" else min(8, cores)


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees, for the next tensor, instead of handing it back at once.

    With glibc, on Linux; elsewhere nothing happens. By default every large tensor is fresh memory, which the system
    clears page by page: that was 40% of a CPU training step (Adventurer-Tiny, 257 tokens, batch 64).
    """
    if not sys.platform.startswith("linux"):
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)  # never: 2 GiB, the most that an int says, is little beside a long sequence
