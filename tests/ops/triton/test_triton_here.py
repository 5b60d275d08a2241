"""Without a GPU: the kernels in Triton's interpreter, and what the compiler makes of them for a Hopper GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton.runtime") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

HERE = Path(__file__).parent
MIXER = "test_triton_mixer.py"  # takes minutes in the interpreter
FILES = sorted(f.name for f in HERE.glob("test_triton_*.py") if f.name not in (Path(__file__).name, MIXER))


def run_file(name: str, *options: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, str(HERE / name)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name):
    run_file(name)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["-m", "not slow"], ["-m", "slow"]], ids=["short", "long"])
def test_the_mixer_in_the_interpreter(options):
    run_file(MIXER, *options)


class Hopper:
    """As much of a driver as compiling takes."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """What the launches of a test compile to, by kernel; nothing is run."""
    from triton.runtime.driver import driver

    from patchscale.ops.triton import conv, gate, scan, steps

    kernels: dict[str, list] = {}

    def compile_only(kernel, grid, *args, warps=4, stages=3, **constants):
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        kernels.setdefault(kernel.fn.__name__, []).append(kernel.warmup(*args, **constants, grid=grid, **options))

    for module in (conv, gate, scan, steps):
        monkeypatch.setattr(module, "launch", compile_only)
    monkeypatch.setattr(driver, "_active", Hopper())
    return kernels


def forward_and_backward(batch: int, length: int) -> None:
    """Of a mixer of Adventurer-Base: its rows are of 3224 = 8 * 403 numbers."""
    from patchscale.ops.triton.mixer import mix_tokens

    heads, headdim, d_state = 24, 64, 64
    d_inner = heads * headdim
    shapes = ((d_inner + 2 * d_state, 4), (d_inner + 2 * d_state,), (heads,), (heads,), (heads,), (d_inner,))
    projected = torch.zeros(batch, length, 2 * d_inner + 2 * d_state + heads, dtype=torch.bfloat16).requires_grad_()
    state = torch.zeros(batch, heads, headdim, d_state)
    out, _ = mix_tokens(projected, *(torch.zeros(s) for s in shapes), None, state, True, 1, 1e-5, True)
    out.sum().backward()


def test_compiles_for_hopper_once_for_all_lengths(compiled):
    forward_and_backward(2, 130)
    assert len(compiled) == 9
    first = {name: [kernel.hash for kernel in versions] for name, versions in compiled.items()}
    forward_and_backward(2, 208)
    for name, hashes in first.items():
        assert [kernel.hash for kernel in compiled[name]] == 2 * hashes, f"{name} is compiled anew"
    for name, versions in compiled.items():
        for kernel in versions:
            assert kernel.metadata.shared <= 227 * 1024, name
            ptx = kernel.asm["ptx"]
            assert not re.search(r"\b(atom|red)\.", ptx), f"{name}: sums in the order in which threads come"
            assert name.startswith("_steps") or "ld.global.v4" in ptx, f"{name}: loads are not 16 bytes wide"
    for name in ("_chunk_output", "_chunk_backward"):
        assert "wgmma.mma_async" in compiled[name][0].asm["ptx"], f"{name}: not on Hopper's tensor cores"
