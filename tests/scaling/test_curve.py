"""Least squares against SciPy's general solver, started from many places."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from patchscale.scaling.curve import STEEPEST, fit_curve, solve, unit_places

PATCHES = np.array([16.0, 8.0, 4.0, 2.0, 1.0])


def lowest_by_scipy(places, losses, free):
    """Over L_inf, A at the coarsest place and the steepness, those that are not free at 0."""
    unit, _, _ = unit_places(places, "patch")

    def residuals(values):
        constants = np.zeros(3)
        constants[free] = values
        return constants[0] + constants[1] * np.exp(constants[2] * (unit - 1)) - losses

    high = np.array([np.inf, np.inf, STEEPEST])[free]
    starts = [np.array([0.5 * losses.min(), 0.5 * losses.max(), s])[free] for s in (0.01, 0.3, 1, 3, 10)]
    return min(2 * optimize.least_squares(residuals, x, bounds=(np.zeros(len(free)), high)).cost for x in starts)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.1, 5), min_size=5, max_size=5), st.sampled_from(["law", "power"]))
def test_no_curve_found_by_a_general_solver_is_nearer(losses, name):
    losses = np.array(losses)
    found = fit_curve(PATCHES, losses, "patch", name)
    assert found.sse == pytest.approx(np.sum((losses - found(PATCHES)) ** 2), rel=1e-6, abs=1e-12)
    lowest = lowest_by_scipy(PATCHES, losses, [0, 1, 2] if name == "law" else [1, 2])
    assert found.sse <= lowest * (1 + 1e-4) + 1e-9
    assert min(found.l_inf, found.a, found.alpha) >= 0


@pytest.mark.parametrize("name", ["law", "power", "constant"])
def test_many_sets_at_once_are_as_each_alone(name):
    unit, _, _ = unit_places(PATCHES, "patch")
    many = 1 + 0.02 * PATCHES + 0.01 * np.random.default_rng(0).normal(size=(7, 5))
    constants, sse = solve(unit, many, name)
    for row, own, each in zip(constants, sse, many, strict=True):
        alone, sse_alone = solve(unit, each[None], name)
        np.testing.assert_allclose(row, alone[0], rtol=1e-12)
        np.testing.assert_allclose(own, sse_alone[0], rtol=1e-9)


def test_loss_that_falls_with_tokens_has_the_same_curve_over_them():
    losses = 0.8 + 0.02 * PATCHES
    by_patch = fit_curve(PATCHES, losses, "patch", "law")
    by_tokens = fit_curve((32 / PATCHES) ** 2, losses, "tokens", "law")
    assert by_tokens.l_inf == pytest.approx(by_patch.l_inf, rel=1e-9)
    assert by_tokens.alpha == pytest.approx(-by_patch.alpha / 2, rel=1e-9)
    assert (by_patch.reference, by_tokens.reference) == (16, 4)
