"""Building the C++ kernels once for each machine, and loading them."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_FOLDER = Path(__file__).parent
_SOURCES = ("mixer.cpp", "backward.hpp", "forward.hpp", "decays.hpp", "pairwise.hpp", "call.hpp", "vectors.hpp")
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared")


class BuildError(Exception):
    """Why there is no library, in one line."""


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, from the cache (``$XDG_CACHE_HOME/patchscale``, by default ``~/.cache/patchscale``) or just built.

    Raises:
        BuildError: no compiler, or one that cannot build them.
    """
    compiler = _compiler()
    # What is built is for one processor: a home that several machines share holds one library for each kind.
    parts = [_describe_processor(), _run([compiler, "--version"]), *_FLAGS]
    parts += [(_FOLDER / name).read_text() for name in _SOURCES]
    name = f"native-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    if not os.path.exists(folder / name):
        _build(compiler, folder / name)
    try:
        return ctypes.CDLL(str(folder / name))
    except OSError as error:
        raise BuildError(f"{folder / name} cannot be loaded ({error}); delete it to build it again") from None


def _compiler() -> str:
    """``$CXX``, or the first of the usual names that there is."""
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise BuildError(f"no C++ compiler ({chosen or 'c++, g++ or clang++'}) was found; install one, or set CXX")


def _cache_folder() -> Path:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchscale"
    except RuntimeError:
        raise BuildError("there is no home folder; set XDG_CACHE_HOME to a folder") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{folder} cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder") from None
    return folder


def _build(compiler: str, path: Path) -> None:
    """One thread where the compiler knows no OpenMP, as Apple's."""
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    try:
        handle, built = tempfile.mkstemp(suffix=".so", dir=path.parent)
    except OSError as error:
        raise BuildError(
            f"{path.parent} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder"
        ) from None
    os.close(handle)
    command = [compiler, *_FLAGS, tune, str(_FOLDER / "mixer.cpp"), "-o", built]
    try:
        try:
            _run([*command, "-fopenmp"])
        except BuildError:
            _run(command)
        os.chmod(built, 0o755)  # whoever shares the folder may load it
        with open(built, "rb+") as file:
            os.fsync(file.fileno())
        # Other processes may be building the same: whoever comes last replaces a library by its equal.
        os.replace(built, path)
    finally:
        Path(built).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
        raise BuildError(f"{command[0]} failed: {reasons[0].strip() if reasons else f'exit status {done.returncode}'}")
    return done.stdout


def _describe_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "|".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
