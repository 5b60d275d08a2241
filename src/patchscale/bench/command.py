"""``patchscale bench``: from what was asked to the report."""

import functools
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from patchscale.bench import cells
from patchscale.bench.cases import (
    DECAYS,
    DTYPES,
    EXPAND,
    HEADDIM,
    OURS,
    Case,
    bytes_moved,
    counted_flops,
    flops,
    ours_model,
)
from patchscale.bench.measure import OUT_OF_MEMORY, Failed, describe, isolated, preload
from patchscale.bench.peers import DEFAULT_PEERS, PEERS, candidate, missing
from patchscale.bench.report import (
    Cell,
    Display,
    Report,
    describe_machine,
    display,
    growth_table,
    table,
    write_json,
    write_plot,
)
from patchscale.errors import UserError
from patchscale.files import make_folder
from patchscale.models.published import check_model_name
from patchscale.ops.dispatch import choose_implementation
from patchscale.train.device import resolve_device

Kind = Literal["ops", "model", "train"]
KINDS = ("ops", "model", "train")
_SUBJECTS = {"ops": ("scan", "conv"), "model": ("mixer", "block"), "train": ("step",)}
_TOKENS = "196,784,3136"
_FOR_PARTS = ("heads", "decay", "width", "tokens")  # options that a whole model's name settles
_TRAINED = "adventurer_tiny_patch16_224"


@dataclass(frozen=True)
class Options:
    """How a benchmark runs.

    Attributes:
        peers: Whom to measure beside: transformers, vit, mamba-ssm, fla, none, or this project's own other forms,
            native (C++ for CPUs), default-linear (MKL for oneDNN), compiled (torch.compile), graphed (CUDA graphs),
            float8 (torchao) and products-kept; by default all others that are installed and run on the device.
        tokens: Numbers of tokens, such as 196,784,3136,12544,50176.
        heads: Scan heads of 64 channels, for ops; 8,24 by default.
        decay: The scan's decays, for ops: fresh (as before training), mild (no head decays strongly), or both by
            commas; fresh by default.
        width: Widths of mixers and blocks, for model; 256,768 by default.
        model: Whole models, such as adventurer_tiny_patch1_224, for model (instead of blocks) and train; several by
            commas.
        batch: Samples at a time; for several models, one number for all or one for each.
        threads: CPU threads; 1 by default.
        device: cpu or cuda; by default the GPU where there is one.
        dtype: float32 or bfloat16; by default bfloat16 on a GPU. Modules keep float32 weights, under autocast.
        repeats: Rounds at least.
        min_seconds: Time at least that each candidate runs in every case.
        out: Folder for results.json and results.png; a new one under runs by default.
    """

    peers: str | None = None
    tokens: str | None = None
    heads: str | None = None
    decay: str | None = None
    width: str | None = None
    model: str | None = None
    batch: str = "1"
    threads: int = 1
    device: str | None = None
    dtype: str | None = None
    repeats: int = 5
    min_seconds: float = 0.2
    out: Path | None = None


def bench(kind: str, options: Options | None = None) -> Report:
    """Measure operators (``ops``), mixers, blocks or whole models (``model``), or training steps (``train``).

    Prints the tables and writes ``results.json`` and ``results.png``.

    Raises:
        UserError: something asked for does not exist or cannot be used.
    """
    options = options or Options()
    if kind not in KINDS:
        raise UserError(f"unknown benchmark {kind!r}; choose one of {', '.join(KINDS)}")
    device = _device(options.device)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    for name in ("threads", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}, expected at least 1")
    if not 0 <= options.min_seconds < math.inf:
        raise UserError(f"--min-seconds is {options.min_seconds}, expected a number from 0 on")
    work = _cases(kind, options, str(device), dtype)
    operators = choose_implementation(None, device, DTYPES[dtype])
    peers, notes = _peers(options.peers, {case.subject for case in work}, device)
    folder = options.out or Path("runs") / f"bench_{kind}_{time.strftime('%Y%m%d-%H%M%S')}"
    make_folder(folder)
    (folder / "results.png").unlink(missing_ok=True)  # of another run

    effort = cells.Effort(options.threads, options.min_seconds, options.repeats)
    run = _runner(device, peers)
    with display() as shown:
        shown.progress(0, 1, "measuring the machine")
        asked = {name: value for name, value in asdict(options).items() if value is not None}
        report = Report(
            kind,
            asked | {"device": str(device), "dtype": dtype},
            describe_machine(device, options.threads) | {"operators": operators.implementation},
            _machine_ceilings(run, device, dtype, options.threads),
            notes,
        )
        notes += _conditions(report, device, dtype)
        notes.append(f"{OURS}: its operators in {operators.implementation!r}, {operators.reason}")
        for note in notes:
            shown.note(note)
        done, total = 0, sum(2 + len(_doing(case, peers)) for case in work)
        try:
            for case in work:
                done = _measure(case, _doing(case, peers), effort, run, report, shown, done, total)
                write_json(report, folder / "results.json")
        except KeyboardInterrupt:
            if report.cells:
                _show(report, shown, folder)
            raise
        _show(report, shown, folder)
    if not any(cell.seconds for cell in report.cells):
        raise UserError(f"nothing could be measured: {report.cells[0].what_failed}; {folder / 'results.json'} has all")
    return report


