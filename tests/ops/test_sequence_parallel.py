"""What one slice tells the others, against the recurrence token by token; no processes are started here."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchscale.ops.reference import causal_conv1d_reference, ssd_scan_reference
from patchscale.ops.sequence_parallel import compose, decay_and_state, states_between

HEADS, HEADDIM, D_STATE = 3, 4, 5
D_INNER = HEADS * HEADDIM
CONV_DIM = D_INNER + 2 * D_STATE
SHAPES = {
    "history": (2, 3, CONV_DIM),
    "conv_weight": (CONV_DIM, 4),
    "conv_bias": (CONV_DIM,),
    "dt_bias": (HEADS,),
    "A": (HEADS,),
}


def draw(length: int, dtype: torch.dtype, strength: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = {"projected": (2, length, CONV_DIM + HEADS)} | SHAPES
    inputs = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
    inputs["A"] = -strength * inputs["A"].exp()
    return {k: v.to(dtype).requires_grad_() for k, v in inputs.items()}


def truth(inputs: dict[str, Tensor], state: Tensor, reverse: bool) -> Tensor:
    """The state after the slice, from the state before it."""
    xBC, dt = inputs["projected"].split([CONV_DIM, HEADS], dim=-1)
    xBC = causal_conv1d_reference(xBC, inputs["conv_weight"], inputs["conv_bias"], inputs["history"], reverse)
    x, B, C = xBC.split([D_INNER, D_STATE, D_STATE], dim=-1)
    x, dt = x.unflatten(-1, (HEADS, HEADDIM)), F.softplus(dt + inputs["dt_bias"])
    return ssd_scan_reference(x, dt, inputs["A"], B, C, initial_state=state, reverse=reverse)[1]


def ours(inputs: dict[str, Tensor], state: Tensor, reverse: bool, size: int) -> Tensor:
    blocks = inputs["projected"].split(size, dim=1)
    others = {k: v for k, v in inputs.items() if k != "projected"}
    decay, written = decay_and_state(blocks[::-1] if reverse else blocks, **others, d_state=D_STATE, reverse=reverse)
    return decay * state + written


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("length", "size"), [(1, 4), (3, 4), (7, 2), (50, 16), (50, 64)])
def test_a_slice_decays_the_state_and_adds_what_it_writes(
    length, size, reverse, strength, dtype, tolerance, assert_near
):
    inputs = draw(length, dtype, strength)
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    state = torch.randn(2, HEADS, HEADDIM, D_STATE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    actual, expected = ours(inputs, state.to(dtype), reverse, size), truth(exact, state, reverse)
    assert actual.dtype == dtype
    assert_near(actual, expected, tolerance)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    actual_gradients = torch.autograd.grad(actual, list(inputs.values()), weight.to(dtype))
    expected_gradients = torch.autograd.grad(expected, list(exact.values()), weight)
    for name, gradient, truly in zip(inputs, actual_gradients, expected_gradients, strict=True):
        if truly.norm() > 1e-20:  # where all has decayed there is nothing to compare
            assert_near(gradient, truly, 20 * tolerance, name)


def test_bfloat16_is_summed_in_float32(assert_near):
    inputs = {k: v.detach() for k, v in draw(40, torch.float32, 0.01).items()}
    inputs["projected"] = inputs["projected"].bfloat16()
    state = torch.zeros(2, HEADS, HEADDIM, D_STATE)
    actual = ours(inputs, state, False, 16)
    assert actual.dtype == torch.float32
    assert_near(actual, truth({k: v.double() for k, v in inputs.items()}, state.double(), False), 1e-2)


def test_slices_compose_in_any_grouping(assert_near):
    generator = torch.Generator().manual_seed(0)
    decays = torch.rand(3, 2, HEADS, 1, 1, generator=generator, dtype=torch.float64)
    written = torch.randn(3, 2, HEADS, HEADDIM, D_STATE, generator=generator, dtype=torch.float64)
    a, b, c = zip(decays, written, strict=True)
    for left, right in zip(compose(compose(a, b), c), compose(a, compose(b, c)), strict=True):
        assert_near(left, right, 1e-15)

    state = torch.randn(2, HEADS, HEADDIM, D_STATE, generator=generator, dtype=torch.float64)
    states = states_between(state, decays, written)
    assert len(states) == 4
    for i in range(4):
        assert_near(states[i], state, 1e-14)
        if i < 3:
            state = decays[i] * state + written[i]
