"""``patchscale sweep``: from a study file or flags to its runs, and the table that is shown while they train."""

import contextlib
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.live import Live
from rich.table import Table

from patchscale import console
from patchscale.scaling.command import RESULTS_WIDTH, results_table
from patchscale.scaling.runs import Study, make_study, read_fields, read_study
from patchscale.scaling.sweep import State, prepare, runs_to_launch
from patchscale.scaling.sweep import sweep as run_study
from patchscale.train.launch import Slurm, submit_array


@dataclass(frozen=True)
class Sweep:
    """Train a study's runs, several at a time: every combination of patch sizes, seeds and whatever else is swept.

    The study is a file (studies/), or flags: those of `train`, where several values are swept
    (--model adventurer_tiny_patch1 --data digits --img-size 8 --patch-size 8 4 2 1 --seed 0 1 2). With a file, flags
    change all of its runs. The same command again goes on; what is finished stays. Rows of results are in
    OUTPUT/results.jsonl, for `fit` and `report`.
    """

    study: Path | None = None
    """A .toml file; the head of patchscale/scaling/runs.py says what it holds."""
    output: Path | None = None
    """Folder of the sweep; by default runs/NAME."""
    jobs: int | None = None
    """Runs at a time; by default one a GPU, or one a core."""
    hold: Literal["epochs", "flops"] | None = None
    """flops: cheaper runs get more epochs, until all have cost about what the dearest does."""
    show: bool = False
    """Print the runs, and do nothing."""
    slurm: str | None = None
    """Submit the runs as an array of jobs instead, with these flags of `launch slurm`: '--time 1:00:00 ...'. Once they
    are done, the same command without --slurm gathers the results."""


def sweep(arguments: list[str]) -> None:
    """Train a study: every combination of patch sizes, seeds and whatever else is swept."""
    given, others = tyro.cli(Sweep, args=arguments, prog="patchscale sweep", return_unknown_args=True)
    fields = read_fields(others)
    if given.study is not None:
        study = read_study(given.study, fields, given.hold)
    else:
        study = make_study({"all": fields, "hold": given.hold or "epochs"}, "sweep")
    if given.show:
        for each in study.runs:
            epochs = " + ".join(str(stage.epochs) for stage in each.stages.values())
            console.out.print(f"{each.name}  ({each.control}, {epochs} epochs)")
        return
    folder = given.output or Path("runs") / study.name
    if given.slurm is not None:
        _submit(study, folder, given.slurm, given.jobs)
        return
    with _table_while_it_runs() as watch:
        cells = run_study(study, folder, given.jobs, watch)
    console.make_room(RESULTS_WIDTH)
    console.out.print(results_table(cells))
    console.out.print(f"{len(cells)} runs in {folder / 'results.jsonl'}")
    console.out.print(f"read them: patchscale report {folder} --out {folder / 'report.html'}")


def _submit(study: Study, folder: Path, flags: str, at_once: int | None) -> None:
    options = tyro.cli(Slurm, args=shlex.split(flags), prog="--slurm")
    prepare(study, folder)
    runs = list(runs_to_launch(study, folder))
    if not runs:
        console.out.print("all runs are finished")
        return
    jobs = submit_array(runs, options, at_once or len(runs), folder / "logs")
    first, last = jobs[0].job_id, jobs[-1].job_id
    console.out.print(f"{len(jobs)} jobs: {first} to {last}, logs in {folder / 'logs'}")


@contextlib.contextmanager
def _table_while_it_runs() -> Iterator[Callable[[list[State], float | None], None]]:
    """A line for each run while they train; where nobody watches, a line for each that has ended."""
    told: set[str] = set()

    def watch(states: list[State], seconds_left: float | None) -> None:
        if console.err.is_terminal:
            live.update(_table_of(states, seconds_left))
            return
        for state in states:
            if state.state in ("done", "failed", "stopped") and state.run.name not in told:
                told.add(state.run.name)
                top1 = "" if state.top1 is None else f"  top-1 {state.top1:.2f}%"
                left = "" if seconds_left is None else f"  ({console.duration(seconds_left)} left)"
                console.err.print(f"{state.run.name}  {state.state}{top1}{left}")

    with Live(console=console.err, transient=True, refresh_per_second=4) as live:
        yield watch


def _table_of(states: list[State], seconds_left: float | None) -> Table:
    done = sum(state.state == "done" for state in states)
    left = "" if seconds_left is None else f", {console.duration(seconds_left)} left"
    table = Table("run", "", "", "loss", "top-1 %", "time", title=f"{done} of {len(states)} runs done{left}")
    for column in table.columns[3:]:
        column.justify = "right"
    for state in states:
        table.add_row(
            state.run.name,
            f"{state.share:.0%}" if state.state == "running" else state.state,
            state.where,
            "" if state.loss is None else f"{state.loss:.3f}",
            "" if state.top1 is None else f"{state.top1:.2f}",
            console.duration(state.seconds) if state.seconds else "",
        )
    return table
