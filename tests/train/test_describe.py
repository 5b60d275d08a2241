import json
import subprocess

import pytest
from PIL import Image

from patchscale import checkout
from patchscale.train.describe import describe_run, plot_curves


def starts_of(folder) -> list[dict]:
    return json.loads((folder / "run.json").read_text())["starts"]


def test_a_folder_says_what_ran_how_and_where(tmp_path):
    describe_run(tmp_path, {"model": "m", "lr": 0.1}, ["patchscale", "train", "--output", "my run"], processes=4)
    assert json.loads((tmp_path / "recipe.json").read_text()) == {"model": "m", "lr": 0.1}
    (start,) = starts_of(tmp_path)
    assert start["command"] == "patchscale train --output 'my run'"
    assert start["processes"] == 4
    assert {"python", "torch", "torchvision", "timm", "patchscale", "tensorboard"} <= start["versions"].keys()
    assert all(start[key] for key in ("time", "host", "devices", "cpu", "threads", "platform", "folder"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["recipe.json", "run.json"]


def test_a_run_that_goes_on_adds_its_start(tmp_path, monkeypatch):
    monkeypatch.delenv("PATCHSCALE_OPS", raising=False)
    describe_run(tmp_path, {"lr": 0.1}, ["first"])
    monkeypatch.setenv("PATCHSCALE_OPS", "native")
    describe_run(tmp_path, {"lr": 0.2}, None)
    assert [start["PATCHSCALE_OPS"] for start in starts_of(tmp_path)] == [None, "native"]
    assert [start["command"] for start in starts_of(tmp_path)] == ["first", None]
    assert json.loads((tmp_path / "recipe.json").read_text()) == {"lr": 0.2}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"starts": 3}'])
def test_a_damaged_account_of_earlier_starts_does_not_stop_a_run(tmp_path, damage):
    (tmp_path / "run.json").write_text(damage)
    describe_run(tmp_path, {}, ["again"])
    assert [start["command"] for start in starts_of(tmp_path)] == ["again"]


def git(folder, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_package_s_checkout_and_of_no_repository_around_it(tmp_path, monkeypatch):
    package = tmp_path / "lib" / "patchscale"
    (package / "train").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(checkout, "__file__", str(package / "checkout.py"))

    def described() -> dict | None:
        describe_run(tmp_path, {}, None)
        return starts_of(tmp_path)[-1]["git"]

    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "a user's own work, with an environment inside")
    assert described() is None
    git(tmp_path, "add", "lib")
    git(tmp_path, "commit", "-q", "-m", "a checkout")
    assert described() == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (package / "__init__.py").write_text("changed")
    assert described() == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": True}


def test_without_git_a_run_is_described_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    describe_run(tmp_path, {}, None)
    assert starts_of(tmp_path)[0]["git"] is None


def write_rows(folder, rows) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


FULL = {"train_loss": 2.0, "val_loss": 1.5, "ema_val_loss": 1.4, "top1": 40.0, "ema_top1": 45.0, "lr": 1e-3}


@pytest.mark.parametrize("epochs", [1, 300])
def test_curves_are_drawn_of_one_epoch_and_of_many(tmp_path, epochs):
    write_rows(tmp_path, [{"epoch": e, "step": e} | FULL for e in range(1, epochs + 1)])
    plot_curves(tmp_path)
    assert Image.open(tmp_path / "curves.png").size == (1560, 400)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


@pytest.mark.parametrize("missing", [*FULL, "epoch", "step"])
def test_a_missing_quantity_is_left_out(tmp_path, missing):
    row = {k: v for k, v in ({"epoch": 1, "step": 1} | FULL).items() if k != missing}
    write_rows(tmp_path, [row, row])
    plot_curves(tmp_path)
    assert Image.open(tmp_path / "curves.png").width == (1040 if missing == "lr" else 1560)


def test_values_that_are_no_numbers_are_gaps(tmp_path):
    write_rows(
        tmp_path,
        [{"epoch": 1, "lr": 0.0}, {"epoch": 2, "val_loss": None, "top1": "?"}, {"epoch": "x", "train_loss": 1}],
    )
    plot_curves(tmp_path)
    assert Image.open(tmp_path / "curves.png").width == 520  # of the learning rate alone


def test_without_rows_nothing_is_drawn(tmp_path):
    plot_curves(tmp_path)
    write_rows(tmp_path, [{"epoch": 1, "step": 1}])
    plot_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()
