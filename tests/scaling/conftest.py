"""Made-up results of a study: what a sweep would write, were the law exactly true and the seeds scattered so far."""

import numpy as np
import pytest

from patchscale.scaling.results import Cell


def made_up_cell(patch: int = 4, seed: int = 0, width: int = 64, img_size: int = 32, **changes) -> Cell:
    """A run whose loss and accuracy follow laws of patch, width and resolution, with small noise."""
    rng = np.random.default_rng([patch, seed, width, img_size])
    tokens = (img_size // patch) ** 2
    forward = 24.0 * width**2 * 4 * tokens
    loss = 0.9 + 0.06 * patch**0.9 + 20 / width**0.9 * 0.1 + 2 / img_size + rng.normal(0, 0.004)
    top1 = 80 - 1.6 * patch**0.9 - 100 / width - 40 / img_size + rng.normal(0, 0.1)
    values = {
        "study": "made up",
        "family": "adventurer",
        "model": f"adventurer_tiny_patch{patch}",
        "width": width,
        "depth": 4,
        "img_size": img_size,
        "patch_size": patch,
        "tokens": tokens,
        "seed": seed,
        "epochs": 10,
        "train_images": 1000,
        "top1": float(top1),
        "val_loss": float(loss),
        "train_loss": float(loss) - 0.1,
        "parameters": 100_000,
        "flops_forward": forward,
        "flops_training": 3 * forward * 1000 * 10,
        "seconds": 5.0,
        "device": "one thread of a CPU",
        "commit": "0123abc",
        "date": "2026-01-01T00:00:00+00:00",
        "data": "digits",
        "val_images": 360,
        "settings": {"lr": 1e-3, "patch_size": patch, "crop_scale": [0.5, 1.0]},
    }
    return Cell(**(values | changes))


@pytest.fixture(scope="session")
def cell():
    """Makes one run."""
    return made_up_cell


@pytest.fixture(scope="session")
def study():
    """Patch 16 to 1 with three seeds; patch 16 at more widths and another image size."""
    cells = [made_up_cell(patch, seed) for patch in (16, 8, 4, 2, 1) for seed in range(3)]
    cells += [made_up_cell(8, seed, width) for width in (128, 256) for seed in range(3)]
    return cells + [made_up_cell(8, seed, img_size=64) for seed in range(3)]
