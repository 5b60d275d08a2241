"""The law of patch size, L(p) = L_inf + A p^alpha, and how sure a handful of runs can be of it.

That test loss falls smoothly with the patch's side p down to single pixels is the finding of "Scaling Laws in
Patchification" (arXiv 2502.03738, figure 1). The paper prints no equation; this form follows from the spacing of that
figure's ticks, which are those of log(L - L_inf). With an image of fixed size there are N = (side / p)^2 tokens, so the
same law in tokens has the exponent -alpha / 2, and in FLOPs, where they grow as N, the same again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike

from patchscale.errors import UserError
from patchscale.scaling.curve import FREE, GENTLEST, STEEPEST, Array, Curve, fit_curve, floor_of, solve, unit_places
from patchscale.scaling.scatter import draw_in, draw_noise, lack_of_fit, noise_like, spreads

Axis = Literal["patch", "tokens", "flops"]
FormName = Literal["law", "power", "constant"]
Verdict = Literal["holds", "undetermined", "fails"]

FORMULAS: dict[str, str] = {"law": "L_inf + A x^alpha", "power": "A x^alpha", "constant": "L_inf"}
_LACK_OF_FIT = 0.05
_SAME_AICC = 2.0
# An L_inf of this share of the lowest loss is 0 for all that anyone will measure.
_NOTHING = 1e-3


class Prediction(NamedTuple):
    """What is expected at given places; arrays of their shape, in the unit of the losses."""

    value: Array
    low: Array
    high: Array


@dataclass(frozen=True, eq=False)
class Form:
    """One form of the law, fitted. Losses and ``A`` in the unit of what was fitted (nats, or percent of error)."""

    name: FormName
    L_inf: float
    """What the loss tends to; 0 for the power law."""
    A: float
    """Loss above L_inf at x = 1; 0 for the constant. 0 or infinite where no float holds it, as in FLOPs it may be."""
    alpha: float
    """Exponent; negative in tokens and FLOPs, 0 for the constant."""
    intervals: dict[str, tuple[float, float]]
    """Of ``L_inf``, ``A`` and ``alpha``; NaN where the runs leave nothing to judge their spread by."""
    sse: float
    """Sum of squared residuals."""
    aicc: float
    """Akaike's criterion corrected for few runs; infinite where there are too few for it."""
    weight: float
    """Akaike weight among the three forms; NaN where the runs are too few for one of them."""
    held_out: float | None
    """Finest patch left out of the fit: predicted minus found. None where what remains does not settle the form."""
    _draws: Array
    """(draws, 3): L_inf, A at the reference, alpha, refitted to resampled runs."""
    _noise: Array
    """Residuals that stand for one run's noise."""
    _freedom: int | None
    """How many runs the noise was judged by, beyond those that the constants took; None where it was given."""
    _curve: Curve
    _confidence: float

    def __call__(self, x: ArrayLike) -> Array:
        """The fitted curve at ``x``."""
        return np.asarray(self._curve(np.asarray(x, np.float64)))

    def predict(self, x: ArrayLike, runs: int | None = None) -> Prediction:
        """The curve at other places, with an interval at the fit's confidence.

        Args:
            x: patch sizes (pixels), tokens or FLOPs, as the fit's axis says; any shape.
            runs: the interval is where the mean of this many new runs would fall; of the curve itself if None.
        """
        places = _places(x)
        if runs is not None and (not isinstance(runs, Integral) or runs < 1):
            raise UserError(f"runs is {runs}, expected a whole number from 1")
        value = self(places)
        if not len(self._draws):
            return Prediction(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
        l_inf, a, alpha = (self._draws[:, i].reshape(-1, *[1] * places.ndim) for i in range(3))
        drawn = l_inf + a * (places / self._curve.reference) ** alpha
        if runs is not None:
            generator = np.random.default_rng(1)
            noise = generator.choice(self._noise, (*drawn.shape, runs)).mean(-1)
            spread = spreads(self._freedom, len(drawn), generator).reshape(-1, *[1] * places.ndim)
            drawn = drawn + noise * spread
        return _around(value, drawn, self._confidence)

    def predict_fall(self, start: float, end: float) -> Prediction:
        """How much lower the curve is at ``end`` than at ``start``, with an interval."""
        start, end = _places([start, end])
        value = np.asarray(self(start) - self(end))
        if not len(self._draws):
            return Prediction(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
        at_start, at_end = ((x / self._curve.reference) ** self._draws[:, 2] for x in (start, end))
        return _around(value, self._draws[:, 1] * (at_start - at_end), self._confidence)


@dataclass(frozen=True, eq=False)
class LawFit:
    """The law and its rivals fitted to the same runs, and what may be concluded."""

    axis: Axis
    x: Array
    """(runs,)"""
    loss: Array
    """(runs,)"""
    forms: dict[str, Form]
    """``law``, ``power`` and ``constant``."""
    confidence: float
    noise: float
    """Standard deviation of one run; NaN where nothing tells."""
    lack_of_fit: float | None
    """Chance of the patches' means missing the law so far if it held, judged by how far runs scatter that differ in
    their seed alone, at each patch by its own; None without such runs, or where they agree exactly with the law."""
    drawn_in: tuple[int, ...]
    """Runs whose distance from their patch's median was shortened."""
    verdict: Verdict
    words: str
    """The verdict in a sentence or two."""

    @property
    def law(self) -> Form:
        """L_inf + A x^alpha."""
        return self.forms["law"]

    @property
    def best(self) -> Form:
        """The form that Akaike's criterion favours; with too few runs for it, the best predictor of the finest."""
        forms = list(self.forms.values())
        if all(math.isfinite(form.aicc) for form in forms):
            return min(forms, key=lambda form: form.aicc)
        return min(forms, key=lambda form: math.inf if form.held_out is None else abs(form.held_out))

    def predict(self, x: ArrayLike, runs: int | None = None) -> Prediction:
        """See :meth:`Form.predict`; by the law, whose intervals widen by themselves where L_inf is not determined."""
        return self.law.predict(x, runs)


def fit_law(
    x: ArrayLike,
    loss: ArrayLike,
    axis: Axis = "patch",
    confidence: float = 0.9,
    noise: float | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> LawFit:
    """Fit L(x) = L_inf + A x^alpha, with L_inf >= 0 and A >= 0, to runs at three or more places.

    Least squares over all runs. A run far from the others of its patch (more than 5 standard deviations), which are
    near one another, is drawn in, so that one diverged seed of three or more cannot bend the law; a patch as a whole
    never is, since a patch that departs from the law is a finding.

    Intervals are percentiles of refits to the fitted curve plus resampled residuals. Each refit's residuals are scaled
    by a draw of what the true spread may be given so few runs (chi-squared), without which intervals of 5 to 15 runs
    are too narrow. Where every patch has two seeds or more that do not scatter alike, each patch's noise is drawn by
    its own seeds' scatter. A prediction of new runs takes one spread for all. An interval without an end, as of an
    exponent when runs cannot tell a bend from a step, ends in infinity.

    The law is compared with the power law (L_inf = 0) and with a constant by AICc and by the finest patch held out.

    Args:
        x: (runs,) patch side in pixels, tokens an image, or FLOPs, as ``axis`` says; runs that differ in the seed alone
            repeat it.
        loss: (runs,) test loss (nats), or any other quantity that is better low and above 0, such as percent of error.
        axis: what ``x`` is. Loss rises with the patch's side and falls with tokens and FLOPs: alpha is positive for
            the first, negative for the others.
        confidence: of the intervals.
        noise: standard deviation of one run, where it is known from elsewhere; needed for intervals where there are as
            many runs as constants.
        draws: refits for the intervals; 0 for none.
        seed: of the resampling.

    Raises:
        UserError: fewer than three places, lengths that differ, or numbers that are not finite and above 0.
    """
    places, losses = _checked(x, loss, axis, confidence, noise)
    for name, number in (("draws", draws), ("seed", seed)):
        if not isinstance(number, Integral) or isinstance(number, bool) or number < 0:
            raise UserError(f"{name} is {number!r}, expected a whole number from 0")
    used, drawn_in = draw_in(places, losses)
    fits = {name: fit_curve(places, used, axis, name) for name in FREE}
    free_runs = len(places) - FREE["law"]
    generator = np.random.default_rng(seed)
    aicc = {name: _aicc(fit.sse, len(places), FREE[name] + 1, floor_of(used)) for name, fit in fits.items()}
    best = min(aicc.values())
    comparable = all(map(math.isfinite, aicc.values()))
    relative = {name: math.exp((best - value) / 2) if comparable else math.nan for name, value in aicc.items()}
    errors = _held_out_errors(places, used, axis)
    forms: dict[str, Form] = {}
    for name, fit in fits.items():
        residuals = noise_like(used - fit(places), FREE[name], noise, generator)
        drawn = draw_noise(places, used, residuals, FREE[name], noise, draws, generator)
        redrawn = _refit(places, fit, name, axis, drawn)
        forms[name] = Form(
            name,  # type: ignore[arg-type]
            fit.l_inf,
            float(_at_one(fit.a, fit.alpha, fit.reference)),
            fit.alpha,
            _intervals(redrawn, fit, unit_places(places, axis)[2], confidence),
            fit.sse,
            aicc[name],
            relative[name] / sum(relative.values()),
            errors.get(name),
            redrawn,
            residuals,
            len(places) - FREE[name] if noise is None else None,
            fit,
            confidence,
        )
    spread = noise if noise is not None else math.sqrt(fits["law"].sse / free_runs) if free_runs else math.nan
    lack = lack_of_fit(places, losses, fits["law"])
    verdict, words = _judge(places, losses, forms, axis, confidence, lack)
    return LawFit(axis, places, losses, forms, confidence, spread, lack, drawn_in, verdict, words)


class Scored(NamedTuple):
    """A prediction beside what was found there."""

    x: float
    predicted: float
    low: float
    high: float
    found: float
    runs: int

    @property
    def inside(self) -> bool:
        """Whether the interval holds what was found."""
        return self.low <= self.found <= self.high


def score_coarse_to_fine(
    patch: ArrayLike,
    loss: ArrayLike,
    coarse: Sequence[float] = (16, 8, 4),
    form: FormName = "law",
    confidence: float = 0.9,
    noise: float | None = None,
) -> list[Scored]:
    """Fit on the coarse patches alone, predict the finer ones, and set what was found beside it.

    Args:
        patch: (runs,) patch side in pixels.
        loss: (runs,) as for :func:`fit_law`.
        coarse: patch sizes to fit on.
        form: which form predicts.
        confidence: of the interval for the mean of as many runs as were made.
        noise: see :func:`fit_law`.

    Raises:
        UserError: the runs lack a coarse patch, or have no finer one.
    """
    places, losses = _checked(patch, loss, "patch", confidence, noise, least=1)
    if form not in FREE:
        raise UserError(f"form is {form!r}, expected one of {', '.join(FREE)}")
    if not isinstance(coarse, (Sequence, np.ndarray)) or isinstance(coarse, str) or not len(coarse):
        raise UserError(f"coarse is {coarse!r}, expected the patch sizes to fit on, such as (16, 8, 4)")
    missing = sorted(set(coarse) - set(places), reverse=True)
    finer = sorted({p for p in places if p < min(coarse)}, reverse=True)
    if missing or not finer:
        what = f"none at patch {missing[0]:g}" if missing else f"none finer than patch {min(coarse):g}"
        fitted_on = ", ".join(f"{p:g}" for p in coarse)
        raise UserError(
            f"predicting fine patches from {fitted_on} needs runs at each of them and at a finer one: {what}"
        )
    fitted = np.isin(places, coarse)
    fit = fit_law(places[fitted], losses[fitted], confidence=confidence, noise=noise).forms[form]
    scores = []
    for p in finer:
        found = losses[places == p]
        value, low, high = map(float, fit.predict(p, len(found)))
        scores.append(Scored(float(p), value, low, high, float(found.mean()), len(found)))
    return scores


def _checked(
    x: ArrayLike, loss: ArrayLike, axis: str, confidence: float, noise: float | None, least: int = 3
) -> tuple[Array, Array]:
    names = {"patch": "patch sizes", "tokens": "numbers of tokens", "flops": "FLOPs"}
    if axis not in get_args(Axis):
        raise UserError(f"axis is {axis!r}, expected one of {', '.join(get_args(Axis))}")
    for name, number in (("confidence", confidence), ("noise", noise)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, Real)):
            raise UserError(f"{name} is {number!r}, expected a number")
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}, expected between 0 and 1, such as 0.9")
    if noise is not None and not (math.isfinite(noise) and noise > 0):
        raise UserError(f"noise is {noise}, expected a standard deviation above 0, or none")
    try:
        places, losses = np.asarray(x, np.float64), np.asarray(loss, np.float64)
    except (TypeError, ValueError) as e:
        raise UserError(f"the law needs numbers: {e}") from e
    if places.ndim != 1 or places.shape != losses.shape:
        raise UserError(
            f"{names[axis]} have the shape {places.shape} and losses {losses.shape}: give two lists of one length, an "
            "entry a run"
        )
    for what, values in ((names[axis], places), ("losses", losses)):
        bad = np.flatnonzero(~((values > 1e-100) & (values < 1e100)))
        if len(bad):
            raise UserError(
                f"{what}: entry {bad[0]} is {values[bad[0]]:g}, expected above 0 and finite; leave that run out"
            )
    if len(set(places)) < least:
        found = ", ".join(f"{p:g}" for p in sorted(set(places))) or "none"
        raise UserError(f"the law has three constants and needs runs at 3 different {names[axis]} or more, not {found}")
    return places, losses


def _refit(places: Array, fit: Curve, name: str, axis: str, drawn: Array) -> Array:
    """(draws, 3): L_inf, A at the reference and alpha, fitted to the curve plus each draw of the noise."""
    if not len(drawn):
        return np.empty((0, 3))
    unit, _, span = unit_places(places, axis)
    constants, _ = solve(unit, fit(places) + drawn, name)
    return constants / np.array([1, 1, span])


def _at_one(a: ArrayLike, alpha: ArrayLike, reference: float) -> Array:
    """A at x = 1 from that at the reference; 0 or infinite beyond what a float holds."""
    with np.errstate(over="ignore", divide="ignore"):
        return np.sign(a) * np.exp(np.log(np.abs(a)) - np.asarray(alpha) * math.log(reference))


def _places(x: ArrayLike) -> Array:
    try:
        places = np.asarray(x, np.float64)
    except (TypeError, ValueError) as e:
        raise UserError(f"cannot predict at {x!r}: give numbers above 0") from e
    if not np.all(np.isfinite(places) & (places > 0)):
        raise UserError(f"cannot predict at {places.tolist()}: give numbers above 0")
    return places


def _around(value: Array, drawn: Array, confidence: float) -> Prediction:
    """Refits to all but exact points are coarser than the fit: without this it could lie outside their interval."""
    low, high = _interval(drawn, confidence)
    return Prediction(value, np.minimum(low, value), np.maximum(high, value))


def _interval(drawn: Array, confidence: float) -> tuple[Array, Array]:
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def _intervals(draws: Array, fit: Curve, span: float, confidence: float) -> dict[str, tuple[float, float]]:
    names = ("L_inf", "A", "alpha")
    if not len(draws):
        return dict.fromkeys(names, (math.nan, math.nan))
    # Between two infinities a quantile is no number.
    at_one = np.minimum(_at_one(draws[:, 1], draws[:, 2], fit.reference), np.finfo(np.float64).max)
    columns = np.stack([draws[:, 0], at_one, draws[:, 2]], 1)
    low, high = _interval(columns, confidence)
    # Where the search for alpha ends, the interval does not.
    gentlest, steepest = GENTLEST / abs(span), STEEPEST / abs(span)
    near, far = (low, high) if span > 0 else (high, low)
    if abs(near[2]) <= gentlest * (1 + 1e-6):
        near[2] = 0.0
    if abs(far[2]) >= steepest * (1 - 1e-6):
        far[2] = math.copysign(math.inf, span)
        if (fit.reference > 1) == (span > 0):
            low[1] = 0.0
        else:
            high[1] = math.inf
    # Refits to all but exact points are coarser than the fit: without this its constants could lie outside.
    own = (fit.l_inf, float(_at_one(fit.a, fit.alpha, fit.reference)), fit.alpha)
    return {name: (min(float(low[i]), own[i]), max(float(high[i]), own[i])) for i, name in enumerate(names)}


def _aicc(sse: float, runs: int, constants: int, floor: float) -> float:
    """Akaike's criterion of a least-squares fit (the noise counts as a constant), corrected for few runs."""
    if runs - constants - 1 < 1:
        return math.inf
    criterion = runs * math.log(max(sse, floor) / runs) + 2 * constants
    return criterion + 2 * constants * (constants + 1) / (runs - constants - 1)


def _held_out_errors(places: Array, losses: Array, axis: str) -> dict[str, float]:
    finest = places.min() if axis == "patch" else places.max()
    rest = places != finest
    found = float(losses[~rest].mean())
    errors = {}
    for name, constants in FREE.items():
        if len(set(places[rest])) >= max(constants, 2):
            errors[name] = float(fit_curve(places[rest], losses[rest], axis, name)(finest)) - found
    return errors


def _judge(
    places: Array, losses: Array, forms: dict[str, Form], axis: str, confidence: float, lack: float | None
) -> tuple[Verdict, str]:
    """What may be concluded, and why."""
    law, power, constant = forms["law"], forms["power"], forms["constant"]
    order = sorted(set(places), reverse=axis == "patch")
    means = [float(losses[places == p].mean()) for p in order]
    repeated = len(places) > len(order)
    rise = ""
    if means[-1] > means[-2]:
        rise = f" The loss rises from {means[-2]:.4g} to {means[-1]:.4g} at the last step."
    if lack is not None and lack < _LACK_OF_FIT:
        return "fails", (
            f"The law does not hold: its curve misses the patches' means by more than the seeds scatter "
            f"(chance {_chance(lack)}).{rise}"
        )
    if math.isfinite(law.aicc):
        flat = constant.aicc <= min(law.aicc, power.aicc)
        why = "a constant describes these runs as well as any curve (AICc)"
    else:
        curves = [form.held_out for form in (law, power) if form.held_out is not None]
        flat = constant.held_out is not None and bool(curves) and abs(constant.held_out) <= min(map(abs, curves))
        why = "the mean of the other patches predicts the finest as well as any curve (too few runs for AICc)"
    if flat:
        return "fails", f"The law does not hold: {why}.{rise}"
    low, high = law.intervals["L_inf"]
    reasons = []
    if law.L_inf > min(means):
        reasons.append(f"the fitted one, {law.L_inf:.4g}, is above the lowest loss found, {min(means):.4g}")
    if math.isnan(low):
        reasons.append("there are as many constants as runs, and nothing tells how far one run scatters")
    else:
        share = f"{100 * confidence:g}%"
        if low <= _NOTHING * min(means):
            reasons.append(f"its {share} interval, 0 to {high:.3g}, reaches 0")
        if high - low > max(means) - min(means):
            reasons.append(f"its {share} interval is wider than the losses' range, {max(means) - min(means):.3g}")
    if math.isfinite(law.aicc) and power.aicc < law.aicc + _SAME_AICC:
        better = "better" if power.aicc < law.aicc else "as well"
        reasons.append(f"a power law without it describes them {better} (AICc {power.aicc - law.aicc:+.1f})")
    if reasons:
        return "undetermined", f"These runs do not determine L_inf: {'; '.join(reasons)}.{rise}"
    if lack is not None:
        how = f"chance of a scatter as large: {_chance(lack)}"
    elif len(order) <= FREE["law"]:
        how = "three patch sizes cannot test the fit"
    else:
        how = "every run is on the curve" if repeated else "single runs cannot test the fit"
    return "holds", f"The law holds here as far as these runs tell ({how}), and they determine L_inf.{rise}"


def _chance(p: float) -> str:
    return "under 0.001" if p < 1e-3 else f"{p:.2g}"
