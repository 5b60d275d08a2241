"""One set of weights at every patch size: trained on sizes drawn step by step, scored at each."""

import copy
import itertools

import pytest
import torch
from PIL import Image

from patchscale.errors import UserError
from patchscale.models.weight_files import read_checkpoint
from patchscale.tasks.classification import Classification
from patchscale.train.checkpoint import load_model
from patchscale.train.evaluate import evaluate
from patchscale.train.loop import train
from patchscale.train.observer import Observer
from patchscale.train.speed import forward_flops

SIZES = (8, 4, 2)


class Stop(Observer):
    """Stops a run after a step, as Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self.left = step

    def progress(self, progress) -> None:
        self.left -= progress.phase == "train"
        if not self.left:
            raise KeyboardInterrupt


@pytest.fixture(params=["adventurer_tiny_patch4", "pixel_transformer_tiny_patch4_32"])
def flexible(recipe, request):
    def make(**changes):
        fields = {"model": request.param, "embed_dim": 96, "depth": 1, "patch_sizes": SIZES, "epochs": 1}
        return recipe(**(fields | changes))

    return make


def test_a_run_over_several_patch_sizes_learns_them_all_and_keeps_one_set_of_weights(flexible):
    result = train(flexible(epochs=5, limit_train=960))
    state = read_checkpoint(result.folder / "last.pt")
    assert state.weights["patch_embed.proj.weight"].shape[2:] == (8, 8)  # the largest
    assert state.weights["pos_embed"].shape[1] == 17  # the grid of the smallest
    assert state.extra["model_args"]["pos_grid"] == (4, 4)
    assert state.grid == (4, 4)
    found = evaluate(str(result.folder / "last.pt"), patch_sizes=SIZES)
    assert [at.patch_size for at in found.by_patch] == list(SIZES)
    assert [at.patches for at in found.by_patch] == [1, 4, 16]
    assert found.scores == found.by_patch[0].scores == result.scores
    for at, least in zip(found.by_patch, (40, 40, 15), strict=True):  # chance is 10; the finest learns last
        assert at.scores.top1 > least, at
    flops = [at.flops for at in found.by_patch]
    assert flops == sorted(flops)


def test_scores_at_a_patch_size_are_those_of_the_model_called_with_it(flexible):
    folder = train(flexible()).folder
    found = evaluate(str(folder / "last.pt"), patch_sizes=(2, 4))
    loaded = load_model(str(folder / "last.pt"))
    from patchscale.data.sources import open_source

    source = open_source("digits", "val", 320)
    transform = loaded.preprocessing.transform()
    images = torch.stack([transform(image) for image, _ in (source.dataset[i] for i in range(len(source.dataset)))])
    labels = torch.tensor([label for _, label in (source.dataset[i] for i in range(len(source.dataset)))])

    class Called(torch.nn.Module):
        def __init__(self, patch_size: int) -> None:
            super().__init__()
            self.model, self.patch_size = loaded.model, patch_size

        def forward(self, x):
            return self.model(x, patch_size=self.patch_size)

    for at in found.by_patch:
        scores = Classification(10).evaluate(Called(at.patch_size), [(images, labels)])
        assert scores.top1 == pytest.approx(at.scores.top1, abs=0.32)  # one image, on the border
        assert scores.loss == pytest.approx(at.scores.loss, rel=1e-4)
        own = copy.deepcopy(loaded.model)
        own.set_input_size(patch_size=at.patch_size)
        assert at.flops == forward_flops(own, loaded.preprocessing)


def test_a_run_that_was_stopped_draws_the_same_patch_sizes_after_it(flexible, tmp_path):
    whole = train(flexible(output=tmp_path / "whole", save_minutes=0))
    parts = flexible(output=tmp_path / "parts", save_minutes=0)
    with pytest.raises(KeyboardInterrupt):
        train(parts, observer=Stop(5))
    resumed = train(parts)
    mine, theirs = (read_checkpoint(r.folder / "last.pt").weights for r in (whole, resumed))
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_weights_of_a_run_over_several_patch_sizes_start_another_run(flexible, tmp_path):
    first = train(flexible(output=tmp_path / "first"))
    second = flexible(output=tmp_path / "second", weights=str(first.folder), patch_size=4)
    state = read_checkpoint(train(second).folder / "last.pt")
    assert state.extra["resized"].keys() == {"patch_embed"}  # the positions stay on their grid
    assert state.weights["patch_embed.proj.weight"].shape[2:] == (4, 4)


def test_patch_sizes_that_do_not_go_are_refused(recipe):
    with pytest.raises(UserError, match="8x8 is not a whole number of 3x3 patches"):
        train(recipe(patch_sizes=(4, 3)))
    with pytest.raises(UserError, match=r"--patch-sizes is for models of this library, and deit_base_patch16_224"):
        train(recipe(model="deit_base_patch16_224", patch_sizes=(4, 2)))
    with pytest.raises(UserError, match=r"--patch-sizes is 4 0, expected pixels"):
        recipe(patch_sizes=(4, 0))
    folder = train(recipe(epochs=1)).folder
    with pytest.raises(UserError, match="8x8 is not a whole number of 3x3 patches"):
        evaluate(str(folder), patch_sizes=(4, 3))


@pytest.mark.parametrize("model", ["adventurer_tiny_patch4", "pixel_transformer_tiny_patch4_32"])
def test_a_run_with_interpolated_tokens_is_evaluated_and_gone_on_from(recipe, tmp_path, model):
    settings = {"model": model, "embed_dim": 96, "depth": 1, "epochs": 1, "limit_train": 64, "extend": 2}
    run = train(recipe(**settings))
    assert evaluate(str(run.folder)).scores.loss == pytest.approx(run.scores.loss, rel=1e-4)
    again = train(recipe(**settings, weights=str(run.folder), lr=1e-9, output=tmp_path / "again"))
    assert again.scores.loss == pytest.approx(run.scores.loss, rel=1e-3)


def test_data_of_other_classes_is_refused_and_of_other_names_for_them_taken_in_order(recipe, tmp_path):
    def folder(*names):
        root = tmp_path / "".join(names)
        for split, (i, name) in itertools.product(("train", "val"), enumerate(names)):
            (root / split / name).mkdir(parents=True)
            Image.new("L", (8, 8), 200 * i).save(root / split / name / "0.png")
        return f"folder:{root}"

    weights = str(train(recipe(data=folder("cat", "dog"), epochs=1, global_batch=2, limit_val=None)).folder)
    notes = []
    own = evaluate(weights, note=notes.append)
    assert not notes
    with pytest.raises(UserError, match="class 1 of the weights is 'dog', of the data 'wolf': the data needs"):
        evaluate(weights, data=folder("cat", "wolf"))
    assert evaluate(weights, data=folder("chat", "loup"), note=notes.append).scores == own.scores
    assert "class 0 of the weights is 'cat', of the data 'chat'; no name is in both" in notes[0]


@pytest.mark.parametrize(
    ("given", "message"), [({"batch_size": 0}, "--batch-size is 0"), ({"workers": -1}, "--workers is -1")]
)
def test_numbers_that_are_none_are_refused_before_the_weights_are_read(given, message):
    with pytest.raises(UserError, match=message):
        evaluate("/no/such/file.pth", **given)
