"""Reading a study: its runs by what they share, the law of each series, and what the same compute buys elsewhere."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from patchscale.errors import UserError
from patchscale.scaling.law import Axis, LawFit, Scored, fit_law, score_coarse_to_fine
from patchscale.scaling.results import CONTROL, Cell

Quantity = Literal["loss", "error"]
UNITS: dict[str, str] = {"loss": "test loss (nats)", "error": "top-1 error (%)"}


class Mean(NamedTuple):
    """A mean over seeds and its standard error; the error is NaN for a single run."""

    value: float
    error: float
    runs: int

    def half_width(self, confidence: float) -> float:
        """Half the mean's confidence interval (Student's t); NaN for a single run."""
        return self.error * float(stats.t.ppf((1 + confidence) / 2, self.runs - 1)) if self.runs > 1 else math.nan


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error of one run or more."""
    runs = len(values)
    return Mean(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(runs) if runs > 1 else math.nan, runs)


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seed alone."""

    cells: tuple[Cell, ...]

    @property
    def first(self) -> Cell:
        """One of them, for what they share."""
        return self.cells[0]

    @property
    def top1(self) -> Mean:
        """Percent."""
        return mean_of([cell.top1 for cell in self.cells])

    @property
    def loss(self) -> Mean:
        """Nats."""
        return mean_of([cell.val_loss for cell in self.cells])

    @property
    def flops(self) -> float:
        """Of one training."""
        return float(np.mean([cell.flops_training for cell in self.cells]))

    @property
    def seconds(self) -> float:
        """Of one training, the median."""
        return float(np.median([cell.seconds for cell in self.cells]))


@dataclass(frozen=True, eq=False)
class Series:
    """Groups that differ in patch size (or tokens) alone, coarse to fine."""

    groups: tuple[Group, ...]

    @property
    def first(self) -> Cell:
        """One run, for what all share."""
        return self.groups[0].first

    @property
    def name(self) -> str:
        """In words."""
        cell = self.first
        size = "image shrinking with the patch" if cell.control == "length" else f"{cell.img_size} px"
        words = f"{cell.study}: {cell.family}, width {cell.width}, {cell.depth} blocks, {size}"
        if cell.control not in ("scale", "length"):
            words += f", {cell.control}"
        return words + (", equal training FLOPs" if cell.held == "flops" else f", {cell.epochs} epochs")

    @property
    def patches(self) -> tuple[int, ...]:
        """Coarse to fine."""
        return tuple(dict.fromkeys(group.first.patch_size for group in self.groups))


def group_cells(cells: Sequence[Cell]) -> list[Group]:
    """Runs that differ in their seed alone, together."""
    found: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.group, []).append(cell)
    return [Group(tuple(sorted(same, key=lambda cell: cell.seed))) for same in found.values()]


def find_series(groups: Sequence[Group]) -> list[Series]:
    """Groups that differ in patch size and tokens alone; those of the most patch sizes first."""
    found: dict[tuple[object, ...], list[Group]] = {}
    for group in groups:
        cell = group.first
        size = None if cell.control == "length" else cell.img_size
        epochs = cell.epochs if cell.held == "epochs" else None
        shape = cell.family, cell.width, cell.depth
        key = (cell.study, cell.control, cell.held, cell.data, cell.train_images, size, epochs, *shape)
        found.setdefault(key, []).append(group)
    every = [
        Series(tuple(sorted(same, key=lambda group: (-group.first.patch_size, group.first.tokens))))
        for same in found.values()
    ]
    for series in every:
        for one, other in pairwise(series.groups):
            if (one.first.patch_size, one.first.tokens) == (other.first.patch_size, other.first.tokens):
                a, b = (repr(group.first.recipe or group.first.model) for group in (one, other))
                raise UserError(
                    f"{series.name}: patch {one.first.patch_size} was run in two ways, {a} and {b}; give them "
                    "different study names, or different files"
                )
    return sorted(every, key=lambda series: -len(series.groups))


def fit_series(series: Series, of: Quantity = "loss", axis: Axis = "patch", confidence: float = 0.9) -> LawFit:
    """The law of one series.

    Args:
        series: three patch sizes or more.
        of: test loss in nats, or top-1 error in percent.
        axis: the side of the patch, tokens, or the FLOPs of one image's forward pass.
        confidence: of the intervals.

    Raises:
        UserError: too few patch sizes, or an error of 0.
    """
    cells = [cell for group in series.groups for cell in group.cells]
    places = {"patch": "patch_size", "tokens": "tokens", "flops": "flops_forward"}
    if axis not in places:
        raise UserError(f"axis is {axis!r}, expected one of {', '.join(places)}")
    return fit_law([getattr(cell, places[axis]) for cell in cells], _values(cells, of), axis, confidence)


def score_series(
    series: Series, of: Quantity = "loss", coarse: Sequence[int] | None = None, confidence: float = 0.9
) -> tuple[tuple[int, ...], list[Scored]]:
    """The coarse patches, and the finer ones predicted from them; nothing where the series is too short.

    Args:
        series: one series.
        of: see :func:`fit_series`.
        coarse: patch sizes to fit on; by default the three coarsest.
        confidence: of the intervals.
    """
    chosen = tuple(coarse or series.patches[:3])
    if len(chosen) < 3 or not set(chosen) <= set(series.patches) or min(series.patches) >= min(chosen):
        return chosen, []
    cells = [cell for group in series.groups for cell in group.cells]
    patches = [cell.patch_size for cell in cells]
    return chosen, score_coarse_to_fine(patches, _values(cells, of), chosen, confidence=confidence)


def _values(cells: Sequence[Cell], of: str) -> list[float]:
    return [cell.val_loss if of == "loss" else 100 - cell.top1 for cell in cells]


def pareto(cost: ArrayLike, score: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other beats: none is as cheap and better, or as good and cheaper.

    Args:
        cost: (points,), low is good.
        score: (points,), high is good.
    """
    costs, scores = np.asarray(cost, np.float64), np.asarray(score, np.float64)
    cheaper = costs[:, None] <= costs
    better = scores[:, None] >= scores
    strictly = (costs[:, None] < costs) | (scores[:, None] > scores)
    return ~np.any(cheaper & better & strictly, axis=0)


