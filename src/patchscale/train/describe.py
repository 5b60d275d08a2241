"""What a run's folder tells a reader who comes later: the recipe, how and where it ran, and its curves."""

import json
import math
import os
import platform
import shlex
import socket
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from patchscale.checkout import checkout
from patchscale.files import write_atomically
from patchscale.ops.dispatch import ENVIRONMENT_VARIABLE
from patchscale.train.logs import METRICS, read_rows

CURVES = "curves.png"
RECIPE = "recipe.json"
RUN = "run.json"

_PACKAGES = ("patchscale", "torch", "torchvision", "timm")


def describe_run(
    folder: Path,
    recipe: Mapping[str, Any],
    command: Sequence[str] | None,
    trackers: Sequence[str] = ("tensorboard",),
    processes: int = 1,
) -> None:
    """Write ``recipe.json`` and, to ``run.json``, how this start of the run came about.

    ``run.json`` holds one entry for every start, oldest first: a run that goes on adds its own.

    Args:
        folder: the run's, which exists.
        recipe: resolved; plain values.
        command: the command line; None for a run started from Python.
        trackers: in use; their versions are written down too.
        processes: how many train together.

    Raises:
        UserError: a file cannot be written.
    """
    _write_json(folder / RECIPE, recipe)
    start = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": None if command is None else shlex.join(command),
        "folder": os.getcwd(),
        "git": _git(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in dict.fromkeys((*_PACKAGES, *trackers))},
            "cuda": torch.version.cuda,
        },
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "devices": _devices(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        ENVIRONMENT_VARIABLE: os.environ.get(ENVIRONMENT_VARIABLE),
        "processes": processes,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    _write_json(folder / RUN, {"starts": [*_starts(folder / RUN), start]})


def plot_curves(folder: Path) -> None:
    """Draw ``curves.png`` from ``metrics.jsonl``: loss, top-1 accuracy and learning rate over the epochs.

    A quantity that no row has is left out; without rows nothing is drawn.

    Raises:
        UserError: the picture cannot be written.
    """
    rows = read_rows(folder / METRICS)
    panels = [(title, drawn) for title, curves in _PANELS if (drawn := _points(rows, curves))]
    if not panels:
        return
    # The object interface: pyplot would keep every figure of a long run, and ask for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.2 * len(panels), 4.0), dpi=100)
    FigureCanvasAgg(figure)
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, colour, style, epochs, values in curves:
            few = {"marker": "o", "markersize": 4} if len(epochs) <= 30 else {}
            axes.plot(epochs, values, style, color=colour, label=label, linewidth=1.5, **few)
        last = max(epochs[-1] for *_, epochs, _ in curves)
        axes.set_xlim(0, last * 1.02 if last > 1 else 2)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        axes.set_title(title, fontsize=11, loc="left", y=1.085)  # a given height spares a search
        axes.set_xlabel("epoch")
        axes.grid(True, color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        # Over the picture, where it hides no curve, of one epoch or of hundreds.
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=3,
            frameon=False,
            fontsize=8.5,
            columnspacing=1.4,
            handletextpad=0.5,
            borderaxespad=0.2,
            borderpad=0.2,
        )
        if title == "learning rate":
            axes.set_ylim(bottom=0, top=1.05 * max(values) or 1)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    figure.suptitle(folder.absolute().name, x=0.01, ha="left", fontsize=11, color="0.35")
    # Fixed margins: working them out would take as long as the drawing, after every epoch.
    width = figure.get_figwidth()
    figure.subplots_adjust(left=0.6 / width, right=1 - 0.2 / width, bottom=0.13, top=0.78, wspace=0.18)
    write_atomically(folder / CURVES, lambda path: figure.savefig(path, format="png"))


# Each panel's curves: the key in a row, what to call it, its colour (apart to the colour-blind too) and line.
_PANELS = (
    (
        "loss",
        (
            ("train_loss", "training", "#7f7f7f", "-"),
            ("val_loss", "validation", "#0072b2", "-"),
            ("ema_val_loss", "validation, EMA", "#d55e00", "--"),
        ),
    ),
    ("top-1 accuracy (%)", (("top1", "model", "#0072b2", "-"), ("ema_top1", "EMA", "#d55e00", "--"))),
    ("learning rate", (("lr", "at the end of the epoch", "#009e73", "-"),)),
)


def _points(
    rows: Sequence[Mapping[str, Any]], curves: Sequence[tuple[str, str, str, str]]
) -> list[tuple[str, str, str, list[float], list[float]]]:
    """Of each curve that has any: its label, with the best value where more is better, colour, line, and points."""
    drawn = []
    for key, label, colour, style in curves:
        points = [(_number(row.get("epoch", i)), _number(row.get(key))) for i, row in enumerate(rows, start=1)]
        kept = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        if not kept:
            continue
        epochs, values = (list(column) for column in zip(*kept, strict=True))
        if key.endswith("top1"):
            label = f"{label}: {values[-1]:.1f}, best {max(values):.1f}"
        drawn.append((label, colour, style, epochs, values))
    return drawn


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _write_json(file: Path, value: object) -> None:
    write_atomically(file, lambda path: path.write_text(json.dumps(value, indent=2) + "\n"))


def _starts(file: Path) -> list[Any]:
    """What is written of earlier starts; a file that cannot be read tells of none."""
    try:
        starts = json.loads(file.read_text())["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return starts if isinstance(starts, list) else []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    found = checkout()
    return None if found is None else {"commit": found[0], "dirty": found[1]}


def _devices() -> list[str]:
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ["mps"] if torch.backends.mps.is_available() else ["cpu"]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} logical cores"
