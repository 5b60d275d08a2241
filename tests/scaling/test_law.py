import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchscale.errors import UserError
from patchscale.scaling import fit_law, score_coarse_to_fine

PATCHES = np.array([16.0, 8, 4, 2, 1])
L_INF, A, ALPHA = 0.8, 0.02, 1.0


def losses(patch, noise, seed=0):
    return L_INF + A * patch**ALPHA + np.random.default_rng(seed).normal(0, noise, len(patch))


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 5), st.floats(1e-3, 1), st.floats(0.1, 2.5))
def test_exact_points_give_the_constants_back(l_inf, a, alpha):
    law = fit_law(PATCHES, l_inf + a * PATCHES**alpha, draws=0).law
    assert law.L_inf == pytest.approx(l_inf, rel=1e-4, abs=1e-4)
    assert (law.A, law.alpha) == pytest.approx((a, alpha), rel=1e-3)
    assert law(0.5) == pytest.approx(l_inf + a * 0.5**alpha, rel=1e-4)


def test_noisy_points_give_the_constants_within_their_intervals():
    patch = np.repeat(PATCHES, 3)
    fit = fit_law(patch, losses(patch, 0.003), confidence=0.99)
    for name, truth in (("L_inf", L_INF), ("A", A), ("alpha", ALPHA)):
        low, high = fit.law.intervals[name]
        assert low < truth < high
        assert low < getattr(fit.law, name) < high
    assert fit.noise == pytest.approx(0.003, rel=0.5)
    assert fit.verdict == "holds"
    assert fit.best.name == "law"
    assert sum(form.weight for form in fit.forms.values()) == pytest.approx(1)
    assert abs(fit.law.held_out) < abs(fit.forms["power"].held_out) < abs(fit.forms["constant"].held_out)


def test_nine_tenths_of_the_intervals_hold_the_truth():
    patch = np.repeat(PATCHES, 3)
    hits = dict.fromkeys(("L_inf", "A", "alpha", "curve", "runs"), 0)
    draws = 500
    for seed in range(draws):
        fit = fit_law(patch, losses(patch, 0.006, seed), draws=200, seed=seed)
        for name, truth in (("L_inf", L_INF), ("A", A), ("alpha", ALPHA)):
            hits[name] += fit.law.intervals[name][0] <= truth <= fit.law.intervals[name][1]
        curve, runs = fit.predict(0.5), fit.predict(0.5, runs=3)
        hits["curve"] += curve.low <= L_INF + A * 0.5**ALPHA <= curve.high
        hits["runs"] += runs.low <= losses(np.full(3, 0.5), 0.006, 10_000 + seed).mean() <= runs.high
    for name, count in hits.items():
        assert 0.85 <= count / draws <= 0.95, (name, count / draws)


@pytest.mark.parametrize("scatter", [(6, 2, 3, 29, 48), (1, 1, 1, 1, 6)])
def test_most_hold_it_too_where_the_finest_patch_scatters_more(scatter):
    # The first are the standard errors found in docs/studies/cifar100_cpu. 81 to 89% do; with one scatter for all, 50
    # to 70% did. The rest is lost where a run is drawn in to its fellows that does but scatter as its patch does.
    patch = np.repeat([16, 8, 4, 2, 1], 3)
    hits = dict.fromkeys(("L_inf", "alpha", "curve"), 0)
    draws = 200
    for seed in range(draws):
        noise = np.random.default_rng(seed).normal(size=15) * np.repeat(scatter, 3) / np.mean(scatter)
        fit = fit_law(patch, 0.8 + 0.02 * patch + 0.01 * noise, draws=200, seed=seed)
        hits["L_inf"] += fit.law.intervals["L_inf"][0] <= 0.8 <= fit.law.intervals["L_inf"][1]
        hits["alpha"] += fit.law.intervals["alpha"][0] <= 1 <= fit.law.intervals["alpha"][1]
        curve = fit.predict(0.5)
        hits["curve"] += curve.low <= 0.81 <= curve.high
    for name, count in hits.items():
        assert 0.77 <= count / draws <= 0.95, (name, count / draws)