class Gain(NamedTuple):
    """Points of top-1 that something buys, at so many times the training compute."""

    points: float
    half_width: float
    """Of the interval; NaN where there is a single run of something, 0 where all seeds agree exactly."""
    times: float

    def __str__(self) -> str:
        does = f"{'buys' if self.points >= 0 else 'loses'} {abs(self.points):.1f}"
        if math.isnan(self.half_width):
            return f"{does} points (a single run: no interval)"
        if self.half_width == 0:  # accuracies are whole numbers of images, so that two seeds may well be alike
            return f"{does} points (all seeds agree exactly: no interval)"
        if abs(self.points) <= self.half_width:
            return f"changes nothing that these seeds can tell ({self.points:+.1f} ± {self.half_width:.1f} points)"
        return f"{does} ± {self.half_width:.1f} points"


@dataclass(frozen=True, eq=False)
class Step:
    """From one patch size to the next finer one that was run, and what its compute buys otherwise."""

    start: Group
    end: Group
    gain: Gain
    width: Gain | str
    """The same compute spent on width at the coarser patch; why not, where the runs do not say."""
    resolution: Gain | str

    def __str__(self) -> str:
        one, other = self.start.first.patch_size, self.end.first.patch_size
        times = self.gain.times
        cost = (
            f"costs {times:.1f} times the"
            if times > 1.05
            else "takes as much"
            if times > 0.95
            else f"takes {times:.2f} of the"
        )
        words = f"From patch {one}, going to {other} {cost} training compute and {self.gain}"
        if isinstance(self.width, str) and self.width == self.resolution:
            return f"{words}; what width or resolution does for the same compute {self.width}."
        return f"{words}; the same compute spent on width {self.width}, on resolution {self.resolution}."


def is_of_patch_sizes(series: Series) -> bool:
    """Whether models differ in the size of their patches, of one image, and in nothing else."""
    control = series.first.control
    return len(series.patches) > 1 and (control == CONTROL or control.startswith(f"{CONTROL}, "))


