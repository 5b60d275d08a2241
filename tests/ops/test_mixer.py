"""The mixer in one operator against its definition, token by token, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from patchscale import UserError
from patchscale.ops import causal_conv1d, chunks, gated_rms_norm, mix_tokens, ssd_scan
from patchscale.ops.reference import mix_tokens_reference

NAMES = (
    "projected",
    "conv_weight",
    "conv_bias",
    "dt_bias",
    "A",
    "D",
    "norm_weight",
    "history",
    "initial_state",
)
property_test = settings(deadline=None, max_examples=25, database=None)


def draw(
    length: int,
    *,
    batch: int = 2,
    heads: int = 3,
    headdim: int = 4,
    d_state: int = 6,
    width: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs of a mixer: activations in ``dtype``, parameters in float32 at least."""
    generator = torch.Generator().manual_seed(seed)
    d_inner = heads * headdim
    conv_dim = d_inner + 2 * d_state
    shapes = {
        "projected": (batch, length, d_inner + conv_dim + heads),
        "conv_weight": (conv_dim, width),
        "conv_bias": (conv_dim,),
        "dt_bias": (heads,),
        "A": (heads,),
        "D": (heads,),
        "norm_weight": (d_inner,),
        "history": (batch, width - 1, conv_dim),
        "initial_state": (batch, heads, headdim, d_state),
    }
    inputs = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
    inputs["dt_bias"] -= 2
    inputs["A"] = -inputs["A"].exp()
    parameters = torch.promote_types(dtype, torch.float32)
    return {k: v.to(dtype if k in ("projected", "history") else parameters) for k, v in inputs.items()}


def mix_and_gradients(
    mix, inputs: dict[str, Tensor], outputs: tuple[str, ...] = ("out", "final_state"), **options
) -> dict[str, Tensor]:
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    values = mix(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    grad_outputs = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in values]
    # Rounded to bfloat16 for every dtype, so that a reference in float64 starts from the same numbers.
    grad_outputs = [g.bfloat16().to(t.dtype) for g, t in zip(grad_outputs, values, strict=True)]
    gradients = torch.autograd.grad(values, list(leaves.values()), grad_outputs)
    return dict(zip(outputs, values, strict=True)) | {f"grad of {k}": g for k, g in zip(leaves, gradients, strict=True)}


def mixed(inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    return mix_and_gradients(mix_tokens, inputs, final_state=True, **options)


def truth(inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    return mix_and_gradients(mix_tokens_reference, {k: v.double() for k, v in inputs.items()}, **options)


# The worst cases are sums over all tokens of terms of either sign: the gradients of A and dt_bias.
SUMS = ("grad of A", "grad of dt_bias")


@pytest.mark.parametrize(
    ("dtype", "tolerance", "tolerance_of_sums"),
    [(torch.float64, 1e-10, 1e-10), (torch.float32, 1e-5, 1e-4), (torch.bfloat16, 1e-2, 1e-2)],
)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 196, 197])
def test_values_and_gradients(length, reverse, dtype, tolerance, tolerance_of_sums, assert_near):
    for batch, suffix in ((1, 3), (3, 1), (2, 0)):
        inputs = draw(length, batch=batch, dtype=dtype, seed=length)
        options = {"reverse": reverse, "suffix": min(suffix, length)}
        expected = truth(inputs, **options)
        for name, value in mixed(inputs, **options).items():
            assert_near(value, expected[name], tolerance_of_sums if name in SUMS else tolerance, name)


# The definition in the order of the scan, in which nothing is moved, reversed or last.
@pytest.mark.parametrize("absent", [(), ("history", "initial_state")])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("length", "suffix"), [(1, 0), (2, 0), (2, 1), (3, 1), (65, 1), (66, 0), (67, 2), (197, 1)])
def test_heading_token(length, suffix, reverse, absent, assert_near):
    inputs = {k: v for k, v in draw(length, seed=length).items() if k not in absent}
    tokens = list(range(length - 1))
    body = tokens[: length - 1 - suffix]
    order = [length - 1, *(body[::-1] if reverse else body), *tokens[len(body) :]]

    def in_order(projected, **others):
        out, state = mix_tokens_reference(projected[:, order], **others)
        return out[:, [order.index(t) for t in tokens]], state

    expected = mix_and_gradients(in_order, inputs)
    for mix in (mixed, truth):
        for name, value in mix(inputs, reverse=reverse, suffix=suffix, heading=True).items():
            assert_near(value, expected[name], 1e-10, name)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [577, 1157])
