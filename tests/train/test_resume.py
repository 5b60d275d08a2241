"""Runs that are stopped, killed and damaged: they end as if nothing had happened, or say clearly why they cannot."""

import hashlib
import importlib.util
import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from patchscale.errors import Interrupted, TrainingStopped, UserError
from patchscale.models.weights import load_weights
from patchscale.tasks.classification import Classification
from patchscale.train import loop
from patchscale.train.checkpoint import is_damaged, read_training_state, save_checkpoint
from patchscale.train.loop import train
from patchscale.train.observer import Observer

# All that draws random numbers, and all that has a state.
EVERYTHING = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "drop_path": 0.1,
    "ema_decay": 0.9,
    "device_batch": 16,
    "auto_augment": "rand-m5-n1",
    "clip_grad": 1.0,
    "workers": 2,
}


class Ask(Observer):
    """Sends this process a signal after some steps, or in the middle of an evaluation."""

    def __init__(self, number: int, step: int = 0, phase: str = "train") -> None:
        self.number, self.step, self.phase, self.seen = number, step, phase, 0
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, progress) -> None:
        self.seen += progress.phase == self.phase
        if self.seen == self.step and progress.phase == self.phase:
            os.kill(os.getpid(), self.number)


def digest(folder: Path) -> str:
    """Of the weights, their average and the optimiser's numbers."""
    state = torch.load(folder / "last.pt", weights_only=True)
    moments = [v[k] for v in state["optimizer"]["state"].values() for k in ("exp_avg", "exp_avg_sq", "step")]
    tensors = [*state["model"].values(), *state["model_ema"].values(), *moments]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def losses(folder: Path) -> list[float]:
    return [json.loads(row)["train_loss"] for row in (folder / "metrics.jsonl").read_text().splitlines()]


# An epoch is ten steps.
@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, 3), (signal.SIGINT, 10), (signal.SIGUSR1, 14), (signal.SIGHUP, 3)]
)
def test_a_signal_stops_a_run_after_its_step_and_the_same_call_goes_on(recipe, tmp_path, number, step):
    settings = EVERYTHING | {"workers": 0, "epochs": 2}
    whole = train(recipe(**settings, output=tmp_path / "whole"))
    again = recipe(**settings, output=tmp_path / "parts")
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=rf"{number.name} after step {step}, saved in .*parts"):
        train(again, observer=Ask(number, step))
    assert signal.getsignal(number) == before
    parts = train(again)
    assert digest(whole.folder) == digest(parts.folder)
    assert losses(whole.folder) == losses(parts.folder)
    assert whole.scores == parts.scores


def test_under_nohup_a_run_outlives_its_terminal(recipe):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = train(recipe(epochs=1), observer=Ask(signal.SIGHUP, 3))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [report.epoch for report in result.reports] == [1]


def test_a_signal_during_evaluation_repeats_the_evaluation_alone(recipe, tmp_path):
    settings = {"ema_decay": 0.9, "epochs": 2, "device_batch": 16}
    whole = train(recipe(**settings, output=tmp_path / "whole"))
    again = recipe(**settings, output=tmp_path / "parts")
    with pytest.raises(Interrupted, match="after step 10"):
        train(again, observer=Ask(signal.SIGTERM, 2, "evaluate"))
    assert losses(tmp_path / "parts") == []
    parts = train(again)
    assert digest(whole.folder) == digest(parts.folder)
    assert losses(whole.folder) == losses(parts.folder)


def test_a_run_may_stop_twice_in_an_epoch(recipe, tmp_path):
    settings = EVERYTHING | {"workers": 0, "epochs": 2}
    whole = train(recipe(**settings, output=tmp_path / "whole"))
    again = recipe(**settings, output=tmp_path / "parts")
    for total in (2, 5):
        with pytest.raises(Interrupted, match=f"after step {total}"):
            train(again, observer=Ask(signal.SIGTERM, 2 if total == 2 else 3))
    parts = train(again)
    assert digest(whole.folder) == digest(parts.folder)
    assert losses(whole.folder) == losses(parts.folder)


