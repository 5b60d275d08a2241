"""Optimiser steps: against what the published code computed, and against the recurrences written out in float64."""

import csv
import json
import math
from dataclasses import replace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from patchscale.errors import UserError
from patchscale.models import Adventurer
from patchscale.tasks.classification import Classification
from patchscale.train.optimiser import Updates, freeze, make_optimizer, make_schedule, peak_lr
from patchscale.train.processes import Processes, make_fabric
from patchscale.train.recipe import Recipe


def tiny(**changes) -> Adventurer:
    return Adventurer(**({"img_size": 8, "patch_size": 4, "num_classes": 5, "embed_dim": 32, "depth": 2} | changes))


def alone(recipe: Recipe) -> Processes:
    return Processes(make_fabric(recipe))


def rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=peak_lr(recipe))
    set_rates = make_schedule(optimizer, recipe, steps_per_epoch)
    result = []
    for step in range(recipe.epochs * steps_per_epoch):
        set_rates(step)
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


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("1_128", {"epochs": 300, "lr": 5e-4, "global_batch": 1024, "unscale_lr": False}),
        ("2_224", {"epochs": 100, "lr": 5e-4, "global_batch": 1024, "unscale_lr": False}),
        ("3_224", {"epochs": 20, "lr": 1e-5, "global_batch": 512, "unscale_lr": True}),
    ],
)
def test_the_published_schedule_is_the_published_codes(stage, changes, parity):
    with open(parity(f"lr_stage{stage}.csv")) as file:
        rows = [row["lr_in_use_while_training_epoch_t"] for row in csv.DictReader(file)]
    expected = [float(value) for value in rows if value]
    found = rates(Recipe("m", "d", schedule="published", warmup_epochs=5, **changes), steps_per_epoch=3)
    assert len(expected) == changes["epochs"]
    for epoch, value in enumerate(expected):
        assert found[3 * epoch : 3 * epoch + 3] == pytest.approx([value] * 3, rel=1e-12, abs=0), epoch


def test_the_linear_rule_scales_the_peak_alone():
    recipe = Recipe("m", "d", lr=5e-4, global_batch=1024, unscale_lr=False, epochs=20, warmup_epochs=5)
    assert peak_lr(recipe) == pytest.approx(1e-3)
    assert rates(recipe, 10)[0] == recipe.warmup_lr
    assert peak_lr(Recipe("m", "d", lr=5e-4, global_batch=1024)) == 5e-4


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_groups_are_the_published_ones_in_the_published_order(layer_decay, parity):
    expected = json.loads(parity("param_groups_tiny.json").read_text())[f"layer_decay_{layer_decay}"]
    with torch.device("meta"):
        model = timm.create_model("adventurer_tiny_patch16_224")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = make_optimizer(model, Recipe("m", "d", layer_decay=layer_decay, weight_decay=0.05)).param_groups
    assert [[names[id(p)] for p in g["params"]] for g in groups] == [g["params"] for g in expected]
    assert [g["weight_decay"] for g in groups] == [g["weight_decay"] for g in expected]
    assert [g["lr_scale"] for g in groups] == pytest.approx([g["lr_scale"] for g in expected], rel=1e-12)


@pytest.mark.parametrize("schedule", ["step", "published"])
def test_layer_decay_scales_the_warm_up_and_the_lowest_rate_too(schedule):
    recipe = Recipe("m", "d", epochs=10, warmup_epochs=2, layer_decay=0.5, schedule=schedule)
    optimizer = make_optimizer(tiny(), recipe)
    set_rates = make_schedule(optimizer, recipe, 1)
    plain = rates(recipe, 1)
    for step, rate in enumerate(plain):
        set_rates(step)
        # Patches and tables are three levels below the head, the blocks two and one.
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(
            [rate * scale for scale in (0.125, 0.125, 1, 1, 0.25, 0.25, 0.5, 0.5)], rel=1e-12
        )


