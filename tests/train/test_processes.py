"""Several processes of one run on this machine, over gloo: the same training as one process, and none hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from patchscale.errors import INTERRUPTED, Interrupted, UserError
from patchscale.train.checkpoint import read_training_state
from patchscale.train.loop import train
from patchscale.train.observer import Observer
from patchscale.train.processes import images_per_process, make_fabric
from patchscale.train.recipe import Recipe


def flags(recipe: Recipe) -> list[str]:
    defaults, words = Recipe("", ""), []
    for field in fields(Recipe):
        value = getattr(recipe, field.name)
        if value != getattr(defaults, field.name):
            values = value if isinstance(value, tuple) else (value,)
            words += ["--" + field.name.replace("_", "-"), *map(str, values)]
    return words


def torchrun(words: list[str], count: int = 2, script: Path | None = None) -> subprocess.CompletedProcess:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    program = [str(script)] if script is not None else ["-m", "patchscale"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATCHSCALE_TEST": "1"}
    return subprocess.run(
        [*run, *program, "train", *words], capture_output=True, text=True, timeout=300, env=environment, check=False
    )


def rows(folder: Path) -> list[dict]:
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(one: Path, other: Path) -> None:
    for mine, theirs in zip(rows(one), rows(other), strict=True):
        for name in ("train_loss", "val_loss", "ema_val_loss", "top1"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5), name
    states = [torch.load(folder / "last.pt", weights_only=True) for folder in (one, other)]
    for kind in ("model", "model_ema"):
        for name, value in states[0][kind].items():
            # Adam divides by small numbers: rounding in a gradient near zero is a step of either sign.
            assert (states[1][kind][name] - value).norm() <= 1e-3 * value.norm() + 1e-4, name


@pytest.fixture
def one(recipe, tmp_path):
    """A run in one process: a step in parts, clipped, averaged; 101 images to evaluate on, which two cannot share."""
    settings = {"epochs": 2, "ema_decay": 0.9, "clip_grad": 1.0, "device_batch": 8, "limit_val": 101}
    run = recipe(**settings, output=tmp_path / "one")
    return run, train(run)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_and_score_each_image_once(one, tmp_path, strategy):
    run, result = one
    two = replace(run, output=tmp_path / "two", strategy=strategy)
    done = torchrun(flags(two))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("over 101 images") == result.reports.__len__() * 2 + 2  # said by one process
    assert_same_training(result.folder, two.output)
    assert result.scores.images == 101
    assert json.loads((two.output / "run.json").read_text())["starts"][0]["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(one, tmp_path, strategy):
    run, result = one

    class Stop(Observer):
        def progress(self, progress) -> None:
            if progress.step == 7:
                os.kill(os.getpid(), signal.SIGTERM)

    moved = replace(run, output=tmp_path / "moved")
    with pytest.raises(Interrupted):
        train(moved, observer=Stop())
    done = torchrun(flags(replace(moved, strategy=strategy)))
    assert done.returncode == 0, done.stderr
    assert "going on" in done.stderr
    assert_same_training(result.folder, moved.output)


BROKEN = """
import os, sys
import patchscale.train.loop as loop
from patchscale.cli import main
from patchscale.tasks.classification import Classification
from patchscale.errors import UserError
healthy, calls = Classification.loss, []
def loss(self, model, images, targets):
    calls.append(1)
    value = healthy(self, model, images, targets)
    if os.environ["RANK"] == "1" and len(calls) == 5:
        if sys.argv[-1] == "nan":
            return value * float("nan")
        if sys.argv[-1] == "error":
            raise UserError("the disk is full: make room")
        os.kill(os.getpid(), 9)
    return value
Classification.loss = loss
sys.exit(main(sys.argv[1:-1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"), [("nan", "the loss is nan at step 5"), ("error", "the disk is full: make room")]
)
def test_a_failure_in_one_process_stops_all_with_its_words(recipe, tmp_path, how, message):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    start = time.monotonic()
    done = torchrun([*flags(recipe()), how], script=script)
    assert time.monotonic() - start < 60 + 30  # the starting of two processes included
    assert done.returncode != 0
    # At least by the first that ends: torchrun kills the other.
    assert f"patchscale: {message}" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_killed_process_does_not_leave_the_others_waiting(recipe, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    start = time.monotonic()
    done = torchrun([*flags(recipe()), "kill"], script=script)
    assert time.monotonic() - start < 60 + 30
    assert done.returncode != 0


@pytest.mark.slow
def test_devices_are_started_from_the_command_line_alone(recipe, tmp_path):
    run = recipe(epochs=1, devices=2, output=tmp_path / "two")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "patchscale", "train", *flags(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert len(rows(run.output)) == 1
    assert done.stdout.count("last: ") == 1


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_to_the_whole_group_stops_the_run_and_not_its_readers(recipe, number):
    """As Ctrl-C and Slurm send it."""
    run = recipe(epochs=200, workers=2)
    child = subprocess.Popen(
        [sys.executable, "-m", "patchscale", "train", *flags(run)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (run.output / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(child.pid, number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == INTERRUPTED, said
    assert "saved in" in said
    assert "Traceback" not in said
    assert read_training_state(run.output)["step"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cpu", "precision": "16-mixed"}, "16-mixed needs an NVIDIA GPU"),
        ({"device": "cuda", "devices": 2}, "cuda"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(recipe, changes, message):
    if changes["device"] == "cuda" and torch.cuda.device_count() > 1:
        pytest.skip("this machine can")
    with pytest.raises(UserError, match=message):
        make_fabric(recipe(**changes))


def test_numbers_other_than_were_started_are_refused(recipe, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--devices is 3, but torchrun started 2"):
        make_fabric(recipe(devices=3))
    with pytest.raises(UserError, match="--nodes is 1, but torchrun started 2"):
        make_fabric(recipe(nodes=1))


def test_a_batch_that_processes_cannot_share_is_refused_with_near_ones():
    with pytest.raises(UserError, match="10, which 4 processes cannot share: try 8 or 12"):
        images_per_process(10, 4)
    with pytest.raises(UserError, match=r"try 4$"):
        images_per_process(3, 4)
    assert images_per_process(4096, 128) == 32


def test_a_batch_that_the_processes_cannot_share_is_refused_before_they_are_started(recipe):
    with pytest.raises(UserError, match="--global-batch is 32, which 64 processes cannot share: try 64"):
        make_fabric(recipe(global_batch=32, devices=64))
    with pytest.raises(UserError, match="--global-batch is 32, which 6 processes cannot share: try 30 or 36"):
        make_fabric(recipe(global_batch=32, devices=2, nodes=3))


@pytest.mark.slow
def test_a_batch_that_the_processes_cannot_share_is_refused_by_all(recipe):
    done = torchrun(flags(recipe(global_batch=33)))
    assert done.returncode != 0
    assert "--global-batch is 33, which 2 processes cannot share: try 32 or 34" in done.stderr
