import pytest
import torch

from patchscale.train.recipe import Recipe


@pytest.fixture(autouse=True)
def one_thread():
    """Small runs are faster so, and bit for bit the same whatever runs beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def recipe(tmp_path):
    """A run of seconds that learns the digits."""

    def make(**changes) -> Recipe:
        fields = {
            "model": "adventurer_tiny_patch4",
            "data": "digits",
            "img_size": 8,
            "embed_dim": 32,
            "depth": 2,
            "epochs": 3,
            "global_batch": 32,
            "lr": 4e-3,
            "hflip": 0.0,
            "crop_scale": (0.8, 1.0),
            "limit_train": 320,
            "workers": 0,
            "device": "cpu",
            "output": tmp_path / "run",
        }
        return Recipe(**(fields | changes))

    return make
