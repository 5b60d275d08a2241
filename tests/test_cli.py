import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

from patchscale.cli import main

SMALL = ["--img-size", "8", "--embed-dim", "32", "--depth", "2", "--batch-size", "32", "--limit-train", "320"]
TRAIN = ["train", "--model", "adventurer_tiny_patch4", "--data", "digits", "--workers", "0", "--hflip", "0", *SMALL]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small finished run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main([*TRAIN, "--epochs", "2", "--lr", "4e-3", "--output", str(folder)]) == 0
    return folder


def fails(capsys, arguments, status=2):
    """The one line on standard error with which a command ends."""
    assert main([str(a) for a in arguments]) == status
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("patchscale: ")
    return lines[0]


def test_eval_repeats_training_from_the_checkpoint_alone(run, capsys):
    assert main(["eval", "--weights", str(run / "last.pt")]) == 0
    scores, recorded = capsys.readouterr().out.strip().splitlines()
    assert scores.startswith(recorded.removeprefix("training recorded: "))


def test_a_run_is_resumed_by_its_own_recipe_changed_by_flags(run, tmp_path, capsys):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    changed = ["train", "--resume", str(copy), "--epochs", "3"]
    assert main(changed) == 2
    assert "epochs was 2, is now 3. Give --override-recipe" in capsys.readouterr().err
    assert main([*changed, "--override-recipe"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^epoch (\d+)", printed, re.M) == ["3"]


def test_eval_tries_the_flip_rules_and_keeps_the_most_accurate(run, capsys):
    # Depth 2 gives "pairs" and "released" the same blocks, none: the trained rule is alone in flipping one.
    assert main(["eval", "--weights", str(run), "--flip", "auto"]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"(alternate|pairs|released)( \*)? +│ +([\d.]+)", out)
    assert [name for name, _, _ in rows] == ["alternate", "pairs", "released"]
    assert rows[1][2] == rows[2][2]
    assert next(name for name, star, _ in rows if star) == "alternate"
    assert float(rows[0][2]) > float(rows[1][2])


def test_predict_prints_the_classes_and_writes_the_picture(run, tmp_path, capsys):
    from patchscale.data.sources import open_source

    image, _ = open_source("digits", "train").dataset[0]
    image.save(tmp_path / "digit.png")
    picture = tmp_path / "new" / "features.png"
    arguments = ["predict", tmp_path / "digit.png", "--weights", run, "--features", picture, "--top", "3"]
    assert main([str(a) for a in arguments]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    shares = [float(line.split("%")[0]) for line in lines[:3]]
    assert shares == sorted(shares, reverse=True)
    assert {line.split()[-1] for line in lines[:3]} <= set("0123456789")
    assert Image.open(picture).size == (896, 448)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--top", "0"), "--top is 0"), (("--features", "out.xyz"), "out.xyz: end the name in .png, .jpg or .webp")],
)
def test_predict_says_what_it_cannot_do_before_it_begins(flags, message, capsys):
    assert message in fails(capsys, ["predict", "/no/such/image.png", "--weights", "/no/such/file.pth", *flags])


@pytest.mark.parametrize("name", ["run[lr=1e-3]", "[bold]run", ":cat:"])
def test_names_are_printed_as_they_are(name, run, tmp_path, capsys):
    assert main(["convert", str(run), str(tmp_path / name / "out.safetensors")]) == 0
    assert f"wrote {tmp_path / name}/out.safetensors" in capsys.readouterr().out


def test_convert_writes_what_timm_reads(run, tmp_path):
    import timm

    assert main(["convert", str(run / "last.pt"), str(tmp_path / "out")]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    weights = torch.load(run / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.pretrained_cfg["mean"] == [0.305]


def test_a_converted_file_is_fed_as_the_run_was(run, tmp_path, capsys):
    assert main(["convert", str(run / "last.pt"), str(tmp_path / "out")]) == 0
    limits = ["--data", "digits", "--limit-val", "320"]
    capsys.readouterr()
    assert main(["eval", "--weights", str(run / "last.pt"), *limits]) == 0
    expected = capsys.readouterr().out.splitlines()[0]
    assert main(["eval", "--weights", str(tmp_path / "out"), *limits, "--batch-size", "32"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == expected


def test_models_lists_published_accuracies(capsys):
    assert main(["models", "*base_patch16_*"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"adventurer_base_patch16_224 +│ +197 │ +98\.7 │ +82\.6", out)


def test_models_lists_every_family(capsys):
    assert main(["models", "*_tiny_patch1_*"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"pixel_transformer_tiny_patch1_32 +│ +1,025 │ +5\.7 │", out)
    assert re.search(r"deit_tiny_patch1_64 +│ +4,097 │", out)
    assert main(["models", "deit_base_patch1_64"]) == 0
    assert "81.3" in capsys.readouterr().out


def test_models_lists_names_without_an_image_size_where_they_are_asked_for(capsys):
    assert main(["models", "*_base_patch16"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"{family}_base_patch16 +│ +197 │", out) for family in ("adventurer", "deit"))
    assert main(["models", "*"]) == 0
    assert not re.search(r"adventurer_base_patch16 ", capsys.readouterr().out)


@pytest.mark.parametrize("model", ["deit_tiny_patch4", "pixel_transformer_tiny_patch1_32"])
def test_a_vision_transformer_goes_through_every_command(model, tmp_path, capsys):
    import timm

    folder, patch = tmp_path / "run", ["--patch-size", "4"]
    arguments = ["train", "--model", model, "--data", "digits", "--workers", "0", "--hflip", "0", *SMALL, *patch]
    arguments[arguments.index("--embed-dim") + 1] = "48"
    assert main([*arguments, "--epochs", "1", "--output", str(folder)]) == 0
    capsys.readouterr()
    assert main(["eval", "--weights", str(folder / "last.pt")]) == 0
    scores, recorded = capsys.readouterr().out.strip().splitlines()
    assert scores.startswith(recorded.removeprefix("training recorded: "))
    Image.new("L", (8, 8), 7).save(tmp_path / "a.png")
    picture = ["--features", str(tmp_path / "b.png")]
    assert main(["predict", str(tmp_path / "a.png"), "--weights", str(folder), *picture]) == 0
    assert Image.open(tmp_path / "b.png").size == (896, 448)
    assert main(["convert", str(folder / "last.pt"), str(tmp_path / "out")]) == 0
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    weights = torch.load(folder / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(value, weights[name]) for name, value in by_timm.state_dict().items())


def test_env_names_the_implementation_of_each_operator(capsys, monkeypatch):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"native kernels +for CPUs, with PATCHSCALE_OPS=native: \S", out)
    assert re.search(r"linear layers +float32 on CPUs: (oneDNN|PyTorch's default)", out)
    assert re.search(r"ssd_scan +torch \(the default on", out)
    monkeypatch.setenv("PATCHSCALE_OPS", "reference")
    assert main(["env"]) == 0
    assert re.search(r"ssd_scan +reference \(set by PATCHSCALE_OPS\)", capsys.readouterr().out)
    monkeypatch.setenv("PATCHSCALE_OPS", "fast")
    assert main(["env"]) == 2
    printed = capsys.readouterr()
    assert re.search(r"ssd_scan +none, see below", printed.out)
    assert "unknown operator implementation 'fast'" in printed.err


def test_a_wrong_model_name_offers_near_ones(capsys):
    line = fails(capsys, ["train", "--model", "adventurer_bas_patch16_224", "--data", "digits"])
    assert "adventurer_base_patch16_224" in line


def test_a_patch_that_does_not_divide_the_image_names_sizes_that_do(capsys, tmp_path):
    line = fails(capsys, [*TRAIN, "--patch-size", "3", "--output", tmp_path / "x"])
    assert "6x6 or 9x9" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["train", "--model", "adventurer_tiny_patch4", "--data", "folder:/no/such/folder"],
        ["train", "--model", "adventurer_tiny_patch4", "--data", "nonsense"],
        ["train", "--resume", "/no/such/run"],
        ["eval", "--weights", "/no/such/file.pth", "--data", "digits"],
        ["predict", "/no/such/image.png", "--weights", "/no/such/file.pth"],
        ["convert", "/no/such/file.pth", "out"],
        ["models", "nonsense"],
    ],
    ids=lambda arguments: " ".join(arguments[:3]),
)
def test_bad_input_is_one_line_and_exit_status_2(capsys, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(capsys, arguments)


def test_a_hostile_file_is_refused_by_name_and_not_run(capsys, tmp_path):
    import os

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": {"a": torch.zeros(1)}, "extra": Hostile()}, tmp_path / "bad.pth")
    line = fails(capsys, ["eval", "--weights", tmp_path / "bad.pth", "--data", "digits"])
    assert "posix.mkdir" in line
    assert not (tmp_path / "ran").exists()


def test_an_unreadable_image_is_named(capsys, tmp_path, run):
    (tmp_path / "a.png").write_bytes(b"no image")
    assert "a.png" in fails(capsys, ["predict", tmp_path / "a.png", "--weights", run])


def test_an_output_that_cannot_be_written_is_refused_before_training(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write to" in fails(capsys, [*TRAIN, "--epochs", "1", "--output", tmp_path / "file" / "run"])


def test_a_loss_that_is_not_finite_is_one_line_and_exit_status_1(capsys, tmp_path):
    arguments = [*TRAIN, "--epochs", "5", "--lr", "1e30", "--warmup-epochs", "0", "--output", tmp_path / "run"]
    assert main([str(a) for a in arguments]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"the loss is (nan|inf) at step \d+ with learning rate 9\.99e\+29; no checkpoint", line)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["eval", "--help"]])
def test_help_is_no_error(arguments):
    found = subprocess.run([sys.executable, "-m", "patchscale", *arguments], capture_output=True, text=True)
    assert found.returncode == 0
    assert "Traceback" not in found.stderr
    assert len(found.stdout.splitlines()) > 5


RECIPE = ["train", "--recipe", "digits_three_stage", "--embed-dim", "32", "--depth", "1", "--limit-train", "64"]


def test_a_recipe_runs_its_stages_and_flags_change_them_all(capsys, tmp_path):
    arguments = [*RECIPE, "--epochs", "1", "--output", str(tmp_path / "run")]
    stages = ["coarse", "finer", "pixels"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^(\w+)  last: ", printed, re.M) == stages
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["1_coarse", "2_finer", "3_pixels"]
    assert main(arguments) == 0
    assert re.findall(r"^\w+  (?:last|epoch)", capsys.readouterr().out, re.M) == [f"{s}  last" for s in stages]
    # One epoch more: the stage goes on.
    assert main([*arguments, "--stage", "coarse", "--epochs", "2", "--override-recipe"]) == 0
    assert re.findall(r"^coarse  epoch (\d+)", capsys.readouterr().out, re.M) == ["2"]


def test_a_recipe_is_shown_as_the_flags_leave_it(capsys):
    assert main(["train", "--recipe", "adventurer_base_patch8", "--lr", "0.25", "--show"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if not line.startswith(" ")][:3] == [
        "1 pretrain",
        "2 intermediate",
        "3 finetune",
    ]
    assert out.count("lr = 0.25") == out.count("model = adventurer_base_patch8") == 3
    assert "published top1: 83.9" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "digits_three_stages"], "unknown recipe 'digits_three_stages'; did you mean digits_three_stage"),
        (["--recipe", "adventurer_tiny_patch8"], "names no data (published recipes are for ImageNet-1k: folder:PATH)"),
        (["--recipe", "digits_three_stage", "--stage", "4"], "expected one of 1 (coarse), 2 (finer), 3 (pixels)"),
        (["--recipe", "digits_three_stage", "--stage", "pixels"], "starts from the weights of stage finer"),
        (["--recipe", "digits_three_stage", "--resume", "/no/such/run"], "leave out --resume"),
        (["--model", "adventurer_tiny_patch4", "--data", "digits", "--stage", "1"], "give --recipe too"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, ["train", *arguments])


def test_what_a_command_does_not_need_is_not_loaded_before_it():
    code = "import sys, patchscale.cli; print([m for m in ('torchmetrics', 'scipy', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
