"""The mixer as Triton kernels, for NVIDIA GPUs; importing this package imports no Triton.

What each file holds, in the order in which a token meets it: `conv.py` (the short convolution), `steps.py` (step sizes
and their running log-decays), `scan.py` (states, outputs), `gate.py` (gate and norm); `mixer.py` puts them together,
`tokens.py` says how every kernel finds its tokens, and `tuning.py` how large its blocks are.

All kernels count tokens in scan order. Only those that touch the caller's tensors know where a token stands, and work
it out from its number: scanning from the right costs no copy. All offsets that grow with the batch or the length are
64-bit. Sums over tokens go through a partial sum of each program, added up in one order: equal runs give equal bits.
"""

import importlib.util
import os

import torch

OLDEST_CAPABILITY = (8, 0)  # bfloat16 on the tensor cores


def available(device: torch.device) -> str | None:
    """Why the kernels cannot run for tensors on this device, in one line; None if they can."""
    if not _is_installed():
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the Triton kernels are for NVIDIA GPUs, not {'rocm' if device.type == 'cuda' else device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, "
            f"the Triton kernels need {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"
        )
    return None


@torch.compiler.assume_constant_result  # not every PyTorch can trace it
def _is_installed() -> bool:
    found = importlib.util.find_spec("triton")
    return found is not None and found.origin is not None  # None for any folder of that name


def unfit(dtype: torch.dtype, sizes: dict[str, int]) -> str | None:
    """Why the kernels do not take tensors like these; None if they do. sizes: as ``choose_implementation`` has them."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the Triton kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    for name in ("headdim", "d_state"):
        size = sizes.get(name, 16)
        if size < 16 or size & (size - 1):
            return f"the Triton kernels take a {name} that is a power of two from 16, not {size}"
    return None
