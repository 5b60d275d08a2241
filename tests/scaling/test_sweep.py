"""Whole sweeps on the digits, with models of a moment."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from patchscale.errors import Interrupted, UserError
from patchscale.files import locked
from patchscale.scaling.results import read_results, write_results
from patchscale.scaling.runs import make_study
from patchscale.scaling.sweep import is_finished, stage_folders, sweep
from patchscale.train.checkpoint import read_training_state
from patchscale.train.evaluate import evaluate
from patchscale.train.logs import read_rows
from patchscale.train.loop import train

TINY = {
    "model": "adventurer_tiny_patch1", "data": "digits", "img_size": 8, "embed_dim": 32, "depth": 1, "limit_train": 64,
    "global_batch": 16, "workers": 0, "device": "cpu", "trackers": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished sweep of two patch sizes, a run of three stages and one for both patch sizes at once."""
    study = make_study(
        {
            "name": "tiny",
            "all": TINY | {"epochs": 2},
            "arm": [
                {"patch_size": [8, 4]},
                {"control": "curriculum", "recipe": "digits_three_stage", "epochs": 1},
                {"control": "any", "patch_sizes": [8, 4]},
            ],
        },
        "s",
    )
    folder = tmp_path_factory.mktemp("sweep")
    seen = []
    cells = sweep(study, folder, 2, lambda states, left: seen.append([(s.state, s.share, left) for s in states]))
    return study, folder, cells, seen


def test_each_run_has_one_complete_row(done):
    _, folder, cells, _ = done
    assert read_results(folder) == cells
    assert [(c.control, c.patch_size, c.tokens, c.epochs, c.train_images) for c in cells] == [
        ("scale", 8, 1, 2, 64), ("scale", 4, 4, 2, 64), ("curriculum", 1, 64, 3, 64), ("any", 8, 1, 2, 64),
        ("any", 4, 4, 2, 64),
    ]  # fmt: skip
    for cell in cells:
        assert (cell.study, cell.family, cell.width, cell.depth, cell.seed) == ("tiny", "adventurer", 32, 1, 0)
        assert cell.val_images == 64
        assert cell.flops_training > cell.flops_forward > 0
        assert cell.seconds > 0
        assert re.fullmatch(r"[0-9a-f]{40}\+?|unknown", cell.commit)


def test_a_run_is_the_training_that_its_recipe_is(done, tmp_path):
    study, folder, cells, _ = done
    alone = train(replace(study.runs[1].stages["train"], output=tmp_path / "alone"))
    # Libraries add in an order that depends on where memory lies: two processes may differ in the last bits.
    assert alone.scores.loss == pytest.approx(cells[1].val_loss, rel=1e-5)
    here = torch.load(stage_folders(study.runs[1], folder)[0] / "last.pt", weights_only=True)["model"]
    there = torch.load(tmp_path / "alone" / "last.pt", weights_only=True)["model"]
    for name, value in here.items():
        torch.testing.assert_close(value, there[name], rtol=1e-3, atol=1e-4)


def test_a_curriculum_costs_what_its_stages_cost_together(done):
    _, _, (_, _, curriculum, *_), _ = done
    same = make_study({"all": TINY | {"epochs": 1, "patch_size": [4, 2, 1]}}, "s")
    from patchscale.scaling.runs import planned_flops

    assert curriculum.flops_training == 64 * sum(planned_flops(r.stages["train"])[1] for r in same.runs)


def test_a_model_of_several_patch_sizes_has_a_row_at_each(done):
    study, folder, cells, _ = done
    run = study.runs[3]
    weights = str(stage_folders(run, folder)[0] / "last.pt")
    found = evaluate(weights, patch_sizes=(8, 4), workers=0).by_patch
    separate, both = cells[:2], cells[3:]
    assert [(c.top1, c.val_loss) for c in both] == [(at.scores.top1, at.scores.loss) for at in found]
    assert [c.flops_forward for c in both] == [c.flops_forward for c in separate]
    assert {c.flops_training for c in both} == {sum(c.flops_training for c in separate) / 2}


def test_the_watcher_sees_runs_begin_and_end(done):
    _, _, _, seen = done
    assert [s for s, _, _ in seen[-1]] == ["done"] * 4
    assert "running" in {s for states in seen for s, _, _ in states}
    assert any(left is not None for states in seen for _, _, left in states)


def test_a_finished_sweep_runs_nothing_again(done):
    study, folder, cells, _ = done
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("last.pt")}
    assert sweep(study, folder) == cells
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("last.pt")} == before


def test_other_runs_under_the_same_names_are_refused(done):
    _, folder, _, _ = done
    other = make_study({"name": "tiny", "all": TINY | {"epochs": 3, "patch_size": [8, 4]}, "arm": [{}]}, "s")
    named = replace(other, runs=tuple(replace(r, name=f"scale-{r.name}") for r in other.runs))
    with pytest.raises(UserError, match=r"scale-patch8 holds a run of another recipe: epochs was 2, is now 3"):
        sweep(named, folder)


def test_a_run_that_fails_is_named_and_the_others_finish(tmp_path):
    study = make_study({"all": TINY | {"epochs": 1, "patch_size": 8, "lr": [1e-3, 2e-3]}}, "s")
    bad = replace(study.runs[0].stages["train"], global_batch=100)
    study = replace(study, runs=(replace(study.runs[0], stages={"train": bad}), study.runs[1]))
    with pytest.raises(
        UserError, match=r"lr0\.001 failed: stage train: --global-batch is 100, more than the 64 of --limit-train"
    ):
        sweep(study, tmp_path, 2)
    assert [is_finished(run, tmp_path) for run in study.runs] == [False, True]