def test_a_step_of_loss_over_flops_close_together_is_no_traceback():
    # The steepest law that is looked for: A at one FLOP is beyond any float, and the curve is not.
    flops = [1e12, 1.05e12, 1.1e12, 1.15e12, 1.2e12]
    fit = fit_law(flops, [3, 1.5, 1.1, 1.05, 1.04], axis="flops")
    assert np.isinf(fit.law.A)
    assert fit.law(flops) == pytest.approx([3, 1.5, 1.1, 1.05, 1.04], abs=0.1)
    assert fit.predict(1.3e12).value == pytest.approx(1.04, abs=0.1)


def test_tokens_and_flops_have_half_the_exponent():
    patch = np.repeat(PATCHES, 3)
    tokens = (64 / patch) ** 2
    loss = losses(patch, 0.003)
    by_patch, by_tokens = fit_law(patch, loss), fit_law(tokens, loss, axis="tokens")
    by_flops = fit_law(1e9 * tokens, loss, axis="flops")
    for other in (by_tokens, by_flops):
        assert other.law.alpha == pytest.approx(-by_patch.law.alpha / 2, rel=1e-5)
        assert other.law.L_inf == pytest.approx(by_patch.law.L_inf, rel=1e-6)
        assert other.verdict == by_patch.verdict
    mine, theirs = by_patch.predict([1, 0.5]), by_tokens.predict([4096, 16384])
    for ours, same in zip(mine, theirs, strict=True):
        assert ours == pytest.approx(same, rel=1e-3)


def test_one_diverged_seed_does_not_bend_the_law():
    patch = np.repeat(PATCHES, 3)
    loss = losses(patch, 0.003)
    before = fit_law(patch, loss)
    loss[7] += 2.0
    after = fit_law(patch, loss)
    assert before.drawn_in == ()
    assert after.drawn_in == (7,)
    assert after.law.L_inf == pytest.approx(L_INF, abs=0.02)
    assert after.predict(1).value == pytest.approx(before.predict(1).value, abs=0.01)


def test_the_best_form_of_five_single_runs_predicts_the_finest():
    assert fit_law(PATCHES, L_INF + A * np.asarray(PATCHES, float)).best.name == "law"  # AICc takes more runs


def test_two_seeds_that_differ_are_both_believed():
    """Which of them diverged is not known."""
    patch = np.repeat(PATCHES, 2)
    loss = losses(patch, 0.003)
    loss[7] += 2.0
    assert fit_law(patch, loss).drawn_in == ()


def test_a_patch_whose_seeds_all_differ_is_believed():
    patch = np.repeat(PATCHES, 3)
    loss = losses(patch, 0.003)
    loss[patch == 2] += [-0.1, 0.0, 0.15]
    assert fit_law(patch, loss).drawn_in == ()


def test_a_limit_above_what_was_found_is_not_said_to_be_determined():
    patch = np.repeat(PATCHES, 3)
    loss = 1.0 + 0.02 * patch + np.tile([-0.001, 0.0, 0.001], len(PATCHES))
    assert fit_law(patch, loss).verdict == "holds"
    steep = 1.0 + 1e-4 * patch**3 - 0.004 * (patch == 1) + np.tile([-0.003, 0.0, 0.003], len(PATCHES))
    fit = fit_law(patch, steep)
    assert fit.law.L_inf > steep[patch == 1].mean()
    assert fit.verdict == "undetermined"
    assert "is above the lowest loss found" in fit.words


def test_a_patch_that_departs_from_the_law_is_a_finding():
    patch = np.repeat(PATCHES, 3)
    loss = losses(patch, 0.003)
    loss[patch == 1] += 0.2  # as on images of a few pixels, where patch 1 learns more slowly
    fit = fit_law(patch, loss)
    assert fit.drawn_in == ()
    assert fit.verdict == "fails"
    assert fit.lack_of_fit < 0.001
    assert "does not hold" in fit.words
    assert "rises" in fit.words


@pytest.mark.parametrize("axis", ["patch", "tokens"])
def test_an_exponent_that_the_search_alone_bounds_has_an_interval_without_an_end(axis):
    """A step at the coarsest patch, however steep, describes these as well."""
    patch = np.repeat(PATCHES, 3)
    loss = np.where(patch == 16, 1.2, 1.0) + np.tile([-0.004, 0.0, 0.004], 5)
    law = fit_law(patch if axis == "patch" else (32 / patch) ** 2, loss, axis=axis).law
    end = law.intervals["alpha"][1 if axis == "patch" else 0]
    assert end == (math.inf if axis == "patch" else -math.inf)
    assert law.intervals["A"][0 if axis == "patch" else 1] == (0 if axis == "patch" else math.inf)
    assert all(map(math.isfinite, law.intervals["L_inf"]))


