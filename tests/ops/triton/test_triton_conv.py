"""The convolution on Triton kernels against its definition, token by token, in float64."""

import pytest
import torch
from torch import Tensor

from patchscale import UserError
from patchscale.ops.reference import causal_conv1d_reference
from patchscale.ops.triton.conv import causal_conv1d

NAMES = ("x", "weight", "bias", "history")


def draw(
    length: int, *, batch: int = 2, channels: int = 20, width: int = 4, dtype=torch.float32, device="cpu"
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "history": (batch, width - 1, channels),
    }
    inputs = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
    return {k: v.to(device, dtype if k in ("x", "history") else torch.float32) for k, v in inputs.items()}


def conv(*, reverse=False, suffix=0, **inputs):
    return causal_conv1d(*(inputs.get(k) for k in NAMES), reverse, suffix)


def and_gradients(operator, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    out = operator(**leaves, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad.bfloat16().to(out.device, out.dtype))
    return {"out": out} | dict(zip(leaves, gradients, strict=True))


def check(assert_near, inputs: dict[str, Tensor], tolerance: float, **options) -> None:
    expected = and_gradients(causal_conv1d_reference, {k: v.cpu().double() for k, v in inputs.items()}, **options)
    for name, value in and_gradients(conv, inputs, **options).items():
        assert_near(value.cpu(), expected[name], tolerance, name)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("length", "suffix"), [(1, 0), (1, 1), (2, 1), (63, 0), (64, 1), (65, 3), (197, 1)])
def test_values_and_gradients(length, suffix, reverse, device, assert_near):
    check(assert_near, draw(length, device=device), 1e-5, reverse=reverse, suffix=suffix)


def test_bfloat16(device, assert_near):
    check(assert_near, draw(40, dtype=torch.bfloat16, device=device), 1e-2, reverse=True, suffix=1)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_other_widths_with_and_without_history(width, reverse, device, assert_near):
    inputs = draw(9, width=width, channels=130, device=device)
    some = {k: v for k, v in inputs.items() if v.numel()}
    check(assert_near, some, 1e-5, reverse=reverse, suffix=1)
    some.pop("history", None)
    check(assert_near, some, 1e-5, reverse=reverse, suffix=1)


# The second sample starts more than 2^31 numbers after the first: offsets in 32 bits would be negative.
def test_samples_far_apart(device, assert_near):
    inputs = draw(20, dtype=torch.bfloat16, device=device)
    expected = and_gradients(conv, inputs, reverse=True, suffix=1)
    apart = 2**31 + 64
    try:
        memory = torch.empty(apart + 20 * 20, dtype=torch.bfloat16, device=device)  # of which little is touched
    except RuntimeError:
        pytest.skip("4.3 GB of address space are not to be had")
    inputs["x"] = memory.as_strided((2, 20, 20), (apart, 20, 1)).copy_(inputs["x"])
    for name, value in and_gradients(conv, inputs, reverse=True, suffix=1).items():
        assert_near(value, expected[name], 1e-6, name)


@pytest.mark.parametrize("enough", [1, 20])
def test_many_blocks_of_the_backward_add_up(enough, device, monkeypatch, assert_near):
    monkeypatch.setattr("patchscale.ops.triton.tuning.ENOUGH_PROGRAMS", enough)
    check(
        assert_near, draw(600 if enough == 1 else 130, batch=1, channels=5, device=device), 1e-5, reverse=True, suffix=1
    )


def test_non_contiguous_inputs(device, assert_near):
    inputs = draw(20, device=device)
    expected = and_gradients(conv, inputs, reverse=True)
    strided = {k: torch.stack([v, v * 0 + torch.nan], dim=-1)[..., 0] for k, v in inputs.items()}
    for name, value in and_gradients(conv, strided, reverse=True).items():
        assert_near(value, expected[name], 1e-6, name)
    inputs["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    for name, value in and_gradients(conv, inputs, reverse=True).items():
        assert_near(value, expected[name], 1e-6, name)


@pytest.mark.parametrize("absent", [(), ("history",)])
def test_custom_op_keeps_pytorchs_rules(absent, device):
    inputs = draw(5, device=device)
    tensors = [None if k in absent else inputs[k].requires_grad_() for k in NAMES]
    torch.library.opcheck(torch.ops.patchscale.causal_conv1d_triton.default, (*tensors, True, 1))


def test_compiled_whole(device, assert_near):
    inputs = draw(20, device=device)
    expected = and_gradients(conv, inputs, reverse=True, suffix=1)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    for name, value in and_gradients(compiled, inputs, reverse=True, suffix=1).items():
        assert_near(value, expected[name], 1e-6, name)


def test_every_element_is_written(device):
    torch.use_deterministic_algorithms(True)
    try:
        result = and_gradients(conv, draw(3, device=device), reverse=True, suffix=1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(v.isfinite().all() for v in result.values())


@pytest.mark.parametrize("shape", [(0, 9), (2, 0)])
def test_empty_in_empty_out(shape, device):
    inputs = draw(9, device=device) | {"x": torch.zeros(*shape, 20, device=device)}
    inputs["history"] = inputs["history"][: shape[0]]
    result = and_gradients(conv, inputs)
    assert result["out"].shape == result["x"].shape == (*shape, 20)
    assert not result["history"].any()
    assert not result["weight"].any()


def test_too_wide_is_named(device):
    with pytest.raises(UserError, match="5 taps"):
        conv(**draw(9, width=5, device=device))
