"""Run the runs of a study, several at a time, and gather what came out.

A sweep's folder holds ``study.json``, ``runs/NAME/`` for each run with its ``recipe.toml`` beside the stages' own
folders, and ``results.jsonl``, one row for each finished run; rows of other runs that the file holds stay in it. The
same call again goes on: what is finished stays, what was killed continues from its last checkpoint.
"""

import contextlib
import json
import multiprocessing
import os
import queue
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from patchscale.errors import INTERRUPTED, Interrupted, TrainingStopped, UserError
from patchscale.files import locked, make_folder, write_atomically
from patchscale.scaling.results import FILE, Cell, read_results, write_results
from patchscale.scaling.runs import Run, Study, image_flops, planned_flops, to_recipe_file
from patchscale.train.build import create_model, stop_signals, trained_module
from patchscale.train.checkpoint import LAST, read_training_state
from patchscale.train.describe import RUN as RUN_RECORD
from patchscale.train.device import keep_freed_memory
from patchscale.train.evaluate import evaluate
from patchscale.train.logs import METRICS, read_rows
from patchscale.train.observer import EpochReport, Observer, Progress
from patchscale.train.recipe import Recipe
from patchscale.train.stages import run_stages

RUNS = "runs"
RECIPE = "recipe.toml"
BY_PATCH = "by_patch.json"
_TELL_SECONDS = 0.2


@dataclass
class State:
    """How far a run is, for a table of all."""

    run: Run
    state: str = "waiting"
    """waiting, running, done, failed or stopped."""
    share: float = 0.0
    """Of its steps."""
    where: str = ""
    """Stage and epoch."""
    loss: float | None = None
    top1: float | None = None
    seconds: float = 0.0
    """Since it was started, in this sweep."""
    cost: float = 0.0
    """FLOPs of all its training."""
    error: str = ""


