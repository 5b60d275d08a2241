"""Jobs: what is refused before submission, when a job requeues, and whole runs here and on a real Slurm."""

import fcntl
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from patchscale.cli import main
from patchscale.errors import INTERRUPTED, UserError
from patchscale.train import launch
from patchscale.train.launch import Local, Slurm, submit, submit_array

submitit = pytest.importorskip("submitit")

SMALL = ["--img-size", "8", "--patch-size", "4", "--embed-dim", "32", "--depth", "1", "--hflip", "0", "--workers", "0"]
TRAIN = ["--model", "adventurer_tiny_patch4", "--data", "digits", "--limit-train", "64", "--batch-size", "16", *SMALL]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "last.pt", weights_only=True)["model"]


def assert_same_weights(run: Path, other: Path) -> None:
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def wait_until(condition, seconds: float, what: str, log: Path | None = None):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    printed = log.read_text() if log is not None and log.exists() else ""
    pytest.fail(f"{what} took more than {seconds} s\n{printed}")


def wait_for_end(job: launch.Job, seconds: float) -> None:
    """Until the job's function has returned, which is when submitit writes this file, or has failed."""
    file = job.log.with_name(f"{job.job_id}_0_result.pkl")
    wait_until(file.exists, seconds, f"job {job.job_id}", job.log)
    assert pickle.loads(file.read_bytes()) == ("success", None), job.log.read_text()


# What is refused


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """A folder of commands in the place of Slurm's, each noting that it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def command(name: str, answer: str = "", status: int = 0) -> None:
        file = folder / name
        file.write_text(
            f'#!/bin/sh\necho "{name} $*" >> {folder}/calls\necho "{answer}" | tr -d "\\n"\nexit {status}\n'
        )
        file.chmod(0o755)

    for name in ("sbatch", "srun"):
        command(name, "Submitted batch job 7")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return command


def calls(tmp_path: Path) -> list[str]:
    file = tmp_path / "bin" / "calls"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize(
    ("flags", "training", "says"),
    [
        ([], [], "After --"),
        (["--time", "0"], TRAIN, "--time is 0"),
        (["--time", "soon"], TRAIN, "--time is 'soon'"),
        (["--time", "2:00", "--signal-before", "180"], TRAIN, "180 seconds of --signal-before"),
        (["--nodes", "0"], TRAIN, "--nodes is 0"),
        (["--mem-gb", "nan"], TRAIN, "--mem-gb is nan"),
        (["--gpus-per-node", "-1"], TRAIN, "--gpus-per-node is -1"),
        (["--name", "bash"], TRAIN, "--name is bash"),
        ([], ["--model", "adventurer_tny_patch4", "--data", "digits"], "adventurer_tiny_patch4"),
        ([], ["--recipe", "adventurer_base_pach16"], "adventurer_base_patch16"),
        ([], [*TRAIN, "--patch-size", "3"], "6x6 or 9x9"),
        ([], [*TRAIN, "--output", "FILE/run"], "cannot write to"),
        ([], [*TRAIN, "--output", "50%"], "choose another"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_line_before_anything_is_submitted(
    fake_slurm, tmp_path, monkeypatch, capsys, flags, training, says
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("")
    assert main(["launch", "slurm", *flags, "--", *training]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line
    assert calls(tmp_path) == []
    assert not (tmp_path / "runs").exists()


def test_flags_that_train_does_not_know_are_refused(fake_slurm, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["launch", "slurm", "--", *TRAIN, "--epochz", "3"])
    assert stopped.value.code == 2
    assert "--epochs" in capsys.readouterr().err
    assert calls(tmp_path) == []


def test_a_machine_without_slurm_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch here"):
        submit([*TRAIN, "--output", str(tmp_path / "run")], Slurm())
    assert not (tmp_path / "run").exists()


def test_missing_submitit_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install submitit"):
        submit(TRAIN, Local())


def test_what_slurm_refuses_is_one_line(fake_slurm, tmp_path, monkeypatch):
    refusal = "sbatch: error: invalid partition specified: gpu"
    (tmp_path / "bin" / "sbatch").write_text(f'#!/bin/sh\necho "{refusal}" >&2\nexit 1\n')
    with pytest.raises(UserError, match="Slurm refused the job: invalid partition specified: gpu"):
        submit([*TRAIN, "--output", str(tmp_path / "run")], Slurm(partition="gpu"))


def test_runs_of_an_array_need_folders_of_their_own(fake_slurm, tmp_path):
    with pytest.raises(UserError, match="needs --output"):
        submit_array([TRAIN], Slurm(), 1, tmp_path / "logs")
    same = [*TRAIN, "--output", str(tmp_path / "run")]
    with pytest.raises(UserError, match="the same --output"):
        submit_array([same, same], Slurm(), 1, tmp_path / "logs")
    assert calls(tmp_path) == []


# What is submitted


def test_sbatch_is_asked_for_what_the_flags_say(fake_slurm, tmp_path, capsys):
    flags = ["--nodes", "2", "--gpus-per-node", "4", "--cpus-per-task", "8", "--mem-gb", "0.5", "--time", "1-12:30"]
    flags += ["--partition", "gpu", "--account", "vision", "--qos", "high", "--signal-before", "300"]
    assert main(["launch", "slurm", *flags, "--", *TRAIN, "--output", str(tmp_path / "some run")]) == 0
    printed = capsys.readouterr().out
    log = tmp_path / "some run" / "logs" / "7_0_log.out"
    assert f"tail -F '{log}'" in printed
    assert "squeue --jobs 7" in printed
    text = (tmp_path / "some run" / "logs" / "7_submission.sh").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M))
    expected = {"nodes": "2", "gpus-per-node": "4", "ntasks-per-node": "4", "cpus-per-task": "8", "mem": "512M"}
    expected |= {"time": "2190", "partition": "gpu", "account": "vision", "qos": "high", "signal": "USR1@300"}
    expected |= {"requeue": "", "open-mode": "append", "job-name": "'some run'"}
    assert asked.items() >= expected.items()
    assert "--cpus-per-task=8" in next(line for line in text.splitlines() if line.startswith("srun"))


def test_a_job_without_output_gets_a_folder_at_submission(fake_slurm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = submit(TRAIN, Slurm())
    assert job.folder.parent == tmp_path / "runs"
    delayed = submitit.core.utils.DelayedSubmission.load(job.log.with_name("7_submitted.pkl"))
    assert delayed.args[0] == [*TRAIN, "--output", str(job.folder)]


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("90", 90), ("1:30", 2), ("2:00:00", 120), ("0:0:1", 1), ("1-0", 1440), ("1-2:30", 1590), ("1-2:30:01", 1591)],
)
def test_time_limits_are_read_as_slurm_reads_them(time, minutes):
    assert Slurm(time=time).minutes == minutes


# What a job does, whatever training is


@pytest.fixture
def task(fake_slurm, monkeypatch):
    """Runs a process of a Slurm job in which training ends with a status; gives the process's own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}

    def run(
        training, rank: int = 0, state: str = "RUNNING", restarts: int = 0, refusal: str = "", unknown: int = 0
    ) -> int:
        fake_slurm("squeue", state, unknown)
        fake_slurm("scontrol", refusal, int(bool(refusal)))
        monkeypatch.setattr("patchscale.cli.main", training)
        environment = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "9", "SLURM_PROCID": str(rank)}
        environment |= {"SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": str(restarts)}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        try:
            launch._train_on_slurm(["--output", "x"], 3)
        except SystemExit as e:
            return e.code
        return 0

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_job_ends_with_the_status_of_training(task, tmp_path):
    assert [task(lambda arguments, status=status: status) for status in (0, 1, 2)] == [0, 1, 2]
    assert calls(tmp_path) == []


