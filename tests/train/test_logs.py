import json
import time

import pytest

from patchscale.errors import UserError
from patchscale.train import logs as logs_module
from patchscale.train.logs import TRACKERS, Logs, check_trackers, read_rows


def row(epoch: int, **changes) -> dict:
    return {"epoch": epoch, "train_loss": 1.0 / epoch, "lr": 1e-3, "top1": 10.0 * epoch, "device": "cpu"} | changes


def through_json(state: dict) -> dict:
    return json.loads(json.dumps(state))


class Recorder:
    """A tracker of lists; ``fails`` names the call that raises."""

    def __init__(self, logged: int = -1, fails: str = "") -> None:
        self.run, self.logged, self.fails = "mine", logged, fails
        self.seen: list[tuple[int, dict[str, float]]] = []
        self.ends: list[bool] = []

    def __call__(self, folder, name, config, run, step):
        self._fail("start")
        return self

    def _fail(self, call: str) -> None:
        if self.fails == call:
            raise OSError(28, "No space left on device")

    def log(self, step, values) -> None:
        self._fail("log")
        self.seen.append((step, values))

    def flush(self) -> None:
        self._fail("flush")

    def close(self, finished) -> None:
        self._fail("close")
        self.ends.append(finished)


@pytest.fixture
def tracker(monkeypatch):
    """Puts a recorder in TensorBoard's place."""

    def place(**settings) -> Recorder:
        recorder = Recorder(**settings)
        monkeypatch.setitem(TRACKERS, "tensorboard", recorder)
        return recorder

    return place


def test_an_epoch_is_one_line_of_json_and_its_numbers_reach_the_trackers(tmp_path, tracker):
    recorder = tracker()
    logs = Logs(tmp_path)
    logs.step(5, {"loss": 2.0, "lr": 1e-3})
    logs.epoch(10, row(1))
    logs.close(finished=True)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == row(1) | {"step": 10}
    assert recorder.seen == [
        (5, {"step/loss": 2.0, "step/lr": 1e-3}),
        (10, {"train_loss": 1.0, "lr": 1e-3, "top1": 10.0}),
    ]
    assert recorder.ends == [True]


def test_a_number_that_is_not_finite_leaves_json_that_any_reader_understands(tmp_path):
    logs = Logs(tmp_path, trackers=())
    logs.epoch(1, row(1, val_loss=float("nan")))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["val_loss"] is None


def test_other_processes_write_nothing_and_still_refuse_what_the_first_refuses(tmp_path):
    logs = Logs(tmp_path, active=False)
    logs.step(1, {"loss": 1.0})
    logs.epoch(1, row(1))
    logs.close(finished=True)
    assert logs.state() == {"rows": 0, "runs": {}}
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError):
        Logs(tmp_path, trackers=("tensorbord",), active=False)