@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute on two free cores, much more on busy ones
def test_killed_at_twenty_random_moments_a_run_ends_with_the_weights_of_an_undisturbed_one(recipe, tmp_path):
    # Saved after every step: much of the time goes by writing, and many kills fall into it.
    settings = EVERYTHING | {"epochs": 4, "save_minutes": 0.0, "trackers": (), "limit_val": 32}
    start = time.monotonic()
    whole = train(recipe(**settings, output=tmp_path / "whole"))
    seconds = time.monotonic() - start
    again = recipe(**settings, output=tmp_path / "parts")
    moments, kills, steps, state = random.Random(0), 0, [], None
    fork = multiprocessing.get_context("fork")
    while kills < 20:
        child = fork.Process(target=train, args=(again,))
        child.start()
        child.join(moments.uniform(0.05, 0.4) * seconds)
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
        else:
            assert child.exitcode == 0
        if (again.output / "last.pt").exists():
            state = read_training_state(again.output)
            steps.append(state["step"])
        if state is not None and state["epoch"] == 4:  # finished before the twentieth kill: begin anew
            assert digest(again.output) == digest(whole.folder)
            assert losses(again.output) == losses(whole.folder)
            # A name of its own: a run that ended without a kill would be "finished" for ever.
            again, state = replace(again, output=tmp_path / f"parts_after_{len(steps)}"), None
    parts = train(again)
    print(f"steps found after kills: {steps}")
    assert len(set(steps)) > 5  # the kills fell into different places
    assert digest(whole.folder) == digest(parts.folder)
    assert losses(whole.folder) == losses(parts.folder)


