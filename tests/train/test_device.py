"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from patchscale.train.device import keep_freed_memory

keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**28) for _ in range(3)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


# More than the 2 GiB up to which malloc could be told, in a number, to keep what is free at its end.
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone is told")
def test_three_gibibytes_are_not_cleared_again():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # of 786,432 pages
