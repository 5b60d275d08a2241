"""What a run says while it trains: rows of JSON in its folder, always, and the experiment trackers people use."""

import contextlib
import importlib.util
import json
import math
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from patchscale.errors import UserError, first_line
from patchscale.files import write_atomically

METRICS = "metrics.jsonl"
PROJECT = "patchscale"  # where a tracker files the run unless its own environment variable says otherwise


class Logs:
    """Where a run's metrics go; one object for a run's life in one process.

    ``metrics.jsonl`` gets one JSON object an epoch. Trackers get the epochs too, and values of single steps in between
    under ``step/``, because an epoch's mean and a step's value of the same name are two curves.

    A run that goes on logs as if it had never been killed: rows and TensorBoard's points after the restored state are
    taken back. The other trackers take nothing back; they go on in the same run, keep what the killed run sent, and are
    not sent those steps again.

    A tracker that cannot start is an error in a new run, whose user can mend it. In a run that goes on, and at any
    time after the start, it is one warning, and the tracker is left alone: training is worth more than its curves.

    Args:
        folder: the run's, which exists.
        trackers: names among ``TRACKERS``.
        config: the resolved recipe, for the trackers to show; plain values.
        name: the run's name in the trackers; the folder's if None.
        state: what ``state()`` gave when the checkpoint that the run goes on from was written; None for a new run.
        step: optimiser steps that the checkpoint has behind it; what was logged of later ones is taken back.
        active: False for every process but the first: it logs nothing, and still refuses what the first refuses.
        note: told of a tracker that is given up.

    Raises:
        UserError: a tracker is unknown or not installed, or cannot start; or the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        trackers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
        name: str | None = None,
        state: Mapping[str, Any] | None = None,
        step: int = 0,
        active: bool = True,
        note: Callable[[str], object] = warnings.warn,
    ) -> None:
        check_trackers(trackers)
        self._active, self._note = active, note
        self._file = folder / METRICS
        self._rows = 0
        self._runs: dict[str, str] = dict(state["runs"]) if state is not None else {}
        self._trackers: dict[str, _Tracker] = {}
        self._again: dict[str, dict[str, float]] = {}
        if not active:
            return
        self._rows = self._cut_back(0 if state is None else state["rows"], step)
        for tracker in dict.fromkeys(trackers):
            try:
                started = TRACKERS[tracker](
                    folder, name or folder.absolute().name, dict(config or {}), self._runs.get(tracker), step
                )
            except Exception as e:
                message = f"{tracker} cannot start: {_said(e)}"
                if state is None:
                    self.close(finished=False)
                    raise UserError(f"{message}; set it up or leave it out of --trackers") from e
                note(f"{message}; the run goes on without it")
                continue
            self._trackers[tracker] = started
            self._again[tracker] = {}
            if started.run is not None:
                self._runs[tracker] = started.run

    def step(self, step: int, values: Mapping[str, Any]) -> None:
        """Give the trackers what one optimiser step measured.

        Args:
            step: optimiser steps since the run began, this one included.
            values: numbers by name; anything else is passed over.
        """
        self._track(step, {f"step/{name}": value for name, value in values.items()})

    def epoch(self, step: int, row: Mapping[str, Any]) -> None:
        """Write an epoch's row to ``metrics.jsonl``, on disk when this returns, and give its numbers to the trackers.

        A number that is not finite is written as null, which every reader of JSON understands.

        Args:
            step: optimiser steps since the run began.
            row: plain numbers and strings by name; ``step`` is added.

        Raises:
            UserError: the file cannot be written (a full disk, say).
        """
        if not self._active:
            return
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line = json.dumps(plain | {"step": step}, default=float) + "\n"
        try:
            with open(self._file, "ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise UserError(f"cannot write {self._file}: {e.strerror}") from e
        self._rows += 1
        self._track(step, {k: v for k, v in row.items() if k not in ("step", "epoch")})

    def state(self) -> dict[str, Any]:
        """Plain values for the checkpoint: the rows written so far, and the trackers' names for this run.

        What was logged until now is on disk when this returns, as far as the trackers let it be forced.
        """
        self._each(lambda _, tracker: tracker.flush())
        return {"rows": self._rows, "runs": dict(self._runs)}

    def close(self, finished: bool) -> None:
        """End the run's logging.

        Args:
            finished: whether training has come to its end; otherwise the trackers are told that it was cut short.
        """

        def close(name: str, tracker: _Tracker) -> None:
            if self._again[name]:  # nothing new came after what was run again
                tracker.log(tracker.logged + 1, self._again.pop(name))
            tracker.close(finished)

        self._each(close)
        self._trackers.clear()

    def _track(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}

        def log(name: str, tracker: _Tracker) -> None:
            # What the killed run sent to a tracker that takes nothing back stays there. Steps that are run again were
            # logged already: their latest values wait for the first new step, so that no curve runs backwards and no
            # epoch whose row had not arrived is lost.
            self._again[name] |= numbers
            if step > tracker.logged:
                tracker.log(step, self._again[name])
                self._again[name] = {}

        self._each(log)

    def _each(self, act: "Callable[[str, _Tracker], None]") -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                act(name, tracker)
            except Exception as e:  # whatever a foreign client raises
                del self._trackers[name]
                self._note(f"{name} has failed and is left alone from here on: {_said(e)}; {METRICS} goes on")

    def _cut_back(self, rows: int, step: int) -> int:
        """Leave the rows that belong to the restored state; returns how many there are."""
        # The count decides between a checkpoint written before an epoch's row and one written after it, at one step.
        kept = [row for row in read_rows(self._file) if row.get("step", math.inf) <= step][:rows]
        if len(kept) < rows:
            self._note(f"{self._file} has {len(kept)} of the {rows} rows that it had when the checkpoint was written")
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomically(self._file, lambda path: path.write_text(text))
        return len(kept)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, without damaged lines (a crash in the middle of a write leaves one).

    A file that is not there has no rows.

    Raises:
        UserError: the file is there and cannot be read.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f"cannot read {file}: {e.strerror}") from e
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):  # of JSON and of UTF-8 alike
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def check_trackers(names: Sequence[str]) -> None:
    """See that every tracker is known and installed, without importing it.

    Raises:
        UserError: one is not; the message says what is known, or what to install.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"there is no tracker {name!r}: choose among {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            package = name if name == "tensorboard" else f"'patchscale[{name}]'"
            raise UserError(
                f"the tracker {name} is not installed: pip install {package}, or leave it out of --trackers"
            )


