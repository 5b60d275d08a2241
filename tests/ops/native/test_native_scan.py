"""The scan in C++ against its definition, token by token, in float64."""

import pytest
import torch
from torch import Tensor

from patchscale import UserError
from patchscale.ops import causal_conv1d, ssd_scan
from patchscale.ops.reference import ssd_scan_reference


def draw(
    length: int, *, batch: int = 2, heads: int = 4, headdim: int = 16, d_state: int = 16, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": normal(batch, length, heads, headdim),
        "dt": 0.3 * torch.rand(batch, length, heads, generator=generator),
        "A": -torch.rand(heads, generator=generator),
        "B": normal(batch, length, d_state),
        "C": normal(batch, length, d_state),
        "D": normal(heads),
        "initial_state": normal(batch, heads, headdim, d_state),
    }


def and_gradients(scan, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    values = scan(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    grad_outputs = [torch.randn(v.shape, generator=generator).to(v.dtype) for v in values]
    gradients = torch.autograd.grad(values, list(leaves.values()), grad_outputs)
    names = ("y", "final_state", *(f"grad of {k}" for k in leaves))
    return dict(zip(names, (*values, *gradients), strict=True))


def native(**inputs):
    return ssd_scan(**inputs, implementation="native")


def check(assert_near, inputs, expected=None, **options) -> None:
    if expected is None:
        given = {k: v for k, v in options.items() if k != "chunk_size"}
        expected = and_gradients(ssd_scan_reference, {k: v.double() for k, v in inputs.items()}, **given)
    for name, value in and_gradients(native, inputs, **options).items():
        assert_near(value, expected[name], 1e-4 if name == "grad of A" else 1e-5, name)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 196, 197, 577])
def test_values_and_gradients(length, reverse, ran, assert_near):
    for batch, suffix in ((1, 3), (3, 1)):
        check(assert_near, draw(length, batch=batch, seed=length), reverse=reverse, suffix=min(suffix, length))
    assert ran == 2 * [False, True]


# Too long for gradients of a loop over tokens: against plain PyTorch in float64, which is tested against that loop.
@pytest.mark.parametrize("length", [3136, pytest.param(50176, marks=pytest.mark.slow)])
def test_long_sequences(length, ran, assert_near):
    inputs = draw(length, batch=1)
    options = {"reverse": True, "suffix": 1}
    exact = {k: v.double() for k, v in inputs.items()}
    check(assert_near, inputs, and_gradients(ssd_scan, exact, **options), **options)
    assert ran == [False, True]


def strongly_decaying(steps: Tensor) -> dict[str, Tensor]:
    inputs = draw(steps.shape[0]) | {"A": -torch.tensor([1.0, 0.5, 0.01, 2.0])}
    return inputs | {"dt": steps[None, :, None].expand_as(inputs["dt"]).clone()}


# Over a chunk these sum to log-decays of -83 (whose exponential is hardly a normal number), -118 (the strongest that
# are cut into factors), and -192 and more, where exp(cs_t) / exp(cs_s) would be 0 / 0, or overflow.
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("step", [1.3, 1.85, 3.0, 30.0, 300.0])
def test_strong_decay(step, reverse, ran, assert_near):
    inputs = strongly_decaying(torch.full((150,), step))
    options = {"reverse": reverse, "suffix": 1}
    expected = and_gradients(ssd_scan_reference, {k: v.double() for k, v in inputs.items()}, **options)
    result = and_gradients(native, inputs, **options)
    assert result.pop("grad of A").isfinite().all()
    for name, value in result.items():
        assert_near(value, expected[name], 1e-5, name, zero=1e-30)
    assert ran == [False, True]


@pytest.mark.parametrize("reverse", [False, True])
def test_steps_of_zero_between_strong_decays(reverse, assert_near):
    # Looser: float32 keeps differences of running sums near -3000 to 2e-4 only.
    inputs = strongly_decaying(torch.tensor([0.0, 100.0, 0.01, 0.0])[torch.arange(150) % 4])
    expected = and_gradients(ssd_scan_reference, {k: v.double() for k, v in inputs.items()}, reverse=reverse)
    result = and_gradients(native, inputs, reverse=reverse)
    gradient_of_A = result.pop("grad of A")
    for name, value in result.items():
        assert_near(value, expected[name], 1e-4, name)
    terms = (inputs["dt"] * expected["grad of dt"]).abs().sum()
    assert (gradient_of_A - expected["grad of A"]).abs().max() <= 1e-4 * terms


