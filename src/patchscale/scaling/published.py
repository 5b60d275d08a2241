"""What the papers published about patch size, as tidy data. Nothing in it was measured by this project."""

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from patchscale.scaling.law import LawFit, Scored, fit_law, score_coarse_to_fine

MARKS = {
    "T": "printed in the paper",
    "A": "in the authors' repository",
    "S": "quoted by others",
    "P": "read off a plot",
    "D": "derived from the above",
}
# Percent. No published run was repeated, so how far one scatters is not known. Intervals of predictions from three
# published accuracies assume this standard deviation, the last digit of the tables.
ASSUMED_NOISE = 0.1


@dataclass(frozen=True)
class Published:
    """One published number."""

    paper: str
    place: str
    """Table, figure or repository."""
    mark: str
    """How it was read, a key of :data:`MARKS`."""
    task: str
    model: str
    """Empty where the paper does not say."""
    setting: str
    """scale (patches of another size, the image's size fixed), extend (patch 16, tokens interpolated), a head, ..."""
    img_size: int | None
    """Pixels a side."""
    patch_size: int | None
    """Pixels a side; None of numbers about a whole panel."""
    tokens: int | None
    metric: str
    value: float
    unit: str


@cache
def published() -> tuple[Published, ...]:
    """All rows: accuracies, mIoU and AP by patch size, digitised losses, controls and cost, each with its source."""
    text = files("patchscale.scaling").joinpath("published.csv").read_text(encoding="utf-8")
    rows = []
    for row in csv.DictReader(text.splitlines()):
        numbers = {name: int(row[name]) if row[name] else None for name in ("img_size", "patch_size", "tokens")}
        rows.append(Published(**{**row, **numbers, "value": float(row["value"])}))  # type: ignore[arg-type]
    return tuple(rows)


@dataclass(frozen=True, eq=False)
class Panel:
    """A published series over patch size, and the law fitted to it."""

    name: str
    place: str
    fit: LawFit
    plotted_L_inf: float | None
    """What the figure's tick labels imply; None for series that are no panel of that figure."""
    plotted_alpha: float | None
    """Slope in the figure's axes, log(L - L_inf) over log p."""


def fitted_panels(confidence: float = 0.9) -> list[Panel]:
    """The nine panels of digitised losses (figure 1 of arXiv 2502.03738), five single runs each.

    Args:
        confidence: of all intervals, between 0 and 1.
    """
    panels = []
    for place in sorted({row.place for row in published() if row.place.startswith("Figure 1")}):
        rows = [row for row in published() if row.place == place]
        points = [row for row in rows if row.patch_size is not None]
        plotted = {row.metric: row.value for row in rows if row.patch_size is None}
        places, losses = [row.patch_size or 0 for row in points], [row.value for row in points]
        fit = fit_law(places, losses, confidence=confidence)
        first = points[0]
        name = f"{first.model} {first.img_size} px" if first.model else f"{first.task.split()[0]} {first.metric}"
        panels.append(Panel(name, place, fit, plotted["L_inf of the ticks"], plotted["alpha in the plotted axes"]))
    return panels


def scored_accuracies(confidence: float = 0.9) -> list[tuple[str, list[Scored]]]:
    """Published top-1 errors (percent) predicted at patch 2 and 1 from 16, 8 and 4, by model and image size.

    Args:
        confidence: of all intervals, between 0 and 1.
    """
    series: dict[str, dict[int, float]] = {}
    for row in published():
        if row.metric == "top1" and row.place == "Tables 1 and 4" and row.patch_size is not None:
            series.setdefault(f"{row.model} {row.img_size} px", {})[row.patch_size] = round(100 - row.value, 6)
    return [
        (name, score_coarse_to_fine(list(errors), list(errors.values()), confidence=confidence, noise=ASSUMED_NOISE))
        for name, errors in series.items()
    ]
