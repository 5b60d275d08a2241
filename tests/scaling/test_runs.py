import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from patchscale.errors import UserError
from patchscale.models import Adventurer
from patchscale.scaling.runs import image_flops, make_study, planned_flops, read_fields, read_study, to_recipe_file
from patchscale.scaling.study import find_series, group_cells
from patchscale.train.recipe import Recipe
from patchscale.train.stages import read_recipe_file

TINY = {"model": "adventurer_tiny_patch1", "data": "digits", "img_size": 8, "embed_dim": 32, "depth": 1}
STUDIES = Path(__file__).resolve().parents[2] / "studies"


def names(content):
    return [run.name for run in make_study(content, "s").runs]


def test_every_combination_of_listed_values_is_a_run():
    study = make_study({"all": TINY | {"patch_size": [4, 2], "seed": [0, 1, 2]}}, "s")
    assert [r.name for r in study.runs] == [f"patch{p}-seed{s}" for p in (4, 2) for s in (0, 1, 2)]
    assert {r.control for r in study.runs} == {"scale"}
    assert study.runs[4].stages["train"].patch_size == 2
    assert study.runs[4].stages["train"].seed == 1


def test_a_field_that_is_a_list_is_swept_by_a_list_of_lists():
    assert names({"all": TINY | {"crop_scale": [0.5, 1.0]}}) == ["run"]
    runs = make_study({"all": TINY | {"crop_scale": [[0.5, 1.0], [1.0, 1.0]]}}, "s").runs
    assert [r.stages["train"].crop_scale for r in runs] == [(0.5, 1.0), (1.0, 1.0)]


def test_arms_have_their_own_fields_and_controls():
    study = make_study(
        {
            "all": TINY | {"patch_size": [4, 2]},
            "arm": [
                {"control": "scale"},
                {"control": "length", "tokens_a_side": 4},
                {"control": "width", "patch_size": 4, "embed_dim": [64, 128]},
            ],
        },
        "s",
    )  # fmt: skip
    assert [r.name for r in study.runs] == [
        "scale-patch4", "scale-patch2", "length-patch4", "length-patch2", "width-width64", "width-width128",
    ]  # fmt: skip
    assert [r.stages["train"].img_size for r in study.runs] == [8, 8, 16, 8, 8, 8]


def test_arms_of_several_models_are_told_apart():
    arms = [{"model": "adventurer_tiny_patch1"}, {"model": "deit_tiny_patch1_64"}]
    assert names({"all": {"data": "digits", "seed": [0, 1]}, "arm": arms}) == [
        "adventurer_tiny-seed0", "adventurer_tiny-seed1", "deit_tiny-seed0", "deit_tiny-seed1",
    ]  # fmt: skip


def test_what_a_row_of_results_does_not_tell_is_told_by_the_control():
    swept = {"pixel_swaps": [0, 8], "seed": [0, 1]}
    runs = make_study({"all": TINY | swept, "arm": [{"control": "swaps"}]}, "s").runs
    assert [r.control for r in runs] == ["swaps, pixel_swaps 0"] * 2 + ["swaps, pixel_swaps 8"] * 2
    assert [r.name for r in runs] == [f"swaps{n}-seed{s}" for n in (0, 8) for s in (0, 1)]