def sweep(
    study: Study,
    folder: Path,
    jobs: int | None = None,
    watch: Callable[[list[State], float | None], None] | None = None,
) -> list[Cell]:
    """Run what is not finished, the dearest first, and write ``results.jsonl`` after each.

    Args:
        study: what to run.
        folder: of the sweep; one that holds a part of it goes on.
        jobs: how many runs at a time; by default one a GPU, or one a core.
        watch: told how far all runs are, and the seconds left, several times a second.

    Returns:
        One row for each run.

    Raises:
        UserError: fewer than one job; another sweep is at work in the folder; it holds other runs of these names, or
            results that cannot be read; a run cannot be made, or some failed: all others are finished then.
        Interrupted: a stop signal came; each run has saved, and the same call goes on.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs is {jobs}, expected at least 1 run at a time")
    make_folder(folder)
    with locked(folder):
        return _sweep(study, folder, jobs, watch)


def _sweep(
    study: Study, folder: Path, jobs: int | None, watch: Callable[[list[State], float | None], None] | None
) -> list[Cell]:
    file = folder / FILE
    held = read_results(file) if file.exists() and file.stat().st_size else []
    prepare(study, folder)
    states = [State(run, cost=_planned_cost(run)) for run in study.runs]
    for state in states:
        if is_finished(state.run, folder):
            state.state, state.share = "done", 1.0
    gpus = torch.cuda.device_count()
    jobs = jobs or gpus or os.cpu_count() or 1
    waiting = sorted((s for s in states if s.state == "waiting"), key=lambda s: -s.cost)
    cells = collect(study, folder, held)
    with _Pool(folder, jobs, gpus) as pool:
        while (waiting or pool.running) and not (pool.asked_to_stop and not pool.running):
            while waiting and len(pool.running) < jobs and not pool.asked_to_stop:
                pool.start(waiting.pop(0))
            if pool.turn():
                cells = collect(study, folder, held)
            if watch is not None:
                watch(states, _seconds_left(states, jobs))
        stopped = pool.asked_to_stop
    failed = [s for s in states if s.state == "failed"]
    if failed:
        more = f", and {len(failed) - 1} more failed" if len(failed) > 1 else ""
        raise UserError(f"{failed[0].run.name} failed: {failed[0].error}{more}. The same command tries again")
    if stopped:
        raise Interrupted(f"stopped with {len(cells)} of {len(states)} runs finished; the same command goes on")
    return cells


def prepare(study: Study, folder: Path) -> None:
    """Make the sweep's folder, with a recipe file for each run.

    Raises:
        UserError: it cannot be written to, or holds a run of another recipe under one of the names.
    """
    make_folder(folder)
    for run in study.runs:
        place = run_folder(run, folder)
        for recipe, there in zip(run.stages.values(), stage_folders(run, folder), strict=True):
            if not (there / LAST).exists():
                continue
            began_with = Recipe.from_dict(read_training_state(there)["recipe"])
            changes = replace(began_with, weights=recipe.weights).changes(recipe)
            if changes:
                words = "; ".join(f"{k} was {was!r}, is now {now!r}" for k, (was, now) in changes.items())
                raise UserError(f"{place} holds a run of another recipe: {words}. Choose another --output")
        make_folder(place)
        text = to_recipe_file(run)
        write_atomically(place / RECIPE, partial(Path.write_text, data=text, encoding="utf-8"))
    names = {"study": study.name, "runs": {run.name: run.control for run in study.runs}}
    write_atomically(folder / "study.json", lambda path: path.write_text(json.dumps(names, indent=1) + "\n"))


def run_folder(run: Run, folder: Path) -> Path:
    """Of one run of a sweep."""
    return folder / RUNS / run.name


def stage_folders(run: Run, folder: Path) -> list[Path]:
    """Of the stages of one run, as :func:`patchscale.train.stages.run_stages` makes them."""
    return [run_folder(run, folder) / f"{i}_{stage}" for i, stage in enumerate(run.stages, start=1)]


def is_finished(run: Run, folder: Path) -> bool:
    """Whether a run has done all its epochs."""
    last, recipe = stage_folders(run, folder)[-1], list(run.stages.values())[-1]
    return (last / LAST).exists() and read_training_state(last)["epoch"] >= recipe.epochs


def collect(study: Study, folder: Path, held: Sequence[Cell] = ()) -> list[Cell]:
    """The rows of all finished runs, from their folders; written to ``results.jsonl`` too.

    Args:
        study: whose runs.
        folder: of the sweep.
        held: rows that the file held before; those of other runs, or of a run that has not finished here, stay.

    Raises:
        UserError: a folder cannot be read, or written to.
    """
    cells = [cell for run in study.runs if is_finished(run, folder) for cell in cells_of(study, run, folder)]
    new = {cell.key for cell in cells}
    write_results(folder / FILE, [*(cell for cell in held if cell.key not in new), *cells])
    return cells


def cells_of(study: Study, run: Run, folder: Path) -> list[Cell]:
    """What one finished run came to, from the files it left; of one for several patch sizes, at each of them.

    Raises:
        UserError: one of the files is gone or damaged.
    """
    folders = stage_folders(run, folder)
    states = [read_training_state(f) for f in folders]
    rows = [read_rows(f / METRICS) for f in folders]
    if any(not part or part[-1].get("epoch") != r.epochs for part, r in zip(rows, run.stages.values(), strict=True)):
        raise _damaged(run, folder, METRICS)
    try:
        start = json.loads((folders[-1] / RUN_RECORD).read_text())["starts"][-1]
        git, devices, cpu, threads = (start[key] for key in ("git", "devices", "cpu", "threads"))
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise _damaged(run, folder, RUN_RECORD) from e
    flops = [_flops_of(state) for state in states]
    images = [state["step"] * recipe.global_batch for state, recipe in zip(states, run.stages.values(), strict=True)]
    last, row, recipe = states[-1], rows[-1][-1], list(run.stages.values())[-1]
    with torch.device("meta"):
        model: Any = create_model(last["model_name"], dict(last["model_args"]))
    cell = Cell(
        study=study.name,
        family=re.sub(r"_(tiny|small|base|large|huge)(_.*)?$", "", recipe.model),
        model=recipe.model,
        width=model.embed_dim,
        depth=len(getattr(model, "layers", None) or model.blocks),
        img_size=last["preprocessing"]["img_size"][0],
        patch_size=model.patch_embed.patch_size[0],
        tokens=model.patch_embed.grid_size[0] * model.patch_embed.grid_size[1],
        seed=recipe.seed,
        epochs=sum(r.epochs for r in run.stages.values()),
        train_images=round(images[-1] / recipe.epochs),
        top1=row["top1"],
        val_loss=row["val_loss"],
        train_loss=row["train_loss"],
        parameters=sum(p.numel() for p in model.parameters()),
        flops_forward=flops[-1][0],
        flops_training=sum(of_image * n for (_, of_image), n in zip(flops, images, strict=True)),
        seconds=sum(epoch["seconds"] for part in rows for epoch in part),
        device=devices[0] if devices != ["cpu"] else f"{cpu}, {threads} threads",
        commit="unknown" if git is None else git["commit"] + "+" * git["dirty"],
        date=time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime((folders[-1] / LAST).stat().st_mtime)),
        data=recipe.data,
        recipe=run.recipe,
        control=run.control,
        held=study.hold,
        val_images=last["scores"]["images"],
        ema_top1=row.get("ema_top1"),
        ema_val_loss=row.get("ema_val_loss"),
        settings=_settings(run),
    )
    if not recipe.patch_sizes:
        return [cell]
    at_each = zip(score_by_patch(recipe, folders[-1]), _flops_by_patch(last), strict=True)
    return [replace(cell, flops_forward=forward, **scores) for scores, (forward, _) in at_each]


def _damaged(run: Run, folder: Path, file: str) -> UserError:
    place = run_folder(run, folder)
    return UserError(f"{place} is finished, but its {file} is gone or damaged: remove {place}, and it is run again")


def _settings(run: Run) -> dict[str, Any]:
    """Of the last stage, and in which fields each earlier one differs from it."""
    *earlier, last = ((name, recipe.to_dict()) for name, recipe in run.stages.items())
    differ = {name: {k: v for k, v in each.items() if v != last[1][k]} for name, each in earlier}
    return last[1] | ({"earlier_stages": differ} if differ else {})


def score_by_patch(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """What a finished stage for several patch sizes scores at each; worked out once, and kept in its folder."""
    file = folder / BY_PATCH
    if recipe.patch_sizes and not file.exists():
        found = [
            {"patch_size": at.patch_size, "tokens": at.patches, "top1": at.scores.top1, "val_loss": at.scores.loss}
            for at in evaluate(
                str(folder / LAST), patch_sizes=recipe.patch_sizes, device=recipe.device, workers=recipe.workers
            ).by_patch
        ]
        write_atomically(file, lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))
    return json.loads(file.read_text()) if recipe.patch_sizes else []


def _flops_of(state: dict[str, Any]) -> tuple[float, float]:
    """Of one image forward and in training; of training at several patch sizes, the mean."""
    by_patch = _flops_by_patch(state)
    return by_patch[0][0], sum(training for _, training in by_patch) / len(by_patch)


def _flops_by_patch(state: dict[str, Any]) -> list[tuple[int, int]]:
    recipe, preprocessing = Recipe.from_dict(state["recipe"]), state["preprocessing"]
    counts = []
    for given in [{"patch_size": size} for size in recipe.patch_sizes] or [{}]:
        with torch.device("meta"):
            module = trained_module(recipe, create_model(state["model_name"], dict(state["model_args"]) | given))
        counts.append(image_flops(module, preprocessing["channels"], tuple(preprocessing["img_size"])))
    return counts


def _planned_cost(run: Run) -> float:
    """In FLOPs for as many images as each stage's limit, or one: enough to sort runs of a study by."""
    return sum(planned_flops(r)[1] * r.epochs * (r.limit_train or 1) for r in run.stages.values())


