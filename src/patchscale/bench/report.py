"""What a run found: a table, a JSON file, a picture; and the machine it ran on."""

import importlib.util
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch

from patchscale.bench.cases import OURS, Case
from patchscale.bench.measure import OUT_OF_MEMORY, Ceilings
from patchscale.checkout import checkout
from patchscale.files import write_atomically

PACKAGES = ("patchscale", "torch", "triton", "timm", "numpy", "transformers", "mamba-ssm", "causal-conv1d", "fla-core")


@dataclass
class Cell:
    """One candidate in one case."""

    case: Case
    name: str
    seconds: list[float] = field(default_factory=list)
    """Of every round."""
    ratios: list[float] = field(default_factory=list)
    """This candidate's time over this project's in the same round."""
    flops: int = 0
    """Of the case's matrix products."""
    moved: int | None = None
    """Bytes that the case has to move at least."""
    ceilings: Ceilings | None = None
    """Measured beside the times."""
    memory: int | None = None
    """Peak bytes over what is held before the call."""
    agreement: float | None = None
    """Relative error against this project."""
    error: str | None = None

    @property
    def what_failed(self) -> str:
        """And why, in one line."""
        return f"{self.name}, {self.case.what}: {self.error}"

    @property
    def median(self) -> float | None:
        """Seconds."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """10th and 90th percentile, seconds."""
        return (percentile(self.seconds, 0.1), percentile(self.seconds, 0.9)) if self.seconds else None

    @property
    def ratio(self) -> float | None:
        """How many times as long as this project it takes: the median over rounds."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def share_of_peak(self) -> float | None:
        """Matrix-product FLOPs per second over those of a large product: of a training step, its FLOP utilisation."""
        if not self.flops or self.median is None or self.ceilings is None:
            return None
        return self.flops / self.median / self.ceilings.flops

    @property
    def share_of_bandwidth(self) -> float | None:
        """Bytes that must be moved, per second, over those that a large copy moves."""
        if self.moved is None or self.median is None or self.ceilings is None:
            return None
        return self.moved / self.median / self.ceilings.bandwidth

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what was measured, and what follows from it."""
        found = asdict(self)
        found["ceilings"] = None if self.ceilings is None else self.ceilings._asdict()
        derived = ("median", "spread", "ratio", "share_of_peak", "share_of_bandwidth")
        return found | {name: getattr(self, name) for name in derived}


@dataclass
class Report:
    """One run."""

    kind: str
    options: dict[str, Any]
    machine: dict[str, Any]
    ceilings: Ceilings
    notes: list[str]
    cells: list[Cell] = field(default_factory=list)

    def growth(self) -> list[dict[str, Any]]:
        """How a sample's time and memory grow with its tokens: the slope of log against log, 1 where linear."""
        rows = []
        for (series, name), cells in self.by_series().items():
            times = [(c.case.tokens, c.median / c.case.batch) for c in cells if c.median]
            memory = [(c.case.tokens, c.memory / c.case.batch) for c in cells if c.memory]
            if len({tokens for tokens, _ in times}) > 1:
                rows.append(
                    {
                        "subject": series[0],
                        "size": series[1],
                        "mode": series[2],
                        "name": name,
                        "tokens": [tokens for tokens, _ in times],
                        "time": slope(times),
                        "memory": slope(memory) if len({tokens for tokens, _ in memory}) > 1 else None,
                    }
                )
        return rows

    def by_series(self) -> dict[tuple[tuple[str, str, str], str], list[Cell]]:
        """Cells that differ in their number of tokens alone, in its order."""
        found: dict[tuple[tuple[str, str, str], str], list[Cell]] = {}
        for cell in sorted(self.cells, key=lambda c: c.case.tokens):
            found.setdefault((cell.case.series, cell.name), []).append(cell)
        return found

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "kind": self.kind,
            "options": self.options,
            "machine": self.machine,
            "ceilings": self.ceilings._asdict(),
            "notes": self.notes,
            "cells": [cell.to_dict() for cell in self.cells],
            "growth": self.growth(),
        }


def percentile(values: list[float], share: float) -> float:
    """Between the two nearest values, in proportion."""
    values = sorted(values)
    place = share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def slope(points: list[tuple[int, Any]]) -> float:
    """Of log y against log x, by least squares."""
    x, y = ([math.log(p[i]) for p in points] for i in (0, 1))
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Processor, GPU, versions, commit, date and command line."""
    import datetime

    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name)) is not None},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["versions"]["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this runs from, with a plus where files differ from it, or as PATCHSCALE_COMMIT says."""
    if "PATCHSCALE_COMMIT" in os.environ:
        return os.environ["PATCHSCALE_COMMIT"]
    found = checkout()
    return None if found is None else found[0] + ("+" if found[1] else "")


def write_json(report: Report, path: Path) -> None:
    """Everything, every raw timing included."""
    text = json.dumps(report.to_dict(), indent=1, default=str)
    write_atomically(path, lambda p: p.write_text(text + "\n", encoding="utf-8"))


