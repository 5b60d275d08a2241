"""The mixer and the scan in C++, for CPUs: optional, built when first asked for by the compiler that the machine has.

`mixer.cpp` says how they work and includes the rest: `forward.hpp`, `backward.hpp`, decays (`decays.hpp`), strong ones
(`pairwise.hpp`), what is handed over (`call.hpp`), vectors and products (`vectors.hpp`). `library.py` builds and loads
them, `calls.py` hands tensors over, `mixer.py` and `scan.py` take the places of `mixer_blocks.py` and `chunked.py`.
Importing builds nothing.
"""

import torch

from patchscale.ops.native.library import BuildError, library

PANEL = 64  # the kernels' unit of channels


def available(device: torch.device) -> str | None:
    """Why the kernels cannot run for tensors on this device, in one line; None if they can. Builds them if need be."""
    if device.type != "cpu":
        return f"the native kernels are for CPUs, not {device.type}"
    return _obstacle_to_building()


@torch.compiler.assume_constant_result
def _obstacle_to_building() -> str | None:
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


def unfit(dtype: torch.dtype, sizes: dict[str, int]) -> str | None:
    """Why the kernels do not take tensors like these; None if they do. sizes: as ``choose_implementation`` has them."""
    if not sizes:
        return None  # the convolution alone, which has no kernel here
    # A scan alone would have to compute its bfloat16 output again for the backward.
    precisions = (torch.float32, torch.bfloat16) if "taps" in sizes else (torch.float32,)
    if dtype not in precisions:
        names = [str(t).removeprefix("torch.") for t in (*precisions, dtype)]
        return f"the native kernels take {' and '.join(names[:-1])} here, not {names[-1]}"
    heads, headdim = sizes.get("heads", 1), sizes.get("headdim", PANEL)
    if headdim not in (16, 32, 64) or heads * headdim % PANEL:
        return (
            f"the native kernels take heads of 16, 32 or 64 channels, a multiple of {PANEL} together, "
            f"not {heads} of {headdim}"
        )
    if sizes.get("d_state", 16) % 16:
        return f"the native kernels take a d_state that is a multiple of 16, not {sizes['d_state']}"
    if sizes.get("taps", 1) > 4:
        return f"the native kernels take a convolution of at most 4 tokens, not {sizes['taps']}"
    return None
