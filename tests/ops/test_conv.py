"""The causal convolution against F.conv1d and against its definition."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchscale import UserError
from patchscale.ops import causal_conv1d
from patchscale.ops.reference import causal_conv1d_reference

property_test = settings(deadline=None, max_examples=30, database=None)


def draw(
    length: int, *, batch: int = 2, channels: int = 5, width: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "history": (batch, width - 1, channels),
    }
    inputs = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
    return {
        k: v.to(dtype if k in ("x", "history") else torch.promote_types(dtype, torch.float32))
        for k, v in inputs.items()
    }


def convolve_and_gradients(convolve, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    out = convolve(**leaves, **options)
    grad_output = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # Rounded to bfloat16 for every dtype, so that a reference in float64 starts from the same numbers.
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_output.bfloat16().to(out.dtype))
    return {"out": out} | {f"grad of {k}": g for k, g in zip(leaves, gradients, strict=True)}


def library_conv(x: Tensor, weight: Tensor, bias: Tensor, history: Tensor | None = None) -> Tensor:
    """PyTorch's own depthwise convolution over the history and the tokens, left to right."""
    reach = weight.shape[1] - 1
    before = x.new_zeros(x.shape[0], reach, x.shape[2]) if history is None else history
    window = torch.cat([before, x], dim=1).transpose(1, 2)
    return F.silu(F.conv1d(window, weight[:, None], bias, groups=weight.shape[0])).transpose(1, 2)


@pytest.mark.parametrize("with_history", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 20])
def test_reference_is_pytorchs_convolution(length, width, with_history, assert_near):
    inputs = {k: v for k, v in draw(length, width=width).items() if k != "history" or (with_history and width > 1)}
    expected = convolve_and_gradients(library_conv, inputs)
    for name, value in convolve_and_gradients(causal_conv1d_reference, inputs).items():
        assert_near(value, expected[name], 1e-12, name)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 63, 64, 65, 197])
def test_values_and_gradients(length, reverse, dtype, tolerance, assert_near):
    for batch, suffix in ((1, 0), (3, 1), (3, 3)):
        inputs = draw(length, batch=batch, dtype=dtype, seed=length)
        options = {"reverse": reverse, "suffix": min(suffix, length)}
        expected = convolve_and_gradients(
            causal_conv1d_reference, {k: v.double() for k, v in inputs.items()}, **options
        )
        for name, value in convolve_and_gradients(causal_conv1d, inputs, **options).items():
            assert_near(value, expected[name], tolerance, name)


# The convolution walks in blocks of tokens, or of samples, that fit the cache: no block's edge may show.
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("block_elements", [5 * 20, 5 * 150, 5 * 100 * 2])
def test_sequences_are_convolved_whole(block_elements, reverse, monkeypatch, assert_near):
    def flipped_library_conv(x, **others):
        return library_conv(x.flip(1), **others).flip(1)

    monkeypatch.setattr("patchscale.ops.conv._BLOCK_ELEMENTS", block_elements)
    inputs = draw(100, batch=3)
    expected = convolve_and_gradients(flipped_library_conv if reverse else library_conv, inputs)
    for name, value in convolve_and_gradients(causal_conv1d, inputs, reverse=reverse).items():
        assert_near(value, expected[name], 1e-12, name)


def test_gradients_are_finite_differences():
    inputs = draw(6, channels=2, width=3)

    def convolve(*tensors):
        return causal_conv1d(**dict(zip(inputs, tensors, strict=True)), reverse=True, suffix=1, implementation="torch")

    assert torch.autograd.gradcheck(convolve, [t.requires_grad_() for t in inputs.values()])


@pytest.mark.parametrize("reverse", [False, True])
def test_no_history_is_a_history_of_zeros(reverse, assert_near):
    inputs = draw(7)
    zeros = inputs | {"history": torch.zeros_like(inputs["history"])}
    del inputs["history"]
    expected = convolve_and_gradients(causal_conv1d, zeros, reverse=reverse, suffix=1)
    for name, value in convolve_and_gradients(causal_conv1d, inputs, reverse=reverse, suffix=1).items():
        assert_near(value, expected[name], 1e-12, name)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("later", [1, 5, 8])
def test_causal(later, reverse):
    inputs = draw(9)
    order = list(reversed(range(9))) if reverse else list(range(9))
    changed = inputs["x"].clone()
    changed[:, order[later]] += 1
    before, after = (causal_conv1d(**inputs | {"x": x}, reverse=reverse) for x in (inputs["x"], changed))
    same = (before == after).flatten(2).all(2).all(0)[order]
    assert same.tolist() == [not later <= t < later + 4 for t in range(9)]


# Short sequences and long ones go two ways through the operator.
lengths = st.integers(1, 12) | st.integers(30, 50)


@property_test
@given(lengths, st.integers(0, 6) | st.integers(25, 50), st.integers(1, 5))
def test_reverse_is_flip_convolve_flip(assert_near, length, suffix, width):
    suffix = min(suffix, length)
    inputs = draw(length, width=width)

    def turn(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:, : length - suffix].flip(1), tensor[:, length - suffix :]], dim=1)

    expected = turn(library_conv(**inputs | {"x": turn(inputs["x"])}))
    assert_near(causal_conv1d(**inputs, reverse=True, suffix=suffix), expected, 1e-12)


