import csv
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from patchscale.errors import UserError
from patchscale.models.weight_files import read_checkpoint
from patchscale.train.evaluate import evaluate
from patchscale.train.observer import Observer
from patchscale.train.optimiser import make_schedule, peak_lr
from patchscale.train.recipe import Recipe
from patchscale.train.stages import read_recipe_file, recipe_names, run_stages

REPOSITORY = Path(__file__).parents[2]
PUBLISHED = [n for n in recipe_names() if n.startswith("adventurer_")]


def stages_of(name: str) -> dict[str, Recipe]:
    return {k: Recipe.from_dict({"data": "digits"} | v) for k, v in read_recipe_file(name).stages.items()}


def last(folder: Path) -> dict:
    return torch.load(folder / "last.pt", weights_only=True)


class Stop(Observer):
    """Interrupts after an epoch, as Ctrl-C would."""

    def __init__(self, epoch: int) -> None:
        self.stop = epoch

    def epoch(self, report) -> None:
        if report.epoch == self.stop:
            raise KeyboardInterrupt


@pytest.fixture
def three(recipe):
    """Patches of 4, then 2, then 1 pixel, in seconds."""
    common = recipe(limit_train=64, epochs=2, ema_decay=0.9)
    return {
        "coarse": common,
        "finer": replace(common, patch_size=2, which="ema"),
        "pixels": replace(common, patch_size=1, epochs=1, resize="published"),
    }


def test_every_size_and_patch_size_has_its_recipe():
    expected = {f"adventurer_{s}_patch{p}" for s in ("tiny", "small", "base", "large") for p in (16, 8, 4, 2, 1)}
    expected |= {f"{name}_128" for name in expected} | {f"adventurer_base_patch{p}_64" for p in (16, 8, 4, 2, 1)}
    expected |= {f"adventurer_{size}_patch1_64" for size in ("tiny", "small")}
    assert set(PUBLISHED) == expected


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_makes_its_model_and_says_what_was_published(name):
    import timm

    file = read_recipe_file(name)
    for recipe in stages_of(name).values():
        with torch.device("meta"):
            sizes = {"img_size": recipe.img_size, "patch_size": recipe.patch_size}
            model = timm.create_model(recipe.model, **{k: v for k, v in sizes.items() if v is not None})
        assert recipe.model in (name.removesuffix("_128").removesuffix("_64"), recipe.model)
        if name in PUBLISHED:
            assert model.patch_embed.patch_size[0] == int(name.split("patch")[1].split("_")[0])
            assert recipe.model == "_".join(name.split("_")[:3])
    if name in PUBLISHED:
        assert {"top1", "cost"} <= file.published.keys()
        final = list(stages_of(name).values())[-1].img_size
        assert final == int(name.split("_")[3] if name.count("_") == 3 else 224)


FROM_MASKS = [n for n in recipe_names() if n.endswith(("_mae", "_probe"))]
VISION_TRANSFORMERS = [
    n for n in recipe_names() if n.startswith(("deit_", "pixel_transformer_")) and n not in FROM_MASKS
]


def test_every_vision_transformer_with_a_published_result_has_its_recipe():
    from patchscale.models.published import PUBLISHED_VIT

    named = {f"deit_{s}_patch16" for s in ("tiny", "small", "base")} | {"deit_base_patch8"}
    named |= {f"deit_base_patch{p}_64" for p in (16, 8, 4, 2, 1)} | {f"deit_base_patch{p}_128" for p in (16, 8, 4, 2)}
    cifar = {f"pixel_transformer_{s}{p}_cifar100" for s in ("tiny", "small") for p in ("", "_patch2")}
    small = {f"pixel_transformer_{s}{p}_28" for s in ("small", "base", "large") for p in ("", "_patch2")}
    assert set(VISION_TRANSFORMERS) == named | cifar | small
    for name in VISION_TRANSFORMERS:
        (recipe,) = stages_of(name).values()
        stem = "_".join(recipe.model.split("_")[:-1]) if recipe.model.endswith(("_28", "_32")) else recipe.model
        img = recipe.img_size or int(recipe.model.split("_")[-1])
        known = PUBLISHED_VIT.get(f"{stem}_{img}")
        assert known is not None or name in cifar, name
        assert known in (None, read_recipe_file(name).published["top1"]), name


