"""What one process measures: the memory of one candidate, or the times of all that do a case."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from patchscale.bench.cases import DTYPES, OURS, Candidate, Case, as_call, differentiate, forget_gradients
from patchscale.bench.measure import (
    Ceilings,
    Failed,
    ceilings,
    describe,
    hand_back_freed_memory,
    peak_memory,
    time_rounds,
    warm_up,
)
from patchscale.bench.peers import candidate
from patchscale.train.device import keep_freed_memory

# Longer sequences are compared on their first tokens, on a CPU.
_COMPARED_TOKENS = 4096


@dataclass(frozen=True)
class Effort:
    """How hard to measure."""

    threads: int
    min_seconds: float
    min_rounds: int


class Times(NamedTuple):
    """Of one case."""

    seconds: dict[str, list[float]]
    """Of every candidate that ran, round by round."""
    errors: dict[str, str]
    """Why the others did not."""
    agreement: dict[str, float]
    """The relative error against this project, of those that compute the same function."""
    ceilings: Ceilings
    """Measured right before and after; the better."""


def measure_memory(case: Case, name: str, effort: Effort) -> int | None:
    """Bytes of memory that a candidate needs over what is held anyway: weights, inputs, optimiser states.

    Raises:
        Failed: it does not run.
    """
    torch.set_num_threads(effort.threads)
    if case.device == "cpu":
        hand_back_freed_memory()
    try:
        return peak_memory(as_call(case, candidate(name, case)), case.place, first_differs=case.subject == "step")
    finally:
        _clean_up(case)


def measure_times(case: Case, names: list[str], effort: Effort) -> Times:
    """Time candidates side by side, those that agree with this project or compute another function."""
    torch.set_num_threads(effort.threads)
    if case.device == "cpu":
        keep_freed_memory()
    errors: dict[str, str] = {}
    agreement: dict[str, float] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    truth: list[Tensor] | None = None
    dtype = DTYPES[case.dtype]
    try:
        before = ceilings(case.place, dtype)
        for name in [OURS, *(n for n in names if n != OURS)]:
            try:
                calls[name], result = _ready(case, name)
                if name == OURS:
                    truth = result
                elif result is not None and truth is not None:
                    agreement[name] = relative_error(result, truth)
                    if not agreement[name] <= tolerance(case):
                        raise Failed(f"disagrees with {OURS}: relative error {agreement[name]:.1e}")
            except Exception as e:
                errors[name] = describe(e)
                calls.pop(name, None)
        truth = result = None
        _clean_up(case)
        for call in calls.values():  # to compile one may have undone another
            warm_up(call)
        seconds = time_rounds(calls, case.place, effort.min_seconds, effort.min_rounds)
        after = ceilings(case.place, dtype)
    finally:
        calls.clear()
        _clean_up(case)
    return Times(seconds, errors, agreement, Ceilings(*map(max, before, after)))


def _ready(case: Case, name: str) -> tuple[Callable[[], Tensor], list[Tensor] | None]:
    """A candidate's call, warmed up, and what it is compared by."""
    made = candidate(name, case)
    result = comparable_result(case, made)
    call = as_call(case, made)
    warm_up(call)
    return call, result


def comparable_result(case: Case, made: Candidate) -> list[Tensor] | None:
    """The output, and when training the gradient of the first input; None for another function.

    Of whole models the output alone: their blocks' gradients are compared when blocks are measured.
    """
    if made.comparable is None:
        return None
    inputs = made.inputs
    if case.place.type == "cpu" and not case.model:
        inputs = tuple(
            (t.detach()[:, :_COMPARED_TOKENS] if t.ndim > 2 else t.detach()).requires_grad_(t.requires_grad)
            for t in inputs
        )
    if not case.training or case.model:
        with torch.no_grad(), case.autocast:
            return [made.comparable(*inputs).clone()]
    output = differentiate(case, made, made.comparable, inputs)
    # Copies: a CUDA graph writes its next results to the same places.
    result = [t.detach().clone() for t in (output, inputs[0].grad) if t is not None]
    forget_gradients(inputs, made.parameters)
    return result


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest |actual - expected| / |expected|; NaN if anything is."""
    errors = [
        (torch.linalg.vector_norm((a - e).float()) / torch.linalg.vector_norm(e.float())).item()
        for a, e in zip(actual, expected, strict=True)
    ]
    return float("nan") if any(e != e for e in errors) else max(errors)


def tolerance(case: Case) -> float:
    """The relative error up to which two candidates compute the same function; rounding adds up in a whole model."""
    float32 = 5e-3 if case.place.type == "cuda" else 1e-4  # on a GPU, Triton multiplies float32 in TF32
    one_layer = 5e-2 if case.dtype == "bfloat16" else float32
    return 2 * one_layer if case.model else one_layer


def machine_ceilings(device: str, dtype: str, threads: int) -> Ceilings:
    """The ceilings, at leisure."""
    torch.set_num_threads(threads)
    return ceilings(torch.device(device), DTYPES[dtype], seconds=0.5)


def _clean_up(case: Case) -> None:
    gc.collect()
    if case.place.type == "cuda":
        torch.cuda.empty_cache()