@pytest.mark.skipif(importlib.util.find_spec("fcntl") is None, reason="no locks on this system")
def test_two_processes_do_not_train_in_one_folder(recipe):
    run = recipe(epochs=2000, save_minutes=0.0, trackers=())
    child = multiprocessing.get_context("fork").Process(target=train, args=(run,))
    child.start()
    try:
        deadline = time.monotonic() + 60
        while not (run.output / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(UserError, match=rf"run is in use by process {child.pid} on .*: wait for it, stop it, or"):
            train(run)
        assert child.is_alive()
    finally:
        child.kill()
        child.join()
    with pytest.raises(Interrupted):  # what was killed holds nothing
        train(run, observer=Ask(signal.SIGTERM, 1))


def stopped(recipe, **changes) -> Path:
    """A run's folder with checkpoints of step 4 (last) and 3 (previous)."""
    with pytest.raises(Interrupted):
        train(recipe(epochs=2, ema_decay=0.9, save_minutes=0.0, **changes), observer=Ask(signal.SIGTERM, 4))
    return recipe().output


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_aloud(recipe, tmp_path):
    whole = train(recipe(epochs=2, ema_decay=0.9, output=tmp_path / "whole"))
    folder = stopped(recipe)
    damage(folder / "last.pt")
    observer = Ask(0)
    parts = train(recipe(epochs=2, ema_decay=0.9), observer=observer)
    assert any("last.pt is damaged" in note for note in observer.notes)
    assert any("after step 3 of 20" in note for note in observer.notes)
    assert digest(whole.folder) == digest(parts.folder)


def test_where_the_last_checkpoint_is_gone_the_one_before_is_gone_on_from(recipe, tmp_path):
    whole = train(recipe(epochs=2, ema_decay=0.9, output=tmp_path / "whole"))
    folder = stopped(recipe)
    (folder / "last.pt").unlink()
    observer = Ask(0)
    parts = train(recipe(epochs=2, ema_decay=0.9), observer=observer)
    assert any("after step 3 of 20" in note for note in observer.notes)
    assert digest(whole.folder) == digest(parts.folder)


@pytest.mark.parametrize("kept", ["best.pt", "epoch_0001.pt", "metrics.jsonl"])
def test_what_is_left_of_another_run_is_not_written_over(recipe, kept):
    folder = train(recipe(epochs=1, limit_train=64, keep_epochs=1)).folder
    for file in folder.iterdir():
        if file.is_file() and file.name != kept:
            file.unlink()
    before = (folder / kept).read_bytes()
    with pytest.raises(UserError, match=rf"run holds what is left of another run \({kept}.*another --output"):
        train(recipe(epochs=1, limit_train=64))
    assert (folder / kept).read_bytes() == before


@pytest.mark.parametrize("place", ["evaluate", "_draw"])
def test_a_run_killed_where_its_first_results_are_written_goes_on(recipe, monkeypatch, place):
    settings = {"epochs": 2, "limit_train": 64}
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run if place == "_draw" else Classification, place, raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(recipe(**settings))
    assert [report.epoch for report in train(recipe(**settings)).reports] == [1, 2]
    assert len(losses(recipe().output)) == 2


def test_a_run_killed_before_its_first_checkpoint_begins_again(recipe, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(recipe(epochs=1, limit_train=64))
    assert (recipe().output / "metrics.jsonl").exists()
    assert [report.epoch for report in train(recipe(epochs=1, limit_train=64)).reports] == [1]


def raising(error: type[BaseException]):
    def fail(*_, **__):
        raise error

    return fail


def test_where_both_are_damaged_the_run_says_so(recipe):
    folder = stopped(recipe)
    for name in ("last.pt", "previous.pt"):
        damage(folder / name)
    with pytest.raises(UserError, match=r"last\.pt.*previous\.pt damaged"):
        train(recipe(epochs=2, ema_decay=0.9))


def test_a_changed_recipe_is_refused_by_field_unless_told(recipe):
    folder = stopped(recipe)
    changed = recipe(epochs=3, ema_decay=0.9, lr=1e-3)
    with pytest.raises(UserError, match=r"epochs was 2, is now 3; lr was 0.004, is now 0.001.*--override-recipe"):
        train(changed)
    observer = Ask(0)
    result = train(changed, observer=observer, override=True)
    assert any("changed recipe: epochs was 2" in note for note in observer.notes)
    assert [r.epoch for r in result.reports] == [1, 2, 3]
    assert json.loads((folder / "recipe.json").read_text())["lr"] == 1e-3


def test_a_changed_recipe_changes_what_the_optimiser_does(recipe):
    folder = stopped(recipe)
    before = torch.load(folder / "last.pt", weights_only=True)["optimizer"]
    train(recipe(epochs=2, ema_decay=0.9, weight_decay=0.3, betas=(0.8, 0.95), layer_decay=0.5), override=True)
    after = torch.load(folder / "last.pt", weights_only=True)["optimizer"]
    assert {group["weight_decay"] for group in before["param_groups"]} == {0.0, 0.05}
    assert {group["weight_decay"] for group in after["param_groups"]} == {0.0, 0.3}
    assert {tuple(group["betas"]) for group in after["param_groups"]} == {(0.8, 0.95)}
    assert {group["lr_scale"] for group in after["param_groups"]} == {0.125, 0.25, 0.5, 1.0}
    assert {int(state["step"]) for state in after["state"].values()} == {20}  # its moments went on


def test_an_average_that_begins_later_begins_with_the_weights_of_then(recipe):
    with pytest.raises(Interrupted):
        train(recipe(save_minutes=0.0), observer=Ask(signal.SIGTERM, 9))
    before = torch.load(recipe().output / "last.pt", weights_only=True)["model"]
    with pytest.raises(Interrupted):  # after a step that moves the average by hardly anything
        train(recipe(ema_decay=0.999999), observer=Ask(signal.SIGTERM, 1), override=True)
    average = torch.load(recipe().output / "last.pt", weights_only=True)["model_ema"]
    for name, value in before.items():
        torch.testing.assert_close(average[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [{"global_batch": 64}, {"limit_train": 640}, {"limit_train": 160}])
@pytest.mark.parametrize("is_recorded", [True, False])
def test_another_number_of_steps_an_epoch_is_refused(recipe, changes, is_recorded):
    with pytest.raises(Interrupted):
        train(recipe(epochs=2, limit_val=20), observer=Ask(signal.SIGTERM, 14))
    last = recipe().output / "last.pt"
    if not is_recorded:  # as versions before this one wrote it
        state = torch.load(last, weights_only=True)
        del state["steps_per_epoch"]
        save_checkpoint(last, state)
    before = last.read_bytes()
    with pytest.raises(UserError, match=r"cannot go on with (5|20) steps an epoch where .*--global-batch"):
        train(recipe(epochs=2, limit_val=20, **changes), override=True)
    assert last.read_bytes() == before


def test_a_batch_of_another_size_is_taken_where_an_epoch_has_as_many_steps(recipe):
    with pytest.raises(Interrupted):
        train(recipe(epochs=2, limit_val=20), observer=Ask(signal.SIGTERM, 14))
    result = train(recipe(epochs=2, limit_val=20, global_batch=64, limit_train=640), override=True)
    assert [(report.epoch, report.step) for report in result.reports] == [(2, 20)]


def test_other_frozen_parameters_are_refused_by_the_name_of_the_flag(recipe):
    stopped(recipe)
    with pytest.raises(UserError, match=r"cannot go on with another --freeze \(freeze was \[\], is now \['norm_f"):
        train(recipe(epochs=2, ema_decay=0.9, freeze=("norm_f.*",)), override=True)


def test_where_and_how_a_run_computes_may_change(recipe, tmp_path):
    whole = train(recipe(epochs=2, ema_decay=0.9, output=tmp_path / "whole"))
    stopped(recipe)
    parts = train(recipe(epochs=2, ema_decay=0.9, workers=1, device_batch=8, grad_checkpointing=True))
    assert losses(parts.folder) == pytest.approx(losses(whole.folder), rel=1e-5)


def test_resuming_another_model_is_refused(recipe):
    stopped(recipe)
    with pytest.raises(UserError, match="cannot resume: the checkpoint is of another model"):
        train(recipe(epochs=2, ema_decay=0.9, embed_dim=64), override=True)


def test_resuming_nothing_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        train(recipe(), resume=tmp_path)


def test_a_finished_run_is_left_alone_and_says_so(recipe):
    first = train(recipe(epochs=1))
    before = (first.folder / "last.pt").read_bytes()
    observer = Ask(0)
    again = train(recipe(epochs=1), observer=observer)
    assert again.reports == ()
    assert again.scores == first.scores
    assert "finished" in observer.notes[-1]
    assert (first.folder / "last.pt").read_bytes() == before


def test_a_full_disk_leaves_the_last_good_checkpoint(recipe, tmp_path, monkeypatch):
    whole = train(recipe(epochs=2, ema_decay=0.9, output=tmp_path / "whole"))
    folder = stopped(recipe)
    good, save, calls = digest(folder), torch.save, []

    def full(state, path):
        calls.append(path)
        if len(calls) == 1:
            return save(state, path)
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"last\.pt: .*No space left"):
            train(recipe(epochs=2, ema_decay=0.9, save_minutes=0.0))
    assert not list(folder.glob(".*.tmp"))
    assert read_training_state(folder)["step"] == 5
    assert digest(folder) != good
    assert digest(train(recipe(epochs=2, ema_decay=0.9)).folder) == digest(whole.folder)


def test_however_often_a_disk_is_full_both_checkpoints_stay_good(tmp_path, monkeypatch):
    """On a file system without hard links, where the last one is copied before the new one takes its place."""
    for step in (1, 2):
        save_checkpoint(tmp_path / "last.pt", {"step": step})

    def full(path, content):
        raise OSError(28, "No space left on device")

    files = {name: (tmp_path / name).read_bytes() for name in ("last.pt", "previous.pt")}
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", raising(OSError))
        patch.setattr(Path, "write_bytes", full)
        for step in (3, 4, 5):
            with pytest.raises(UserError, match="No space left"):
                save_checkpoint(tmp_path / "last.pt", {"step": step})
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    assert not any(is_damaged(tmp_path / name) for name in files)
    assert not list(tmp_path.glob(".*.tmp"))
    save_checkpoint(tmp_path / "last.pt", {"step": 6})
    assert not any(is_damaged(tmp_path / name) for name in files)
    assert len(json.loads((tmp_path / "checksums.json").read_text())["last.pt"]) == 1


@pytest.mark.parametrize("damaged", ["[]", '{"last.pt": 3}', "{", None])
def test_without_a_record_of_checksums_no_file_is_under_suspicion(tmp_path, damaged):
    save_checkpoint(tmp_path / "last.pt", {"step": 1})
    if damaged is None:
        (tmp_path / "checksums.json").unlink()
    else:
        (tmp_path / "checksums.json").write_text(damaged)
    assert not is_damaged(tmp_path / "last.pt")
    save_checkpoint(tmp_path / "last.pt", {"step": 2})
    assert not any(is_damaged(tmp_path / name) for name in ("last.pt", "previous.pt"))
    damage(tmp_path / "previous.pt")
    assert is_damaged(tmp_path / "previous.pt")


def test_a_dead_worker_is_said_in_plain_words(recipe):
    class Kill(Observer):
        def progress(self, progress) -> None:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
            time.sleep(0.2)

    with pytest.raises(TrainingStopped, match="reads images has died"):
        train(recipe(workers=1, epochs=20), observer=Kill())


def test_checkpoints_of_chosen_epochs_are_kept_and_every_file_loads_everywhere(recipe):
    result = train(recipe(epochs=4, keep_epochs=2, ema_decay=0.9))
    names = {"last.pt", "previous.pt", "best.pt", "epoch_0002.pt", "epoch_0004.pt"}
    assert {p.name for p in result.folder.glob("*.pt")} == names
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_classes": 10, "in_chans": 1}
    for name in names:
        file = torch.load(result.folder / name, weights_only=True)
        # timm takes the averaged weights where a file has them.
        for load, which in ((load_weights, "model"), (timm.models.load_checkpoint, "model_ema")):
            model = timm.create_model("adventurer_tiny_patch4", **sizes)
            load(model, str(result.folder / name))
            assert all(torch.equal(v, file[which][k]) for k, v in model.state_dict().items()), (name, load)


def test_a_loss_that_is_not_finite_leaves_a_run_that_can_go_on(recipe, tmp_path, monkeypatch):
    whole = train(recipe(epochs=2, ema_decay=0.9, output=tmp_path / "whole"))
    healthy, calls = Classification.loss, []

    def loss(self, model, images, targets):
        calls.append(1)
        return healthy(self, model, images, targets) * (float("nan") if len(calls) == 5 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(Classification, "loss", loss)
        with pytest.raises(TrainingStopped, match="step 5"):
            train(recipe(epochs=2, ema_decay=0.9, save_minutes=0.0))
    assert digest(train(recipe(epochs=2, ema_decay=0.9)).folder) == digest(whole.folder)
