"""A study's figures, each drawn twice: as SVG whose colours follow the reader's light or dark, and as PNG."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import Affine2D

from patchscale.scaling.law import LawFit
from patchscale.scaling.study import Group, Mean, Series, pareto

# Names of colours, in light and in dark.
COLOURS: dict[str, tuple[str, str]] = {
    "paper": ("#fdfdfb", "#15181b"),
    "ink": ("#1c2126", "#e8eaec"),
    "muted": ("#646d76", "#9aa4ad"),
    "rule": ("#e2e5e7", "#2d3339"),
    "c0": ("#1d5fa7", "#7db4f0"),
    "c1": ("#b3541e", "#ee9d66"),
    "c2": ("#22796a", "#66c6b2"),
    "c3": ("#8a4b94", "#cf9ada"),
    "c4": ("#7a6a12", "#d2bd56"),
    "c5": ("#a63a50", "#f08fa2"),
}
_LIGHT, _DARK = (" ".join(f"--{name}: {pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
# CSS custom properties of these names.
VARIABLES = f":root {{ {_LIGHT} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}"
SERIES_COLOURS = 6
# Small enough that the text keeps a readable size where the figure fills a phone's screen.
_SIZE = (4.4, 3.3)
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

Palette = dict[str, str]


@dataclass(frozen=True)
class Picture:
    """One figure in the forms it is kept in."""

    name: str
    alt: str
    """What it shows, for who cannot see it."""
    inline: str
    """SVG element whose colours are the page's variables."""
    svg: str
    """SVG file of its own, with light and dark inside."""
    png: bytes