@pytest.mark.parametrize("name", VISION_TRANSFORMERS)
def test_warm_up_warms_up(name):
    """The published example of the pixel transformer starts it at the peak rate."""
    (recipe,) = stages_of(name).values()
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.AdamW([parameter], lr=peak_lr(recipe))
    set_rates = make_schedule(optimizer, recipe, steps_per_epoch=10)
    rates = []
    for step in range(0, 10 * recipe.epochs, 10):
        set_rates(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] <= 1e-6
    late = recipe.schedule == "published"
    peak = int(recipe.warmup_epochs) + late
    assert rates[1 + late : peak] == sorted(rates[1 + late : peak])
    assert max(rates) == pytest.approx(peak_lr(recipe), rel=0.03)  # the cosine is counted from the first step
    assert abs(rates.index(max(rates)) - peak) <= 1
    assert rates[-1] < 0.02 * peak_lr(recipe)


def test_the_pixel_transformers_recipe_is_the_published_one():
    (recipe,) = stages_of("pixel_transformer_tiny_cifar100").values()
    assert (recipe.lr, recipe.weight_decay, recipe.betas) == (0.004, 0.3, (0.9, 0.95))
    assert (recipe.epochs, recipe.global_batch, recipe.warmup_epochs) == (2400, 1024, 20)
    assert (recipe.crop_scale, recipe.grayscale, recipe.color_jitter, recipe.hflip) == ((0.2, 1.0), 0.2, 0.4, 0.5)
    assert peak_lr(recipe) == 0.004
    (deit,) = stages_of("deit_base_patch1_64").values()
    assert peak_lr(deit) == pytest.approx(1e-3)