def test_only_the_first_process_of_a_stopped_run_requeues_it(task, tmp_path):
    assert task(lambda arguments: INTERRUPTED, rank=1) == 0
    assert calls(tmp_path) == []
    assert task(lambda arguments: INTERRUPTED, rank=0) == 0
    # Of an array, the one run, not all.
    assert calls(tmp_path) == ["squeue --noheader --jobs 8_1 --format %T", "scontrol requeue 8_1"]


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", ""])
def test_a_job_that_slurm_stops_or_somebody_cancels_is_left_to_slurm(task, tmp_path, state):
    assert task(lambda arguments: INTERRUPTED, state=state) == 0
    assert len(calls(tmp_path)) == 1


@pytest.mark.parametrize("said", ["slurm_load_jobs error: Socket timed out on send/recv operation", ""])
def test_a_job_whose_state_slurm_does_not_tell_is_requeued(task, tmp_path, said):
    assert task(lambda arguments: INTERRUPTED, state=said, unknown=1) == 0
    assert calls(tmp_path)[-1] == "scontrol requeue 8_1"


def test_requeues_have_a_limit(task, tmp_path, capsys):
    assert task(lambda arguments: INTERRUPTED, restarts=3) == INTERRUPTED
    assert "requeued 3 times" in capsys.readouterr().out


def test_a_job_that_cannot_be_requeued_says_so(task, capsys):
    assert task(lambda arguments: INTERRUPTED, refusal="Access denied") == INTERRUPTED
    assert "not requeued, the same command goes on: Access denied" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_before_training_answers_them_requeues_at_once(task, tmp_path, number):
    def slow_start(arguments):
        os.kill(os.getpid(), number)
        time.sleep(5)
        return 0

    assert task(slow_start) == 0
    assert calls(tmp_path)[-1] == "scontrol requeue 8_1"


