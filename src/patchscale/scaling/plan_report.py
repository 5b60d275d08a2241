"""A plan as a table, in words and as a picture."""

import math
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from patchscale.errors import UserError
from patchscale.files import make_folder, write_atomically
from patchscale.scaling.figures import Palette, amount, draw
from patchscale.scaling.plan import SPARE, Fit, Options, Row, crossovers, find_gpu, fit_memory, plan, read_memory
from patchscale.train.cost import RECOMPUTE, Recompute


def show_plan(options: Options, print_: Callable[[Any], None], note: Callable[[str], None] = lambda text: None) -> None:
    """Make a plan, print it, and draw it where a file is named.

    Args:
        options: what, and where.
        print_: takes tables and lines.
        note: told what is being done.

    Raises:
        UserError: as :func:`plan` and :func:`read_memory`, or the picture cannot be written.
    """
    memory = None if options.fit_memory is None else read_memory(options.fit_memory)
    if options.plot is not None:
        if options.plot.suffix != ".png":
            raise UserError(f"--plot is {options.plot}, expected a name that ends in .png")
        make_folder(options.plot.resolve().parent)
    rows = plan(options, note)
    print_(table_of(options, rows))
    for family in ("scan", "attention"):
        own = [row for row in rows if row.family == family]
        parameters = [row.cost.parameters / 1e6 for row in own]
        width, depth = own[0].subject.embed_dim, own[0].subject.depth
        size = f"width {width}, {depth} blocks, {min(parameters):.4g} to {max(parameters):.4g} M parameters"
        other = {"scan": "an Adventurer", "attention": "a DeiT"}[family]
        print_(f"{family}: {own[0].subject.name if own[0].subject is rows[0].subject else other}, {size}")
    for name, text in crossovers(rows).items():
        print_(f"{name}: {text}")
    if memory is not None:
        for line in fit_lines(options, fit_memory(options, rows, memory)):
            print_(line)
    if options.plot is not None:
        picture = draw("plan", "cost of training by tokens, of attention and the scan", partial(_plot, rows)).png
        write_atomically(options.plot, lambda path: path.write_bytes(picture))
        print_(f"wrote {options.plot}")


def table_of(options: Options, rows: Sequence[Row]) -> Table:
    """A line for each patch size and model."""
    first = rows[0]
    where = "measured here" if options.gpu is None else f"an estimate, {find_gpu(options.gpu).name} at its peaks"
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"a training step of {first.cost.batch} images, {options.precision}; time: {where}",
        caption="FLOPs and bytes moved are of an image; memory is the peak of the step, also where only the results of "
        f"linear layers or only the blocks' inputs are kept for the backward; an epoch is {options.images:,} images",
    )
    for name in ("patch", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in ("forward", "training", "moved", "memory", "products\nkept", "blocks\nonly", "step", "epoch"):
        table.add_column(name, justify="right", no_wrap=True)
    for patch_size in options.patch_sizes:
        for row in (row for row in rows if row.patch_size == patch_size):
            cost, batch = row.cost, row.cost.batch
            peaks = [_bytes(row.costs[r].peak) if r in row.costs else "" for r in RECOMPUTE]
            table.add_row(
                str(patch_size),
                f"{cost.tokens:,}",
                row.family,
                f"{amount(cost.forward_flops / batch)}F",
                f"{amount(cost.training_flops / batch)}F",
                f"{amount(cost.moved / batch)}B",
                *peaks,
                _seconds(row.seconds),
                _seconds(row.seconds * options.images / batch),
            )
        table.add_section()
    return table


def fit_lines(options: Options, fits: Sequence[Fit]) -> list[str]:
    """In words, patch size by patch size."""
    words: dict[Recompute, str] = {
        "nothing": "nothing recomputed",
        "all but products": "all but products recomputed (--grad-checkpointing --keep-products)",
        "blocks": "blocks recomputed (--grad-checkpointing)",
    }
    lines = [f"{options.model} in {options.fit_memory}, {SPARE:.0%} of it left free:"]
    for patch_size in options.patch_sizes:
        own = [fit for fit in fits if fit.patch_size == patch_size]
        most = ", ".join(f"{fit.batch:,} with {words[fit.recompute].split(' (')[0]}" for fit in own)
        enough = next((fit for fit in own if fit.batch >= options.batch_size), None)
        if enough is not None:
            cheapest = f"{options.batch_size} images: {words[enough.recompute]}"
        elif own[-1].batch:
            best = max(own, key=lambda fit: fit.batch)
            cheapest = f"{options.batch_size} images do not fit: --device-batch {best.batch}, {words[best.recompute]}"
        else:
            cheapest = "not one image fits"
        lines.append(f"  patch {patch_size}: {cheapest}; at most {most}")
    return lines


def _bytes(number: int) -> str:
    return _in_units(number, {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20})


def _seconds(seconds: float) -> str:
    return _in_units(seconds, {"d": 86400, "h": 3600, "min": 60, "s": 1, "ms": 1e-3})


def _in_units(amount: float, units: dict[str, float]) -> str:
    """Three digits, or all of a whole number, in the largest unit that there is one of, or the last."""
    unit, size = next(((u, s) for u, s in units.items() if amount >= 0.9995 * s), [*units.items()][-1])
    number = amount / size
    return f"{number:.3g} {unit}" if number < 999.5 else f"{number:,.0f} {unit}"


def _plot(rows: Sequence[Row], palette: Palette) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained", facecolor=palette["paper"])
    panels: dict[str, Callable[[Row], float]] = {
        "time of an image": lambda row: row.seconds / row.cost.batch,
        "memory of an image (GiB)": lambda row: row.cost.peak / row.cost.batch / 2**30,
        "training FLOPs of an image": lambda row: row.cost.training_flops / row.cost.batch,
    }
    labels: list[Callable[[float], str]] = [_seconds, lambda value: f"{value:g}", lambda value: f"{amount(value)}F"]
    crossed = dict(zip(panels, (crossovers(rows)[name] for name in ("time", "memory", "FLOPs")), strict=True))
    for axes, (name, value), label in zip(figure.subplots(1, 3), panels.items(), labels, strict=True):
        drawn: list[float] = []
        for colour, family in (("c0", "scan"), ("c1", "attention")):
            own = sorted((row for row in rows if row.family == family), key=lambda row: row.cost.tokens)
            tokens, values = [row.cost.tokens for row in own], [value(row) for row in own]
            drawn += values
            axes.plot(
                tokens,
                values,
                "o-",
                color=palette[colour],
                label=f"{family}, width {own[0].subject.embed_dim}",
                markersize=4,
            )
        axes.set(xscale="log", yscale="log", xlabel="tokens")
        what = "\n".join(textwrap.wrap(crossed[name], 50))
        axes.set_title(f"{name}\n{what}", loc="left", color=palette["ink"], fontsize=8.5)
        axes.set_xticks(tokens, [f"{t:,}" for t in tokens], rotation=30)
        decades = range(math.floor(math.log10(min(drawn))), math.ceil(math.log10(max(drawn))) + 1)
        axes.set_yticks([10.0**d for d in decades], [label(10.0**d) for d in decades])
        axes.set_ylim(0.7 * min(drawn), 1.4 * max(drawn))
        axes.minorticks_off()
        axes.tick_params(colors=palette["muted"])
        axes.grid(axis="y", color=palette["rule"], linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, labelcolor=palette["ink"], fontsize=8, loc="lower right")
    return figure