def _seconds_left(states: list[State], jobs: int) -> float | None:
    """From the pace of what has run, over FLOPs; None as long as nothing has."""
    done = sum(s.share * s.cost for s in states if s.seconds)
    spent = sum(s.seconds for s in states)
    if not done:
        return None
    left = [(1 - s.share) * s.cost * spent / done for s in states if s.state in ("waiting", "running")]
    return max(sum(left) / jobs, max(left, default=0.0))


class _Pool:
    """Runs in processes of their own; those with a GPU get one each."""

    def __init__(self, folder: Path, jobs: int, gpus: int) -> None:
        self.folder, self.gpus, self.asked_to_stop = folder, gpus, 0
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self.context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self.context.set_forkserver_preload([__name__])
        self.told: Any = self.context.Queue()
        self.running: dict[str, tuple[State, Any, float, int]] = {}
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "_Pool":
        with contextlib.suppress(ValueError):  # not the main thread
            for number in stop_signals():
                self.before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *error: object) -> None:
        if self.running:  # after an error: what was trained is kept all the same
            self._stop()
        while self.running:
            self.turn()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _stop(self, *signal_and_frame: object) -> None:
        """Each run saves and ends; a second signal ends it at once, as it would alone."""
        self.asked_to_stop += 1
        for _, process, _, _ in self.running.values():
            _terminate(process)

    def start(self, state: State) -> None:
        """Start a run, on a GPU of its own where there are GPUs."""
        taken = {slot for _, _, _, slot in self.running.values()}
        slot = min(set(range(len(taken) + 1)) - taken)
        device = f"cuda:{slot % self.gpus}" if self.gpus else None
        arguments = state.run, self.folder, device, self.threads, self.told
        # A daemon is not allowed workers of its own.
        process = self.context.Process(target=_run, args=arguments, daemon=False, name=state.run.name)
        process.start()
        state.state = "running"
        self.running[state.run.name] = state, process, time.monotonic(), slot
        if self.asked_to_stop:  # while it was starting
            _terminate(process)

    def turn(self) -> bool:
        """Take in what runs say for a moment; True when one has ended."""
        deadline = time.monotonic() + _TELL_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            try:
                name, values = self.told.get(timeout=left)
            except queue.Empty:
                break
            if name in self.running:
                vars(self.running[name][0]).update(values)
        ended = [name for name, (_, process, _, _) in self.running.items() if not process.is_alive()]
        for state, _, began, _ in self.running.values():
            state.seconds = time.monotonic() - began
        for name in ended:
            state, process, _, _ = self.running.pop(name)
            if process.exitcode == 0:
                state.state, state.share = "done", 1.0
            elif process.exitcode == INTERRUPTED or self.asked_to_stop:
                state.state = "stopped"
            else:
                state.state = "failed"
                state.error = state.error or f"its process ended with status {process.exitcode}"
        return bool(ended)


