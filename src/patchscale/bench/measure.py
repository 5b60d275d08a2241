"""How long a call takes, how much memory it needs, and what the machine can do at best."""

import contextlib
import ctypes
import functools
import gc
import multiprocessing
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import torch

from patchscale.errors import first_line
from patchscale.ops.linear import linear

OUT_OF_MEMORY = "out of memory"
_MAX_ROUNDS = 1000
_WARM_UP_SECONDS = 0.05
# A call shorter than this has its memory measured the second time, free of what a first call sets up.
_REPEATED_BELOW_SECONDS = 5.0


class Failed(RuntimeError):
    """A measurement that could not be made, and why, in one line."""


class Ceilings(NamedTuple):
    """What the machine does at best."""

    flops: float
    """Of a large matrix product, per second."""
    bandwidth: float
    """Of a large copy: bytes read and bytes written, per second."""


def time_rounds(
    calls: Mapping[str, Callable[[], object]], device: torch.device, min_seconds: float, min_rounds: int
) -> dict[str, list[float]]:
    """Seconds that each call takes, in rounds in which each runs once, so that a slow spell meets all alike.

    The order is turned round from one round to the next. On a CUDA device time is measured by events, and the L2 cache
    is overwritten before each call.

    Args:
        calls: by name, each warmed up (:func:`warm_up`).
        device: where they compute.
        min_seconds: each call runs this long in total, but for `_MAX_ROUNDS`.
        min_rounds: and this many times at least.
    """
    clock = _CudaClock() if device.type == "cuda" else _clock
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for round_ in range(max(min_rounds, _MAX_ROUNDS)):
            if round_ >= min_rounds and all(sum(s) >= min_seconds for s in seconds.values()):
                break
            for name in list(calls) if round_ % 2 == 0 else reversed(list(calls)):
                seconds[name].append(clock(calls[name]))
    finally:
        gc.enable()
    return seconds


def warm_up(call: Callable[[], object]) -> None:
    """Run a call once, and a short one for a while."""
    start = time.perf_counter()
    call()
    while time.perf_counter() - start < _WARM_UP_SECONDS:
        call()


def _clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class _CudaClock:
    """Seconds between two events around a call, its inputs no longer in the L2 cache."""

    def __init__(self) -> None:
        self.flushed = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Callable[[], object]) -> float:
        self.flushed.zero_()
        self.start.record()
        call()
        self.end.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.end) / 1000


def ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> Ceilings:
    """Measure the ceilings; each takes about ``seconds``.

    Products are those of :func:`patchscale.ops.linear.linear`. For bfloat16 on a machine that multiplies float32
    faster, float32's, which is what is then computed in.
    """
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    flops = 0.0
    for each in {dtype} if on_gpu else {dtype, torch.float32}:
        a, b = (torch.randn(size, size, device=device).to(each) for _ in range(2))
        flops = max(flops, 2 * size**3 / _median(functools.partial(linear, a, b), device, seconds))
    source = torch.zeros(2**30 if on_gpu else 2**26, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return Ceilings(flops, 2 * source.numel() / _median(functools.partial(target.copy_, source), device, seconds))


def _median(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    warm_up(call)
    return statistics.median(time_rounds({"": call}, device, seconds, 3)[""])


def peak_memory(call: Callable[[], object], device: torch.device, first_differs: bool = False) -> int | None:
    """Bytes that a call needs at its peak, over what is held before it: weights, inputs, optimiser states.

    On a CPU this is the resident set, so it wants a process of its own that hands freed memory back
    (:func:`isolated`, :func:`hand_back_freed_memory`). None where the system does not tell.

    Args:
        call: what to measure; a short call is measured the second time that it runs, a long one the first.
        device: where it computes.
        first_differs: the first run makes what is then kept (optimiser states): measure the second however long it is.
    """
    if device.type == "cuda":
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if device.type != "cpu":
        return None
    start = time.perf_counter()
    peak = _peak_resident(call)
    if first_differs or time.perf_counter() - start < _REPEATED_BELOW_SECONDS:
        peak = _peak_resident(call)
    return peak


def _peak_resident(call: Callable[[], object]) -> int | None:
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (FileNotFoundError, PermissionError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    return unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise FileNotFoundError(field)


def hand_back_freed_memory() -> None:
    """Have this process give every tensor's memory back as it is freed, so that what is resident is what is held.

    With glibc, on Linux; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(mmap_threshold, 65536)
    mallopt(trim_threshold, 0)


def isolated(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function(*arguments)`` returns, computed in a fresh process, which may run out of memory alone.

    The process is forked from one that has imported everything and computed nothing.

    Raises:
        Failed: it raised an error, or was killed.
    """
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_child, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        succeeded, result = receiver.recv()
    except EOFError:
        process.join()
        # The system kills what takes more memory than there is.
        why = OUT_OF_MEMORY if process.exitcode == -signal.SIGKILL else f"ended with status {process.exitcode}"
        raise Failed(why) from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if not succeeded:
        raise Failed(result)
    return result


def preload(modules: list[str]) -> None:
    """Have the process that :func:`isolated` forks from import these; call it before."""
    context = _context()
    if context.get_start_method() != "forkserver":
        return
    context.set_forkserver_preload(modules)
    # It begins to ignore interrupts, as its children do, only when it has imported all.
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)


def _context() -> Any:
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")


def _in_child(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    gc.freeze()  # what was imported needs no collecting, here and now
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if one must be killed, then this one
    try:
        sender.send((True, function(*arguments)))
    except Exception as e:
        sender.send((False, describe(e)))


def describe(error: Exception) -> str:
    """An error in one line; every way of running out of memory in the same words."""
    text = first_line(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return OUT_OF_MEMORY
    return text if isinstance(error, Failed) else f"{type(error).__name__}: {text}"