def _machine_ceilings(run: Callable[..., Any], device: torch.device, dtype: str, threads: int) -> Any:
    try:
        return run(cells.machine_ceilings, str(device), dtype, threads)
    except Failed as e:
        raise UserError(f"not even a matrix product can be measured with --threads {threads}: {e}") from None


def _show(report: Report, shown: Display, folder: Path) -> None:
    """The tables and what went wrong, on the screen; the picture, beside the results."""
    shown.table(f"patchscale bench {report.kind}", *table(report))
    columns, rows = growth_table(report)
    if rows:
        shown.table("growth with the number of tokens (1 is linear)", columns, rows)
    for cell in report.cells:
        if cell.error not in (None, OUT_OF_MEMORY):
            shown.note(cell.what_failed)
    shown.note(f"wrote {folder / 'results.json'}")
    if write_plot(report, folder / "results.png"):
        shown.note(f"wrote {folder / 'results.png'}")
    else:
        shown.note("no picture: matplotlib is not installed (pip install matplotlib)")


def _device(name: str | None) -> torch.device:
    device = resolve_device(name)
    if device.type not in ("cpu", "cuda"):
        if name is None:
            return torch.device("cpu")
        raise UserError(f"--device is {name!r}: the benchmark measures cpu and cuda alone")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _cases(kind: str, options: Options, device: str, dtype: str) -> list[Case]:
    names = options.model.split(",") if options.model is not None else [_TRAINED] if kind == "train" else None
    unused: tuple[str, ...] = {"ops": ("width", "model"), "model": ("heads", "decay"), "train": _FOR_PARTS}[kind]
    where = f"bench {kind}"
    if kind == "model" and names is not None:
        unused, where = _FOR_PARTS, "bench model --model"
    for name in unused:
        if getattr(options, name) is not None:
            raise UserError(f"--{name} has no use in `{where}`; leave it out")
    batches = _numbers("batch", options.batch)
    if len(batches) not in (1, len(names or ())):
        raise UserError(f"--batch is {options.batch!r}, expected one number, or one for each model")
    if names is not None:
        batches *= len(names) if len(batches) == 1 else 1
        return [
            case
            for name, batch in zip(names, batches, strict=True)
            for case in _model_cases(kind, name.strip(), {"batch": batch, "device": device, "dtype": dtype})
        ]
    tokens = _numbers("tokens", _TOKENS if options.tokens is None else options.tokens)
    if kind == "ops":
        heads = _numbers("heads", "8,24" if options.heads is None else options.heads)
    else:
        heads = []
        for width in _numbers("width", "256,768" if options.width is None else options.width):
            if width % HEADDIM:
                raise UserError(f"--width is {width}, expected a multiple of {HEADDIM}")
            heads.append(width * EXPAND // HEADDIM)
    decays = (options.decay or DECAYS[0]).split(",")
    for decay in decays:
        if decay not in DECAYS:
            raise UserError(
                f"--decay is {options.decay!r}, expected {' or '.join(DECAYS)}, or both with a comma between"
            )
    return [
        Case(subject, training, n, batches[0], h, device, dtype, decay=decay)
        for subject in _SUBJECTS[kind]
        for h in dict.fromkeys(heads)
        for decay in (dict.fromkeys(decays) if subject == "scan" else DECAYS[:1])
        for training in (False, True)
        for n in dict.fromkeys(tokens)
    ]


def _model_cases(kind: str, name: str, common: dict[str, Any]) -> list[Case]:
    if not re.fullmatch(r"adventurer_\w+", name):
        raise UserError(f"--model is {name!r}, expected an Adventurer's, such as {_TRAINED} (`patchscale models`)")
    check_model_name(name)
    model = ours_model(Case("model", False, 0, heads=0, model=name, **common | {"device": "meta"}))
    tokens, heads = model.pos_embed.shape[1] - 1, model.embed_dim * EXPAND // HEADDIM
    common = common | {"tokens": tokens, "heads": heads, "model": name}
    if kind == "train":
        return [Case("step", True, checkpointing=checkpointing, **common) for checkpointing in (False, True)]
    return [Case("model", training, checkpointing=training, **common) for training in (False, True)]


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"--{name} is {text!r}, expected whole numbers from 1 on with commas between, such as 196,784")
    return numbers