def test_masked_autoencoding_comes_before_classification_and_its_published_results_are_told():
    assert set(FROM_MASKS) == {"digits_mae", "pixel_transformer_tiny_cifar100_probe"} | {
        f"pixel_transformer_{s}{p}_cifar100_mae" for s in ("tiny", "small") for p in ("", "_patch2")
    }
    for name in FROM_MASKS:
        first, second = stages_of(name).values()
        assert (first.task, second.task) == ("masked-autoencoding", "classification")
        assert (first.model, first.img_size, first.mask_ratio) == (second.model, second.img_size, 0.75)
        if name.endswith("_cifar100_mae"):
            assert first.model.startswith(name.split("_cifar")[0])
            published = read_recipe_file(name).published
            assert published["from_scratch"] == read_recipe_file(name.removesuffix("_mae")).published["top1"]
            assert published["top1"] > published["from_scratch"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_accuracies_are_those_of_the_published_weights(name):
    from patchscale.models.published import published_top1

    known = published_top1(name) or published_top1(f"{name}_224")
    if known is not None:
        assert read_recipe_file(name).published["top1"] == known


def test_base_is_the_published_recipe_as_its_schedules_were_recorded(parity):
    for (stage, recipe), file in zip(
        stages_of("adventurer_base_patch1").items(), ("1_128", "2_224", "3_224"), strict=True
    ):
        with open(parity(f"lr_stage{file}.csv")) as rows:
            used = [row["lr_in_use_while_training_epoch_t"] for row in csv.DictReader(rows)]
        assert recipe.epochs == sum(bool(value) for value in used), stage
        assert recipe.schedule == "published"
        assert peak_lr(recipe) == pytest.approx({"3_224": 1e-5}.get(file, 1e-3))
        assert recipe.warmup_epochs == 5
    assert [r.drop_path for r in stages_of("adventurer_base_patch1").values()] == [0.1, 0.4, 0.6]
    assert [r.drop_path for r in stages_of("adventurer_small_patch8").values()] == [0.1, 0.2, 0.4]
    assert [r.layer_decay for r in stages_of("adventurer_large_patch4").values()] == [1.0, 0.9, 0.95]


def test_stages_start_from_each_other_resized_and_say_how(three, tmp_path):
    done = list(run_stages(three, tmp_path))
    assert [d.name for d in done] == ["coarse", "finer", "pixels"]
    assert [d.folder.name for d in done] == ["1_coarse", "2_finer", "3_pixels"]
    states = [last(d.folder) for d in done]
    assert [s["model"]["pos_embed"].shape[1] for s in states] == [5, 17, 65]
    assert [s["model"]["patch_embed.proj.weight"].shape[-1] for s in states] == [4, 2, 1]
    assert states[0]["resized"] == {}
    assert states[1]["resized"]["patch_embed"].startswith("4x4 to 2x2 pixels: pseudo-inverse")
    assert states[1]["resized"]["pos_embed"] == "2x2 to 4x4 patches: bicubic without antialiasing, last entry kept"
    assert states[2]["resized"]["pos_embed"] == "4x4 to 8x8 patches: bicubic without antialiasing, first entry kept"
    assert [s["recipe"]["resize"] for s in states] == ["correct", "correct", "published"]
    assert Path(states[2]["recipe"]["weights"]) == tmp_path / "2_finer" / "last.pt"
    assert json.loads((tmp_path / "3_pixels" / "recipe.json").read_text())["patch_size"] == 1
    assert evaluate(str(tmp_path / "3_pixels" / "last.pt")).scores == done[-1].result.scores


@pytest.mark.parametrize("which", ["model", "ema"])
def test_a_stage_starts_from_exactly_the_weights_that_it_was_told_to(three, tmp_path, which):
    # A second stage that learns nothing ends where it began.
    stages = {
        "first": three["coarse"],
        "second": replace(three["coarse"], epochs=1, lr=1e-30, warmup_epochs=0, min_lr=0, weight_decay=0, which=which),
    }
    folders = [d.folder for d in run_stages(stages, tmp_path)]
    before = read_checkpoint(folders[0] / "last.pt", which).weights
    other = read_checkpoint(folders[0] / "last.pt", "ema" if which == "model" else "model").weights
    after = read_checkpoint(folders[1] / "last.pt").weights
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert any(not torch.equal(after[k], v) for k, v in other.items())


def test_the_same_call_again_goes_on_and_ends_with_the_same_weights(three, tmp_path):
    whole = [d.folder for d in run_stages(three, tmp_path / "whole")]
    with pytest.raises(KeyboardInterrupt):
        list(run_stages(three, tmp_path / "parts", observer=lambda s: Stop(1) if s == "finer" else Observer()))
    assert not (tmp_path / "parts" / "3_pixels").exists()
    epochs: list[tuple[str, int]] = []

    def record(stage):
        class Record(Observer):
            def epoch(self, report):
                epochs.append((stage, report.epoch))

        return Record()

    again = list(run_stages(three, tmp_path / "parts", observer=record))
    assert epochs == [("finer", 2), ("pixels", 1)]
    assert [len(d.result.reports) for d in again] == [0, 1, 1]
    for left, right in zip(whole, [d.folder for d in again], strict=True):
        states = last(left)["model"], last(right)["model"]
        assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert [d.result.reports for d in run_stages(three, tmp_path / "parts")] == [(), (), ()]


def test_one_stage_alone_by_name_or_number(three, tmp_path):
    with pytest.raises(UserError, match="stage finer starts from the weights of stage coarse, which is not finished"):
        list(run_stages(three, tmp_path, only="2"))
    assert [d.name for d in run_stages(three, tmp_path, only="1")] == ["coarse"]
    assert [d.name for d in run_stages(three, tmp_path, only="finer")] == ["finer"]
    with pytest.raises(UserError, match=r"--stage is 4, expected one of 1 \(coarse\), 2 \(finer\), 3 \(pixels\)"):
        list(run_stages(three, tmp_path, only="4"))
    # Weights of one's own come before the last stage's.
    given = three | {"pixels": replace(three["pixels"], weights=str(tmp_path / "1_coarse" / "last.pt"))}
    list(run_stages(given, tmp_path, only="pixels"))
    assert last(tmp_path / "3_pixels")["resized"]["patch_embed"].startswith("4x4 to 1x1")


def test_a_wrong_last_stage_is_found_before_the_first_one_runs(three, tmp_path):
    with pytest.raises(UserError, match="stage pixels: image size 8x8 is not a whole number of 3x3 patches"):
        list(run_stages(three | {"pixels": replace(three["pixels"], patch_size=3)}, tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_last_stage_that_freezes_what_is_not_there_is_found_before_the_first_one_runs(three, tmp_path):
    with pytest.raises(UserError, match=r"stage pixels: .*blocks"):
        list(run_stages(three | {"pixels": replace(three["pixels"], freeze=("blocks.*",))}, tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_augment": "nonsense"}, "--auto-augment 'nonsense' is no policy"),
        ({"data": "folder:/nonexistent"}, "/nonexistent"),
        ({"trackers": ("foo",)}, "there is no tracker 'foo'"),
        ({"global_batch": 65}, "--global-batch is 65, more than the 64"),
        ({"which": "ema"}, "--which ema is of stage finer, which keeps no average"),
    ],
)
def test_what_a_last_stage_cannot_have_is_found_before_the_first_one_runs(three, tmp_path, changes, message):
    stages = three | {"finer": replace(three["finer"], ema_decay=None), "pixels": replace(three["pixels"], **changes)}
    with pytest.raises(UserError, match=rf"stage pixels: .*{message}"):
        list(run_stages(stages, tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_file_of_ones_own_builds_on_another(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'base = "adventurer_base_patch16"\nstages = ["finetune", "extra"]\n'
        "[all]\nlr = 2e-5\n[stage.extra]\nepochs = 7\n[stage.finetune]\nepochs = 3\n"
    )
    file = read_recipe_file(str(tmp_path / "mine.toml"))
    assert list(file.stages) == ["finetune", "extra"]
    assert file.stages["finetune"]["epochs"] == 3
    assert file.stages["finetune"]["drop_path"] == 0.6
    assert file.stages["finetune"]["lr"] == 2e-5
    assert file.stages["extra"] == {"lr": 2e-5, "epochs": 7}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[all", "is not a recipe"),
        ("", "no stages"),
        ("[stage.a]\nepoch = 3", r"stage a: unknown field epoch \(did you mean epochs\?\)"),
        ("[stages.a]\nepochs = 3", "stages is"),
        ("[stage.a]\n[alls]\nx = 1", "has alls; a recipe has all, base"),
        ('stages = ["b"]\n[stage.a]', "no stage b; it has a"),
        ('base = "adventurer_bas_patch16"', "unknown recipe 'adventurer_bas_patch16'; did you mean adventurer_base"),
        ('base = "x.toml"', "its own base"),
        ("[stage]\na = 3", r"stage\.a is 3"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        read_recipe_file(str(tmp_path / "x.toml"))
    assert "\n" not in str(refused.value)


def test_unknown_names_and_files_are_refused():
    with pytest.raises(UserError, match=r"did you mean .*adventurer_base_patch16"):
        read_recipe_file("adventurer_base_patch61")
    with pytest.raises(UserError, match=r"no such recipe file: nothing\.toml"):
        read_recipe_file("nothing.toml")


def test_the_wheel_holds_every_recipe(tmp_path):
    import subprocess

    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = {Path(name).stem for name in zipfile.ZipFile(wheel).namelist() if "patchscale/recipes/" in name}
    assert inside - {"README"} == set(recipe_names())
