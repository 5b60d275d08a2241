import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from patchscale.errors import TrainingStopped, UserError
from patchscale.tasks.classification import Classification
from patchscale.train.checkpoint import load_model
from patchscale.train.evaluate import evaluate
from patchscale.train.loop import train
from patchscale.train.observer import Observer


def weights_of(folder: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)["model"]


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


class Interrupt(Observer):
    """Stops a run after an epoch, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def epoch(self, report) -> None:
        if report.epoch == self.after:
            raise KeyboardInterrupt


def test_a_run_learns_and_leaves_what_it_says(recipe):
    result = train(recipe(epochs=6))
    assert result.scores.top1 > 60  # chance is 10
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["top1"] == result.scores.top1
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert json.loads((result.folder / "recipe.json").read_text())["embed_dim"] == 32
    assert list((result.folder / "tensorboard").glob("events*"))
    assert not list(result.folder.glob("*.tmp"))


def test_evaluation_of_the_checkpoint_alone_repeats_what_training_printed(recipe):
    result = train(recipe(smoothing=0.1, mixup=0.8))
    found = evaluate(str(result.folder / "last.pt"))
    assert found.scores == result.scores == found.recorded


def test_pixels_that_change_places_do_so_wherever_the_weights_are_used(recipe):
    result = train(recipe(pixel_swaps=24, swap_distance=6, limit_train=160))
    assert load_model(str(result.folder)).preprocessing.pixel_swaps == 24
    assert evaluate(str(result.folder / "last.pt")).scores == result.scores
    state = torch.load(result.folder / "last.pt", weights_only=True)
    state["preprocessing"] |= {"pixel_swaps": 0, "swap_distance": None}
    torch.save(state, result.folder / "in_place.pt")
    assert evaluate(str(result.folder / "in_place.pt")).scores.loss > result.scores.loss


@pytest.mark.parametrize("positions", ["learn", "sincos", "none"])
def test_a_recipe_chooses_how_tokens_know_their_place(recipe, positions):
    result = train(recipe(model="deit_tiny_patch4", embed_dim=24, pos_embed=positions, epochs=1, limit_train=64))
    assert load_model(str(result.folder)).model.positions == positions
    assert ("pos_embed" in weights_of(result.folder)) is (positions == "learn")
    assert evaluate(str(result.folder)).scores == result.scores


def test_fixed_positions_stay_on_their_map_when_the_patch_shrinks(recipe, tmp_path):
    settings = {"model": "deit_tiny_patch4", "embed_dim": 24, "pos_embed": "sincos", "limit_train": 64}
    coarse = train(recipe(**settings, epochs=1, output=tmp_path / "coarse"))
    fine = recipe(**settings, weights=str(coarse.folder), patch_size=2, epochs=2, output=tmp_path / "fine")
    with pytest.raises(KeyboardInterrupt):
        train(fine, observer=Interrupt(after=1))
    result = train(fine)
    model = load_model(str(result.folder / "last.pt")).model
    assert (model.patch_embed.grid_size, model.pos_grid) == ((4, 4), (2, 2))
    assert evaluate(str(result.folder / "last.pt")).scores == result.scores


def test_fixed_positions_stay_on_their_map_where_one_model_is_for_many_patches(recipe, tmp_path):
    settings = {"model": "deit_tiny_patch8", "embed_dim": 24, "pos_embed": "sincos", "limit_train": 64}
    coarse = train(recipe(**settings, patch_size=8, epochs=1, output=tmp_path / "coarse"))
    more = settings | {"weights": str(coarse.folder), "patch_sizes": (8, 4, 2), "patch_size": None, "epochs": 2}
    whole = train(recipe(**more, output=tmp_path / "whole"))
    assert evaluate(str(whole.folder / "last.pt")).scores == whole.scores
    with pytest.raises(KeyboardInterrupt):
        train(recipe(**more, output=tmp_path / "parts"), observer=Interrupt(after=1))
    resumed = train(recipe(**more, output=tmp_path / "parts"))
    assert_same(weights_of(whole.folder), weights_of(resumed.folder))


def test_the_average_of_the_weights_is_evaluated_and_kept(recipe):
    result = train(recipe(ema_decay=0.9))
    found = evaluate(str(result.folder / "last.pt"), which="ema")
    assert found.scores == result.reports[-1].ema_scores == found.recorded
    assert found.scores != result.scores


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_after_an_epoch_ends_with_the_same_weights(recipe, tmp_path, workers):
    settings = {"mixup": 0.8, "cutmix": 1.0, "ema_decay": 0.9, "drop_path": 0.1, "device_batch": 16, "workers": workers}
    whole = train(recipe(**settings, output=tmp_path / "whole"))
    interrupted = recipe(**settings, output=tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, observer=Interrupt(after=1))
    resumed = train(interrupted, resume=tmp_path / "parts")
    assert_same(weights_of(whole.folder), weights_of(resumed.folder))
    rows = [(r.folder / "metrics.jsonl").read_text().splitlines() for r in (whole, resumed)]
    losses = [[json.loads(row)["train_loss"] for row in part] for part in rows]
    assert losses[0] == losses[1]


def test_accumulation_and_checkpointing_change_memory_and_not_the_result(recipe, tmp_path):
    plain = train(recipe(epochs=1, output=tmp_path / "a"))
    parts = train(recipe(epochs=1, device_batch=8, output=tmp_path / "b"))
    recomputed = train(recipe(epochs=1, grad_checkpointing=True, output=tmp_path / "c"))
    in_part = train(recipe(epochs=1, grad_checkpointing=True, keep_products=True, output=tmp_path / "d"))
    assert parts.reports[0].train_loss == pytest.approx(plain.reports[0].train_loss, rel=1e-4)
    for other in (recomputed, in_part):
        assert other.reports[0].train_loss == pytest.approx(plain.reports[0].train_loss, rel=1e-5)


def test_bfloat16_autocast_learns(recipe):
    result = train(recipe(precision="bf16-mixed", epochs=6))
    assert result.scores.top1 > 60


def test_a_run_starts_from_given_weights_resized_to_its_patches(recipe, tmp_path):
    first = train(recipe(epochs=6, output=tmp_path / "first"))
    second = train(recipe(epochs=1, lr=1e-6, warmup_epochs=0, output=tmp_path / "second", weights=str(first.folder)))
    assert second.scores.top1 == pytest.approx(first.scores.top1, abs=3)
    finer = train(recipe(epochs=1, patch_size=2, output=tmp_path / "finer", weights=str(first.folder)))
    assert weights_of(finer.folder)["pos_embed"].shape == (1, 17, 32)


def test_the_best_checkpoint_is_the_most_accurate_epoch(recipe):
    result = train(recipe(epochs=6))
    best = max(result.reports, key=lambda report: report.scores.top1)
    assert result.best_epoch == best.epoch
    assert evaluate(str(result.folder)).scores == best.scores


@pytest.mark.parametrize("model", ["deit_tiny_patch4", "pixel_transformer_tiny_patch4_32"])
def test_a_vision_transformer_learns_and_is_scored_from_its_checkpoint(recipe, model):
    result = train(recipe(model=model, embed_dim=48, layer_decay=0.9, epochs=6))
    assert result.scores.top1 > 60  # chance is 10
    assert evaluate(str(result.folder / "last.pt")).scores == result.scores


def test_a_timm_model_trains_too(recipe):
    result = train(recipe(model="test_vit", embed_dim=None, depth=None, patch_size=4, epochs=1, img_size=8))
    assert evaluate(str(result.folder / "last.pt")).scores == result.scores


def test_a_loss_that_is_not_finite_stops_and_names_step_rate_and_checkpoint(recipe, monkeypatch):
    healthy = Classification.loss

    def loss(self, model, images, targets):
        calls.append(1)
        return healthy(self, model, images, targets) * (float("nan") if len(calls) == 13 else 1.0)

    calls: list[int] = []
    monkeypatch.setattr(Classification, "loss", loss)
    with pytest.raises(TrainingStopped, match=r"loss is nan at step 13 with learning rate .*last\.pt") as stopped:
        train(recipe())
    last = Path(str(stopped.value).split()[-1])
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(last.parent).values())


@pytest.fixture
def broken_folder(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (8, 8), (index * 60, 0, 0)).save(tmp_path / "images" / split / name / f"{index}.png")
    broken = tmp_path / "images" / "train" / "cat" / "2.png"
    broken.write_bytes(b"not an image")
    return tmp_path / "images"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_training_by_name(recipe, broken_folder, workers):
    with pytest.raises(UserError, match=r"cannot read .*cat/2\.png.*--skip-unreadable"):
        train(recipe(data=f"folder:{broken_folder}", limit_train=None, global_batch=2, workers=workers))


class Notes(Observer):
    """Keeps what it is told."""

    notes: tuple[str, ...] = ()

    def note(self, text: str) -> None:
        self.notes += (text,)


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_bfloat16_without_instructions_for_it_is_said_to_be_slow(recipe, monkeypatch, has_bfloat16):
    known = {"architecture": "x86_64", "avx512_bf16": has_bfloat16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    observer = Notes()
    train(recipe(precision="bf16-mixed", device="cpu", epochs=1, limit_train=64), observer=observer)
    assert any("--precision 32-true" in note for note in observer.notes) != has_bfloat16


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_run_that_ends_in_its_warm_up_is_told(recipe, epochs):
    observer = Notes()
    train(recipe(epochs=epochs, warmup_epochs=2, limit_train=64), observer=observer)
    assert any("never reaches its peak" in note for note in observer.notes) == (epochs == 1)


def test_unreadable_images_are_left_out_on_request_and_said_once(recipe, broken_folder):
    observer = Notes()
    settings = {"data": f"folder:{broken_folder}", "limit_train": None, "global_batch": 2, "skip_unreadable": True}
    result = train(recipe(**settings, epochs=2), observer=observer)
    assert len(result.reports) == 2
    assert len(observer.notes) == 1
    assert "2.png" in observer.notes[0]


def test_a_step_without_images_is_passed_over_and_one_with_a_single_image_not_mixed(recipe, broken_folder):
    files = sorted((broken_folder / "train").rglob("*.png"))
    for file in files[1:]:
        file.write_bytes(b"not an image")
    observer = Notes()
    settings = {"data": f"folder:{broken_folder}", "limit_train": None, "global_batch": 2, "skip_unreadable": True}
    (report,) = train(recipe(**settings, epochs=1, mixup=0.8), observer=observer).reports
    assert report.step == 4
    assert sum("none of its 2 images can be read" in note for note in observer.notes) == 3
    files[0].write_bytes(b"not an image")
    with pytest.raises(UserError, match="none of the images of epoch 1 can be read"):
        train(recipe(**settings, epochs=1, output=broken_folder / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 1000}, "--global-batch is 1000, more than the 320 images"),
        ({"global_batch": 1, "mixup": 0.8}, "mix pairs of images: give --global-batch 2 or more"),
        ({"patch_size": 3}, "nearest sizes that fit: 6x6 or 9x9"),
        ({"pixel_swaps": 40}, "--pixel-swaps is 40, an image of 8x8 pixels has 32 pairs"),
        ({"embed_dim": 66, "pos_embed": "sincos"}, "multiple of 4, not 66"),
        ({"model": "resnet18", "pos_embed": "none"}, "resnet18 cannot be made .*pos_embed"),
        ({"embed_dim": 20}, "headdim"),
        ({"device": "nonsense"}, "device 'nonsense'"),
        ({"weights": "/no/such/file.pth"}, "no such weight file"),
    ],
)
def test_bad_recipes_are_refused_before_work_is_done(recipe, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(recipe(**changes, output=tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()