@pytest.mark.parametrize(
    "scatter", [(1, 1, 1, 1, 1), (1, 1, 6, 1, 1), (1, 1, 1, 1, 6), (6, 1, 1, 1, 1), (1, 2, 4, 8, 16)]
)
def test_a_true_law_is_seldom_rejected_wherever_its_seeds_scatter(scatter):
    patch, generator = np.repeat(PATCHES, 3), np.random.default_rng(0)
    width, true = 0.005 * np.repeat(scatter, 3), L_INF + A * patch
    chances = [fit_law(patch, true + width * generator.normal(size=15), draws=0).lack_of_fit for _ in range(200)]
    assert np.mean(np.array(chances) < 0.05) < 0.15  # the plain F-test: 0.29 where the third patch scatters most


@pytest.mark.parametrize("counts", [(1, 1, 1, 1, 2), (3, 1, 1, 1, 1), (2, 2, 2, 1, 1), (3, 3, 1, 1, 1)])
def test_a_true_law_is_seldom_rejected_where_some_patches_have_a_single_run(counts):
    patch, generator = np.repeat(PATCHES, counts), np.random.default_rng(1)
    true = L_INF + A * patch
    chances = [
        fit_law(patch, true + 0.005 * generator.normal(size=len(patch)), draws=0).lack_of_fit for _ in range(200)
    ]
    assert np.mean(np.array(chances) < 0.05) < 0.1  # 0.12 to 0.25 if each single run counted as a scatter found


def test_seeds_that_agree_exactly_still_test_the_fit():
    patch = np.repeat(PATCHES, 2)
    off = fit_law(patch, np.repeat([1.1, 0.93, 0.9, 0.85, 0.86], 2))
    assert (off.lack_of_fit, off.verdict) == (0.0, "fails")
    on = fit_law(patch, L_INF + A * patch)
    assert on.lack_of_fit is None
    assert "every run is on the curve" in on.words
    assert on.predict(1).low <= on.predict(1).value <= on.predict(1).high


def test_a_scattering_patch_does_not_fail_the_law_by_being_drawn_in():
    """Where two of three seeds are near one another by chance, the third is drawn in for the curve alone."""
    patch = np.repeat(PATCHES, 3)
    loss = losses(patch, 0.003)
    loss[patch == 1] += [0.0, 0.004, 0.09]
    fit = fit_law(patch, loss)
    assert fit.drawn_in == (14,)
    assert fit.lack_of_fit > 0.05


def test_a_flat_law_has_no_exponent():
    patch = np.repeat(PATCHES, 3)
    fit = fit_law(patch, 1 - 0.02 * patch / 16 + np.tile([-0.01, 0, 0.01], 5))
    assert (fit.law.A, fit.law.alpha) == (0, 0)
    assert fit.law.intervals["alpha"][0] == 0


def test_without_effect_the_law_is_not_claimed():
    patch = np.repeat(PATCHES, 3)
    verdicts = []
    for seed in range(40):
        loss = 1 + np.random.default_rng(seed).normal(0, 0.01, len(patch))
        fit = fit_law(patch, loss, draws=100)
        verdicts.append(fit.verdict)
        assert fit.verdict != "holds" or "rises" not in fit.words
    assert verdicts.count("fails") > 30
    assert "holds" not in verdicts


def test_a_power_law_does_not_determine_l_inf():
    patch = np.repeat(PATCHES, 3)
    fit = fit_law(patch, 0.5 * patch**0.05 + np.random.default_rng(0).normal(0, 0.003, 15), confidence=0.99)
    assert fit.verdict == "undetermined"
    assert "do not determine L_inf" in fit.words
    assert fit.law.intervals["L_inf"][0] == pytest.approx(0, abs=1e-6)
    assert fit.forms["power"].intervals["alpha"][0] < 0.05 < fit.forms["power"].intervals["alpha"][1]


