"""Runs as jobs: on a Slurm cluster or on this machine, in the background, through submitit.

A job is the command ``patchscale train ARGUMENTS --output FOLDER`` on each of its processes. The same command goes on
with an unfinished run, so all that a job needs in order to survive is to be started again.
"""

import argparse
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from patchscale.errors import INTERRUPTED, UserError, first_line
from patchscale.files import make_folder
from patchscale.train.command import read_train
from patchscale.train.stages import check_recipe

_FOREVER_MINUTES = 10 * 365 * 24 * 60


@dataclass(frozen=True)
class Slurm:
    """Train on a Slurm cluster; a job that is pre-empted, or runs out of time, queues again and goes on."""

    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 0
    """GPUs of each machine."""
    tasks_per_node: int | None = None
    """Training processes on each machine; by default one a GPU, or a single one."""
    cpus_per_task: int | None = None
    """Cores for each process and its loader's workers; by default the cluster's own rule."""
    mem_gb: float | None = None
    """Memory of each machine, in GB; by default the cluster's own rule."""
    time: str = "24:00:00"
    """Time limit, as Slurm writes it: MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS. A longer run queues again."""
    signal_before: int = 120
    """Seconds before the time limit at which training is told to save and stop: more than a step and a checkpoint."""
    max_requeues: int = 100
    """Queue again at most this often, pre-emption included; 0 for never."""
    partition: str | None = None
    """Partition; by default the cluster's."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    name: str | None = None
    """Name of the job; by default the run's folder."""

    @property
    def minutes(self) -> int:
        """The time limit, rounded up.

        Raises:
            UserError: it is none.
        """
        match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", self.time)
        if match is None:
            raise UserError(f"--time is {self.time!r}, expected MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS")
        days, *parts = match.groups()
        # Slurm's rule: the first number is hours if days come before it or seconds after it, else minutes.
        hours = days is not None or parts[2] is not None
        first, second, third = (int(part or 0) for part in parts)
        seconds = 3600 * first + 60 * second + third if hours else 60 * first + second
        return math.ceil((86400 * int(days or 0) + seconds) / 60)

    @property
    def tasks(self) -> int:
        """Processes on each machine."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


@dataclass(frozen=True)
class Local:
    """Train on this machine, in the background, with all of its GPUs in sight."""


class Job(NamedTuple):
    """A submitted run."""

    job_id: str
    folder: Path
    """The run's."""
    log: Path
    """What the first process prints."""


def submit(arguments: Sequence[str], options: Slurm | Local) -> Job:
    """Submit one run.

    Args:
        arguments: those of ``patchscale train``. Without ``--output`` the run gets a new folder under runs/.
        options: where and how.

    Raises:
        UserError: ``train`` or Slurm would refuse them, submitit is not installed, there is no Slurm here, or the
            folder cannot be written to; nothing is submitted then.
    """
    _check_options(options)
    _check_place(options)
    _check_train(arguments)
    folder, arguments = _settle_folder(arguments)
    make_folder(folder)
    executor = _executor(options, folder / "logs", folder.name)
    if isinstance(options, Slurm):
        job = _submit(lambda: executor.submit(_train_on_slurm, arguments, options.max_requeues))
    else:
        job = _submit(lambda: executor.submit(_train_here, arguments, os.environ.get("CUDA_VISIBLE_DEVICES")))
    return Job(job.job_id, folder, job.paths.stdout)


def submit_array(runs: Sequence[Sequence[str]], options: Slurm, at_once: int, logs: Path) -> list[Job]:
    """Submit several runs as one Slurm array; each is requeued by itself.

    Args:
        runs: the arguments of ``patchscale train`` of each run, with an ``--output`` of its own.
        options: of every run.
        at_once: how many may run at the same time.
        logs: folder of all logs.

    Raises:
        UserError: as :func:`submit`; or two runs have one folder, or a run has none.
    """
    if not runs or at_once < 1:
        raise UserError(f"an array of {len(runs)} runs, {at_once} at once: expected 1 or more")
    _check_options(options)
    _check_place(options)
    settled: dict[Path, list[str]] = {}
    for arguments in runs:
        _check_train(arguments)
        if _place(arguments)[0] is None:
            raise UserError(f"each run of an array needs --output: {' '.join(arguments)}")
        folder, rest = _settle_folder(arguments)
        if folder in settled:
            raise UserError(f"two runs of an array have the same --output {folder}")
        settled[folder] = rest
    for folder in (logs, *settled):
        make_folder(folder)
    executor = _executor(options, logs.absolute(), logs.absolute().parent.name)
    executor.update_parameters(array_parallelism=at_once)
    limits = itertools.repeat(options.max_requeues)
    jobs = _submit(lambda: executor.map_array(_train_on_slurm, list(settled.values()), limits))
    return [Job(job.job_id, folder, job.paths.stdout) for job, folder in zip(jobs, settled, strict=True)]


def _check_place(options: Slurm | Local) -> None:
    if not hasattr(signal, "SIGUSR1"):
        raise UserError(f"launch needs Linux or macOS, not {sys.platform}; `patchscale train` runs here")
    try:
        import submitit  # noqa: F401
    except ImportError as e:
        raise UserError("launch needs submitit, which is not installed: pip install submitit") from e
    if isinstance(options, Slurm) and not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError("no sbatch here: run this where your cluster takes jobs, or use `patchscale launch local`")