def test_a_signal_before_training_does_not_end_the_other_processes(task, tmp_path):
    def slow_start(arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return 0

    assert task(slow_start, rank=1) == 0
    assert calls(tmp_path) == []


# Whole runs


def test_a_local_job_trains_to_its_end(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["launch", "local", "--", *TRAIN, "--epochs", "1", "--output", str(folder)]) == 0
    job_id = re.search(r"^job (\d+) trains in", capsys.readouterr().out)[1]
    job = launch.Job(job_id, folder, folder / "logs" / f"{job_id}_0_log.out")
    wait_for_end(job, 300)
    assert re.search(r"^last: ", job.log.read_text(), re.M)
    assert [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1]


# A real Slurm of this machine alone


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def install_slurm() -> None:
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
    with open(Path(tempfile.gettempdir()) / "patchscale-install-slurm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be at it
        if all(map(shutil.which, programs)):
            return
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        install = ["install", "--yes", "--no-install-recommends", "slurm-wlm", "munge"]
        for arguments in (["update"], install):
            try:
                subprocess.run(["apt-get", *arguments], check=True, env=environment, capture_output=True, timeout=300)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as e:
                pytest.skip(f"Slurm cannot be installed here: {e}")


CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} Boards=1 SocketsPerBoard=1 CoresPerSocket={cores} ThreadsPerCore=1 \
RealMemory=2000 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def slurm_says(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture(scope="module")
def slurm():
    """A Slurm of one node with all of its files in a temporary folder, where it may be installed and started."""
    if os.environ.get("CI") != "true" and os.environ.get("PATCHSCALE_TEST_SLURM") != "1":
        pytest.skip("installs and starts Slurm on this machine: only with CI=true or PATCHSCALE_TEST_SLURM=1")
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("Slurm is installed and started as root on Debian only")
    install_slurm()
    folder = Path(tempfile.mkdtemp(prefix="patchscale-slurm-"))
    folder.chmod(0o755)
    ports = {"controller_port": free_port(), "node_port": free_port()}
    host = socket.gethostname().partition(".")[0]
    text = CONFIGURATION.format(folder=folder, host=host, cores=min(2, os.cpu_count() or 1), **ports)
    (folder / "slurm.conf").write_text(text)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    files = {f"--{name}-file": folder / f"munge.{name}" for name in ("key", "pid", "log", "seed")}
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
    munged += [f"{flag}={path}" for flag, path in files.items()]
    configuration = str(folder / "slurm.conf")
    daemons, before = [], os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = configuration
    try:
        for command in (munged, ["slurmctld", "-D", "-f", configuration], ["slurmd", "-D", "-f", configuration]):
            with open(folder / f"{command[0]}.out", "w") as out:
                daemons.append(subprocess.Popen(command, stdout=out, stderr=out))
            if command is munged:
                wait_until((folder / "munge.socket").exists, 20, "munged", folder / "munged.out")
        idle = ["sinfo", "--noheader", "--format", "%T"]
        wait_until(
            lambda: subprocess.run(idle, capture_output=True, text=True).stdout.strip() == "idle",
            30,
            "starting Slurm",
            folder / "slurmctld.log",
        )
        yield folder
        subprocess.run(["scancel", "--user", "root"], capture_output=True, timeout=30)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)


def epochs(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def restarts(job: launch.Job) -> int:
    return int(re.search(r"Restarts=(\d+)", slurm_says("scontrol", "show", "job", job.job_id))[1])


@pytest.mark.slow
def test_a_slurm_job_signalled_and_requeued_ends_as_an_undisturbed_one(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = [*TRAIN, "--epochs", "20", "--mixup", "0.8"]
    job = submit([*arguments, "--output", str(tmp_path / "run")], Slurm(time="10", signal_before=60))
    for disturbance in ("scancel --signal=USR1", "scontrol requeue"):
        before = epochs(job.folder), restarts(job)
        wait_until(lambda before=before: epochs(job.folder) > before[0] + 1, 60, "two more epochs", job.log)
        slurm_says(*disturbance.split(), job.job_id)
        wait_until(lambda before=before: restarts(job) > before[1], 30, disturbance, job.log)
    reached = epochs(job.folder)
    assert reached < 20, "the job was through before it was disturbed: give it more epochs"
    assert main(["train", *arguments, "--output", str(tmp_path / "undisturbed")]) == 0
    wait_for_end(job, 60)
    assert_same_weights(job.folder, tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_slurm_array_runs_each_of_its_runs(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs = [[*TRAIN, "--epochs", "1", "--seed", str(s), "--output", str(tmp_path / f"seed{s}")] for s in (0, 1)]
    jobs = submit_array(runs, Slurm(time="10"), 2, tmp_path / "logs")
    array = jobs[0].job_id.partition("_")[0]
    assert [job.job_id for job in jobs] == [f"{array}_0", f"{array}_1"]
    assert "ArrayTaskThrottle=2" in slurm_says("scontrol", "show", "job", array)
    for job in jobs:
        wait_for_end(job, 60)
        assert epochs(job.folder) == 1
    assert not torch.equal(*(next(iter(weights(job.folder).values())) for job in jobs))
