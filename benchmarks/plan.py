"""What `patchscale plan` predicts beside what is measured: step time and peak memory, patch 16 to 1, three widths.

    OMP_NUM_THREADS=1 PYTHONPATH=src python benchmarks/plan.py --out benchmarks/results/plan-cpu

Models of 12 blocks at 32 px, so that patch 1 (1,024 tokens) is a matter of seconds on a CPU; as many images as make
8,192 tokens, 64 at most. Every measurement has a process of its own. Time: the shortest of a few steps, in seconds of
the processor where there is one thread, so that other work on the same core does not count; predicted and measured in
turn, twice, and the smaller of either taken, for what slows a core from beside it. Memory: the most over what is held
before the step, with the same held bytes added to both, also where blocks, or all but products, are recomputed.
"""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from patchscale.bench.measure import hand_back_freed_memory, isolated, peak_memory, preload
from patchscale.bench.report import describe_machine
from patchscale.errors import UserError
from patchscale.files import make_folder, write_atomically
from patchscale.scaling.plan import (
    Options,
    Subject,
    measure_machine,
    possible,
    probe,
    subjects,
    time_in_turn,
    training_step,
)
from patchscale.train.build import recompute_blocks
from patchscale.train.cost import Recompute
from patchscale.train.device import keep_freed_memory

TURNS = 2
CPU = torch.device("cpu")
# How far off may be what is predicted.
GOALS = {"memory": 0.10, "time": 0.20}


def batch_of(patch_size: int) -> int:
    """Images a step."""
    return min(64, 8192 // (32 // patch_size) ** 2)


def predicted_seconds(subject: Subject, patch_size: int, threads: int) -> float:
    """By the plan's short probe."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    machine = measure_machine(CPU, "32-true")
    cost = subject.cost(patch_size, batch_of(patch_size), "32-true")
    return probe(subject, patch_size, cost, "32-true", CPU, machine)


def measured_seconds(subject: Subject, patch_size: int, threads: int) -> float:
    """Of the whole step."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    step = training_step(subject.make("cpu", patch_size=patch_size), subject.img_size, "32-true", CPU)
    return min(time_in_turn([partial(step, batch_of(patch_size))], 2, 1.0)[0])


def measured_memory(subject: Subject, patch_size: int, recompute: Recompute, threads: int) -> int | None:
    """Over what is held before the step."""
    torch.set_num_threads(threads)
    hand_back_freed_memory()
    model = subject.make("cpu", patch_size=patch_size)
    if recompute != "nothing":
        recompute_blocks(model, keep_products=recompute == "all but products")
    step = training_step(model, subject.img_size, "32-true", CPU)
    batch = batch_of(patch_size)
    peak = peak_memory(lambda: step(batch), CPU, first_differs=True)
    images = (4 * 3 * subject.img_size[0] * subject.img_size[1] + 8) * batch
    return None if peak is None else peak - images  # which the step makes itself


def cell(subject: Subject, patch_size: int, threads: int) -> dict[str, Any]:
    """All about one model at one patch size."""
    batch = batch_of(patch_size)
    row: dict[str, Any] = {"family": subject.family, "width": subject.embed_dim, "patch_size": patch_size}
    row |= {"batch": batch, "tokens": (32 // patch_size) ** 2, "memory": {}}
    for recompute in possible(subject.make(patch_size=patch_size)):
        cost = subject.cost(patch_size, batch, "32-true", recompute)
        measured = isolated(measured_memory, subject, patch_size, recompute, threads)
        over = None if measured is None else measured + cost.held
        row["memory"][recompute] = {"predicted": cost.peak, "measured": over, "held": cost.held}
    times = [
        [isolated(time, subject, patch_size, threads) for time in (predicted_seconds, measured_seconds)]
        for _ in range(TURNS)
    ]
    row["seconds"] = dict(zip(("predicted", "measured"), zip(*times, strict=True), strict=True))
    return row


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Predicted over measured."""
    found = {"time": min(row["seconds"]["predicted"]) / min(row["seconds"]["measured"])}
    for recompute, memory in row["memory"].items():
        if memory["measured"] is not None:
            found[recompute] = memory["predicted"] / memory["measured"]
    return found


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Predicted, measured and how far apart."""
    table = Table(title="predicted / measured; 32 px, 12 blocks, float32")
    names = ("nothing", "all but products", "blocks")
    for name in ("", "width", "patch", "tokens", "images", "step (s)", "off by", "memory (MB)", "off by", *names[1:]):
        table.add_column(name, justify="right")
    for row in rows:
        off = {name: f"{ratio - 1:+.0%}" for name, ratio in ratios(row).items()}
        memory = row["memory"]["nothing"]
        table.add_row(
            row["family"],
            str(row["width"]),
            str(row["patch_size"]),
            f"{row['tokens']:,}",
            str(row["batch"]),
            " / ".join(f"{min(row['seconds'][what]):.3g}" for what in ("predicted", "measured")),
            off["time"],
            f"{memory['predicted'] / 1e6:.1f} / {(memory['measured'] or 0) / 1e6:.1f}",
            *(off.get(name, "") for name in names),
        )
    return table


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """How many are within the goals."""
    found = [ratios(row) for row in rows]
    time = [abs(each["time"] - 1) for each in found]
    memory = [abs(ratio - 1) for each in found for name, ratio in each.items() if name != "time"]
    lines = []
    for name, every in (("memory", memory), ("time", time)):
        good = sum(off <= GOALS[name] for off in every)
        lines.append(f"{name}: {good} of {len(every)} within {GOALS[name]:.0%}; the worst is {max(every):.0%} off")
    return lines


def main() -> None:
    """Measure, print, and write ``results.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--patch-sizes", type=int, nargs="+", default=[16, 8, 4, 2, 1])
    given = parser.parse_args()
    threads = torch.get_num_threads()
    preload(["timm", "torch", "patchscale.scaling.plan"])
    console = Console(width=150)
    machine = describe_machine(CPU, threads)
    rows: list[dict[str, Any]] = []
    base = Options("adventurer_tiny_patch16_224", img_size=32, patch_sizes=tuple(given.patch_sizes))
    if given.out is not None:
        make_folder(given.out)
    for width in given.widths:
        for subject in subjects(replace(base, embed_dim=width)):
            for patch_size in given.patch_sizes:
                rows.append(cell(subject, patch_size, threads))
                console.print(f"{subject.family} {width} patch {patch_size}: {ratios(rows[-1])}", highlight=False)
                if given.out is not None:
                    content = json.dumps({"machine": machine, "rows": rows}, indent=1)
                    write_atomically(given.out / "results.json", lambda path, text=content: path.write_text(text))
    console.print(table_of(rows))
    for line in summary(rows):
        console.print(line, highlight=False)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
