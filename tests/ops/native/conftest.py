"""Inputs that the C++ kernels take, and a count of how often they ran."""

import pytest
import torch

from patchscale.ops import native
from patchscale.ops.native import calls


@pytest.fixture(autouse=True)
def built() -> None:
    if obstacle := native.available(torch.device("cpu")):
        pytest.skip(obstacle)


@pytest.fixture
def ran(monkeypatch) -> list[bool]:
    """Whether each call of the kernels was a backward."""
    backwards: list[bool] = []
    run = calls.run

    def count(backward, *arguments):
        backwards.append(backward)
        run(backward, *arguments)

    monkeypatch.setattr(calls, "run", count)
    return backwards


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """More threads than samples, as many, and fewer."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