def test_long_sequences(length, reverse, assert_near):
    inputs = draw(length, dtype=torch.float32)
    expected = truth(inputs, reverse=reverse, suffix=1)
    for name, value in mixed(inputs, reverse=reverse, suffix=1).items():
        assert_near(value, expected[name], 1e-4 if name in SUMS else 1e-5, name)


def test_is_the_three_operators(assert_near):
    inputs = draw(70)
    del inputs["history"]

    def three(projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, initial_state):
        z, xBC, dt = projected.split([12, 24, 3], dim=-1)
        xBC = causal_conv1d(xBC, conv_weight, conv_bias, reverse=True, suffix=1)
        x, B, C = xBC.split([12, 6, 6], dim=-1)
        dt = torch.nn.functional.softplus(dt + dt_bias)
        y, state = ssd_scan(
            x.unflatten(-1, (3, 4)), dt, A, B, C, D, initial_state=initial_state, reverse=True, suffix=1
        )
        return gated_rms_norm(y.flatten(2), z, norm_weight), state

    expected = mix_and_gradients(three, inputs)
    for name, value in mixed(inputs, reverse=True, suffix=1).items():
        assert_near(value, expected[name], 1e-10, name)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("reverse", [False, True])
def test_without_history_or_initial_state(reverse, width, assert_near):
    inputs = draw(70, width=width)
    for absent in (("history",), ("initial_state",), ("history", "initial_state")):
        some = {k: v for k, v in inputs.items() if k not in absent and v.numel()}
        expected = truth(some, reverse=reverse, suffix=1)
        for name, value in mixed(some, reverse=reverse, suffix=1).items():
            assert_near(value, expected[name], 1e-10, name)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_alone(used, assert_near):
    inputs = draw(70)
    gradients = []
    for mix, options in ((mix_tokens, {"final_state": True}), (mix_tokens_reference, {})):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        mix(**leaves, **options, reverse=True, suffix=1)[used].pow(2).sum().backward()
        gradients.append({k: v.grad for k, v in leaves.items() if v.grad is not None})
    for name, actual in gradients[0].items():
        assert_near(actual, gradients[1].get(name, torch.zeros_like(actual)), 1e-10, name)
    assert gradients[1].keys() <= gradients[0].keys()


# Steps of 0.001, 1 and 30 a token: heads within a chunk's factors, beyond them, and a mix of both.
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rates", [[0.001, 0.001, 0.001], [30.0, 30.0, 30.0], [0.01, 1.0, 30.0], [0.9, 1.0, 1.1]])
def test_strong_and_weak_decay(rates, reverse, assert_near):
    inputs = draw(197, dtype=torch.float32)
    inputs["A"] = -torch.tensor(rates)
    inputs["dt_bias"] = torch.full((3,), 1.0)
    expected = truth(inputs, reverse=reverse, suffix=1)
    for name, value in mixed(inputs, reverse=reverse, suffix=1).items():
        # Beyond exp(-30) nothing but rounding is left of the gradient of A.
        assert_near(value, expected[name], 1e-4 if name in SUMS else 1e-5, name)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rates", [[0.001, 0.5, 0.01], [30.0, 30.0, 30.0], [0.01, 1.0, 30.0]])
@pytest.mark.parametrize("length", [1, 2, 65, 95])
def test_one_chunk_without_states(length, rates, reverse, assert_near):
    inputs = draw(length, dtype=torch.float64)
    del inputs["history"], inputs["initial_state"]
    inputs["A"] = -torch.tensor(rates, dtype=torch.float64)
    found, expected = (
        mix_and_gradients(lambda f=mix, **given: f(**given, reverse=reverse)[:1], inputs, outputs=("out",))
        for mix in (mix_tokens, mix_tokens_reference)
    )
    for name, value in found.items():
        assert_near(value, expected[name], 1e-10, name)


def test_one_chunk_without_states_costs_none():
    inputs = {k: v.requires_grad_() for k, v in draw(80, heads=4, headdim=8, d_state=16).items()}
    del inputs["initial_state"]
    with FlopCounterMode(display=False) as forward:
        out, _ = mix_tokens(**inputs)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    tokens, products, inside = 2 * 80, 80 * 16, 80 * 32
    assert forward.get_total_flops() == 2 * tokens * (products + inside)
    assert backward.get_total_flops() == 2 * tokens * (3 * products + 2 * inside)


