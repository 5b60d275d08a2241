import math

import pytest
import torch
from torch import nn

from patchscale.errors import UserError
from patchscale.train.build import check_model_name, create_model, make_optimizer, make_schedule, run_folder
from patchscale.train.checkpoint import LAST
from patchscale.train.recipe import Recipe


def small():
    return create_model("adventurer_tiny_patch4", {"embed_dim": 32, "depth": 2, "img_size": 8, "num_classes": 10})


def test_an_unknown_model_is_refused_with_near_names():
    with pytest.raises(UserError, match="adventurer_base_patch16_224"):
        check_model_name("adventurer_base_patch16_242")


def test_any_timm_model_is_known():
    check_model_name("resnet18")


def test_arguments_that_a_model_does_not_take_are_refused():
    with pytest.raises(UserError, match="resnet18 cannot be made"):
        create_model("resnet18", {"flip": "alternate"})


def test_decay_is_for_matrices_and_kernels_alone():
    model = small()
    recipe = Recipe("m", "d", weight_decay=0.3)
    decays = {id(p): g["weight_decay"] for g in make_optimizer(model, recipe).param_groups for p in g["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        skipped = parameter.ndim <= 1 or name in ("pos_embed", "cls_token")
        assert decays[id(parameter)] == (0.0 if skipped else 0.3), name


def rates(recipe, steps_per_epoch):
    optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=recipe.lr)
    schedule = make_schedule(optimizer, recipe, steps_per_epoch)
    result = []
    for step in range(recipe.epochs * steps_per_epoch):
        schedule.step_update(step)
        result.append(optimizer.param_groups[0]["lr"])
    return result


def test_the_rate_warms_up_linearly_then_follows_a_cosine_over_the_whole_run():
    recipe = Recipe("m", "d", epochs=30, lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=5)
    found, total, warmup = rates(recipe, 10), 300, 50
    expected = [
        1e-6 + t * (1e-3 - 1e-6) / warmup
        if t < warmup
        else 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * t / total))
        for t in range(total)
    ]
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_warm_up_is_five_epochs_or_a_tenth_of_a_shorter_run():
    assert rates(Recipe("m", "d", epochs=100), 10).index(max(rates(Recipe("m", "d", epochs=100), 10))) == 50
    assert rates(Recipe("m", "d", epochs=10), 10).index(max(rates(Recipe("m", "d", epochs=10), 10))) == 10


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    (tmp_path / LAST).write_bytes(b"")
    with pytest.raises(UserError, match="--resume"):
        run_folder(Recipe("m", "d", output=tmp_path), None)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        run_folder(Recipe("m", "d", output=tmp_path / "file" / "run"), None)
