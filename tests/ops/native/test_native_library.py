"""Building the kernels: once for a machine, and with one clear line where it cannot be done."""

import ctypes
import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from patchscale import UserError
from patchscale.ops import native, ssd_scan
from patchscale.ops.native.calls import kernels
from patchscale.ops.native.library import _compiler, library

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for cached in (library, kernels):
        cached.cache_clear()
    yield
    for cached in (library, kernels):
        cached.cache_clear()


def compare_with_plain(assert_near) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dt, B, C = (torch.randn(2, 130, *shape, generator=generator) for shape in ((4, 16), (4,), (16,), (16,)))
    found, expected = [], []
    for implementation, results in (("native", found), ("torch", expected)):
        tensors = [t.clone().requires_grad_() for t in (x, dt.abs() / 9, -torch.ones(4), B, C)]
        y, state = ssd_scan(*tensors, implementation=implementation)
        results += [y, state, *torch.autograd.grad(y.square().sum() + state.sum(), tensors)]
    for value, wanted in zip(found, expected, strict=True):
        assert_near(value, wanted, 1e-5)


def test_is_built_once_and_kept(tmp_path, monkeypatch):
    assert isinstance(library(), ctypes.CDLL)
    (built,) = (tmp_path / "cache" / "patchscale").iterdir()
    before = built.stat().st_mtime_ns
    library.cache_clear()
    assert native.available(CPU) is None
    assert built.stat().st_mtime_ns == before
    # Another compiler is another library.
    other = tmp_path / "another-c++"
    other.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo another && exit\nexec {_compiler()} "$@"\n')
    other.chmod(other.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(other))
    library.cache_clear()
    library()
    assert len(list((tmp_path / "cache" / "patchscale").iterdir())) == 2


def test_a_compiler_without_openmp_builds_for_one_thread(tmp_path, monkeypatch, assert_near):
    compiler = tmp_path / "c++"
    refuse = 'for a; do [ "$a" = -fopenmp ] && echo "error: unsupported option" >&2 && exit 1; done'
    compiler.write_text(f'#!/bin/sh\n{refuse}\nexec {_compiler()} "$@"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    compare_with_plain(assert_near)


def test_a_damaged_library_is_named(tmp_path):
    # Built by another process: what this one has loaded once, it does not read again.
    program = "from patchscale.ops.native.library import library; library()"
    subprocess.run([sys.executable, "-c", program], check=True)
    (built,) = (tmp_path / "cache" / "patchscale").iterdir()
    built.write_bytes(b"damaged")
    obstacle = native.available(CPU)
    assert str(built) in obstacle
    assert obstacle.endswith("delete it to build it again")


# The vectors of older processors, and of those that this one's are not made of.
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86")
@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_vectors_of_every_width_compute_the_same(processor, tmp_path, monkeypatch, assert_near):
    flags = "sse4_2" if processor == "x86-64" else "avx2"
    if flags not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {flags}")
    compiler = tmp_path / "c++"
    body = f'for a; do shift; [ "$a" = -march=native ] && a=-march={processor}; set -- "$@" "$a"; done'
    compiler.write_text(f'#!/bin/sh\n{body}\nexec {_compiler()} "$@"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    compare_with_plain(assert_near)


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler (no-such-compiler) was found" in native.available(CPU)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "c++, g++ or clang++" in native.available(CPU)
    x = torch.zeros(1, 4, 4, 16)
    with pytest.raises(UserError, match=r"no C\+\+ compiler .* choose 'torch'"):
        ssd_scan(x, x[..., 0], -torch.ones(4), x[:, :, 0], x[:, :, 0], implementation="native")


def test_a_compiler_that_fails_says_why(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\necho "mixer.cpp: error: no room" >&2\nexit 1\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    assert native.available(CPU).endswith("failed: mixer.cpp: error: no room")
    assert not list((tmp_path / "cache" / "patchscale").iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    assert "set XDG_CACHE_HOME" in native.available(CPU)


def test_a_cache_that_is_no_folder(tmp_path):
    (tmp_path / "cache").write_text("")
    assert "set XDG_CACHE_HOME" in native.available(CPU)


def test_no_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", fail)
    assert native.available(CPU) == "there is no home folder; set XDG_CACHE_HOME to a folder"


def test_other_devices():
    assert native.available(torch.device("cuda")) == "the native kernels are for CPUs, not cuda"