@property_test
@given(st.integers(2, 150), st.data(), st.booleans())
def test_two_halves_with_state_and_history_passed_on_are_one(assert_near, length, data, reverse):
    cut = data.draw(st.integers(1, length - 1))
    inputs = draw(length)
    expected, expected_state = mix_tokens(**inputs, reverse=reverse, final_state=True)
    first, second = slice(cut), slice(cut, None)
    if reverse:
        first, second = second, first
    y_first, state = mix_tokens(
        **inputs | {"projected": inputs["projected"][:, first]}, reverse=reverse, final_state=True
    )
    met = inputs["projected"][:, first, 12:36]
    met = torch.cat([inputs["history"], met.flip(1) if reverse else met], 1)[:, -3:]
    y_second, state = mix_tokens(
        **inputs | {"projected": inputs["projected"][:, second], "history": met, "initial_state": state},
        reverse=reverse,
        final_state=True,
    )
    assert_near(torch.cat([y_second, y_first] if reverse else [y_first, y_second], 1), expected, 1e-11)
    assert_near(state, expected_state, 1e-11)


# Samples are taken a few at a time, chunks a few at a time: neither may show.
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("elements", [1, 64 * 12, 2 * 64 * 12, 5 * 64 * 12])
def test_samples_and_blocks_do_not_mix(elements, reverse, monkeypatch, assert_near):
    monkeypatch.setattr("patchscale.ops.chunks._BLOCK_ELEMENTS", elements)
    inputs = draw(300, batch=1 if elements > 2 * 64 * 12 else 3)
    options = {"reverse": reverse, "suffix": 1, "heading": True}
    expected = truth(inputs, **options)
    for name, value in mixed(inputs, **options).items():
        assert_near(value, expected[name], 1e-10, name)


@pytest.mark.parametrize("heading", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [2, 65, 150])
def test_every_element_is_written(length, reverse, heading):
    torch.use_deterministic_algorithms(True)  # fills what torch leaves uninitialised with NaN
    try:
        assert torch.empty(3).isnan().all()
        options = {"reverse": reverse, "suffix": 1, "heading": heading}
        result = mixed(draw(length), **options)
        leaves = {k: v.requires_grad_() for k, v in draw(length).items()}
        mix_tokens(**leaves, **options)[0].sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in (result | {k: v.grad for k, v in leaves.items()}).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("reverse", [False, True])
def test_non_contiguous_inputs(reverse, assert_near):
    inputs = draw(70)
    expected = mixed(inputs, reverse=reverse)
    strided = {k: torch.stack([v, v * 0 + torch.nan], dim=-1)[..., 0] for k, v in inputs.items()}
    for name, value in mixed_strided(strided, reverse).items():
        assert_near(value, expected[name], 1e-11, name)


def mixed_strided(strided: dict[str, Tensor], reverse: bool) -> dict[str, Tensor]:
    leaves = {k: v.requires_grad_() for k, v in strided.items()}
    out, state = mix_tokens(**leaves, reverse=reverse, final_state=True)
    return {"out": out, "final_state": state}


def test_without_gradients_nothing_is_kept(assert_near):
    inputs = draw(150)
    expected = mixed(inputs)["out"]
    with torch.no_grad():
        out, state = mix_tokens(**inputs)
    assert state is None
    assert_near(out, expected, 1e-12)


def test_dtypes():
    result = mixed(draw(5, dtype=torch.bfloat16))
    assert result["out"].dtype == result["grad of projected"].dtype == torch.bfloat16
    assert result["final_state"].dtype == result["grad of A"].dtype == torch.float32