def write_plot(report: Report, path: Path) -> bool:
    """Time and memory against tokens, log-log, a row for every subject and size; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    series = report.by_series()
    rows = list(dict.fromkeys(key[0][:2] for key in series))
    names = list(dict.fromkeys(key[1] for key in series))
    figure = Figure(figsize=(11, 3.6 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False)
    for row, (subject, size) in enumerate(rows):
        for column, quantity in enumerate(("ms a sample", "extra memory, MiB a sample")):
            axis = axes[row][column]
            axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=quantity, title=f"{subject}, {size}")
            axis.grid(True, which="major", alpha=0.3)
            here = [c for key, cells in series.items() if key[0][:2] == (subject, size) for c in cells]
            tokens = {c.case.tokens for c in here if c.median or c.memory}
            axis.set_xticks(sorted(tokens), [f"{n:,}" for n in sorted(tokens)], fontsize=8)
            axis.set_xticks([], minor=True)
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            for (key, name), cells in series.items():
                if key[:2] != (subject, size):
                    continue
                values = [1e3 * c.median / c.case.batch if c.median else None for c in cells]
                if column == 1:
                    values = [c.memory / 2**20 / c.case.batch if c.memory else None for c in cells]
                points = [(c.case.tokens, v) for c, v in zip(cells, values, strict=True) if v]
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        marker="o",
                        markersize=4,
                        color=f"C{names.index(name)}",
                        linestyle="-" if key[2] == "forward" else ":" if "checkpointed" in key[2] else "--",
                        label=f"{name}, {key[2]}",
                    )
            if axis.lines:
                axis.legend(fontsize=7, handlelength=3.5)
    machine = report.machine
    figure.suptitle(f"{machine.get('gpu') or machine['processor']}, threads: {machine['threads']}", fontsize=9)
    write_atomically(path, lambda p: figure.savefig(p, format="png", dpi=130))
    return True


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the main table."""
    columns = ["what", "tokens", "who", "median", "10-90%", "us/token", "times ours", "of peak", "of copy", "memory"]
    columns += ["agrees to"]
    rows = []
    for cell in report.cells:
        case = cell.case
        row = [f"{case.subject}, {case.size}, {case.mode}", f"{case.tokens:,}", cell.name]
        if cell.median is None or cell.spread is None:
            row += ["failed" if cell.error != OUT_OF_MEMORY else OUT_OF_MEMORY, "", "", "", "", ""]
        else:
            row += [
                duration(cell.median),
                f"{duration(cell.spread[0])} to {duration(cell.spread[1])}",
                f"{1e6 * cell.median / case.tokens / case.batch:.3g}",
                "" if cell.name == OURS or cell.ratio is None else f"{cell.ratio:.2f}",
                _percent(cell.share_of_peak),
                _percent(cell.share_of_bandwidth),
            ]
        row.append("" if cell.memory is None else size(cell.memory))
        row.append("" if cell.agreement is None else f"{cell.agreement:.0e}")
        rows.append(row)
    return columns, rows


def growth_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of exponents."""
    rows = []
    for row in report.growth():
        what = f"{row['subject']}, {row['size']}, {row['mode']}"
        span = f"{row['tokens'][0]:,} to {row['tokens'][-1]:,}"
        memory = "" if row["memory"] is None else f"{row['memory']:.2f}"
        rows.append([what, row["name"], span, f"{row['time']:.2f}", memory])
    return ["what", "who", "tokens", "time ~ tokens^", "memory ~ tokens^"], rows


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def size(number: float) -> str:
    """MiB, or GiB from 10 on."""
    return f"{number / 2**30:.1f} GiB" if number >= 10 * 2**30 else f"{number / 2**20:,.1f} MiB"


class Display(Protocol):
    """Where a run tells how far it is, and prints what it found."""

    def note(self, text: str) -> None:
        """A line that belongs to the results."""

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A table of results."""

    def progress(self, done: int, total: int, text: str) -> None:
        """What is being done, on standard error."""


@contextmanager
def display() -> Iterator[Display]:
    """Rich's tables and progress bar where rich is installed, else plain lines."""
    if importlib.util.find_spec("rich") is None:
        yield PlainDisplay()
        return
    with RichDisplay() as shown:
        yield shown


class PlainDisplay:
    """Aligned columns, and a line for each step."""

    def note(self, text: str) -> None:
        """See :class:`Display`."""
        print(text, flush=True)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """See :class:`Display`."""
        widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
        print(f"\n{title}")
        for row in [columns, ["-" * width for width in widths], *rows]:
            print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip(), flush=True)

    def progress(self, done: int, total: int, text: str) -> None:
        """See :class:`Display`."""
        if text:
            print(f"[{done}/{total}] {text}", file=sys.stderr, flush=True)


class RichDisplay:
    """The same with rich."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from patchscale import console

        self.print = console.print_whole
        columns = [BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")]
        self.bar = Progress(*columns, console=console.err, transient=True)
        self.task = self.bar.add_task("", total=None)

    def __enter__(self) -> "RichDisplay":
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def note(self, text: str) -> None:
        """See :class:`Display`."""
        from rich.text import Text

        self._print(Text(text))

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """See :class:`Display`."""
        from rich.table import Table
        from rich.text import Text

        shown = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            numbers = i > 0 and column not in ("who", "what")
            shown.add_column(column, justify="right" if numbers else "left", no_wrap=True)
        for row in rows:
            shown.add_row(*map(Text, row))
        self._print(shown)

    def _print(self, what: Any) -> None:
        if not self.bar.console.is_terminal:
            self.print(what)
            return
        self.bar.stop()  # on another stream: what is printed would be glued to it
        self.print(what)
        self.bar.start()

    def progress(self, done: int, total: int, text: str) -> None:
        """See :class:`Display`."""
        self.bar.update(self.task, completed=done, total=total, description=text)
