"""Where the kernels run in these tests: on the GPU, else in Triton's interpreter.

The interpreter has to be asked for before Triton is imported, and half of PyTorch imports Triton. So without a GPU only
`test_triton_here.py` is collected: it runs each of the other files in a process of its own, with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE_ONLY = "test_triton_here.py"

if INTERPRETED or torch.cuda.is_available():
    collect_ignore = [HERE_ONLY]
else:
    collect_ignore_glob = ["test_triton_[!h]*.py"]

if INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    _convert = interpreter._convert_float

    def _convert_as_a_gpu(values, source, target, rounding):
        """Of float32 the interpreter keeps the upper half as bfloat16; a GPU rounds to the nearest."""
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return _convert(values, source, target, rounding)

    interpreter._convert_float = _convert_as_a_gpu


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
