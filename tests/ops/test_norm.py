"""The gated norm against its formula."""

import pytest
import torch

from patchscale.ops import gated_rms_norm


def draw(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in (shape, shape, shape[-1:])]


def formula(y, z, weight, eps=1e-5):
    gated = y * z / (1 + torch.exp(-z))
    return gated / torch.sqrt((gated * gated).sum(-1, keepdim=True) / y.shape[-1] + eps) * weight


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 5, 64)])
def test_values_and_gradients(shape, dtype, tolerance, assert_near):
    leaves = [t.requires_grad_() for t in draw(shape, dtype)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    out, expected = gated_rms_norm(*leaves), formula(*exact)
    assert out.dtype == dtype
    assert_near(out, expected, tolerance)
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(out, leaves, grad_output)
    for name, actual, wanted in zip(
        ("y", "z", "weight"), gradients, torch.autograd.grad(expected, exact, grad_output.double()), strict=True
    ):
        assert_near(actual, wanted, tolerance, name)


def test_eps_is_added_to_the_mean_square(assert_near):
    y, z, weight = draw((4, 8))
    assert_near(gated_rms_norm(1e-3 * y, z, weight, eps=0.5), formula(1e-3 * y, z, weight, eps=0.5), 1e-12)


def test_channels_of_zeros_stay_zero_with_finite_gradients():
    y, z, weight = (t.requires_grad_() for t in draw((4, 8)))
    out = gated_rms_norm(y * 0, z, weight)
    assert torch.equal(out, torch.zeros_like(out))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), [y, z, weight]))


def test_autocast_does_not_lower_the_precision(assert_near):
    y, z, weight = draw((50, 64), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = gated_rms_norm(y, z, weight)
    assert out.dtype == torch.float32
    assert_near(out, formula(y.double(), z.double(), weight.double()), 1e-5)


def test_bfloat16_is_rounded_once(assert_near):
    y, z, weight = draw((50, 64), torch.bfloat16)
    exact = formula(y.double(), z.double(), weight.double())
    one_rounding = ((exact.bfloat16() - exact).norm() / exact.norm()).item()
    assert_near(gated_rms_norm(y, z, weight), exact, 1.05 * one_rounding)