def test_as_many_runs_as_constants_leave_nothing_to_judge_by():
    coarse = PATCHES[:3]
    fit = fit_law(coarse, L_INF + A * coarse)
    assert all(math.isnan(end) for end in fit.law.intervals["L_inf"])
    assert fit.verdict == "undetermined"
    assert math.isnan(fit.noise)
    known = fit_law(coarse, L_INF + A * coarse, noise=0.005)
    assert known.law.intervals["L_inf"][0] < L_INF < known.law.intervals["L_inf"][1]
    assert known.predict(1, runs=1).high - known.predict(1, runs=1).low > 2 * 0.005


def test_fine_patches_are_predicted_from_coarse():
    patch = np.repeat(PATCHES, 3)
    loss = losses(patch, 0.002)
    two, one = score_coarse_to_fine(patch, loss)
    assert (two.x, one.x, two.runs) == (2, 1, 3)
    assert one.predicted == pytest.approx(L_INF + A, abs=0.03)
    assert one.inside
    assert not score_coarse_to_fine(patch, loss, form="constant")[1].inside


@pytest.mark.parametrize(
    ("x", "loss", "keywords", "words"),
    [
        ([16, 8], [1, 0.9], {}, "at 3 different patch sizes or more, not 8, 16"),
        ([16, 8, 4], [1, 0.9], {}, r"shape \(3,\) and losses \(2,\)"),
        ([], [], {}, "not none"),
        ([16, 8, 0], [1, 0.9, 0.8], {}, "patch sizes: entry 2 is 0, expected above 0"),
        ([16, 8, 4], [1, float("nan"), 0.8], {}, "losses: entry 1 is nan"),
        ([16, 8, 4], [1, 0.9, float("inf")], {"axis": "tokens"}, "losses: entry 2 is inf"),
        (["a", "b", "c"], [1, 2, 3], {}, "the law needs numbers"),
        ([16, 8, 4], [1, 0.9, 0.8], {"axis": "size"}, "axis is 'size', expected one of patch, tokens, flops"),
        ([16, 8, 4], [1, 0.9, 0.8], {"confidence": 90}, "confidence is 90, expected between 0 and 1"),
        ([16, 8, 4], [1, 0.9, 0.8], {"noise": -1}, "noise is -1, expected a standard deviation above 0"),
        ([16, 8, 4], [1, 0.9, 0.8], {"noise": "x"}, "noise is 'x', expected a number"),
        ([16, 8, 4], [1, 0.9, 0.8], {"draws": -1}, "draws is -1, expected a whole number from 0"),
        ([16, 8, 4], [1, 0.9, 0.8], {"seed": 0.5}, "seed is 0.5, expected a whole number from 0"),
        ([16, 8, 4], [1e300, 0.9, 0.8], {}, r"losses: entry 0 is 1e\+300"),
    ],
)
def test_bad_input_is_refused(x, loss, keywords, words):
    with pytest.raises(UserError, match=words):
        fit_law(x, loss, **keywords)


def test_bad_places_to_predict_are_refused():
    fit = fit_law(PATCHES, L_INF + A * PATCHES)
    for x in (0, -1, float("nan"), [1, math.inf]):
        with pytest.raises(UserError, match="give numbers above 0"):
            fit.predict(x)
    with pytest.raises(UserError, match="runs is 0"):
        fit.predict(1, runs=0)
    with pytest.raises(UserError, match=r"runs is 1\.5"):
        fit.predict(1, runs=1.5)
    assert fit.predict(1, runs=np.int64(2)).value == fit.predict(1).value  # NumPy's numbers are numbers
    assert score_coarse_to_fine(PATCHES, L_INF + A * PATCHES, coarse=PATCHES[:3], noise=np.float32(0.01))
    with pytest.raises(UserError, match="cannot predict at 'a'"):
        fit.predict("a")
    with pytest.raises(UserError, match="give numbers above 0"):
        fit.law.predict_fall(0, -1)
    with pytest.raises(UserError, match="form is 'lawx', expected one of law, power, constant"):
        score_coarse_to_fine(PATCHES, PATCHES, form="lawx")
    for coarse in (None, 16, "16", ()):
        with pytest.raises(UserError, match=r"coarse is .*, expected the patch sizes to fit on"):
            score_coarse_to_fine(PATCHES, PATCHES, coarse=coarse)
    with pytest.raises(UserError, match="none at patch 16"):
        score_coarse_to_fine(PATCHES[1:], PATCHES[1:])
    with pytest.raises(UserError, match="none finer than patch 4"):
        score_coarse_to_fine(PATCHES[:3], PATCHES[:3])