def test_extended_sequences_are_told_apart_from_patch_sizes(cell):
    swept = TINY | {"patch_size": [8, 4, 2], "extend": [1, 2]}
    runs = make_study({"all": swept}, "s").runs
    assert [(r.name, r.control) for r in runs] == [
        ("patch8-extend1", "scale"), ("patch8-extend2", "scale, extend 2"),
        ("patch4-extend1", "scale"), ("patch4-extend2", "scale, extend 2"),
        ("patch2-extend1", "scale"), ("patch2-extend2", "scale, extend 2"),
    ]  # fmt: skip
    rows = []
    for run in runs:
        recipe = run.stages["train"]
        tokens = (8 * recipe.extend // recipe.patch_size) ** 2
        rows.append(cell(recipe.patch_size, img_size=8, tokens=tokens, control=run.control))
    plain, extended = find_series(group_cells(rows))
    assert [group.first.tokens for group in plain.groups] == [1, 4, 16]
    assert [group.first.tokens for group in extended.groups] == [4, 16, 64]
    (fixed,) = make_study({"all": TINY | {"extend": 4}}, "s").runs
    assert fixed.control == "scale, extend 4"


def test_a_control_that_a_study_names_is_left_as_it_is():
    """Its rows are compared under that name, those of studies that have finished among them."""
    study = read_study(STUDIES / "digits_extend.toml")
    assert {run.control for run in study.runs} == {"scale", "extend"}


def test_pre_training_is_counted_with_its_decoder_and_is_no_study_by_itself():
    mae = Recipe.from_dict(TINY | {"patch_size": 2, "task": "masked-autoencoding", "decoder_depth": 1})
    forward, training = planned_flops(mae)
    deeper = planned_flops(replace(mae, decoder_depth=2))
    assert training > 2 * forward > 0
    assert deeper[0] > forward
    with pytest.raises(UserError, match="compares classifiers: the last stage's task is masked-autoencoding"):
        make_study({"all": TINY | {"task": "masked-autoencoding"}}, "s")


def test_an_arm_may_be_a_recipe_of_several_stages():
    study = make_study({"all": {"seed": [0, 1], "depth": 1}, "arm": [{"recipe": "digits_three_stage"}]}, "s")
    stages = read_recipe_file("digits_three_stage").stages
    for run in study.runs:
        assert list(run.stages) == list(stages)
        assert [r.patch_size for r in run.stages.values()] == [s["patch_size"] for s in stages.values()]
        assert {r.depth for r in run.stages.values()} == {1}


def test_at_equal_flops_the_dearest_run_keeps_its_epochs():
    study = make_study({"hold": "flops", "all": TINY | {"patch_size": [8, 4, 2, 1], "epochs": 3}}, "s")
    recipes = [run.stages["train"] for run in study.runs]
    assert recipes[-1].epochs == 3
    costs = []
    for recipe in recipes:
        model = Adventurer(8, recipe.patch_size, 1, 10, embed_dim=32, depth=1)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 1, 8, 8)).sum().backward()
        costs.append(counter.get_total_flops() * recipe.epochs)
    assert max(costs) / min(costs) < 1.2


def test_epochs_that_cannot_make_flops_equal_are_told(caplog):
    sweep = TINY | {"embed_dim": [32, 64, 96]}
    study = make_study({"hold": "flops", "all": sweep | {"epochs": 1}}, "s")
    costs = {run.name: planned_flops(r)[1] * r.epochs for run in study.runs for r in run.stages.values()}
    dearest = costs[study.runs[-1].name]
    name, share = max(((n, c / dearest) for n, c in costs.items()), key=lambda pair: abs(pair[1] - 1))
    assert abs(share - 1) > 0.05
    assert f"{name} takes {100 * share:.0f}% of the dearest's" in caplog.text
    caplog.clear()
    make_study({"hold": "flops", "all": sweep | {"epochs": 100}}, "s")
    assert not caplog.text


def test_at_equal_flops_a_model_of_several_patch_sizes_costs_their_mean():
    sizes = [8, 4, 2, 1]
    each = make_study({"all": TINY | {"patch_size": sizes, "epochs": 1}}, "s")
    costs = [planned_flops(run.stages["train"]) for run in each.runs]
    together = TINY | {"model": "adventurer_tiny_patch8", "patch_sizes": sizes, "epochs": 1}
    (one,) = make_study({"all": together}, "s").runs
    forward, training = planned_flops(one.stages["train"])
    assert (forward, training) == (sum(f for f, _ in costs) // 4, sum(t for _, t in costs) // 4)


def test_at_equal_flops_fewer_images_are_seen_more_often():
    study = make_study({"hold": "flops", "all": TINY | {"limit_train": [64, 640], "epochs": 2}}, "s")
    assert [run.stages["train"].epochs for run in study.runs] == [20, 2]


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([32, 64]), st.integers(1, 3))
def test_flops_are_those_of_the_counter_on_real_tensors(patch_size, width, depth):
    real = Adventurer(8, patch_size, 1, 10, embed_dim=width, depth=depth)
    with torch.device("meta"):
        model = Adventurer(8, patch_size, 1, 10, embed_dim=width, depth=depth)
    forward, training = image_flops(model, 1, (8, 8))
    with FlopCounterMode(display=False) as counter:
        loss = real(torch.zeros(1, 1, 8, 8)).sum()
        assert counter.get_total_flops() == forward
        loss.backward()
    assert counter.get_total_flops() == training


