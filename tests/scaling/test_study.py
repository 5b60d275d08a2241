from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchscale.errors import UserError
from patchscale.scaling.study import find_series, fit_series, group_cells, outlook, pareto, score_series, steps

few = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@given(few)
def test_pareto_marks_what_no_point_beats(points):
    cost, score = np.array(points).T
    marked = pareto(cost, score)
    for i, (c, s) in enumerate(points):
        beaten = any(c2 <= c and s2 >= s and (c2 < c or s2 > s) for c2, s2 in points)
        assert marked[i] == (not beaten)
    assert marked.any()
    assert sorted(score[marked]) == list(score[marked][np.lexsort((score[marked], cost[marked]))])  # more buys more


@pytest.fixture
def main(study):
    """The series of five patch sizes, and all groups."""
    groups = group_cells(study)
    return find_series(groups)[0], groups


def test_runs_are_grouped_over_seeds_and_lined_up_over_patches(study, main):
    series, groups = main
    assert len(groups) == len(study) / 3
    assert series.patches == (16, 8, 4, 2, 1)
    assert [s.patches for s in find_series(groups)[1:]] == [(8,)] * 3
    assert series.name == "made up: adventurer, width 64, 4 blocks, 32 px, 10 epochs"
    group = series.groups[0]
    assert group.top1.value == pytest.approx(np.mean([cell.top1 for cell in group.cells]))
    assert group.top1.half_width(0.9) == pytest.approx(2.92 * group.top1.error, rel=1e-3)


def test_controls_and_equal_flops_are_series_of_their_own(cell):
    cells = [cell(patch) for patch in (16, 8, 4)]
    cells += [replace(c, control="extend", patch_size=16) for c in cells[1:]]
    cells += [replace(c, held="flops", epochs=e) for c, e in zip(cells[:3], (64, 16, 4), strict=True)]
    cells += [replace(c, control="length", img_size=8 * p) for c, p in zip(cells[:3], (4, 2, 1), strict=True)]
    found = {(s.first.control, s.first.held): len(s.groups) for s in find_series(group_cells(cells))}
    assert found == {
        ("scale", "epochs"): 3,
        ("extend", "epochs"): 2,
        ("scale", "flops"): 3,
        ("length", "epochs"): 3,
    }


def test_a_step_says_what_patch_width_and_resolution_buy(main):
    series, groups = main
    step = steps(series, groups)[1]
    truth = 1.6 * (8**0.9 - 4**0.9)
    assert step.gain.points == pytest.approx(truth, abs=3 * 0.1)
    assert step.gain.times == pytest.approx(4)
    # Four times the FLOPs are twice the width, and twice the resolution.
    assert step.width.points == pytest.approx(100 / 64 - 100 / 128, abs=0.3)
    assert step.resolution.points == pytest.approx(40 / 32 - 40 / 64, abs=0.3)
    words = str(step)
    assert words.startswith("From patch 8, going to 4 costs 4.0 times the training compute and buys 4.7 ± 0.")
    assert "; the same compute spent on width buys 0." in words
    assert ", on resolution buys 0." in words


def test_a_step_reads_between_the_runs_and_never_beyond(cell):
    ladder = [cell(8, seed, width) for width in (64, 96, 192) for seed in range(3)]
    groups = group_cells(ladder + [cell(4, seed) for seed in range(3)])
    (step,) = steps(find_series(groups)[0], groups)
    # 128 lies between 96 and 192; halfway in log FLOPs 96 to 192 would be 136.
    assert 100 / 64 - 100 / 96 - 0.3 < step.width.points < 100 / 64 - 100 / 192 + 0.3
    assert step.resolution == "is not known: nothing larger was run at patch 8"
    narrow = [group for group in groups if group.first.width != 192]
    (step,) = steps(find_series(narrow)[0], narrow)
    assert step.width == "is not known: the largest run at patch 8 takes 2.2 times the compute"