def _peers(asked: str | None, subjects: set[str], device: torch.device) -> tuple[list[str], list[str]]:
    """Whom to measure, and a line for each who is left out or has a remark."""
    names = list(DEFAULT_PEERS)
    if asked is not None:
        names = [name.strip() for name in asked.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in PEERS:
            raise UserError(f"unknown peer {name!r}; known are {', '.join(PEERS)}, and none")
    found, notes = [], []
    for name in dict.fromkeys(names):
        peer = PEERS[name]
        if not subjects & set(peer.makes):
            if asked is not None:
                notes.append(f"without {name}: it has nothing to set beside {', '.join(sorted(subjects))}")
        elif (why := missing(name, device)) is not None:
            notes.append(f"without {name}: {why}")
        else:
            found.append(name)
            notes.append(f"{name}: {peer.remark}")
    return found, notes


def _conditions(report: Report, device: torch.device, dtype: str) -> list[str]:
    machine, peak = report.machine, report.ceilings
    place = machine.get("gpu") or f"{machine['processor']}, {machine['cores_allowed']} of {machine['cores']} cores"
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    lines = [
        f"{place}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}, {dtype}; {versions}",
        f"ceilings: matrix product {peak.flops / 1e9:,.1f} GFLOP/s, copy {peak.bandwidth / 1e9:,.1f} GB/s read and "
        "written; shares refer to what was measured around each case",
        "the scan's share of the peak counts the arithmetic of chunks of 64, recomputing nothing",
    ]
    if device.type == "cpu":
        lines.append("every candidate is timed in a process that keeps freed memory; memory is measured in another")
    else:
        lines.append("timed by CUDA events, the L2 cache overwritten before each call")
    return lines


def _doing(case: Case, peers: list[str]) -> list[str]:
    return [name for name in peers if case.subject in PEERS[name].makes]


def _runner(device: torch.device, peers: list[str]) -> Callable[..., Any]:
    """How cells are run: on a CPU each in a fresh process, on a GPU here."""
    if device.type == "cpu":
        modules = [PEERS[name].module for name in peers]
        extra = ["transformers.models.mamba2.modeling_mamba2"] if "transformers" in modules else []
        preload(["patchscale.bench.cells", *extra])
        return isolated

    def run(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as e:
            raise Failed(describe(e)) from None

    return run


def _measure(
    case: Case,
    peers: list[str],
    effort: cells.Effort,
    run: Callable[..., Any],
    report: Report,
    shown: Display,
    done: int,
    total: int,
) -> int:
    """Measure a case, its cells added to the report; returns how much is done."""
    found: dict[str, Cell] = {}
    for name in (OURS, *peers):
        shown.progress(done, total, f"memory of {name}: {case.what}")
        cell = found[name] = Cell(case, name)
        try:
            cell.memory = run(cells.measure_memory, case, name, effort)
        except Failed as e:
            cell.error = str(e)
        done += 1
    able = [name for name, cell in found.items() if cell.error is None]
    shown.progress(done, total, f"time: {case.what}")
    if able:
        try:
            times = run(cells.measure_times, case, able, effort)
        except Failed as e:
            for name in able:
                found[name].error = str(e)
        else:
            _fill(case, found, times)
    report.cells += found.values()
    return done + 1


def _fill(case: Case, found: dict[str, Cell], times: cells.Times) -> None:
    arithmetic = flops(case)
    ours = times.seconds.get(OURS)
    for name, cell in found.items():
        cell.error = cell.error or times.errors.get(name)
        cell.agreement = times.agreement.get(name)
        cell.ceilings = times.ceilings
        cell.moved = bytes_moved(case)
        # Who computes the same function has the same work to do, whatever it does beside.
        cell.flops = counted_flops(case, functools.partial(candidate, name)) if name == "vit" else arithmetic
        cell.seconds = times.seconds.get(name, [])
        if ours and cell.seconds:
            cell.ratios = [theirs / mine for theirs, mine in zip(cell.seconds, ours, strict=True)]