class _Tracker(Protocol):
    """An experiment tracker's client.

    ``run`` is what to ask for to go on in the same run, and ``logged`` the last step that the tracker holds already
    and will not take back: -1 in a new run.
    """

    run: str | None
    logged: int

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self, finished: bool) -> None: ...


class _TensorBoard(_Tracker):
    def __init__(self, folder: Path, name: str, config: dict[str, Any], run: str | None, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run, self.logged = None, -1
        # TensorBoard takes back what was logged at this step and later.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


class _Wandb(_Tracker):
    """Weights & Biases. Offline, each start writes a folder of its own under the same run id, to be synced in order."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any], run: str | None, step: int) -> None:
        import wandb

        # An argument would overrule the client's environment variable: where there is one, give none.
        self._run = wandb.init(
            id=run,
            resume="allow" if run is not None else None,
            project=None if "WANDB_PROJECT" in os.environ else PROJECT,
            name=None if "WANDB_NAME" in os.environ else name,
            dir=None if "WANDB_DIR" in os.environ else str(folder),
            config=config,
            allow_val_change=True,  # the recipe of a run that goes on may have been changed on purpose
            reinit="create_new",  # leaves a run that the caller's own program has open alone
            # Without a network finish() would wait for as long as it takes; what it could not send stays in the folder.
            settings=None if "WANDB_FINISH_TIMEOUT" in os.environ else wandb.Settings(finish_timeout=60),
        )
        self.run = self._run.id
        self.logged = self._run.step - 1

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def flush(self) -> None:
        pass  # a process of its own writes what it is given

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class _MLflow(_Tracker):
    def __init__(self, folder: Path, name: str, config: dict[str, Any], run: str | None, step: int) -> None:
        # A server that is gone should cost the run seconds and not, as by default, many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        self.logged = -1
        self._held: dict[str, int] = {}
        run = run or os.environ.get("MLFLOW_RUN_ID")
        if run is None:
            self.run = self._client.create_run(self._experiment(), run_name=name).info.run_id
            values = [Param(key, str(value)) for key, value in config.items()]
            for start in range(0, len(values), 100):  # the most that a server takes at once
                self._client.log_batch(self.run, params=values[start : start + 100])
        else:
            self.run = run
            self._client.update_run(run, status="RUNNING")
            # Nothing can be taken back here, but what is held of every curve can be asked.
            for key in self._client.get_run(run).data.metrics:
                self._held[key] = max(metric.step for metric in self._client.get_metric_history(run, key))

    def _experiment(self) -> str:
        if "MLFLOW_EXPERIMENT_ID" in os.environ:
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found is not None else self._client.create_experiment(name)

    def log(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        new = [self._metric(k, v, now, step) for k, v in values.items() if step > self._held.get(k, -1)]
        if new:
            self._client.log_batch(self.run, metrics=new)

    def flush(self) -> None:
        pass  # every call waits for its answer

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.run, "FINISHED" if finished else "KILLED")


class _Trackio(_Tracker):
    def __init__(self, folder: Path, name: str, config: dict[str, Any], run: str | None, step: int) -> None:
        import trackio

        # Trackio finds a run to go on with by its name alone, so the name must be the run's own.
        self.run = run or f"{name}-{secrets.token_hex(3)}"
        with contextlib.redirect_stdout(sys.stderr):  # it talks where a command's results go
            self._run = trackio.init(
                PROJECT, name=self.run, config=config, resume="never" if run is None else "allow", embed=False
            )
        # The client knows the next step from its store, or from the server, and shows it nowhere else.
        self.logged = getattr(self._run, "_next_step", 0) - 1

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def flush(self) -> None:
        pass  # a thread of its own writes what it is given, within a second

    def close(self, finished: bool) -> None:
        import trackio

        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()  # the run's own finish() would be called, and talk, once more when the program ends


TRACKERS: dict[str, Callable[[Path, str, dict[str, Any], str | None, int], _Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
