"""Runs of masked autoencoding: they learn, go on exactly, and give weights to classifiers."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from patchscale.cli import main
from patchscale.errors import Interrupted, UserError
from patchscale.tasks.masked_autoencoding import MaskedAutoencoder
from patchscale.train.evaluate import evaluate
from patchscale.train.loop import train
from patchscale.train.observer import Observer
from patchscale.train.optimiser import make_optimizer
from patchscale.train.recipe import Recipe
from patchscale.train.stages import run_stages

MAE = {"task": "masked-autoencoding", "patch_size": 2, "decoder_dim": 32, "decoder_depth": 1}
VIT = {"model": "pixel_transformer_tiny_patch1_32", "embed_dim": 24}


class Stop(Observer):
    """Asks the run to stop after some steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def progress(self, progress) -> None:
        self.left -= progress.phase == "train"
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def saved(folder: Path, name: str = "last.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def digest(folder: Path) -> str:
    """Of all weights, their averages and the optimiser's numbers."""
    state = saved(folder)
    moments = [v[k] for v in state["optimizer"]["state"].values() for k in ("exp_avg", "exp_avg_sq")]
    weights = state["model"], state["model_ema"], state["task"]["model"], state["task"]["ema"]
    tensors = [t for part in weights for t in part.values()] + moments
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


@pytest.mark.parametrize("model", [{}, VIT], ids=["adventurer", "vit"])
def test_a_run_learns_and_is_scored_from_its_checkpoint(recipe, model, capsys):
    result = train(recipe(**MAE, **model, epochs=2, ema_decay=0.9))
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert rows[1]["val_loss"] == result.scores.loss < rows[0]["val_loss"]
    assert rows[1]["ema_val_loss"] == result.reports[1].ema_scores.loss
    assert "top1" not in rows[1]
    assert result.best_epoch == 2
    last = str(result.folder / "last.pt")
    assert evaluate(last).scores == result.scores == evaluate(last).recorded
    assert evaluate(last, which="ema").scores == result.reports[1].ema_scores
    assert main(["eval", "--weights", last]) == 0
    assert "reconstruction loss" in capsys.readouterr().out
    for flag in (["--flip", "auto"], ["--patch-size", "4"]):
        assert main(["eval", "--weights", last, *flag]) == 2
        assert "for classifiers" in capsys.readouterr().err
    pictures = sorted((result.folder / "reconstructions").iterdir())
    assert [p.name for p in pictures] == ["epoch_0001.png", "epoch_0002.png"]
    assert Image.open(pictures[1]).size == (3 * 132, 8 * 132)


@pytest.mark.parametrize("model", [{}, VIT], ids=["adventurer", "vit"])
def test_layers_decay_and_the_decoder_does_not(recipe, model, caplog):
    settings = recipe(**MAE, **model, layer_decay=0.5)
    module = MaskedAutoencoder(timm.create_model(settings.model, num_classes=0, img_size=8, patch_size=2, depth=2))
    rates = {
        id(p): group["lr_scale"] for group in make_optimizer(module, settings).param_groups for p in group["params"]
    }
    named = {name: rates[id(p)] for name, p in module.named_parameters()}
    assert {rate for name, rate in named.items() if name.startswith("decoder.")} == {1.0}
    assert named["backbone.patch_embed.proj.weight"] == 0.125
    assert sorted({named[n] for n in named if ".0." in n and n.startswith("backbone")}) == [0.25]
    assert not caplog.records


def test_a_run_that_is_stopped_goes_on_to_the_same_weights(recipe, tmp_path):
    settings = MAE | {"epochs": 2, "limit_train": 128, "ema_decay": 0.9, "drop_path": 0.1, "device_batch": 16}
    whole = train(recipe(**settings, output=tmp_path / "whole"))
    parts = recipe(**settings, output=tmp_path / "parts")
    for after in (3, 2):
        with pytest.raises(Interrupted):
            train(parts, observer=Stop(after))
    assert train(parts).scores == whole.scores
    assert digest(tmp_path / "whole") == digest(tmp_path / "parts")


def test_the_same_patches_are_hidden_however_a_batch_is_divided(recipe, tmp_path):
    settings = MAE | {"epochs": 1, "limit_train": 64}
    whole = train(recipe(**settings, output=tmp_path / "whole"))
    divided = train(recipe(**settings, device_batch=8, output=tmp_path / "divided"))
    assert divided.reports[0].train_loss == pytest.approx(whole.reports[0].train_loss, rel=1e-5)


@pytest.mark.parametrize("model", [{}, VIT], ids=["adventurer", "vit"])
def test_its_weights_start_a_classifier_at_any_patch_size_and_a_probe_that_trains_the_head_alone(
    recipe, tmp_path, model
):
    few = {"limit_train": 64, "epochs": 1}
    first = {
        n: recipe(**stage, **model, **few) for n, stage in {"pretrain": MAE, "finetune": {"patch_size": 2}}.items()
    }
    done = list(run_stages(first, tmp_path / "stages"))
    assert saved(done[1].folder)["recipe"]["weights"] == str(done[0].folder / "last.pt")
    assert done[1].result.scores.images == 64
    before = saved(done[0].folder)["model"]
    probe = recipe(
        patch_size=2, **model, **few, weights=str(done[0].folder), freeze=("[!h]*",), output=tmp_path / "probe"
    )
    after = saved(train(probe).folder)["model"]
    assert after.keys() - before.keys() == {"head.weight", "head.bias"}
    assert all(torch.equal(before[name], after[name]) for name in before)
    finer = train(recipe(patch_size=1, **model, **few, weights=str(done[0].folder), output=tmp_path / "finer"))
    assert "pos_embed" in saved(finer.folder)["resized"]


def test_an_encoder_alone_is_no_classifier(recipe, tmp_path, capsys):
    folder = train(recipe(**MAE, limit_train=64, epochs=1)).folder
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    assert main(["predict", str(tmp_path / "image.png"), "--weights", str(folder)]) == 2
    assert "has no classifier: give --features" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "encoder")]) == 0
    capsys.readouterr()
    assert main(["eval", "--weights", str(tmp_path / "encoder"), "--data", "digits"]) == 2
    assert "has no classifier: train one, with --weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mask_ratio", 0.0, "--mask-ratio is 0.0"),
        ("mask_ratio", 1.5, "--mask-ratio is 1.5"),
        ("decoder_depth", 0, "--decoder-depth is 0"),
        ("mixup", 0.8, "--mixup does not go with --task masked-autoencoding"),
        ("teacher", "resnet18", "--teacher does not go"),
        ("extend", 2, "--extend does not go"),
        ("patch_sizes", (4, 2), "--patch-sizes does not go"),
    ],
)
def test_what_the_task_cannot_do_is_refused_by_flag(field, value, message):
    with pytest.raises(UserError, match=message):
        Recipe("m", "d", **{"task": "masked-autoencoding", field: value})


def test_a_grid_too_small_to_hide_something_is_refused_before_the_first_stage(recipe, tmp_path):
    stages = {"a": recipe(), "b": recipe(task="masked-autoencoding", patch_size=8)}
    with pytest.raises(UserError, match=r"stage b: --mask-ratio 0\.75 leaves 0 of the image's 1x1 patches visible"):
        next(iter(run_stages(stages, tmp_path / "stages")))