def published_run(parity):
    """The fixture's tensors, hyper-parameters, and its recipe and model in our words."""
    path = parity("train_plain.safetensors")
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    recipe = Recipe(
        "adventurer_tiny_patch4",
        "none",
        epochs=config["epochs"],
        global_batch=config["batch"],
        lr=config["lr"],
        unscale_lr=config["unscaled_lr"],
        min_lr=config["min_lr"],
        warmup_lr=config["warmup_lr"],
        warmup_epochs=config["warmup_epochs"],
        schedule="published",
        betas=tuple(config["betas"]),
        weight_decay=config["weight_decay"],
        layer_decay=config["layer_decay"],
        ema_decay=config["ema_decay"],
        clip_grad=config["clip_grad"],
        precision="64-true",
        device="cpu",
    )
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_classes")
    model = Adventurer(**{name: config[name] for name in names}, flip="released").double()
    tensors = load_file(path)
    init = {k.removeprefix("init."): v.double() for k, v in tensors.items() if k.startswith("init.")}
    model.load_state_dict(init)
    return tensors, config, recipe, model


def test_nine_steps_are_those_of_the_published_loop(parity, assert_near):
    tensors, config, recipe, model = published_run(parity)
    updates = Updates(model, recipe, config["steps_per_epoch"], alone(recipe))
    task = Classification(config["num_classes"])
    losses, used = [], []
    for step, (images, targets) in enumerate(
        zip(tensors["batches.images"].double(), tensors["batches.targets"].double(), strict=True)
    ):
        losses.append(updates.step(step, images, targets, lambda x, y: task.loss(model, x, y)))
        used.append([group["lr"] for group in updates.optimizer.param_groups])
    errors = (torch.tensor(losses, dtype=torch.float64) / tensors["losses_f64"] - 1).abs()
    print(f"losses: largest relative error {errors.max():.1e}")
    assert errors.max() <= 1e-9
    by_epoch = torch.tensor(used, dtype=torch.float64)[:: config["steps_per_epoch"]]
    assert torch.allclose(by_epoch, tensors["lr_per_epoch_per_group"], rtol=1e-12, atol=0)
    for kind, found in (("final", model), ("ema", updates.ema.module)):
        state = found.state_dict()
        off = 0
        for name, value in state.items():
            expected = tensors[f"{kind}.{name}"]
            # Stored as the float32 nearest to the float64 result: ours must round to it, or lie within 1e-9 of where
            # the rounding turns.
            differs = value.float() != expected
            off += int(differs.sum())
            half_step = (torch.nextafter(expected, value.float()) - expected).double().abs() / 2
            distance = (value - expected.double()).abs()
            assert (distance <= half_step + 1e-9 * value.abs())[differs].all(), f"{kind}.{name}"
            assert_near(value, expected, 2**-24, f"{kind}.{name}")
        total = sum(v.numel() for v in state.values())
        print(f"{kind} weights: {total - off} of {total} round to the stored float32")
        assert off <= 1e-4 * total
        moved = torch.cat([(value - tensors[f"init.{name}"]).flatten() for name, value in state.items()])
        assert moved.norm() > 1e-3  # the run did something


