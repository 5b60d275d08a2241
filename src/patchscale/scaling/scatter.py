"""How far runs scatter that differ in their seed alone: noise to refit with, runs far off, what a fit may miss by."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from patchscale.scaling.curve import FREE, Array, Curve, floor_of

# A seed further from its patch's median than this many standard deviations of one run is drawn in to there.
_CLIP = 5.0
# Chance above which scatters are taken to be the same.
_DOUBT = 0.5


def draw_in(places: Array, losses: Array) -> tuple[Array, tuple[int, ...]]:
    """Losses with runs far off the others of their patch moved nearer, and which.

    The standard deviation is the median distance of two runs of a patch, over that of two normal draws. Only a run that
    is alone is drawn in: the others of its patch, two at least, are near one another. Two runs that differ accuse each
    other, and where all differ, the patch scatters more than its fellows.
    """
    gaps = []
    for p in set(places):
        here = losses[places == p]
        gaps += np.abs(here[:, None] - here)[np.triu_indices(len(here), 1)].tolist()
    if not gaps or not np.median(gaps) > 0:
        return losses, ()
    furthest = _CLIP * float(np.median(gaps)) / (math.sqrt(2) * stats.norm.ppf(0.75))
    used, alone = losses.copy(), []
    for run, (p, loss) in enumerate(zip(places, losses, strict=True)):
        others = np.delete(losses, run)[np.delete(places, run) == p]
        off = loss - np.median(losses[places == p])
        if len(others) > 1 and abs(off) > furthest and np.ptp(others) <= furthest:
            used[run] = loss - off + math.copysign(furthest, off)
            alone.append(run)
    return used, tuple(alone)


def noise_like(residuals: Array, constants: int, noise: float | None, generator: np.random.Generator) -> Array:
    """Residuals as wide as one run's noise: fitting took some of it away. Empty where it took all."""
    if noise is not None:
        return generator.normal(0, noise, 1000)
    left = len(residuals) - constants
    if left < 1:
        return np.empty(0)
    return (residuals - residuals.mean()) * math.sqrt(len(residuals) / left)


def draw_noise(
    places: Array,
    losses: Array,
    residuals: Array,
    constants: int,
    noise: float | None,
    draws: int,
    generator: np.random.Generator,
) -> Array:
    """(draws, runs): noise to refit with; no draws where nothing tells what it is."""
    if not draws or not len(residuals):
        return np.empty((0, len(places)))
    if noise is None and _scatter_differs(places, losses):
        drawn = np.empty((draws, len(places)))
        for p in np.unique(places):
            here = places == p
            count = int(here.sum())
            own = generator.normal(0, np.std(losses[here], ddof=1), (draws, count))
            drawn[:, here] = own * spreads(count - 1, draws, generator)
        return drawn
    left = None if noise is not None else len(places) - constants
    return generator.choice(residuals, (draws, len(places))) * spreads(left, draws, generator)


def _scatter_differs(places: Array, losses: Array) -> bool:
    """Whether patches of two seeds and more each seem to scatter differently, by M. Bartlett's test (1937).

    Asked of a doubt, not of a proof: to take one scatter for all where the finest patch has four times that of the
    others leaves 90% intervals that hold the truth in 60% of cases, and to take each its own where all are alike makes
    them twice as wide as they need be.
    """
    patches = [losses[places == p] for p in np.unique(places)]
    if any(len(seeds) < 2 or np.ptp(seeds) == 0 for seeds in patches):
        return False
    return bool(stats.bartlett(*patches).pvalue < _DOUBT)


def spreads(freedom: int | None, draws: int, generator: np.random.Generator) -> Array:
    """(draws, 1): what the true standard deviation may be, over that found with so many degrees of freedom."""
    if freedom is None:
        return np.ones((draws, 1))
    return np.sqrt(freedom / generator.chisquare(freedom, (draws, 1)))


def lack_of_fit(places: Array, losses: Array, fit: Curve) -> float | None:
    """Chance of the patches' means missing the law so far if it held, at whatever scatter each patch has.

    How far they miss is set beside what their own scatters make of it on average, and both numbers of degrees of
    freedom follow from those scatters: M. Brown and A. Forsythe, Technometrics 16 (1974), for means about a common one,
    here about the law made linear. A patch with a single run is taken to scatter as the others do together. The plain
    F-test takes one scatter for all: where one of five patches' three seeds scatter six times as far, it rejects a true
    law in up to 29% of cases at 5%, and this one in up to 10%.
    """
    points, counts = np.unique(places, return_counts=True)
    here = [losses[places == p] for p in points]
    means = np.array([each.mean() for each in here])
    squares = np.array([np.sum((each - each.mean()) ** 2) for each in here])
    repeats, spare = len(places) - len(points), len(points) - FREE["law"]
    if repeats < 1 or spare < 1:
        return None
    missed = float(np.sum(counts * (means - fit(points)) ** 2))
    if squares.sum() <= floor_of(losses):  # seeds that agree exactly
        return 0.0 if missed > floor_of(losses) else None
    several = counts > 1
    own = squares / np.maximum(counts - 1, 1)
    scatter = np.where(several, own, squares.sum() / repeats)
    left = np.eye(len(points)) - _projection(points, counts, fit)
    share = np.diag(left)
    expected = float(np.sum(share * scatter))
    above = expected**2 / np.trace(np.linalg.matrix_power(left * scatter, 2))
    # What is expected, as a sum over the scatters that were found.
    parts = (share + share[~several].sum() * (counts - 1) / repeats)[several] * own[several]
    below = expected**2 / np.sum(parts**2 / (counts[several] - 1))
    return float(stats.f.sf(missed / expected, above, below))


def _projection(points: Array, counts: NDArray[np.intp], fit: Curve) -> Array:
    """(points, points): what the law's constants can follow of the points' means, each weighted by its runs."""
    logs = np.log(points / fit.reference)
    rise = np.exp(fit.alpha * logs)
    slopes = np.stack([np.ones_like(rise), rise, fit.a * rise * logs], axis=1) * np.sqrt(counts)[:, None]
    return slopes @ np.linalg.pinv(slopes)