def test_flags_are_read_as_the_fields_they_name():
    words = "--model m --patch-size 8 4 --lr 1e-3 --crop-scale 1 1 --batch-size 32 --grad-checkpointing --workers 0"
    assert read_fields(words.split()) == {
        "model": "m", "patch_size": [8, 4], "lr": 1e-3, "crop_scale": [1, 1], "global_batch": 32,
        "grad_checkpointing": True, "workers": 0,
    }  # fmt: skip
    with pytest.raises(UserError, match="unknown flag --patchsize"):
        read_fields(["--patchsize", "4"])
    with pytest.raises(UserError, match="--epochs is 'ten'"):
        read_fields(["--epochs", "ten"])
    with pytest.raises(UserError, match="--patch-size is given twice: give all its values after one"):
        read_fields(["--patch-size", "8", "4", "--seed", "0", "--patch-size", "2"])
    with pytest.raises(UserError, match="--batch-size is given twice"):
        read_fields(["--global-batch", "16", "--batch-size", "8"])


def test_a_run_is_written_as_a_recipe_file_that_says_the_same(tmp_path):
    study = make_study({"all": TINY | {"crop_scale": [0.5, 1.0], "ema_decay": 0.9, "seed": 3}}, "s")
    (tmp_path / "run.toml").write_text(to_recipe_file(study.runs[0]))
    stages = read_recipe_file(str(tmp_path / "run.toml")).stages
    assert Recipe.from_dict(stages["train"]) == study.runs[0].stages["train"]


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.toml")), ids=lambda p: p.stem)
def test_studies_that_come_along_can_be_read(path, tmp_path):
    study = read_study(path, {"data": "digits"})
    assert len(study.runs) > 1
    json.dumps([r.to_dict() for run in study.runs for r in run.stages.values()])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"grid": {}}, "unknown grid; a study has all, arm, hold, name"),
        ({"name": "", "all": TINY}, "name is '', expected a name for rows and a folder"),
        ({"name": "../x", "all": TINY}, "name is '../x', expected a name for rows and a folder"),
        ({"hold": "time"}, "hold is 'time', expected one of epochs, flops"),
        ({"all": {"data": "digits"}}, "names no model: add it under .all., or give --model"),
        ({"all": TINY | {"patchsize": 4}}, "unknown field patchsize"),
        ({"all": TINY | {"seed": []}}, "seed is an empty list"),
        ({"all": TINY | {"output": "x"}}, "--output FOLDER"),
        ({"all": TINY | {"epochs": "ten"}}, "epochs is 'ten'"),
        ({"all": TINY, "arm": [{}, {}]}, "two runs are run"),
        ({"all": 3}, "all is 3"),
        ({"hold": "flops", "all": {}, "arm": [{"recipe": "digits_three_stage"}]}, "runs of one stage"),
        ({"all": TINY | {"control": 3}}, r"control is 3, expected one name; each further one is an \[\[arm\]\]"),
        ({"all": TINY, "arm": [{"control": ["b", "c"]}, {}]}, r"control is \['b', 'c'\], expected one name"),
        ({"all": TINY | {"recipe": 3}}, "recipe is 3, expected one name"),
        ({"all": TINY, "arm": [1, 2]}, r"arm has 1 in it; the fields of an arm go under \[\[arm\]\]"),
        ({"all": TINY | {"tokens_a_side": "x", "patch_size": 4}}, "tokens_a_side is 'x', expected a whole number"),
        ({"all": TINY | {"tokens_a_side": [4, 0], "patch_size": 4}}, "tokens_a_side is 0, expected a whole number, 1"),
        ({"all": TINY | {"tokens_a_side": 4, "patch_size": "y"}}, "patch_size is 'y', expected a whole number"),
        ({"all": TINY | {"seed": [0, -1]}}, "--seed is -1, expected 0 or more"),
    ],
)
def test_what_a_study_cannot_say_is_refused(content, message):
    with pytest.raises(UserError, match=message):
        make_study(content, "s")


def test_a_file_that_is_no_study_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml is not a study"):
        read_study(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(UserError, match=r"bad\.toml is not a study"):
        read_study(tmp_path / "bad.toml")