def test_rows_after_the_restored_state_are_cut(tmp_path):
    logs = Logs(tmp_path, trackers=())
    for epoch in (1, 2):
        logs.epoch(10 * epoch, row(epoch))
    state = through_json(logs.state())
    for epoch in (3, 4):
        logs.epoch(10 * epoch, row(epoch))
    again = Logs(tmp_path, trackers=(), state=state, step=20)
    assert [r["epoch"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    again.epoch(30, row(3))
    assert again.state()["rows"] == 3
    assert [r["epoch"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_state_from_before_the_row_of_its_own_step_cuts_that_row(tmp_path):
    """A checkpoint at an epoch's last step may be written before the epoch is evaluated, and the row follow."""
    logs = Logs(tmp_path, trackers=())
    logs.epoch(10, row(1))
    state = logs.state()
    logs.epoch(20, row(2))
    Logs(tmp_path, trackers=(), state=state, step=20)
    assert [r["epoch"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("damage", [b'{"epoch": 3, "train_lo', b"\0" * 9, b"\xff\xfe{", b"[1, 2]\n7\n"])
def test_a_damaged_line_is_dropped_and_the_next_row_starts_on_its_own(tmp_path, damage):
    file = tmp_path / "metrics.jsonl"
    logs = Logs(tmp_path, trackers=())
    logs.epoch(10, row(1))
    logs.epoch(20, row(2))
    state = logs.state()
    with open(file, "ab") as end:
        end.write(damage)
    Logs(tmp_path, trackers=(), state=state, step=20).epoch(30, row(3))
    assert [json.loads(line)["epoch"] for line in file.read_text().splitlines()] == [1, 2, 3]


def test_rows_that_have_gone_are_missed_aloud(tmp_path):
    notes: list[str] = []
    logs = Logs(tmp_path, trackers=(), state={"rows": 2, "runs": {}}, step=20, note=notes.append)
    assert "0 of the 2 rows" in notes[0]
    logs.epoch(30, row(3))
    assert logs.state()["rows"] == 1


def test_a_new_run_in_the_folder_of_one_that_left_no_checkpoint_starts_anew(tmp_path):
    Logs(tmp_path, trackers=()).epoch(10, row(1))
    logs = Logs(tmp_path, trackers=())
    assert read_rows(tmp_path / "metrics.jsonl") == []
    assert logs.state()["rows"] == 0


@pytest.mark.parametrize("call", ["log", "flush", "close"])
def test_a_tracker_that_fails_is_named_once_and_left_alone(tmp_path, tracker, call):
    recorder = tracker(fails=call)
    notes: list[str] = []
    logs = Logs(tmp_path, note=notes.append)
    for epoch in (1, 2, 3):
        logs.step(10 * epoch - 5, {"loss": 1.0})
        logs.epoch(10 * epoch, row(epoch))
        state = logs.state()
    logs.close(finished=True)
    assert len(notes) == 1
    assert "tensorboard has failed" in notes[0]
    assert "No space left" in notes[0]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3
    assert state["runs"] == {"tensorboard": "mine"}  # the run that goes on tries the same one again
    assert recorder.ends == []


def test_a_tracker_that_cannot_start_stops_a_new_run_and_not_one_that_goes_on(tmp_path, tracker):
    tracker(fails="start")
    with pytest.raises(UserError, match=r"tensorboard cannot start: OSError: .*No space left.*--trackers"):
        Logs(tmp_path)
    notes: list[str] = []
    logs = Logs(tmp_path, state={"rows": 0, "runs": {"tensorboard": "mine"}}, note=notes.append)
    assert "cannot start" in notes[0]
    assert "goes on without it" in notes[0]
    logs.epoch(1, row(1))
    assert logs.state() == {"rows": 1, "runs": {"tensorboard": "mine"}}


def test_steps_that_a_tracker_has_already_wait_for_the_first_new_one(tmp_path, tracker):
    recorder = tracker(logged=20)
    logs = Logs(tmp_path, state={"rows": 0, "runs": {}})
    logs.step(15, {"loss": 3.0})
    logs.epoch(20, {"epoch": 2, "top1": 50.0})  # perhaps killed before this one arrived
    logs.step(25, {"loss": 2.0})
    logs.step(30, {"loss": 1.0})
    assert recorder.seen == [(25, {"top1": 50.0, "step/loss": 2.0}), (30, {"step/loss": 1.0})]


def test_a_last_row_that_had_perhaps_not_arrived_is_sent_at_the_end(tmp_path, tracker):
    recorder = tracker(logged=20)
    logs = Logs(tmp_path, state={"rows": 0, "runs": {}})
    logs.epoch(20, {"epoch": 2, "top1": 50.0})
    logs.close(finished=True)
    assert recorder.seen == [(21, {"top1": 50.0})]
    assert recorder.ends == [True]


def test_an_unknown_tracker_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"no tracker 'wanb': choose among tensorboard, wandb, mlflow, trackio"):
        check_trackers(["wanb"])


def test_a_tracker_that_is_not_installed_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(logs_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed: pip install 'patchscale\[wandb\]'"):
        check_trackers(["wandb"])


def test_a_full_disk_under_the_rows_is_one_clear_error(tmp_path):
    logs = Logs(tmp_path, trackers=())
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()  # stands in for a full disk
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl"):
        logs.epoch(1, row(1))


def test_tensorboard_forgets_what_the_killed_run_logged_after_its_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = Logs(tmp_path)
    killed.epoch(10, row(1))
    killed.epoch(20, row(2))
    state = through_json(killed.state())  # puts the rows on disk
    killed.epoch(30, row(3, top1=-1.0))
    killed.step(35, {"loss": -1.0})
    killed.state()
    time.sleep(1.1)  # the files of one process are put in order by the second in which they were begun
    resumed = Logs(tmp_path, state=state, step=20)
    resumed.epoch(30, row(3))
    resumed.close(finished=True)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("top1")] == [(10, 10.0), (20, 20.0), (30, 30.0)]
    assert "step/loss" not in board.Tags()["scalars"] or not board.Scalars("step/loss")


def run_and_go_on(folder, tracker: str) -> dict:
    """A run cut short after step 30, and gone on with from step 20 to 40; returns its state."""
    first = Logs(folder, (tracker,), {"lr": 0.1, "crop": (0.5, 1.0)}, "the run")
    for epoch in (1, 2):
        first.step(10 * epoch - 5, {"loss": 2.0})
        first.epoch(10 * epoch, row(epoch))
    state = through_json(first.state())
    first.epoch(30, row(3))
    first.close(finished=False)
    second = Logs(folder, (tracker,), {"lr": 0.2, "crop": (0.5, 1.0)}, "the run", state=state, step=20)
    second.epoch(30, row(3))
    second.epoch(40, row(4))
    second.close(finished=True)
    assert second.state()["runs"] == state["runs"]
    return second.state()


def test_wandb_offline_goes_on_under_the_same_id(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "a_project_of_my_own")
    monkeypatch.setenv("WANDB_SILENT", "true")
    state = run_and_go_on(tmp_path, "wandb")
    wandb.teardown()
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert all(state["runs"]["wandb"] in file.name for file in files)
    first, second = (file.read_bytes() for file in files)
    for name in (b"a_project_of_my_own", b"the run", b"top1", b"step/loss"):
        assert name in first
    assert b"train_loss" in second


def test_mlflow_goes_on_in_the_same_run_and_logs_no_step_twice(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "an experiment")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.chdir(tmp_path)
    state = run_and_go_on(tmp_path, "mlflow")
    client = mlflow.MlflowClient()
    run = client.get_run(state["runs"]["mlflow"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "the run"
    assert run.data.params == {"lr": "0.1", "crop": "(0.5, 1.0)"}
    assert client.get_experiment(run.info.experiment_id).name == "an experiment"
    points = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "top1")]
    assert points == [(10, 10.0), (20, 20.0), (30, 30.0), (40, 40.0)]
    assert client.get_metric_history(run.info.run_id, "step/loss")[-1].step == 15

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens: the network is gone
    notes: list[str] = []
    again = Logs(tmp_path, ("mlflow",), state=state, step=40, note=notes.append)
    assert "mlflow cannot start" in notes[0]
    again.epoch(50, row(5))
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 5


def test_trackio_goes_on_in_the_same_run_and_logs_no_step_twice(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    state = run_and_go_on(tmp_path, "trackio")
    name = state["runs"]["trackio"]
    assert name.startswith("the run-")
    assert SQLiteStorage.get_runs("patchscale") == [name]
    logged = SQLiteStorage.get_logs("patchscale", name)
    assert [(point["step"], point["top1"]) for point in logged if "top1" in point] == [
        (10, 10.0),
        (20, 20.0),
        (30, 30.0),
        (40, 40.0),
    ]
    assert capfd.readouterr().out == ""  # a command's results stay alone on standard output