def draw(name: str, alt: str, plot: Callable[[Palette], Figure]) -> Picture:
    """Draw a figure.

    Args:
        name: of its files.
        alt: what it shows.
        plot: draws it in the given colours.
    """
    settings: Any = {
        "svg.fonttype": "none",
        "text.parse_math": False,  # a dollar sign in a name is one
        "svg.hashsalt": name,
        "svg.id": name,
        "font.size": 9.5,
        "axes.titlesize": 9.5,
        "axes.labelsize": 9.5,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
    }
    # Stand-ins that occur nowhere else, to be replaced by the variables' names.
    stand_ins = {key: f"#0102{i + 16:02x}" for i, key in enumerate(COLOURS)}
    with matplotlib.rc_context(settings):
        text, picture = io.StringIO(), io.BytesIO()
        # Transparent, so that the page's own ground shows.
        plot(stand_ins).savefig(text, format="svg", transparent=True, metadata={"Date": None})
        plot({key: pair[0] for key, pair in COLOURS.items()}).savefig(picture, format="png", dpi=200)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for key, stand_in in stand_ins.items():
        svg = svg.replace(stand_in, f"var(--{key})")
    svg = re.sub(r"'DejaVu Sans'(, ?[^;\"]*)?", _FONTS, svg)
    start = svg.index(">") + 1
    ground = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    file = (
        '<?xml version="1.0" encoding="utf-8"?>\n' + svg[:start] + f"<style>{VARIABLES}</style>" + ground + svg[start:]
    )
    inline = re.sub(
        r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", re.sub(r' height="[^"]*"', "", svg, count=1), count=1
    )
    return Picture(name, alt, inline, file, picture.getvalue())


def by_patch(every: Sequence[Series], of: str, fit: LawFit | None, confidence: float) -> Callable[[Palette], Figure]:
    """Accuracy or loss by patch size, a line a series, with each run, the means' intervals and the first one's law.

    Args:
        every: the series; the first is the one in question.
        of: ``top1`` or ``loss``.
        fit: the law of the first series' loss, drawn with its band unless it does not hold.
        confidence: of the intervals.
    """

    def plot(palette: Palette) -> Figure:
        figure, axes = _new(palette)
        patches = sorted({patch for series in every for patch in series.patches}, reverse=True)
        _patch_axis(axes, patches, every)
        axes.set_title("top-1 accuracy (%)" if of == "top1" else "test loss (nats)", loc="left", color=palette["ink"])
        ends = []
        for index, series in enumerate(every):
            colour = palette[f"c{index % SERIES_COLOURS}"]
            x = np.array([-math.log2(group.first.patch_size) for group in series.groups])
            means: list[Mean] = [getattr(group, of) for group in series.groups]
            for place, group in zip(x, series.groups, strict=True):
                runs = [cell.top1 if of == "top1" else cell.val_loss for cell in group.cells]
                axes.plot([place] * len(runs), runs, ".", color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
            lawful = fit is not None and index == 0 and fit.verdict != "fails"
            values = np.array([mean.value for mean in means])
            half = np.nan_to_num([mean.half_width(confidence) for mean in means])
            # An interval of two seeds is wide; it ends where there are no such accuracies or losses.
            bars = np.minimum(half, values), np.minimum(half, 100 - values) if of == "top1" else half
            axes.errorbar(x, values, bars, color=colour, fmt="o" if lawful else "o-", **_MARKS)
            if lawful and fit is not None:
                fine = np.geomspace(max(patches), min(patches), 100)
                curve = fit.predict(fine)
                axes.fill_between(-np.log2(fine), curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
                axes.plot(-np.log2(fine), curve.value, color=colour, linewidth=1.4)
            ends.append((float(x[-1]), means[-1].value, _label(series, every), colour))
        if len(every) > 1:
            _label_ends(axes, ends)
        return figure

    return plot


def straight(series: Series, fit: LawFit, confidence: float) -> Callable[[Palette], Figure]:
    """The law where it is a straight line: log(L - L_inf) over log p; where L_inf is not determined, log L over it."""
    limit = fit.law.L_inf if fit.verdict == "holds" else 0.0
    form = fit.law if fit.verdict == "holds" else fit.forms["power"]

    def plot(palette: Palette) -> Figure:
        figure, axes = _new(palette)
        _patch_axis(axes, series.patches, [series])
        axes.set_yscale("log")
        title = f"loss above L∞ = {limit:.3g} (nats, log)" if limit else "loss (nats, log): power law, L∞ = 0"
        axes.set_title(title, loc="left", color=palette["ink"])
        x = -np.log2([group.first.patch_size for group in series.groups])
        above = np.array([group.loss.value - limit for group in series.groups])
        half = np.nan_to_num([group.loss.half_width(confidence) for group in series.groups])
        fine = np.geomspace(max(series.patches), min(series.patches), 100)
        curve = form.predict(fine)
        shown = above > 0
        lowest = 0.5 * min(float(above[shown].min()), float(np.min(curve.value - limit)))
        low = np.minimum(half, np.maximum(above - lowest, 0))
        axes.fill_between(
            -np.log2(fine),
            np.maximum(curve.low - limit, lowest),
            np.maximum(curve.high - limit, lowest),
            color=palette["c0"],
            alpha=0.18,
            linewidth=0,
        )
        axes.plot(-np.log2(fine), curve.value - limit, color=palette["c0"], linewidth=1.4)
        axes.errorbar(x[shown], above[shown], [low[shown], half[shown]], color=palette["c0"], fmt="o", **_MARKS)
        _log_ticks(axes, lowest)
        return figure

    return plot


def frontier(groups: Sequence[Group], confidence: float) -> Callable[[Palette], Figure]:
    """Accuracy against training FLOPs; what no other run beats is filled and joined."""
    cost, score = [g.flops for g in groups], [g.top1.value for g in groups]
    best = pareto(cost, score)

    def plot(palette: Palette) -> Figure:
        figure, axes = _new(palette)
        axes.set_xscale("log")
        axes.set_title("top-1 accuracy (%)", loc="left", color=palette["ink"])
        axes.set_xlabel("FLOPs of the training", color=palette["muted"])
        order = sorted(np.flatnonzero(best), key=lambda i: cost[i])
        axes.plot(
            [cost[i] for i in order],
            [score[i] for i in order],
            color=palette["c0"],
            alpha=0.5,
            linewidth=1.2,
            drawstyle="steps-post",
        )
        for i, group in enumerate(groups):
            half = np.nan_to_num(group.top1.half_width(confidence))
            colour = palette["c0"] if best[i] else palette["muted"]
            face = colour if best[i] else palette["paper"]
            axes.errorbar(cost[i], score[i], half, fmt="o", color=colour, mfc=face, **_MARKS)
        low, high = min(cost), max(cost)
        axes.set_xlim(low / 1.6, high * 3)
        decades = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        axes.xaxis.set_major_locator(FixedLocator([d for d in decades if low / 1.6 <= d <= high * 3] or [low]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
        labels = [group_label(group, groups) for group in groups]
        colours = [palette["ink"] if best[i] else palette["muted"] for i in range(len(groups))]
        first_the_best = sorted(range(len(groups)), key=lambda i: (not best[i], cost[i]))
        _label_points(axes, [(cost[i], score[i], labels[i], colours[i]) for i in first_the_best])
        return figure

    return plot


def controls(every: Sequence[Series], confidence: float) -> Callable[[Palette], Figure]:
    """Accuracy of finer patches and of the controls, over tokens; over patches if no control keeps the patch."""
    patches = sorted({group.first.patch_size for series in every for group in series.groups}, reverse=True)
    tokens = sorted({group.first.tokens for series in every for group in series.groups})
    patch_differs = all(len(set(series.patches)) == len(series.groups) for series in every)

    def plot(palette: Palette) -> Figure:
        figure, axes = _new(palette)
        if patch_differs:
            _patch_axis(axes, patches, every)
        else:
            axes.set_xlabel("tokens", color=palette["muted"])
            axes.xaxis.set_major_locator(FixedLocator(np.log2(tokens).tolist()))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{2**value:,.0f}"))
        axes.set_title("top-1 accuracy (%)", loc="left", color=palette["ink"])
        ends = []
        for index, series in enumerate(every):
            colour = palette[f"c{index % SERIES_COLOURS}"]
            cells = [group.first for group in series.groups]
            x = [-math.log2(c.patch_size) if patch_differs else math.log2(c.tokens) for c in cells]
            half = np.nan_to_num([group.top1.half_width(confidence) for group in series.groups])
            values = [group.top1.value for group in series.groups]
            axes.errorbar(x, values, half, color=colour, fmt="o-", **_MARKS)
            name = series.first.control
            if [other.first.control for other in every].count(name) > 1:
                name = f"{name}, {series.first.family}"
            ends.append((x[-1], values[-1], name, colour))
        _label_ends(axes, ends)
        return figure

    return plot


def amount(value: float) -> str:
    """Three digits and a letter: 1.2 T."""
    if value < 1000:
        return f"{value:.3g}"
    power = min(int(math.log10(value) / 3 + 1e-9), 7)
    return f"{value / 1000**power:.3g} {' KMGTPEZ'[power]}"


def group_label(group: Group, groups: Sequence[Group]) -> str:
    """The patch, and what else is not as in every group."""
    cell = group.first
    words = [f"patch {cell.patch_size}"]
    for name, text in (("family", "{}"), ("width", "width {}"), ("depth", "{} blocks"), ("img_size", "{} px")):
        values = [getattr(other.first, name) for other in groups]
        if len(set(values)) > 1 and getattr(cell, name) != max(set(values), key=values.count):
            words.append(text.format(getattr(cell, name)))
    if cell.control != "scale":
        words.append(cell.control)
    return ", ".join(words)


_MARKS: dict[str, Any] = {"markersize": 4.5, "linewidth": 1.3, "elinewidth": 1.1, "capsize": 2.5, "capthick": 1.1}


def _new(palette: Palette) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained", facecolor=palette["paper"])
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(palette["muted"])
    axes.tick_params(colors=palette["muted"], length=3, width=0.8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=palette["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _patch_axis(axes: Axes, patches: Sequence[int], every: Sequence[Series]) -> None:
    """Log of the patch's side, fine to the right, with the tokens underneath where all images are of one size."""
    colour = axes.spines["bottom"].get_edgecolor()
    sizes = {cell.img_size for series in every for group in series.groups for cell in group.cells}
    tokens = {g.first.patch_size: g.first.tokens for series in every for g in series.groups}
    labels = [f"{patch}\n{tokens[patch]:,}" if len(sizes) == 1 else str(patch) for patch in patches]
    axes.set_xticks([-math.log2(patch) for patch in patches], labels)
    axes.set_xlabel("patch side (pixels)" + (" over tokens" if len(sizes) == 1 else ""), color=colour)
    span = math.log2(max(patches) / min(patches)) or 1.0
    axes.set_xlim(-math.log2(max(patches)) - 0.06 * span, -math.log2(min(patches)) + 0.06 * span)


def _log_ticks(axes: Axes, lowest: float) -> None:
    low, high = axes.get_ylim()
    low = max(low, 0.9 * lowest)
    axes.set_ylim(low, high)
    steps = (1, 2, 5) if high / low > 4 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    ticks = [s * 10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for s in steps]
    ticks = [t for t in ticks if low <= t <= high]
    if len(ticks) < 3:
        ticks = [t for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _label(series: Series, every: Sequence[Series]) -> str:
    """What tells a series from the others."""
    parts = (("study", "{}"), ("family", "{}"), ("width", "width {}"), ("depth", "{} blocks"), ("img_size", "{} px"))
    differs = [(name, text) for name, text in parts if len({getattr(s.first, name) for s in every}) > 1]
    words = [text.format(getattr(series.first, name)) for name, text in differs]
    if len({s.first.held for s in every}) > 1:
        words.append(f"equal {series.first.held}")
    if len({(s.first.epochs, s.first.held) for s in every}) > 1 and series.first.held == "epochs":
        words.append(f"{series.first.epochs} epochs")
    return "\n".join(words)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Each line's name at its end, pushed apart where they would lie on one another.

    A line that ends before the others has its name below its end, out of their way.
    """
    low, high = axes.get_ylim()
    gap = 0.075 * (high - low) * max(text.count("\n") + 1 for _, _, text, _ in ends)
    placed: list[float] = []
    last = max(x for x, _, _, _ in ends)
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        if x < last:
            axes.annotate(text, (x, y), (-6, -8), textcoords="offset points", color=colour, ha="right", va="top")
            continue
        height = max([y, *(other + gap for other in placed[-1:])])
        placed.append(height)
        axes.annotate(
            text, (x, height), (8, 0), textcoords="offset points", color=colour, va="center", annotation_clip=False
        )


def _label_points(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Each point's name beside it, where it covers no other point or name; left out where there is no such place."""
    size = 8.0
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # settles where the axes are
    scale = 72 / figure.dpi
    places = axes.transData.transform([(x, y) for x, y, _, _ in points]) * scale
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in places]
    room = axes.bbox.transformed(Affine2D().scale(scale))
    for (x, y, text, colour), (left, bottom) in zip(points, places, strict=True):
        width = 0.58 * size * len(text)
        for across, up in ((6, -9), (6, 3), (-6 - width, 3), (-6 - width, -9), (6, -18), (6, 12), (6, -27), (6, 21)):
            box = (left + across, bottom + up, left + across + width, bottom + up + size)
            free = all(box[0] > b[2] or box[2] < b[0] or box[1] > b[3] or box[3] < b[1] for b in taken)
            inside = room.x0 < box[0] and box[2] < room.x1 and room.y0 < box[1] and box[3] < room.y1 + size
            if free and inside:
                taken.append(box)
                axes.annotate(text, (x, y), (across, up), textcoords="offset points", color=colour, fontsize=size)
                break
