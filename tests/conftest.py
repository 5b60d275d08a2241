"""What several tests need: where the parity fixtures are, and how far two tensors are apart."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of large fixtures beside the repository; a stranger's clone has none."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no shared folder beside the repository")
    return folder


@pytest.fixture(scope="session")
def parity() -> Callable[[str], Path]:
    """Finds what the published code computed: in the repository, else in the shared folder, else skips the test."""

    def find(name: str) -> Path:
        for folder in (REPOSITORY / "tests" / "parity", REPOSITORY.parent / "shared" / "parity"):
            if (folder / name).exists():
                return folder / name
        pytest.skip(f"{name} is kept outside the repository")

    return find


@pytest.fixture(scope="session")
def assert_near() -> Callable[..., None]:
    """Fails unless ``|actual - expected| <= tolerance |expected|`` in the L2 norm (absolute where expected is zero).

    A norm under ``zero`` counts as zero.
    """

    def check(actual: Tensor, expected: Tensor, tolerance: float, name: str = "", zero: float = 0.0) -> None:
        assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        actual, expected = actual.detach().double(), expected.detach().double()
        size = torch.linalg.vector_norm(expected).item()
        size = size if size > zero else 1.0
        error = torch.linalg.vector_norm(actual - expected).item() / size
        assert error <= tolerance, f"{name}: relative error {error:.1e} is over {tolerance:.0e}"  # NaN fails too

    return check