def steps(series: Series, groups: Sequence[Group], confidence: float = 0.9) -> list[Step]:
    """What each finer patch of a series buys, and what width and resolution buy for the same training compute.

    That is read between the two nearest runs in log FLOPs, never beyond the runs.

    Args:
        series: where the patch is what changes.
        groups: all of the study, among which runs of other width and resolution are looked for.
        confidence: of the intervals, by Welch's approximation from each group's own seeds.
    """
    found = []
    for start, end in pairwise(series.groups):
        gain = _gain({end: 1.0, start: -1.0}, end.flops / start.flops, confidence)
        found.append(
            Step(
                start,
                end,
                gain,
                _instead(start, end.flops, groups, ("width", "depth"), confidence),
                _instead(start, end.flops, groups, ("img_size", "tokens"), confidence),
            )
        )
    return found


def _instead(
    start: Group, budget: float, groups: Sequence[Group], free: tuple[str, ...], confidence: float
) -> Gain | str:
    """What a training of so many FLOPs gains over ``start`` when the compute goes into the free fields."""
    cell = start.first
    fixed = {"study", "control", "held", "data", "family", "width", "depth", "img_size", "patch_size", "tokens"}
    fixed |= {"train_images"} | ({"epochs"} if cell.held == "epochs" else set())
    fixed -= set(free)
    others = [
        group
        for group in groups
        if group is not start
        and all(getattr(group.first, name) == getattr(cell, name) for name in fixed)
        and getattr(group.first, free[0]) > getattr(cell, free[0])
        and all(getattr(group.first, name) >= getattr(cell, name) for name in free)
    ]
    if cell.held == "flops":
        return "is not a question here, where all trainings take the same"
    if not others:
        return f"is not known: nothing larger was run at patch {cell.patch_size}"
    ladder = sorted([start, *others], key=lambda group: group.flops)
    if ladder[-1].flops < 0.98 * budget:  # rounding of what was meant to be equal is not "beyond the runs"
        most = ladder[-1].flops / start.flops
        return f"is not known: the largest run at patch {cell.patch_size} takes {most:.1f} times the compute"
    above = next(i for i, group in enumerate(ladder) if group.flops >= 0.98 * budget)
    if above == 0:
        return "is not known: the step takes no more compute than before"
    low, high = ladder[above - 1], ladder[above]
    share = min(math.log(budget / low.flops) / math.log(high.flops / low.flops), 1.0)
    weights = {high: share}
    weights[low] = weights.get(low, 0.0) + 1 - share
    weights[start] = weights.get(start, 0.0) - 1
    return _gain(weights, budget / start.flops, confidence)


def _gain(weights: dict[Group, float], times: float, confidence: float) -> Gain:
    points = sum(weight * group.top1.value for group, weight in weights.items())
    parts = [(weight * group.top1.error) ** 2 for group, weight in weights.items() if weight]
    freedom = [group.top1.runs - 1 for group, weight in weights.items() if weight]
    variance = sum(parts)
    if math.isnan(variance):
        return Gain(points, math.nan, times)
    if variance == 0:
        return Gain(points, 0.0, times)
    welch = variance**2 / sum(part**2 / degrees for part, degrees in zip(parts, freedom, strict=True))
    return Gain(points, math.sqrt(variance) * float(stats.t.ppf((1 + confidence) / 2, welch)), times)


def outlook(series: Series, confidence: float = 0.9) -> str:
    """What the next patch, finer than any that was run, is expected to buy, by the law of top-1 error over patch size.

    That is half of the finest, or the next size below that divides the image.
    """
    finest, first = series.patches[-1], series.first
    patch = next(size for size in range(max(finest // 2, 1), 0, -1) if first.img_size % size == 0)
    try:
        if fit_series(series, "loss", "patch", confidence).verdict == "fails":
            return f"Patch {patch} was not run, and nothing can be said of it: the law does not hold for these losses."
        fit = fit_series(series, "error", "patch", confidence)
    except UserError as e:
        return f"Patch {patch} was not run, and nothing can be said of it: {e}."
    if fit.verdict == "fails":
        return f"Patch {patch} was not run, and nothing can be said of it: the law does not hold for these accuracies."
    value, low, high = map(float, fit.law.predict_fall(finest, patch))
    interval = "no interval" if math.isnan(low) else f"{100 * confidence:g}% interval {low:.1f} to {high:.1f}"
    unsure = "" if fit.verdict == "holds" else "; their limit is not determined, so read it with care"
    return (
        f"From patch {finest}, going to {patch} takes {(finest / patch) ** 2:.3g} times the tokens and is expected to "
        f"buy {value:.1f} points ({interval}), by the law of these accuracies{unsure}."
    )