@property_test
@given(lengths.filter(lambda n: n > 1), st.data())
def test_two_halves_with_the_history_passed_on_are_one(assert_near, length, data):
    cut = data.draw(st.integers(1, length - 1))
    inputs = draw(length)
    first, second = inputs["x"][:, :cut], inputs["x"][:, cut:]
    seen = torch.cat([inputs["history"], first], dim=1)[:, -3:]
    parts = [
        causal_conv1d(**inputs | {"x": first}),
        causal_conv1d(**inputs | {"x": second, "history": seen}),
    ]
    assert_near(torch.cat(parts, dim=1), causal_conv1d(**inputs), 1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_non_contiguous_inputs(reverse, assert_near):
    inputs = draw(9, channels=6)
    expected = convolve_and_gradients(causal_conv1d, inputs, reverse=reverse, suffix=1)
    wide = torch.cat([torch.full_like(inputs["x"], torch.nan), inputs["x"]], dim=-1)
    strided = inputs | {
        "x": wide[..., 6:],
        "weight": inputs["weight"].t().contiguous().t(),
        "history": inputs["history"].permute(2, 1, 0).contiguous().permute(2, 1, 0),
    }
    leaves = {k: v.requires_grad_() for k, v in strided.items()}
    out = causal_conv1d(**leaves, reverse=reverse, suffix=1)
    assert_near(out, expected["out"], 1e-12)
    # An expanded gradient, not a materialised one.
    expected_sum = causal_conv1d_reference(
        **{k: v.requires_grad_() for k, v in inputs.items()}, reverse=reverse, suffix=1
    )
    wanted = torch.autograd.grad(expected_sum.sum(), [inputs[k] for k in leaves])
    for name, actual, value in zip(leaves, torch.autograd.grad(out.sum(), list(leaves.values())), wanted, strict=True):
        assert_near(actual, value, 1e-10, name)


@pytest.mark.parametrize("length", [50, 200])  # from 128 rows on in oneDNN
def test_bfloat16_is_summed_in_float32(length, assert_near):
    inputs = draw(length, dtype=torch.bfloat16)
    exact = causal_conv1d_reference(**{k: v.double() for k, v in inputs.items()})
    with torch.autocast("cpu", torch.bfloat16):
        out = causal_conv1d(**inputs)
    assert out.dtype == torch.bfloat16
    # No further from the truth than one rounding of it.
    assert_near(out, exact, 1.05 * ((exact.bfloat16() - exact).norm() / exact.norm()).item())


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_every_element_is_written(length, reverse):
    torch.use_deterministic_algorithms(True)  # fills what torch leaves uninitialised with NaN
    try:
        assert torch.empty(3).isnan().all()
        result = convolve_and_gradients(causal_conv1d, draw(length), reverse=reverse, suffix=1)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in result.items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
def test_custom_op_keeps_pytorchs_rules(dtype, reverse):
    inputs = draw(9, dtype=dtype)
    tensors = [t.requires_grad_() for t in inputs.values()]
    torch.library.opcheck(torch.ops.patchscale.causal_conv1d.default, (*tensors, reverse, 1))


def test_compiled_whole(assert_near):
    inputs = draw(20)
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")
    expected = convolve_and_gradients(causal_conv1d_reference, inputs, reverse=True, suffix=1)
    for name, value in convolve_and_gradients(compiled, inputs, reverse=True, suffix=1).items():
        assert_near(value, expected[name], 1e-12, name)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("x", (2, 9, 4), "(batch, length, 5)"),
        ("x", (2, 5), "(batch, length, 5)"),
        ("history", (2, 4, 5), "(2, 3, 5)"),
        ("history", (1, 3, 5), "(2, 3, 5)"),
        ("bias", (1,), "(5,)"),
        ("bias", (4,), "(5,)"),
        ("weight", (5, 1, 4), "(channels, width)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, shape, expected):
    inputs = draw(9) | {name: torch.zeros(shape, dtype=torch.float64)}
    with pytest.raises(UserError) as error:
        causal_conv1d(**inputs)
    message = str(error.value)
    assert message.startswith(f"{name} has shape {shape}")
    assert expected in message


@pytest.mark.parametrize(
    ("options", "words"),
    [({"suffix": 10}, "suffix is 10"), ({"suffix": -1}, "suffix is -1"), ({"implementation": "cuda!"}, "'cuda!'")],
)
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(UserError, match=words):
        causal_conv1d(**draw(9), **options)


@pytest.mark.parametrize("shape", [(0, 9, 5), (0, 90, 5), (2, 0, 5)])
def test_empty_in_empty_out(shape):
    inputs = draw(9)
    del inputs["history"]
    assert causal_conv1d(**inputs | {"x": torch.zeros(shape, dtype=torch.float64)}).shape == shape


def test_float32_stays_so_under_autocast(assert_near):
    inputs = draw(200, dtype=torch.float32)
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = causal_conv1d(**leaves)
        out.square().sum().backward()
    causal_conv1d_reference(**exact).square().sum().backward()
    for name, leaf in leaves.items():
        assert_near(leaf.grad, exact[name].grad, 1e-5, name)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_no_tokens(implementation):
    inputs = draw(9) | {"x": torch.zeros(2, 0, 5, dtype=torch.float64)}
    del inputs["history"]
    assert causal_conv1d(**inputs, implementation=implementation).shape == (2, 0, 5)


def test_tangents_are_refused():
    inputs = draw(9)
    with pytest.raises(UserError, match="causal_conv1d has no forward-mode derivative"):
        torch.func.jvp(lambda x: causal_conv1d(**inputs | {"x": x}), (inputs["x"],), (inputs["x"],))
