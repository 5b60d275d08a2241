import json
import math
from pathlib import Path

import pytest

from patchscale.errors import UserError
from patchscale.train.recipe import Recipe


def test_a_recipe_survives_json():
    recipe = Recipe("adventurer_tiny_patch4", "digits", img_size=(8, 16), output=Path("runs/x"), ema_decay=0.9)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("epochs", 0, "--epochs"),
        ("global_batch", -1, "--global-batch"),
        ("device_batch", 0, "--device-batch"),
        ("lr", 0.0, "--lr"),
        ("layer_decay", 1.5, "--layer-decay"),
        ("crop_scale", (0.5, 0.2), "--crop-scale"),
        ("hflip", 1.5, "--hflip"),
        ("drop_path", -0.1, "--drop-path"),
        ("eval_crop", 0.0, "--eval-crop"),
        ("ema_decay", 1.0, "--ema-decay"),
        ("clip_grad", 0.0, "--clip-grad"),
        ("seed", -1, "--seed is -1, expected 0 or more"),
        ("lr", math.inf, "--lr"),
        ("betas", (1.0, 1.0), "--betas is 1.0 1.0, expected 0 up to"),
        ("betas", (0.9, math.nan), "--betas"),
        ("workers", -1, "--workers is -1, expected 0 or more"),
        ("min_lr", -1.0, "--min-lr"),
        ("warmup_lr", -1.0, "--warmup-lr"),
        ("warmup_epochs", -1.0, "--warmup-epochs"),
        ("warmup_epochs", math.nan, "--warmup-epochs"),
        ("weight_decay", -1.0, "--weight-decay"),
        ("weight_decay", math.nan, "--weight-decay"),
        ("mixup", math.nan, "--mixup"),
        ("cutmix", -1.0, "--cutmix"),
        ("color_jitter", -1.0, "--color-jitter"),
        ("distillation_alpha", 7.0, "--distillation-alpha"),
        ("distillation_tau", 0.0, "--distillation-tau"),
        ("pixel_swaps", -1, "--pixel-swaps"),
        ("swap_distance", 0, "--swap-distance"),
        ("swap_distance", 2, "--swap-distance is for --pixel-swaps: give both"),
    ],
)
def test_bad_values_are_refused_by_the_name_of_their_flag(field, value, flag):
    with pytest.raises(UserError, match=flag):
        Recipe("m", "d", **{field: value})


def test_a_field_of_another_version_is_named():
    with pytest.raises(UserError, match="colour"):
        Recipe.from_dict({"model": "m", "data": "d", "colour": 1})


@pytest.mark.parametrize(
    ("limits", "expected"),
    [({}, None), ({"limit_train": 100}, 100), ({"limit_train": 100, "limit_val": 0}, None), ({"limit_val": 5}, 5)],
)
def test_the_validation_limit_follows_the_training_limit(limits, expected):
    assert Recipe("m", "d", **limits).val_limit == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", "ten"),
        ("epochs", 1.5),
        ("crop_scale", [0.1]),
        ("freeze", "head.*"),
        ("precision", "float"),
        ("unscale_lr", 1),
        ("mixup", True),
        ("img_size", [8, 8, 8]),
    ],
)
def test_a_value_of_another_type_is_named(field, value):
    with pytest.raises(UserError, match=f"the recipe's {field} is"):
        Recipe.from_dict({"model": "m", "data": "d", field: value})


def test_plain_values_of_the_right_types_are_taken():
    values = {"lr": 1, "img_size": [8, 16], "freeze": ["a", "b"], "output": "x", "teacher": None, "eval_crop": 1}
    assert Recipe.from_dict({"model": "m", "data": "d"} | values).freeze == ("a", "b")


def test_distillation_and_teacher_go_together():
    with pytest.raises(UserError, match="--distillation soft or hard, and --teacher"):
        Recipe("m", "d", teacher="resnet18")
    with pytest.raises(UserError, match="--distillation soft or hard, and --teacher"):
        Recipe("m", "d", distillation="hard")