@pytest.mark.parametrize("absent", [(), ("history", "initial_state")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("want_final", [True, False])
@pytest.mark.parametrize("heading", [True, False])
def test_custom_op_keeps_pytorchs_rules(dtype, absent, want_final, heading):
    inputs = draw(9, dtype=dtype)
    tensors = [None if k in absent else inputs[k].requires_grad_() for k in NAMES]
    options = True, 1, heading, 1e-5, 4, False, want_final, True
    torch.library.opcheck(torch.ops.patchscale.mix_tokens.default, (*tensors, *options))


class Seen(TorchDispatchMode):
    """Names of all operators that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reverse", [False, True])
def test_whoever_looks_on_sees_one_operator_with_the_same_result(reverse):
    options = {"reverse": reverse, "suffix": 1, "heading": True}
    alone = mixed(draw(150), **options)
    with Seen() as seen:
        watched = mixed(draw(150), **options)
    operators = {f"patchscale.{name}.default" for name in ("mix_tokens", "mix_tokens_backward")}
    assert operators <= seen.names
    assert not {"aten.bmm.out", "aten.cumsum.default"} & seen.names
    for name, value in watched.items():
        assert torch.equal(value, alone[name]), name


def test_gradients_cannot_be_differentiated_again():
    inputs = {k: v.requires_grad_() for k, v in draw(70).items()}
    out, _ = mix_tokens(**inputs)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs["projected"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_compiled_whole(assert_near):
    inputs = draw(70)
    compiled = torch.compile(mix_tokens, fullgraph=True, backend="aot_eager")
    options = {"reverse": True, "suffix": 1, "heading": True}
    expected = mixed(inputs, **options)
    actual = mix_and_gradients(compiled, inputs, **options, final_state=True)
    for name, value in actual.items():
        assert_near(value, expected[name], 1e-12, name)


def test_flop_counter_sees_what_the_scan_costs():
    inputs = {k: v.requires_grad_() for k, v in draw(192, heads=4, headdim=8, d_state=16).items()}
    with FlopCounterMode(display=False) as forward:
        out, _ = mix_tokens(**inputs)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    tokens, products, inside, states = 2 * 192, 64 * 16, 64 * 32, 32 * 16
    assert forward.get_total_flops() == 2 * tokens * (products + inside + 2 * states)
    assert backward.get_total_flops() == 2 * tokens * (3 * products + 2 * inside + 4 * states)


def test_flop_counter_sees_the_heading_token():
    inputs = {k: v.requires_grad_() for k, v in draw(193, heads=4, headdim=8, d_state=16).items()}
    with FlopCounterMode(display=False) as forward:
        out, _ = mix_tokens(**inputs, heading=True)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    pairs, states = 2 * (128 * 64 + 65 * 65), 2 * 193 * 32 * 16
    products, inside = pairs * 16, pairs * 32
    assert forward.get_total_flops() == 2 * (products + inside + 2 * states)
    assert backward.get_total_flops() == 2 * (3 * products + 2 * inside + 4 * states)


@pytest.mark.parametrize("shape", [(0, 9), (2, 0)])
def test_empty_in_empty_out(shape):
    inputs = {k: v for k, v in draw(9).items() if k not in ("history", "initial_state")}
    out, state = mix_tokens(**inputs | {"projected": torch.zeros(*shape, 39, dtype=torch.float64)}, final_state=True)
    assert out.shape == (*shape, 12)
    assert state.shape == (shape[0], 3, 4, 6)
    assert not state.any()


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("projected", (2, 9, 38), "38 channels"),
        ("projected", (2, 39), "(batch, length, channels)"),
        ("conv_weight", (25, 4), "conv_weight 25"),
        ("conv_weight", (24, 1, 4), "(channels, width)"),
        ("A", (), "(heads,)"),
        ("A", (0,), "A 0"),
        ("conv_bias", (1,), "(24,)"),
        ("dt_bias", (1,), "(3,)"),
        ("D", (4,), "(3,)"),
        ("norm_weight", (13,), "norm_weight 13"),
        ("history", (2, 4, 24), "(2, 3, 24)"),
        ("initial_state", (2, 3, 6, 4), "(2, 3, 4, 6)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, shape, words):
    inputs = draw(9) | {name: torch.zeros(shape, dtype=torch.float64)}
    with pytest.raises(UserError) as error:
        mix_tokens(**inputs)
    assert name in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"suffix": 10}, "suffix is 10"),
        ({"suffix": -1}, "suffix is -1"),
        ({"suffix": 9, "heading": True}, "suffix is 9, expected 0 to the length, less the heading token, 8"),
        ({"implementation": "cuda!"}, "'cuda!'"),
    ],
)
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(UserError, match=words):
        mix_tokens(**draw(9), **options)


def test_no_heading_token_to_be_had():
    with pytest.raises(UserError, match="no tokens"):
        mix_tokens(**draw(0), heading=True)


def test_tangents_are_refused():
    inputs = draw(9)
    with pytest.raises(UserError, match="mix_tokens has no forward-mode derivative"):
        torch.func.jvp(lambda p: mix_tokens(**inputs | {"projected": p})[0], *2 * ((inputs["projected"],),))


def test_a_default_device_is_not_where_the_plan_lies():
    inputs = draw(73)
    expected, _ = mix_tokens(**inputs)
    chunks.plan.cache_clear()
    with torch.device("meta"):
        assert torch.equal(mix_tokens(**inputs)[0], expected)