def _check_options(options: Slurm | Local) -> None:
    if isinstance(options, Local):
        return
    for name in ("nodes", "tasks_per_node", "cpus_per_task", "mem_gb", "signal_before"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected more than 0")
    for name in ("gpus_per_node", "max_requeues"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected 0 or more")
    if 60 * options.minutes <= options.signal_before:
        raise UserError(
            f"--time is {options.time}, expected more than the {options.signal_before} seconds of --signal-before"
        )
    if options.name in ("bash", "interactive"):
        raise UserError(f"--name is {options.name}, which Slurm gives to shells: choose another")


def _check_train(arguments: Sequence[str]) -> None:
    """Find out now what would otherwise end the job after its hours in the queue; data may be out of sight here."""
    for recipe in read_train(list(arguments)):
        check_recipe(recipe)


def _place(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The folder that ``--output`` names, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output", type=Path)
    found, rest = parser.parse_known_args(list(arguments))
    return found.output, rest


def _settle_folder(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """The run's folder, and the arguments that name it, whichever folder and time the job starts at."""
    folder, rest = _place(arguments)
    if folder is None:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for flag in ("--resume", "--recipe", "--model"):
            parser.add_argument(flag, type=Path)
        given, _ = parser.parse_known_args(rest)
        if given.resume is not None:
            return (given.resume if given.resume.is_dir() else given.resume.parent).absolute(), rest
        folder = Path("runs") / f"{(given.recipe or given.model).stem}_{time.strftime('%Y%m%d-%H%M%S')}"
    folder = folder.expanduser().absolute()
    if "%" in str(folder):
        raise UserError(f"--output is {folder}: Slurm reads % in the name of a log in its own way, choose another")
    return folder, [*rest, "--output", str(folder)]


def _executor(options: Slurm | Local, logs: Path, name: str) -> Any:
    import submitit

    if isinstance(options, Local):
        local = submitit.LocalExecutor(logs)
        local.update_parameters(timeout_min=_FOREVER_MINUTES, stderr_to_stdout=True)
        return local
    # srun no longer takes this from sbatch (since Slurm 22.05). A process that fails ends the others: they would wait.
    srun = ["--kill-on-bad-exit=1"]
    if options.cpus_per_task is not None:
        srun.append(f"--cpus-per-task={options.cpus_per_task}")
    parameters = {
        "job_name": options.name or name,
        "nodes": options.nodes,
        "ntasks_per_node": options.tasks,
        "gpus_per_node": options.gpus_per_node or None,
        "cpus_per_task": options.cpus_per_task,
        "mem": None if options.mem_gb is None else f"{math.ceil(1024 * options.mem_gb)}M",
        "time": options.minutes,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "stderr_to_stdout": True,
        "srun_args": srun,
    }
    # submitit asks for SIGUSR2 and answers it by requeueing in the middle of a step; training answers SIGUSR1.
    extra: dict[str, Any] = {"signal": f"USR1@{options.signal_before}"}
    extra["requeue" if options.max_requeues else "no-requeue"] = True
    slurm = submitit.SlurmExecutor(logs)
    slurm.update_parameters(
        **{k: v for k, v in parameters.items() if v is not None}, additional_parameters=extra, wckey=None
    )
    return slurm


def _submit(call: Any) -> Any:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        return call()
    except (FailedJobError, FailedSubmissionError) as e:
        raise UserError(f"Slurm refused the job: {first_line(e).removeprefix('sbatch: error: ')}") from e


def _train(arguments: list[str]) -> int:
    """The command, in this process; its exit status."""
    from patchscale.cli import main

    try:
        return main(["train", *arguments])
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1


def _train_here(arguments: list[str], gpus: str | None) -> None:
    """What a local job does."""
    # submitit hides all GPUs from a job that asks for none.
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    _answer_signals(_stop)
    status = _train(arguments)
    if status:
        sys.exit(status)


def _train_on_slurm(arguments: list[str], max_requeues: int) -> None:
    """What each process of a Slurm job does."""
    from submitit import JobEnvironment

    job = JobEnvironment()
    first = job.global_rank == 0
    # While it trains, training answers signals by itself. Before that, nothing is lost by stopping at once; but only
    # the first process may, since it requeues: if others ended, it could be waiting for them without end.
    _answer_signals(_stop if first else _pass)
    status = _train(arguments)
    if status == INTERRUPTED:
        # Requeueing sends SIGTERM to this process too.
        _answer_signals(_pass)
        if not first or _requeue(job.job_id, max_requeues):
            sys.exit(0)  # another status would end the other processes, the requeueing one among them
    if status:
        sys.exit(status)


def _requeue(job_id: str, max_requeues: int) -> bool:
    """Queue this job again, unless Slurm does so itself or somebody has cancelled it."""
    status, state = _slurm("squeue", "--noheader", "--jobs", job_id, "--format", "%T")
    # A busy controller may not answer: then nothing is known against requeueing.
    if status == 0 and state != "RUNNING":
        print(f"stopped by Slurm ({state}): not requeued from here", flush=True)
        return True
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if requeued >= max_requeues:
        print(f"requeued {requeued} times, the most allowed: the same command goes on", flush=True)
        return False
    print(f"requeueing job {job_id}", flush=True)
    status, answer = _slurm("scontrol", "requeue", job_id)
    if status or answer:
        print(f"not requeued, the same command goes on: {answer}", flush=True)
        return False
    return True


def _slurm(*command: str) -> tuple[int, str]:
    """A Slurm command's exit status and what it prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout.strip()


def _answer_signals(answer: Any) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, answer)


def _stop(*_: object) -> NoReturn:
    sys.exit(INTERRUPTED)


def _pass(*_: object) -> None:
    pass
