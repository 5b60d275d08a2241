import os
import signal

import pytest
import torch

from patchscale.bench.measure import Failed, hand_back_freed_memory, isolated, peak_memory, time_rounds

CPU = torch.device("cpu")
MEGABYTES = 96


def _hold_and_free():
    """In a child: 96 MB at once, of which a third is kept by the caller."""
    hand_back_freed_memory()
    return peak_memory(lambda: torch.ones(MEGABYTES * 10**6 // 3).repeat(2).clone()[:1].clone(), CPU)


def _fail():
    raise ValueError("two\nlines")


def _be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_every_round_runs_every_call_once():
    runs = []
    calls = {"a": lambda: runs.append("a"), "b": lambda: runs.append("b")}
    seconds = time_rounds(calls, CPU, min_seconds=0.0, min_rounds=4)
    assert {name: len(s) for name, s in seconds.items()} == {"a": 4, "b": 4}
    assert runs[-8:] == ["a", "b", "b", "a"] * 2  # the order turns round


def test_rounds_go_on_until_each_call_has_had_its_time():
    seconds = time_rounds({"a": lambda: sum(range(1000)), "b": lambda: None}, CPU, min_seconds=0.0005, min_rounds=1)
    assert len(seconds["a"]) == len(seconds["b"]) > 1


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peaks are read from Linux's /proc")
def test_peak_memory_is_what_was_held_at_once():
    third = MEGABYTES * 10**6 // 3 * 4  # bytes of the first tensor
    # Its double is made beside it; then the copy of the double, when the first is gone.
    assert isolated(_hold_and_free) == pytest.approx(4 * third, rel=0.26)


def test_a_child_that_fails_says_why_in_one_line():
    with pytest.raises(Failed, match=r"^ValueError: two$"):
        isolated(_fail)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_a_child_that_is_killed_ran_out_of_memory():
    with pytest.raises(Failed, match=r"^out of memory$"):
        isolated(_be_killed)
