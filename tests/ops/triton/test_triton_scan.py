"""The scan on Triton kernels against its definition, token by token, in float64."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from patchscale import UserError
from patchscale.ops.reference import ssd_scan_reference
from patchscale.ops.triton.scan import ssd_scan

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


def draw(
    length: int,
    *,
    batch: int = 1,
    heads: int = 2,
    headdim: int = 16,
    d_state: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": normal(batch, length, heads, headdim).to(dtype),
        "dt": 0.3 * torch.rand(batch, length, heads, generator=generator),
        "A": -normal(heads).exp().float(),
        "B": normal(batch, length, d_state).to(dtype),
        "C": normal(batch, length, d_state).to(dtype),
        "D": normal(heads).float(),
        "initial_state": normal(batch, heads, headdim, d_state).float(),
    }
    return {k: v.to(device) for k, v in inputs.items()}


def scan(*, reverse=False, suffix=0, want_final=True, **inputs):
    return ssd_scan(*(inputs.get(k) for k in NAMES), reverse, suffix, want_final)


def and_gradients(operator, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    outputs = operator(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    grad_outputs = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in outputs]
    grad_outputs = [g.bfloat16().to(t.device, t.dtype) for g, t in zip(grad_outputs, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grad_outputs)
    return {"y": outputs[0], "state": outputs[1]} | dict(zip(leaves, gradients, strict=True))


def check(assert_near, inputs: dict[str, Tensor], tolerance: float, **options) -> None:
    expected = and_gradients(ssd_scan_reference, {k: v.cpu().double() for k, v in inputs.items()}, **options)
    for name, value in and_gradients(scan, inputs, **options).items():
        assert_near(value.cpu(), expected[name], tolerance, name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("length", "suffix"), [(1, 0), (2, 1), (65, 3), (130, 0)])
def test_values_and_gradients(length, suffix, reverse, dtype, tolerance, device, assert_near):
    inputs = draw(length, dtype=dtype, device=device)
    check(assert_near, inputs, tolerance, reverse=reverse, suffix=suffix)


@pytest.mark.parametrize("absent", [("D",), ("initial_state",), ("D", "initial_state")])
def test_without_the_skip_or_an_initial_state(absent, device, assert_near):
    inputs = {k: v for k, v in draw(20, batch=2, heads=3, device=device).items() if k not in absent}
    check(assert_near, inputs, 1e-5, reverse=True)


def test_gradients_at_strong_decay_are_small_numbers_not_differences_of_large_ones(device):
    inputs = draw(130, device=device) | {"A": torch.tensor([-40.0, -80.0], device=device)}
    inputs["dt"] = torch.full_like(inputs["dt"], 0.3)
    expected = and_gradients(ssd_scan_reference, {k: v.cpu().double() for k, v in inputs.items()})
    actual = and_gradients(scan, inputs)
    # exp(-12) and exp(-24) a token: each head's gradient to its own size.
    error = (actual["A"].cpu() - expected["A"]).abs() / expected["A"].abs()
    assert error.max() < 1e-3, error


# What stands behind such a token differs by little from it in the running sum, which is large.
@pytest.mark.parametrize(("step", "rate", "others"), [(20.0, 5.0, 0.001), (100.0, 1.0, 0.001), (100.0, 16.0, 0.001)])
def test_one_token_that_decays_strongly(step, rate, others, device, assert_near):
    inputs = draw(197, device=device)
    inputs["dt"] = torch.full_like(inputs["dt"], others)
    inputs["dt"][:, 70] = step
    inputs["A"] = torch.full_like(inputs["A"], -rate)
    check(assert_near, inputs, 1e-5)


def test_non_contiguous_inputs(device, assert_near):
    inputs = draw(20, batch=2, device=device)
    expected = and_gradients(scan, inputs, reverse=True)
    strided = {k: torch.stack([v, v * 0 + torch.nan], dim=-1)[..., 0] for k, v in inputs.items()}
    strided["x"] = inputs["x"].permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    strided["B"], strided["C"] = torch.cat([inputs["B"], inputs["C"]], dim=-1).chunk(2, dim=-1)
    for name, value in and_gradients(scan, strided, reverse=True).items():
        assert_near(value, expected[name], 1e-6, name)


def test_without_the_final_state(device, assert_near):
    inputs = draw(20, device=device)
    y, state = scan(**inputs, want_final=False)
    assert state.numel() == 0
    assert torch.equal(y, scan(**inputs)[0])


def test_groups_of_heads_add_up(device, monkeypatch, assert_near):
    inputs = draw(40, heads=5, device=device)
    several = and_gradients(scan, inputs)
    monkeypatch.setattr("patchscale.ops.triton.tuning.ENOUGH_PROGRAMS", 1)
    for name, value in and_gradients(scan, inputs).items():
        assert_near(value, several[name], 1e-6, name)


@pytest.mark.parametrize("absent", [(), ("D", "initial_state")])
def test_custom_op_keeps_pytorchs_rules(absent, device):
    inputs = draw(5, device=device)
    tensors = [None if k in absent else inputs[k].requires_grad_() for k in NAMES]
    torch.library.opcheck(torch.ops.patchscale.ssd_scan_triton.default, (*tensors, True, 1, 16, True, True))


def test_compiled_whole(device, assert_near):
    inputs = draw(20, dtype=torch.bfloat16, device=device)
    expected = and_gradients(scan, inputs, reverse=True, suffix=1)
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    for name, value in and_gradients(compiled, inputs, reverse=True, suffix=1).items():
        assert_near(value, expected[name], 1e-6, name)


def test_flop_counter_sees_the_scan(device):
    leaves = {k: v.requires_grad_() for k, v in draw(64, batch=2, heads=3, d_state=32, device=device).items()}
    with FlopCounterMode(display=False) as forward:
        y, _ = scan(**leaves)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    tokens, heads, products, inside, states = 2 * 64, 3, 64 * 32, 64 * 16, 16 * 32
    assert forward.get_total_flops() == 2 * tokens * heads * (products + inside + 2 * states)
    assert backward.get_total_flops() == 2 * tokens * heads * (3 * products + 2 * inside + 64 * 64 + 5 * states)


@pytest.mark.parametrize("shape", [(0, 9), (2, 0)])
def test_empty_in_empty_out(shape, device):
    batch, length = shape
    inputs = draw(9, batch=2, device=device)
    inputs = {k: v[:batch, :length] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
    inputs["initial_state"] = inputs["initial_state"][:batch]
    inputs["initial_state"].requires_grad_()
    y, state = scan(**inputs)
    assert y.shape == (*shape, 2, 16)
    assert torch.equal(state, inputs["initial_state"])
    assert torch.equal(torch.autograd.grad(state.sum(), inputs["initial_state"])[0], torch.ones_like(state))


def test_sizes_that_the_kernels_do_not_take_are_named(device):
    with pytest.raises(UserError, match="d_state is 8"):
        scan(**draw(9, d_state=8, device=device))
    with pytest.raises(UserError, match="float16"):
        scan(**draw(9, dtype=torch.float16, device=device))
