"""How many images are computed at once."""

import pytest
import torch

from patchscale.models import Adventurer, ViT
from patchscale.train import evaluate as scoring
from patchscale.train import loop, memory
from patchscale.train.cost import training_cost
from patchscale.train.loop import train
from patchscale.train.memory import images_that_fit, memory_here
from patchscale.train.observer import Observer
from patchscale.train.optimiser import freeze

GIB = 2**30


class Notes(Observer):
    """Keeps what it is told."""

    notes: tuple[str, ...] = ()

    def note(self, text: str) -> None:
        self.notes += (text,)


@pytest.mark.parametrize("patch_sizes", [(), (4, 2)])
@pytest.mark.parametrize("family", [Adventurer, ViT])
def test_a_step_of_so_many_images_takes_half_of_the_memory_and_one_more_takes_more(family, patch_sizes):
    sizes = {"embed_dim": 64, "depth": 3} | ({"num_heads": 4} if family is ViT else {})
    model = family(32, 4, **sizes)
    fit = images_that_fit(model, (32, 32), 4096, "32-true", patch_sizes, GIB)
    finest = family(32, min(patch_sizes, default=4), **sizes)
    assert training_cost(finest, (32, 32), fit).peak <= GIB / 2
    assert training_cost(finest, (32, 32), fit + 1).peak > GIB / 2
    assert images_that_fit(model, (32, 32), fit, "32-true", patch_sizes, GIB) == fit
    assert images_that_fit(model, (32, 32), 2, "32-true", patch_sizes, GIB) == 2


def test_recomputed_blocks_leave_room_for_more_images():
    model = ViT(32, 2, embed_dim=64, depth=6, num_heads=4)
    all_kept = images_that_fit(model, (32, 32), 4096, "32-true", (), GIB)
    model.set_grad_checkpointing()
    assert images_that_fit(model, (32, 32), 4096, "32-true", (), GIB) > 2 * all_kept


@pytest.mark.parametrize("family", [Adventurer, ViT])
def test_a_linear_probe_leaves_room_for_more_images(family):
    """Nothing is kept for the backward pass of what is frozen."""
    model = family(32, 2, embed_dim=64, depth=6, **({"num_heads": 4} if family is ViT else {}))
    trained = images_that_fit(model, (32, 32), 4096, "32-true", (), GIB)
    freeze(model, ("[!h]*",))
    assert images_that_fit(model, (32, 32), 4096, "32-true", (), GIB) > 2 * trained


def test_where_not_one_image_fits_none_does():
    assert images_that_fit(ViT(32, 2, embed_dim=64, depth=6, num_heads=4), (32, 32), 8, "32-true", (), 2**20) == 0


def test_one_image_is_tried_whatever_it_takes_and_said_to_need_much(recipe, monkeypatch):
    settings = {"epochs": 1, "limit_train": 8, "limit_val": 8, "global_batch": 4, "device": "cpu"}
    for module in (loop, memory, scoring):
        monkeypatch.setattr(module, "memory_here", lambda: 2**18)
    observer = Notes()
    result = train(recipe(**settings), observer=observer)
    assert [report.step for report in result.reports] == [2]
    (said,) = [note for note in observer.notes if "memory" in note]
    assert "a single image may need more than half of the 0.000244 GiB" in said
    assert "--extend" in said
    notes: list[str] = []
    scoring.evaluate(str(result.folder), device="cpu", workers=0, note=notes.append)
    assert notes == [said]


def test_this_machine_has_memory():
    assert 2**28 < memory_here() < 2**45


def test_a_step_that_does_not_fit_is_done_in_parts_with_the_same_result(recipe, tmp_path, monkeypatch):
    settings = {"epochs": 1, "limit_train": 128, "global_batch": 64, "device": "cpu", "drop_path": 0.0}
    whole = train(recipe(**settings, output=tmp_path / "whole"))
    monkeypatch.setattr("patchscale.train.loop.images_that_fit", lambda *given: 24)
    observer = Notes()
    parted = train(recipe(**settings, output=tmp_path / "parted"), observer=observer)
    assert any("takes 24 at a time" in note for note in observer.notes)
    weights = [torch.load(r.folder / "last.pt", weights_only=True)["model"] for r in (whole, parted)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)
