"""Running the benchmark inside the test's own process, so that a test can change what it measures."""

import gc
import json

import pytest
import torch

from patchscale.bench import cells, command, measure
from patchscale.bench.command import Options, bench
from patchscale.bench.measure import Ceilings, Failed, describe


@pytest.fixture
def in_process(monkeypatch):
    """No process is started, malloc stays as it is, and the ceilings are 1 GFLOP/s and 1 GB/s."""

    def run(function, *arguments):
        try:
            return function(*arguments)
        except Exception as e:
            raise Failed(describe(e)) from e

    threads = torch.get_num_threads()
    gc.collect()
    gc.freeze()  # collecting what pytest holds takes longer than what is measured here
    monkeypatch.setattr(measure, "_WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(command, "isolated", run)
    monkeypatch.setattr(cells, "hand_back_freed_memory", lambda: None)
    monkeypatch.setattr(cells, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(cells, "ceilings", lambda *_, **__: Ceilings(1e9, 1e9))
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(in_process, tmp_path, capsys):
    """Runs a small benchmark; gives the report, its JSON and what was printed."""

    def run(kind, **options):
        out = tmp_path / "out"
        report = bench(kind, Options(**{"repeats": 2, "min_seconds": 0.0, "device": "cpu", "out": out} | options))
        return report, json.loads((out / "results.json").read_text()), capsys.readouterr().out

    return run
