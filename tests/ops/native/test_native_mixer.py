"""The mixer in C++ against its definition, token by token, in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchscale import UserError
from patchscale.ops import mix_tokens
from patchscale.ops.reference import mix_tokens_reference

# One number a head, summed over all tokens from terms of either sign: what is left when they cancel has fewer digits.
SUMS = ("grad of A", "grad of dt_bias")
LENGTHS = (1, 2, 3, 63, 64, 65, 95, 96, 197)


def draw(
    length: int, *, batch: int = 2, heads: int = 4, headdim: int = 16, d_state: int = 16, width: int = 4, seed: int = 0
) -> dict[str, Tensor]:
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
    inputs = {k: torch.randn(s, generator=generator) for k, s in shapes.items()}
    inputs["dt_bias"] -= 2
    inputs["A"] = -inputs["A"].sigmoid()
    return {k: v for k, v in inputs.items() if v.numel() or k == "projected"}


def native(**inputs):
    return mix_tokens(**inputs, implementation="native", final_state=True)


def and_gradients(operator, inputs: dict[str, Tensor], outputs=("out", "final_state"), **options) -> dict[str, Tensor]:
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    values = operator(**leaves, **options)[: len(outputs)]
    generator = torch.Generator().manual_seed(1)
    grad_outputs = [torch.randn(v.shape, generator=generator).to(v.dtype) for v in values]
    gradients = torch.autograd.grad(values, list(leaves.values()), grad_outputs)
    return dict(zip(outputs, values, strict=True)) | {f"grad of {k}": g for k, g in zip(leaves, gradients, strict=True)}


def truth(inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    return and_gradients(mix_tokens_reference, {k: v.double() for k, v in inputs.items()}, **options)


def check(assert_near, inputs, tolerance=1e-5, tolerance_of_sums=1e-4, **options) -> None:
    expected = truth(inputs, **options)
    for name, value in and_gradients(native, inputs, **options).items():
        assert_near(value, expected[name], tolerance_of_sums if name in SUMS else tolerance, name)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients(length, reverse, threads, ran, assert_near):
    for batch, suffix in ((1, 3), (3, 1), (2, 0)):
        inputs = draw(length, batch=batch, seed=length)
        check(assert_near, inputs, reverse=reverse, suffix=min(suffix, length))
    assert set(ran) == {False, True}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 65, 66, 198])
def test_heading_token(length, reverse, threads, ran, assert_near):
    for batch, suffix in ((1, 3), (3, 1), (2, 0)):
        inputs = draw(length, batch=batch, seed=length)
        inputs["A"][0] = -30.0
        if batch == 2:
            del inputs["history"], inputs["initial_state"]
        check(assert_near, inputs, reverse=reverse, suffix=min(suffix, length - 1), heading=True)
    assert set(ran) == {False, True}


# The same numbers in float64 are the truth: what is left is the rounding of results.
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 65, 197])
def test_bfloat16_in_and_out(length, reverse, threads, ran, assert_near):
    inputs = {k: v.bfloat16() if k in ("projected", "history") else v for k, v in draw(length).items()}
    options = {"reverse": reverse, "suffix": 1 if length > 1 else 0, "heading": True}
    found, expected = and_gradients(native, inputs, **options), truth(inputs, **options)
    for name, value in found.items():
        assert_near(value, expected[name], 1e-2, name)
        leaf = name.removeprefix("grad of ")
        assert value.dtype == (torch.bfloat16 if leaf in ("out", "projected", "history") else torch.float32)
    assert ran == [False, True]


def test_sums_over_many_tokens_keep_their_digits(assert_near):
    inputs = draw(50176, batch=1, heads=1, headdim=64)
    found = and_gradients(native, inputs)
    expected = and_gradients(mix_tokens, {k: v.double() for k, v in inputs.items()}, final_state=True)
    summed_by_channel = ("grad of conv_weight", "grad of conv_bias", "grad of norm_weight")
    for name, value in found.items():
        of_one_number = name in (*SUMS, "grad of D")
        assert_near(value, expected[name], 1e-6 if name in summed_by_channel else 1e-4 if of_one_number else 1e-5, name)


@pytest.mark.parametrize("length", [577, pytest.param(3136, marks=pytest.mark.slow)])
def test_long_sequences(length, ran, assert_near):
    check(assert_near, draw(length, batch=1), reverse=True, suffix=1)
    assert ran == [False, True]


# Panels of one head, of two and of four; the widths that models have, and states of other sizes than chunks.
@pytest.mark.parametrize(
    ("heads", "headdim", "d_state"), [(1, 64, 64), (9, 64, 16), (17, 64, 64), (6, 32, 48), (12, 16, 128)]
)
def test_sizes(heads, headdim, d_state, threads, ran, assert_near):
    check(assert_near, draw(130, batch=1, heads=heads, headdim=headdim, d_state=d_state), reverse=True, suffix=2)
    assert ran == [False, True]


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("reverse", [False, True])
def test_without_history_or_initial_state(reverse, width, ran, assert_near):
    inputs = draw(70, width=width)
    for absent in ((), ("history",), ("initial_state",), ("history", "initial_state")):
        check(assert_near, {k: v for k, v in inputs.items() if k not in absent}, reverse=reverse, suffix=1)
    assert ran == 4 * [False, True]


@pytest.mark.parametrize("length", [1, 50, 130])
def test_without_the_final_state(length, ran, assert_near):
    for absent in (("history", "initial_state"), ()):
        inputs = {k: v for k, v in draw(length).items() if k not in absent}
        found, expected = (
            and_gradients(lambda f=f, **given: f(**given, reverse=True, suffix=1), tensors, outputs=("out",))
            for f, tensors in (
                (lambda **given: mix_tokens(**given, implementation="native"), inputs),
                (mix_tokens_reference, {k: v.double() for k, v in inputs.items()}),
            )
        )
        for name, value in found.items():
            assert_near(value, expected[name], 1e-4 if name in SUMS else 1e-5, name)
    assert ran == 2 * [False, True]


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_alone(used, ran, assert_near):
    inputs = draw(70)
    gradients = []
    for mix, dtype in ((native, torch.float32), (mix_tokens_reference, torch.float64)):
        leaves = {k: v.to(dtype, copy=True).requires_grad_() for k, v in inputs.items()}
        mix(**leaves, reverse=True, suffix=1)[used].pow(2).sum().backward()
        gradients.append({k: v.grad for k, v in leaves.items() if v.grad is not None})
    for name, actual in gradients[0].items():
        expected = gradients[1].get(name, torch.zeros_like(actual))
        assert_near(actual, expected, 1e-4 if f"grad of {name}" in SUMS else 1e-5, name)
    assert ran == [False, True]


# Steps of 0.001 to 30 a token: heads within a chunk's factors, beyond them, and both side by side.
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("headdim", [16, 32, 64])
@pytest.mark.parametrize("rates", [[0.001] * 4, [0.9, 1.0, 1.1, 0.1], [0.01, 1.0, 30.0, 0.1], [30.0] * 4])
def test_strong_and_weak_decay(rates, headdim, reverse, threads, ran, assert_near):
    inputs = draw(197, headdim=headdim, batch=1)
    inputs["A"] = -torch.tensor(rates)
    inputs["dt_bias"] = torch.full((4,), 1.0)
    check(assert_near, inputs, reverse=reverse, suffix=1)
    assert ran == [False, True]


@pytest.mark.parametrize("absent", [(), ("history", "initial_state")])
@pytest.mark.parametrize("length", [1, 2, 65, 95, 130])
def test_strong_decay_without_states(length, absent, assert_near):
    inputs = {k: v for k, v in draw(length).items() if k not in absent}
    inputs["A"] = -torch.tensor([0.01, 1.0, 30.0, 0.1])
    found, expected = (
        and_gradients(lambda f=f, **given: f(**given, reverse=True), tensors, outputs=("out",))
        for f, tensors in (
            (lambda **given: mix_tokens(**given, implementation="native"), inputs),
            (mix_tokens_reference, {k: v.double() for k, v in inputs.items()}),
        )
    )
    for name, value in found.items():
        assert_near(value, expected[name], 1e-4 if name in SUMS else 1e-5, name)


# A state that decays to less than a normal number on its way from one chunk's middle to the next one's.
def test_states_that_vanish(ran, assert_near):
    inputs = draw(256)
    inputs["A"] = torch.full((4,), -1.0)
    inputs["projected"][..., -4:] = 0
    inputs["dt_bias"] = torch.full((4,), 1.6)  # log-decays of -114 in a chunk
    check(assert_near, inputs)
    assert ran == [False, True]


@settings(deadline=None, max_examples=25, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 150), st.data(), st.booleans())
def test_two_halves_with_state_and_history_passed_on_are_one(assert_near, length, data, reverse):
    cut = data.draw(st.integers(1, length - 1))
    inputs = draw(length)
    expected, expected_state = native(**inputs, reverse=reverse)
    first, second = slice(cut), slice(cut, None)
    if reverse:
        first, second = second, first
    y_first, state = native(**inputs | {"projected": inputs["projected"][:, first]}, reverse=reverse)
    met = inputs["projected"][:, first, 64:160]
    met = torch.cat([inputs["history"], met.flip(1) if reverse else met], 1)[:, -3:]
    rest = {"projected": inputs["projected"][:, second], "history": met, "initial_state": state}
    y_second, state = native(**inputs | rest, reverse=reverse)
    assert_near(torch.cat([y_second, y_first] if reverse else [y_first, y_second], 1), expected, 1e-5)
    assert_near(state, expected_state, 1e-5)


# Samples are taken as many at a time as there are threads, or more.
def test_samples_of_a_batch_do_not_mix(threads, ran, assert_near):
    check(assert_near, draw(70, batch=5), reverse=True, suffix=1)
    assert ran == [False, True]


@pytest.mark.parametrize("heading", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [2, 65, 150])
def test_every_element_is_written(length, reverse, heading, threads):
    torch.use_deterministic_algorithms(True)  # fills what torch leaves uninitialised with NaN
    try:
        assert torch.empty(3).isnan().all()
        given = draw(length)
        given["A"][0] = -30.0
        options = {"reverse": reverse, "suffix": 1, "heading": heading}
        result = and_gradients(native, given, **options)
        leaves = {k: v.requires_grad_() for k, v in draw(length).items() if k != "initial_state"}
        mix_tokens(**leaves, **options, implementation="native")[0].sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in (result | {k: v.grad for k, v in leaves.items()}).items():
        assert value.isfinite().all(), name


def test_equal_runs_give_equal_bits(threads):
    inputs = draw(150, batch=3)
    first, second = (and_gradients(native, inputs, reverse=True, suffix=1) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("reverse", [False, True])
def test_non_contiguous_inputs(reverse, assert_near):
    inputs = draw(70)
    expected = and_gradients(native, inputs, reverse=reverse)
    strided = {k: torch.stack([v, v * 0 + torch.nan], dim=-1)[..., 0].requires_grad_() for k, v in inputs.items()}
    out, state = native(**strided, reverse=reverse)
    assert_near(out, expected["out"], 1e-6)
    assert_near(state, expected["final_state"], 1e-6)
    # A gradient that is expanded, not materialised
    found = torch.autograd.grad(out.sum(), strided["projected"])
    leaf = inputs["projected"].requires_grad_()
    wanted = torch.autograd.grad(mix_tokens_reference(**inputs, reverse=reverse)[0].sum(), leaf)
    assert_near(found[0], wanted[0], 1e-5)


def test_not_a_number_stays_one():
    inputs = draw(256, batch=1)
    inputs["projected"][0, 150, 70] = torch.nan
    out, _ = native(**inputs)
    assert out[0, :128].isfinite().all()  # the chunks before
    assert out[0, 150:].isnan().any(1).all()


@pytest.mark.parametrize("shape", [(0, 9), (2, 0)])
def test_empty_in_empty_out(shape):
    inputs = {k: v.requires_grad_() for k, v in draw(9).items() if k not in ("history", "initial_state")}
    inputs["projected"] = torch.zeros(*shape, 164, requires_grad=True)
    out, state = native(**inputs)
    assert out.shape == (*shape, 64)
    assert not state.any()
    (out.sum() + state.sum()).backward()
    assert not inputs["A"].grad.any()


def test_compiled_whole(assert_near):
    inputs = draw(70)
    compiled = torch.compile(native, fullgraph=True, backend="aot_eager")
    expected = and_gradients(native, inputs, reverse=True, suffix=1)
    for name, value in and_gradients(compiled, inputs, reverse=True, suffix=1).items():
        assert_near(value, expected[name], 1e-6, name)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"headdim": 8, "heads": 8}, "8 of 8"),
        ({"heads": 3}, "3 of 16"),
        ({"d_state": 12}, "multiple of 16, not 12"),
        ({"width": 5}, "at most 4 tokens, not 5"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, words):
    with pytest.raises(UserError, match=words):
        native(**draw(9, **sizes))
    with pytest.raises(UserError, match="choose 'torch'"):
        native(**draw(9, **sizes))


@pytest.mark.parametrize("want_final", [True, False])
@pytest.mark.parametrize("heading", [True, False])
def test_custom_op_keeps_pytorchs_rules(want_final, heading):
    tensors = [tensor.requires_grad_() for tensor in draw(9).values()]
    arguments = (*tensors, True, 1, heading, 1e-5, 4, True, want_final, True)
    torch.library.opcheck(torch.ops.patchscale.mix_tokens.default, arguments)


def test_a_default_device_is_not_where_the_kernels_work():
    inputs = draw(70)
    expected, _ = mix_tokens(**inputs, implementation="native")
    with torch.device("meta"):
        assert torch.equal(mix_tokens(**inputs, implementation="native")[0], expected)


def test_without_tokens_history_has_no_gradient():
    inputs = {k: v.requires_grad_() for k, v in draw(9).items()}
    torch.use_deterministic_algorithms(True)  # what is not written is NaN
    try:
        out, state = native(**inputs | {"projected": inputs["projected"][:, :0]})
        (out.sum() + state.sum()).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not inputs["history"].grad.any()
