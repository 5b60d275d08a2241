"""Time for a token against their number: mixers and blocks, plain and native, forward and in training.

    OMP_NUM_THREADS=1 PYTHONPATH=src python benchmarks/flat.py --out benchmarks/results/cpu-1/flat
    OMP_NUM_THREADS=1 PYTHONPATH=src python benchmarks/flat.py --at-once 12544 --out benchmarks/results/cpu-1/flat-batch

`patchscale bench` measures one number of tokens after the other, minutes apart; the pace of a shared machine drifts by
more than what is asked here. So all numbers take turns in every round, the small ones several times in a row, as layers
of a training step do. Each case is measured in several processes, since where memory happens to lie moves a process's
small numbers by some per cent. What is reported is the median of all rounds, over that of the number of tokens that
does best.
By default there is one image at a time; with `--at-once` as many as make so many tokens.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from patchscale.bench.cases import HEADDIM, OURS, Case, as_call, ours
from patchscale.bench.measure import Failed, isolated, preload, warm_up
from patchscale.bench.peers import PEERS
from patchscale.bench.report import describe_machine
from patchscale.errors import UserError
from patchscale.files import make_folder, write_atomically
from patchscale.train.device import keep_freed_memory

CPU = torch.device("cpu")
NATIVE = "native"
# In a round each number of tokens is called as often as makes so many, once at least.
TOKENS_A_TURN = 12544


def seconds_a_token(
    case: dict[str, Any], tokens: list[int], at_once: int, name: str, rounds: int, threads: int
) -> list[list[float]]:
    """Of each round, for each number of tokens; but of the first, in which memory grows to what all take."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    cases = [Case(tokens=number, batch=max(1, at_once // number), **case) for number in tokens]
    makes = ours if name == OURS else PEERS[NATIVE].makes[case["subject"]]
    calls = [as_call(each, makes(each)) for each in cases]
    for call in calls:
        warm_up(call)
    found: list[list[float]] = []
    for _ in range(1 + rounds):
        found.append([])
        for each, call in zip(cases, calls, strict=True):
            together = each.tokens * each.batch
            repeats = max(1, TOKENS_A_TURN // together)
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            found[-1].append((time.perf_counter() - start) / repeats / together)
    return found[1:]


def over_the_best(row: dict[str, Any]) -> list[float]:
    """The median of rounds over the least median, less one, for each number of tokens."""
    medians = [statistics.median(times) for times in zip(*row["seconds_a_token"], strict=True)]
    return [median / min(medians) - 1 for median in medians]


def table_of(rows: list[dict[str, Any]], tokens: list[int]) -> Table:
    """Microseconds for a token, and how far over the best."""
    table = Table(title="us a token (over the best)")
    for name in ("", "width", "", "", *(f"{number:,}" for number in tokens)):
        table.add_column(name, justify="right")
    for row in rows:
        medians = [1e6 * statistics.median(times) for times in zip(*row["seconds_a_token"], strict=True)]
        cells = [f"{median:.1f} ({over:+.0%})" for median, over in zip(medians, over_the_best(row), strict=True)]
        table.add_row(
            row["subject"], str(row["width"]), "training" if row["training"] else "forward", row["name"], *cells
        )
    return table


def main() -> None:
    """Measure, print, and write ``results.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[784, 3136, 12544, 50176, 200704])
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=3)
    given = parser.parse_args()
    for name in ("at_once", "rounds", "processes", "tokens"):
        value = getattr(given, name)
        if (least := min(value) if isinstance(value, list) else value) < 1:
            parser.error(f"--{name.replace('_', '-')} is {least}, expected at least 1")
    if given.width < HEADDIM or given.width % HEADDIM:
        parser.error(f"--width is {given.width}, expected a multiple of {HEADDIM}")
    threads = torch.get_num_threads()
    preload(["timm", "torch", "patchscale.bench.peers"])
    console = Console(width=150)
    machine = describe_machine(CPU, threads)
    rows: list[dict[str, Any]] = []
    if given.out is not None:
        make_folder(given.out)
    for subject in ("mixer", "block"):
        for training in (False, True):
            for name in (OURS, NATIVE):
                heads = 2 * given.width // HEADDIM
                case = {"subject": subject, "training": training, "heads": heads, "device": "cpu", "dtype": "float32"}
                options = case, given.tokens, given.at_once, name, given.rounds, threads
                try:
                    times = [row for _ in range(given.processes) for row in isolated(seconds_a_token, *options)]
                except Failed as error:  # no compiler, or too little memory
                    console.print(f"{subject}, {name}: not measured: {error}", highlight=False)
                    continue
                row = {"subject": subject, "training": training, "name": name, "width": given.width}
                row |= {"at_once": given.at_once, "processes": given.processes}
                rows.append(row | {"tokens": given.tokens, "seconds_a_token": times})
                console.print(f"{row}: {[f'{over:+.0%}' for over in over_the_best(rows[-1])]}", highlight=False)
                if given.out is not None:
                    content = json.dumps({"machine": machine, "rows": rows}, indent=1)
                    write_atomically(given.out / "results.json", lambda path, text=content: path.write_text(text))
    console.print(table_of(rows, given.tokens))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
