import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "sequence_parallel.py"


@pytest.mark.slow
def test_two_processes_agree_with_one():
    # --standalone lets torchrun find a free port by itself.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    options = ["--height", "9", "--width", "7", "--depth", "2", "--train", "--compare"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "process 0: tokens 0 to 31," in done.stdout
    assert "process 1: tokens 31 to 63," in done.stdout
    logits, gradients = (float(number) for number in re.findall(r"\b\d\.\de[+-]\d\d", done.stdout))
    assert logits < 1e-5
    assert gradients < 1e-4


def test_without_torchrun_it_says_how_to_start_it(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    specification = importlib.util.spec_from_file_location("sequence_parallel", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.main([]) == 2
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err
