"""Least squares of the law's forms, L_inf + A x^alpha with L_inf >= 0, A >= 0 and alpha of the right sign."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

Array = NDArray[np.float64]

# Constants that each form of the law leaves free.
FREE: dict[str, int] = {"law": 3, "power": 2, "constant": 1}
# Laws looked for: from the coarsest to the finest patch, e to so many times.
GENTLEST, STEEPEST = 1e-3, 20.0


class Curve(NamedTuple):
    """A form of the law with its constants."""

    l_inf: float
    a: float
    """At the reference."""
    alpha: float
    reference: float
    """The place of highest loss."""
    sse: float
    """Sum of squared residuals."""

    def __call__(self, x: Array) -> Array:
        """The loss at places ``x``, of any shape."""
        return self.l_inf + self.a * (x / self.reference) ** self.alpha


def unit_places(places: Array, axis: str) -> tuple[Array, float, float]:
    """Where each place lies, from the end of low loss (0) to the other (1); that other; the span of log x, signed."""
    sign = 1.0 if axis == "patch" else -1.0
    logs = sign * np.log(places)
    span = float(logs.max() - logs.min())
    reference = float(places.max() if sign > 0 else places.min())
    return (logs - logs.min()) / span, reference, sign * span


def fit_curve(places: Array, losses: Array, axis: str, name: str) -> Curve:
    """The best curve of a form, to full precision.

    Args:
        places: (runs,) patch sizes, tokens or FLOPs, as ``axis`` says.
        losses: (runs,).
        axis: ``"patch"``, or else loss falls with ``x``.
        name: of the form, a key of ``FREE``.
    """
    unit, reference, span = unit_places(places, axis)
    constants, sse = solve(unit, losses[None], name)
    start, lowest = constants[0], float(sse[0])
    if name != "constant" and start[1] > 0:
        polished = _polish(unit, losses, start, name)
        found = float(np.sum((losses - _values(unit, polished)) ** 2))
        if found <= lowest or lowest < floor_of(losses):
            start, lowest = polished, found
    l_inf, a, steepness = (float(value) for value in start)
    nothing = 1e-9 * float(losses.max())  # what rounding leaves of a constant that is 0
    l_inf, steepness = (l_inf if l_inf > nothing else 0.0), (steepness if a > nothing and steepness > 1e-9 else 0.0)
    return Curve(l_inf, a, steepness / span, reference, lowest)


def _values(unit: Array, constants: Array) -> Array:
    l_inf, a, steepness = constants
    return l_inf + a * np.exp(steepness * (unit - 1))


def _polish(unit: Array, losses: Array, start: Array, name: str) -> Array:
    """From the search over steepness to full precision."""
    free = [0, 1, 2] if name == "law" else [1, 2]

    def spread_out(values: Array) -> Array:
        constants = np.zeros(3)
        constants[free] = values
        return constants

    def jacobian(values: Array) -> Array:
        _, a, steepness = spread_out(values)
        rise = np.exp(steepness * (unit - 1))
        return np.stack([np.ones_like(unit), rise, a * (unit - 1) * rise], axis=1)[:, free]

    high = np.array([np.inf, np.inf, STEEPEST])[free]
    found = optimize.least_squares(
        lambda values: _values(unit, spread_out(values)) - losses,
        np.clip(start[free], 0, high * (1 - 1e-9)),
        jacobian,
        bounds=(np.zeros(len(free)), high),
        x_scale="jac",
        xtol=1e-14,
        ftol=1e-14,
        gtol=1e-14,
    )
    return spread_out(found.x)


def solve(unit: Array, losses: Array, name: str) -> tuple[Array, Array]:
    """Least squares for many sets of losses (sets, runs) at once: constants (sets, 3) and sums of squares (sets,).

    For a given steepness the other constants are linear, so the search is over that one alone: a grid, then twice a
    finer one about the best.
    """
    if name == "constant":
        means = losses.mean(1)
        zeros = np.zeros_like(means)
        return np.stack([means, zeros, zeros], 1), np.sum((losses - means[:, None]) ** 2, 1)
    grid = np.geomspace(GENTLEST, STEEPEST, 128)
    steepness, step = grid[None], float(grid[1] / grid[0])
    for _ in range(3):
        l_inf, a, sse = _linear_constants(np.exp(steepness[..., None] * (unit - 1)), losses, name)
        best = np.argmin(sse, 1)[:, None]
        chosen = np.take_along_axis(np.broadcast_to(steepness, sse.shape), best, 1)
        found = np.concatenate([np.take_along_axis(l_inf, best, 1), np.take_along_axis(a, best, 1), chosen], 1)
        lowest = np.take_along_axis(sse, best, 1)[:, 0]
        steepness = np.minimum(chosen * step ** np.linspace(-1, 1, 11), STEEPEST)
        step **= 0.2
    return found, lowest


def _linear_constants(rise: Array, losses: Array, name: str) -> tuple[Array, Array, Array]:
    """L_inf, A and the sum of squares, each (sets, steepnesses), for ``rise`` (sets or 1, steepnesses, runs)."""
    product = np.matmul(rise, losses[..., None])[..., 0]
    squares, total = np.sum(rise**2, -1), np.sum(losses**2, 1)[:, None]
    through_zero = product / squares
    sse_zero = total - through_zero * product
    if name == "power":
        return np.zeros_like(sse_zero), through_zero, sse_zero
    count, mean_rise, mean = losses.shape[1], rise.mean(-1), losses.mean(1)[:, None]
    covariance = product - count * mean_rise * mean
    spread = np.sum((rise - mean_rise[..., None]) ** 2, -1)
    a = covariance / spread
    l_inf = mean - a * mean_rise
    flat = total - count * mean**2
    sse = flat - a * covariance
    below, falling = l_inf < 0, a < 0
    a = np.where(falling, 0.0, np.where(below, through_zero, a))
    l_inf = np.where(falling, mean, np.where(below, 0.0, l_inf))
    return l_inf, a, np.where(falling, flat, np.where(below, sse_zero, sse))


def floor_of(losses: Array) -> float:
    """A sum of squares that is nothing but rounding."""
    return float(len(losses) * (1e-9 * losses.max()) ** 2)