def _terminate(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)


def _run(run: Run, folder: Path, device: str | None, threads: int, told: Any) -> None:
    """One run of the sweep in ``folder``, in its own process; it saves and ends when the sweep's is gone."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C is for the sweep, which passes it on
    torch.set_num_threads(threads)
    keep_freed_memory()
    sweep_process: Any = multiprocessing.parent_process()
    steps = [recipe.epochs for recipe in run.stages.values()]
    names = list(run.stages)

    class Tell(Observer):
        def __init__(self, stage: str) -> None:
            self.stage, self.before = stage, sum(steps[: names.index(stage)])
            self.prefix = f"{stage} " if len(names) > 1 else ""
            self.said = 0.0

        def progress(self, progress: Progress) -> None:
            now = time.monotonic()
            if now - self.said < _TELL_SECONDS:
                return
            self.said = now
            if not sweep_process.is_alive():  # killed; the same command again starts this run again
                told.cancel_join_thread()  # nobody reads it any more
                signal.raise_signal(signal.SIGTERM)
                return
            if progress.phase != "train":
                return
            epochs = self.before + progress.epoch - 1 + progress.step / progress.steps
            where = f"{self.prefix}epoch {progress.epoch}/{progress.epochs}"
            told.put((run.name, {"share": epochs / sum(steps), "where": where, "loss": progress.loss}))

        def epoch(self, report: EpochReport) -> None:
            row = report.to_dict()
            told.put((run.name, {"top1": row.get("top1"), "loss": row["val_loss"]}))

    stages = {n: r if device is None or r.device else replace(r, device=device) for n, r in run.stages.items()}
    place = run_folder(run, folder)
    command = ["patchscale", "train", "--recipe", str(place / RECIPE)]
    try:
        for _ in run_stages(stages, place, None, Tell, command=command):
            pass
        score_by_patch(stages[names[-1]], stage_folders(run, folder)[-1])
    except Interrupted:
        sys.exit(INTERRUPTED)
    except (UserError, TrainingStopped) as e:
        told.put((run.name, {"error": str(e)}))
        told.close()
        told.join_thread()
        sys.exit(1)


def runs_to_launch(study: Study, folder: Path) -> Iterator[list[str]]:
    """The arguments of ``patchscale train`` for each run that is not finished, for a cluster's array of jobs."""
    for run in study.runs:
        if not is_finished(run, folder):
            place = run_folder(run, folder)
            yield ["--recipe", str((place / RECIPE).absolute()), "--output", str(place.absolute())]