@pytest.mark.parametrize("chunk_size", [1, 5, 16, 100, 256])
def test_chunk_sizes(chunk_size, threads, ran, assert_near):
    check(assert_near, draw(200), reverse=True, suffix=1, chunk_size=chunk_size)
    assert ran == [False, True]


@pytest.mark.parametrize("absent", ["D", "initial_state"])
def test_without_the_skip_or_an_initial_state(absent, assert_near):
    check(assert_near, {k: v for k, v in draw(130).items() if k != absent}, reverse=True)


def test_non_contiguous_inputs(assert_near):
    inputs = draw(70)
    strided = {k: torch.stack([v, v * 0 + torch.nan], dim=-1)[..., 0].requires_grad_() for k, v in inputs.items()}
    y, state = native(**strided)
    expected, expected_state = ssd_scan_reference(**{k: v.double() for k, v in inputs.items()})
    assert_near(y, expected, 1e-5)
    assert_near(state, expected_state, 1e-5)
    (y.sum() + state.sum()).backward()
    leaves = {k: v.double().requires_grad_() for k, v in inputs.items()}
    sum(t.sum() for t in ssd_scan_reference(**leaves)).backward()
    assert_near(strided["x"].grad, leaves["x"].grad, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_convolution_alone_is_plain(dtype):
    x, weight = torch.randn(2, 9, 5).to(dtype), torch.randn(5, 4)
    found, expected = (causal_conv1d(x, weight, weight[:, 0], implementation=name) for name in ("native", "torch"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_named(dtype):
    inputs = draw(5) | {"x": torch.zeros(2, 5, 4, 16, dtype=dtype)}
    with pytest.raises(UserError, match=f"float32 here, not {str(dtype).removeprefix('torch.')}"):
        native(**inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_B_and_C_of_another_precision(dtype, assert_near):
    inputs = draw(130)
    found = and_gradients(native, inputs | {k: inputs[k].to(dtype) for k in "BC"})
    assert found["grad of B"].dtype == dtype
    rounded = inputs | {k: inputs[k].to(dtype).double() for k in "BC"}
    expected = and_gradients(ssd_scan_reference, {k: v.double() for k, v in rounded.items()})
    for name, value in found.items():
        tolerance = 1e-4 if name == "grad of A" else 1e-5
        assert_near(value, expected[name], 5e-3 if value.dtype == torch.bfloat16 else tolerance, name)


def test_one_head_whose_steps_lie_apart():
    inputs = draw(130, heads=1, headdim=64)
    inputs["dt"] = torch.empty(*inputs["dt"].shape[:1], 1, 130).transpose(1, 2).copy_(inputs["dt"])
    assert inputs["dt"].stride(2) == 130
    y, state = native(**inputs)
    expected, expected_state = native(**inputs | {"dt": inputs["dt"].clone(memory_format=torch.contiguous_format)})
    assert torch.equal(y, expected)
    assert torch.equal(state, expected_state)


# See test_scan.py.
@pytest.mark.parametrize(("step", "rate", "others"), [(3.0, 16.0, 0.05), (20.0, 5.0, 0.001), (100.0, 1.0, 0.001)])
def test_gradient_of_A_where_one_token_decays_strongly(step, rate, others, assert_near):
    inputs = draw(197)
    inputs["dt"] = torch.full_like(inputs["dt"], others)
    inputs["dt"][:, 70] = step
    inputs["A"] = torch.full_like(inputs["A"], -rate)
    expected = and_gradients(ssd_scan_reference, {k: v.double() for k, v in inputs.items()})
    for name, value in and_gradients(native, inputs).items():
        assert_near(value, expected[name], 1e-5, name)