def written_out(model, config, batches, layer_decay, clip_grad, schedule):
    """Clipped AdamW with layer decay and a moving average, one parameter at a time, in float64."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    parameters = dict(model.named_parameters())
    depth = 1 + max(int(name.split(".")[1]) for name in parameters if name.startswith("layers."))
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    average = {name: p.detach().clone() for name, p in parameters.items()}
    losses, norms = [], []
    for step, (images, targets) in enumerate(batches):
        loss = -(targets * model(images).log_softmax(1)).sum(1).mean()
        gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
        losses.append(loss.item())
        norm = sum((g * g).sum() for g in gradients.values()).sqrt()
        norms.append(norm.item())
        factor = min(1.0, clip_grad / (norm.item() + 1e-6))
        with torch.no_grad():
            for name, p in parameters.items():
                if name.startswith("layers."):
                    level = 1 + int(name.split(".")[1])
                else:
                    level = depth + 1 if name.startswith(("head", "norm_f")) else 0
                rate = schedule[step] * layer_decay ** (depth + 1 - level)
                decays = p.ndim > 1 and name not in ("cls_token", "pos_embed")
                g = gradients[name] * factor
                first[name] = beta1 * first[name] + (1 - beta1) * g
                second[name] = beta2 * second[name] + (1 - beta2) * g * g
                p.mul_(1 - rate * (config["weight_decay"] if decays else 0.0))
                corrected = first[name] / (1 - beta1 ** (step + 1))
                scale = (second[name] / (1 - beta2 ** (step + 1))).sqrt() + eps
                p.sub_(rate * corrected / scale)
                average[name] = config["ema_decay"] * average[name] + (1 - config["ema_decay"]) * p
    return losses, norms, average


@pytest.mark.parametrize("parts", [1, 2])
def test_layer_decay_clipping_and_accumulation_are_their_recurrences(parity, assert_near, parts):
    tensors, config, recipe, model = published_run(parity)
    _, _, _, other = published_run(parity)
    layer_decay, clip_grad = 0.65, 10.4
    recipe = replace(recipe, layer_decay=layer_decay, clip_grad=clip_grad)
    batches = list(zip(tensors["batches.images"].double(), tensors["batches.targets"].double(), strict=True))
    # Epochs 0 and 1 at the start of a warm-up of two epochs, epoch 2 half way up.
    schedule = [2e-4] * 6 + [(2e-4 + 1e-3) / 2] * 3
    losses, norms, average = written_out(other, config, batches, layer_decay, clip_grad, schedule)
    assert min(norms) < clip_grad < max(norms), norms  # clips some steps, not all
    updates = Updates(model, recipe, config["steps_per_epoch"], alone(recipe), parts)
    task = Classification(config["num_classes"])
    found = [updates.step(i, x, y, lambda a, b: task.loss(model, a, b)) for i, (x, y) in enumerate(batches)]
    assert found == pytest.approx(losses, rel=1e-9)
    for name, value in other.named_parameters():
        assert_near(model.get_parameter(name), value, 1e-9, name)
        assert_near(updates.ema.module.get_parameter(name), average[name], 1e-9, f"average of {name}")


def test_a_loss_that_is_not_finite_changes_nothing():
    model = tiny()
    recipe = Recipe("m", "d", ema_decay=0.5, device="cpu")
    updates = Updates(model, recipe, 1, alone(recipe))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images, targets = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    assert math.isnan(updates.step(0, images, targets, lambda x, y: model(x).sum() * math.nan))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_stay_and_all_others_move():
    model = tiny()
    freeze(model, ["patch_embed.*", "layers.0.*"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recipe = Recipe("m", "d", warmup_epochs=0, device="cpu")
    updates = Updates(model, recipe, 1, alone(recipe))
    images, targets = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    updates.step(0, images, targets, lambda x, y: nn.functional.cross_entropy(model(x), y))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(("patch_embed.", "layers.0.")), name


@pytest.mark.parametrize(("pattern", "message"), [("layer.0.*", "begin with cls_token.*layers"), ("*", "nothing to")])
def test_a_freeze_that_fits_nothing_or_leaves_nothing_is_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        freeze(tiny(), [pattern])


def test_gradients_of_all_parts_and_steps_lie_where_the_first_put_them():
    model = tiny()
    recipe = Recipe("m", "d", epochs=1, device="cpu", global_batch=6)
    updates = Updates(model, recipe, 1, alone(recipe), parts=3)
    places = []

    def loss(images, targets):
        places.append([p.grad.data_ptr() for p in model.parameters() if p.grad is not None])
        return nn.functional.cross_entropy(model(images), targets)

    for step in range(2):
        updates.step(step, torch.randn(6, 3, 8, 8), torch.zeros(6, dtype=torch.long), loss)
    assert len(places[1]) == len(list(model.parameters()))
    assert places[0] == places[3] == []
    assert places[1] == places[2] == places[4] == places[5]