STUDY = """
[all]
patch_size = [4, 2]
epochs = 30
save_minutes = 0.0
"""


def test_rows_of_other_runs_stay_in_the_file(done, tmp_path, cell):
    study, folder, cells, _ = done
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    write_results(tmp_path / "results.jsonl", [replace(cells[1], top1=1.0), cell(seed=7)])
    assert sweep(study, tmp_path) == cells
    assert read_results(tmp_path) == [cell(seed=7), *cells]


def test_a_sweep_that_is_stopped_loses_no_row(done, tmp_path):
    study, folder, cells, _ = done
    shutil.copy(folder / "results.jsonl", tmp_path)
    with pytest.raises(Interrupted, match="stopped with 0 of 4 runs finished"):
        sweep(study, tmp_path, 1, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert read_results(tmp_path) == cells


def test_results_that_cannot_be_read_are_refused_before_anything_is_done(done, tmp_path):
    (tmp_path / "results.jsonl").write_text('{"top1": 90}\n')
    with pytest.raises(UserError, match=r"results\.jsonl, line 1: the row lacks study"):
        sweep(done[0], tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"results.jsonl", ".lock"}
    assert (tmp_path / "results.jsonl").read_text() == '{"top1": 90}\n'


def test_an_empty_file_of_results_holds_no_rows(done, tmp_path):
    study, folder, cells, _ = done
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "results.jsonl").write_text("")
    assert sweep(study, tmp_path) == read_results(tmp_path) == cells


@pytest.mark.skipif(importlib.util.find_spec("fcntl") is None, reason="no locks on this system")
def test_two_sweeps_are_not_at_work_in_one_folder(done, tmp_path):
    script = (
        "import sys, pathlib, patchscale.files as f\nwith f.locked(pathlib.Path(sys.argv[1])):\n print(1)\n input()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(UserError, match=rf"is in use by process {other.pid} on "):
            sweep(done[0], tmp_path)
        other.communicate("\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("file", ["metrics.jsonl", "run.json"])
@pytest.mark.parametrize("content", [None, "", "{}\n"])
def test_a_finished_run_with_a_damaged_file_is_named(done, tmp_path, file, content):
    study, folder, _, _ = done
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damaged = stage_folders(study.runs[1], tmp_path)[0] / file
    damaged.unlink() if content is None else damaged.write_text(content)
    message = rf"scale-patch4 is finished, but its {re.escape(file)} is gone or damaged: remove .*scale-patch4, and it"
    with pytest.raises(UserError, match=message):
        sweep(study, tmp_path)
    assert read_results(tmp_path) == read_results(folder)


def test_after_an_error_runs_that_are_going_save(tmp_path):
    slow = TINY | {"patch_size": 4, "epochs": 1, "limit_train": 1400, "limit_val": 64, "global_batch": 1}
    study = make_study({"all": slow}, "s")

    def watch(states, left):
        if states[0].share > 0:
            raise UserError("an error here")

    with pytest.raises(UserError, match="an error here"):
        sweep(study, tmp_path, 1, watch)
    saved = read_training_state(stage_folders(study.runs[0], tmp_path)[0])
    assert 0 < saved["step"] < 1400
    assert not is_trained_in(stage_folders(study.runs[0], tmp_path)[0])


def is_trained_in(folder: Path) -> bool:
    try:
        with locked(folder):
            return False
    except UserError:
        return True


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_and_ends_as_if_it_had_not_been(tmp_path):
    """By the command line: SIGINT to the sweep, which passes it on, and SIGKILL to all."""
    (tmp_path / "s.toml").write_text(STUDY + "\n".join(f"{k} = {json.dumps(v)}" for k, v in TINY.items()))

    def start(output: Path, *more: str):
        words = ["--study", str(tmp_path / "s.toml"), "--output", str(output), "--jobs", "2", *more]
        command = [sys.executable, "-m", "patchscale", "sweep", *words]
        return subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def wait_for(pattern: str, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "parts").glob(pattern))) < count and time.monotonic() < deadline:
            time.sleep(0.05)

    whole = start(tmp_path / "whole")
    assert whole.wait(400) == 0, whole.stderr.read()

    first = start(tmp_path / "parts")
    wait_for("runs/*/*/last.pt", 2)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 75, said
    assert "0 of 2 runs finished; the same command goes on" in said

    second = start(tmp_path / "parts")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("runs/*/*/last.pt")}
    deadline = time.monotonic() + 60
    while all(p.stat().st_mtime_ns == t for p, t in before.items()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(second.pid, signal.SIGKILL)  # not the runs, which have groups of their own
    second.communicate()
    assert {p.stat().st_mtime_ns for p in before} != set(before.values())
    folders = [p.parent for p in before]
    deadline = time.monotonic() + 60
    while any(map(is_trained_in, folders)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_trained_in, folders))
    assert all(read_training_state(f)["epoch"] < 30 for f in folders)

    last = start(tmp_path / "parts")
    out, said = last.communicate(timeout=400)
    assert last.returncode == 0, said
    assert "2 runs in" in out
    for folder in folders:
        assert [row["epoch"] for row in read_rows(folder / "metrics.jsonl")] == list(range(1, 31))
    for cell, expected in zip(read_results(tmp_path / "parts"), read_results(tmp_path / "whole"), strict=True):
        assert (cell.top1, cell.val_loss, cell.train_loss) == (expected.top1, expected.val_loss, expected.train_loss)