def test_a_step_owns_up_to_what_the_seeds_cannot_tell(cell):
    cells = [replace(cell(p, s), top1=50.0 + s + (p == 4) * 0.1) for p in (8, 4) for s in range(3)]
    groups = group_cells(cells)
    (step,) = steps(find_series(groups)[0], groups)
    assert "changes nothing that these seeds can tell (+0.1 ± " in str(step)
    assert "what width or resolution does for the same compute is not known: nothing larger was run at patch 8." in str(
        step
    )
    alone = group_cells([c for c in cells if c.seed == 0])
    (step,) = steps(find_series(alone)[0], alone)
    assert "buys 0.1 points (a single run: no interval)" in str(step)
    alike = group_cells([replace(c, top1=50.0 + (c.patch_size == 4) * 0.1) for c in cells])
    (step,) = steps(find_series(alike)[0], alike)
    assert "buys 0.1 points (all seeds agree exactly: no interval)" in str(step)


def test_intervals_of_gains_hold_the_truth_nine_times_in_ten(cell):
    hits, draws = 0, 400
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.5, (draws, 2, 4))
    for draw in noise:
        cells = [replace(cell(p, s), top1=50.0 + draw[i, s] + i) for i, p in enumerate((8, 4)) for s in range(4)]
        groups = group_cells(cells)
        (step,) = steps(find_series(groups)[0], groups)
        hits += abs(step.gain.points - 1) <= step.gain.half_width
    assert 0.85 <= hits / draws <= 0.95


def test_the_law_of_a_series_and_its_outlook(cell, main):
    series, _ = main
    fit = fit_series(series)
    assert fit.verdict == "holds"
    assert fit.law.alpha == pytest.approx(0.9, abs=0.1)
    assert fit_series(series, axis="tokens").law.alpha == pytest.approx(-0.45, abs=0.05)
    assert fit_series(series, axis="flops").law.alpha == pytest.approx(-0.45, abs=0.05)
    coarse, scores = score_series(series, "error")
    assert coarse == (16, 8, 4)
    assert [score.x for score in scores] == [2, 1]
    assert all(abs(score.predicted - score.found) < 1 for score in scores)
    shorter = find_series(group_cells([cell(p, s) for p in (16, 8, 4, 2) for s in range(3)]))[0]
    assert "going to 1 takes 4 times the tokens and is expected to buy 1.4 points" in outlook(shorter)


def test_the_outlook_names_a_patch_that_divides_the_image(cell):
    cells = [replace(cell(p, s), img_size=28) for p in (28, 14, 7) for s in range(3)]
    assert "going to 2 takes 12.2 times the tokens" in outlook(find_series(group_cells(cells))[0])


def test_width_is_not_compared_with_fewer_blocks(cell):
    cells = [cell(p, s) for p in (8, 4) for s in range(3)]
    cells += [replace(cell(8, s, width=256), depth=1) for s in range(3)]
    groups = group_cells(cells)
    (step,) = steps(next(series for series in find_series(groups) if len(series.patches) > 1), groups)
    assert step.width == "is not known: nothing larger was run at patch 8"


def test_no_outlook_where_the_law_fails(cell):
    cells = [cell(p, s) for p in (16, 8, 4, 2) for s in range(3)]
    worse = [replace(c, top1=c.top1 - 10 * (c.patch_size == 2)) for c in cells]
    assert "the law does not hold" in outlook(find_series(group_cells(worse))[0])
    perfect = [replace(c, top1=100.0) for c in cells]
    assert "nothing can be said of it: losses: entry 0 is 0" in outlook(find_series(group_cells(perfect))[0])
    unlawful = [replace(c, val_loss=c.val_loss + 0.5 * (c.patch_size == 2)) for c in cells]
    assert "the law does not hold for these losses" in outlook(find_series(group_cells(unlawful))[0])


def test_a_patch_run_in_two_ways_is_refused(cell):
    cells = [cell(8), replace(cell(8), recipe="other"), cell(4)]
    with pytest.raises(UserError, match="patch 8 was run in two ways, 'adventurer_tiny_patch8' and 'other'"):
        find_series(group_cells(cells))
