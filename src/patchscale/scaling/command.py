"""``patchscale fit``: the law of each series of a study in tables and words."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from patchscale.errors import UserError
from patchscale.scaling.law import FORMULAS, Axis, LawFit, Scored
from patchscale.scaling.published import ASSUMED_NOISE, fitted_panels, scored_accuracies
from patchscale.scaling.results import Cell, read_results
from patchscale.scaling.study import (
    UNITS,
    Group,
    Mean,
    Quantity,
    Series,
    find_series,
    fit_series,
    group_cells,
    is_of_patch_sizes,
    outlook,
    pareto,
    score_series,
    steps,
)


def fit(
    results: str, of: Quantity, axis: Axis, confidence: float, coarse: Sequence[int] | None, console: Console
) -> None:
    """Print the fits of a file of results, or of the published figures where ``results`` is ``published``."""
    if not console.is_terminal:
        console.width = 120
    if results == "published":
        if (of, axis, tuple(coarse or ())) != ("loss", "patch", ()):
            raise UserError(
                "fit published shows the papers' losses, and errors predicted from patch 16, 8 and 4: it takes no "
                "--of, --axis or --coarse"
            )
        _print_published(confidence, console)
        return
    groups = group_cells(read_results(Path(results)))
    found = [series for series in find_series(groups) if is_of_patch_sizes(series)]
    if not found:
        raise UserError(
            f"{results} has no models that differ in their patch size alone; the law needs 3 sizes or more. "
            f"What it has is compared by: patchscale report {results} --out report.html"
        )
    if coarse and all(len(series.patches) < 4 for series in found):
        raise UserError(f"--coarse {' '.join(map(str, coarse))}: needs 3 patch sizes, and a finer one left to predict")
    for series in found:
        console.print(f"\n{series.name}", style="bold")
        if len(series.patches) > 2:
            _print_law(series, of, axis, confidence, coarse, console)
        else:
            console.print(f"No law is fitted to {len(series.patches)} patch sizes; it needs 3 or more.")
        sentences = [str(step) for step in steps(series, groups, confidence)]
        for sentence in sentences:
            console.print(sentence)
        if any("±" in sentence for sentence in sentences):
            console.print(f"(± in these sentences: {100 * confidence:g}% intervals.)")
        if len(series.patches) > 2 and series.patches[-1] > 1:
            console.print(outlook(series, confidence))
    for data in dict.fromkeys(group.first.data for group in groups):
        console.print(_frontier_table(data, [group for group in groups if group.first.data == data]))


def _print_law(
    series: Series, of: Quantity, axis: Axis, confidence: float, coarse: Sequence[int] | None, console: Console
) -> None:
    fitted = fit_series(series, of, axis, confidence)
    console.print(_forms_table(fitted, of))
    console.print(fitted.words)
    for run in fitted.drawn_in:
        console.print(f"A run at {axis} {fitted.x[run]:g} is far from its fellows, and was drawn in to them.")
    used, scores = score_series(series, of, coarse, confidence)
    if scores:
        console.print(_scores_table(f"predicted from patch {', '.join(map(str, used))}", {"": scores}, confidence))
    elif coarse:
        raise UserError(f"--coarse {' '.join(map(str, used))}: needs 3 of {series.patches}, and a finer one left")


def _frontier_table(data: str, groups: Sequence[Group]) -> Table:
    marked = pareto([group.flops for group in groups], [group.top1.value for group in groups])
    title = f"\n{data}: no other run is cheaper and better"
    table = Table("training FLOPs", "top-1 %", "patch", "width", "image", "family", title=title)
    for group in sorted((g for g, best in zip(groups, marked, strict=True) if best), key=lambda g: g.flops):
        cell = group.first
        row = (f"{group.flops:.2e}", f"{group.top1.value:.1f}", cell.patch_size, cell.width, f"{cell.img_size} px")
        table.add_row(*map(str, row), cell.family)
    return table


# Characters that this table needs where it says what differs; a line that wraps is better than a column left out.
RESULTS_WIDTH = 92


def results_table(cells: Sequence[Cell]) -> Table:
    """A line for the runs that differ in their seed alone: what they reached, and what that cost."""
    groups = group_cells(cells)
    said = [_what_runs(group.first) for group in groups]
    differs = [len(set(of_all)) > 1 for of_all in zip(*said, strict=True)]
    words = [", ".join(word for word, d in zip(each, differs, strict=True) if d and word) for each in said]
    several = any(differs)
    table = Table(
        title=", ".join(word for word, d in zip(said[0], differs, strict=True) if not d and word),
        caption="± is the standard error over seeds; cost is of all training, in FLOPs",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    if several:
        table.add_column("runs", min_width=16)
    for name in ("patch", "tokens", "seeds", "top-1 %", "test loss", "MFLOP", "time", "cost"):
        table.add_column(name, justify="right", no_wrap=True)
    cheapest = min(group.flops for group in groups)
    for text, group in zip(words, groups, strict=True):
        cell = group.first
        table.add_row(
            *[text] * several,
            str(cell.patch_size),
            f"{cell.tokens:,}",
            str(len(group.cells)),
            _with_error(group.top1, 1),
            _with_error(group.loss, 3),
            f"{cell.flops_forward / 1e6:,.3g}",
            f"{group.seconds:,.0f} s",
            f"{group.flops / cheapest:.3g}x",
        )
    return table


def _what_runs(cell: Cell) -> tuple[str, ...]:
    control = "" if cell.control in ("scale", "length") else cell.control
    return control, cell.family, f"width {cell.width}", f"{cell.img_size} px"


def _with_error(mean: Mean, digits: int) -> str:
    return f"{mean.value:.{digits}f}" + ("" if math.isnan(mean.error) else f" ± {mean.error:.{digits}f}")


def _forms_table(fitted: LawFit, of: str) -> Table:
    x = {"patch": "p", "tokens": "N", "flops": "C"}[fitted.axis]
    table = Table(
        "form", "L_inf", "A", "alpha", "AICc weight", "finest held out", title=f"{UNITS[of]} by {fitted.axis}"
    )
    for name, form in fitted.forms.items():
        cells = [
            f"{getattr(form, constant):.3g} ({low:.3g} to {high:.3g})" if not math.isnan(low) else f"{value:.3g} (?)"
            for constant, (low, high) in form.intervals.items()
            for value in (getattr(form, constant),)
        ]
        if name != "law":
            cells[0 if name == "power" else 1] = ""
        if name == "constant":
            cells[2] = ""
        weight = "too few runs" if math.isnan(form.weight) else f"{form.weight:.2f}"
        held_out = "" if form.held_out is None else f"{form.held_out:+.3f}"
        table.add_row(FORMULAS[name].replace("x", x), *cells, weight, held_out)
    table.caption = f"in brackets: {100 * fitted.confidence:g}% intervals; held out: predicted less found"
    return table


def _scores_table(title: str, scores: dict[str, list[Scored]], confidence: float) -> Table:
    names = [""] if len(scores) > 1 else []
    table = Table(*names, "patch", "predicted", f"{100 * confidence:g}% interval", "found", "which is", title=title)
    for name, series in scores.items():
        for score in series:
            interval = "none" if math.isnan(score.low) else f"{score.low:.3g} to {score.high:.3g}"
            inside = "" if math.isnan(score.low) else "inside" if score.inside else "outside"
            row = (f"{score.x:g}", f"{score.predicted:.3g}", interval, f"{score.found:.3g}", inside)
            table.add_row(*[name] * len(names), *row)
    return table


def _print_published(confidence: float, console: Console) -> None:
    console.print("Published figures, read off arXiv 2502.03738; single runs, none of them ours.")
    table = Table("panel", "L_inf", "alpha", "alpha of the figure's axes", "power law's", "verdict")
    for panel in fitted_panels(confidence):
        law = panel.fit.law
        ends = {name: f"{low:.2f} to {high:.2f}" for name, (low, high) in law.intervals.items()}
        table.add_row(
            panel.name,
            f"{law.L_inf:.3f} ({ends['L_inf']})",
            f"{law.alpha:.2f} ({ends['alpha']})",
            f"{panel.plotted_alpha:g}",
            f"{panel.fit.forms['power'].alpha:.3f}",
            panel.fit.verdict,
        )
    console.print(table)
    title = f"top-1 error in percent, predicted from patch 16, 8, 4 (runs assumed to scatter by {ASSUMED_NOISE})"
    scores = dict(scored_accuracies(confidence))
    console.print(_scores_table(title, scores, confidence))
    every = [score for series in scores.values() for score in series]
    inside = sum(score.inside for score in every)
    off = sum(abs(score.predicted - score.found) for score in every) / len(every)
    console.print(
        f"{inside} of {len(every)} lie in their interval; the predictions are off by {off:.2f} points in the mean. The "
        "intervals hold a run's scatter alone, not that the law itself is inexact.",
    )
