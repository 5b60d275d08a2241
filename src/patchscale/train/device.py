"""Where a run computes, and in which precision."""

import os
from contextlib import AbstractContextManager

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
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


def default_workers(device: torch.device) -> int:
    """Loader processes: on a CPU, where they compete with training for cores, two at most."""
    cores = os.cpu_count() or 1
    return min(2, cores - 1) if device.type == "cpu" else min(8, cores)
