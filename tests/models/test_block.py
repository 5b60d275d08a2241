"""The block against the published order of its steps."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from patchscale import UserError
from patchscale.models.block import CONV_WIDTH, Block, Mamba2Mixer, SwiGLU, append_mean
from patchscale.ops import mix_tokens
from patchscale.ops.reference import causal_conv1d_reference, ssd_scan_reference


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """No parameter at its initial value, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return module


def published_order(mixer: Mamba2Mixer, u: torch.Tensor, flip: bool) -> torch.Tensor:
    """What the published code does, copy for copy: flip the patches, prepend the mean, scan, drop it, flip back."""

    def flip_patches(tokens):
        return torch.cat([tokens[:, :-1].flip(1), tokens[:, -1:]], dim=1)

    mean = u.mean(1, keepdim=True)
    tokens = torch.cat([mean, flip_patches(u) if flip else u], dim=1)
    z, xBC, dt = mixer.in_proj(tokens).split([mixer.d_inner, mixer.d_inner + 2 * mixer.d_state, mixer.nheads], dim=-1)
    xBC = causal_conv1d_reference(xBC, mixer.conv1d.weight[:, 0], mixer.conv1d.bias)
    x, B, C = xBC.split([mixer.d_inner, mixer.d_state, mixer.d_state], dim=-1)
    y, _ = ssd_scan_reference(
        x.unflatten(-1, (mixer.nheads, mixer.headdim)),
        F.softplus(dt + mixer.dt_bias),
        -torch.exp(mixer.A_log),
        B,
        C,
        mixer.D,
    )
    gated = y.flatten(2) * F.silu(z)
    normed = gated / torch.sqrt(gated.pow(2).mean(-1, keepdim=True) + 1e-5) * mixer.norm.weight
    out = mixer.out_proj(normed)[:, 1:]
    return flip_patches(out) if flip else out


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("patches", [1, 2, 3, 16, 64, 80, 93, 94, 150])  # from 94 on in more than one chunk
def test_mixer_is_the_published_order_without_its_copies(patches, reverse, assert_near):
    mixer = randomised(Mamba2Mixer(8, d_state=5, headdim=4, reverse=reverse, dtype=torch.float64))
    parameters = dict(mixer.named_parameters())
    u = torch.randn(2, patches + 1, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for out in (mixer(u), published_order(mixer, u, reverse)):
        grad_output = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gradients = torch.autograd.grad(out, [u, *parameters.values()], grad_output)
        results.append({"out": out} | dict(zip(["u", *parameters], gradients, strict=True)))
    for name, actual in results[0].items():
        assert_near(actual, results[1][name], 1e-11, name)


def test_every_token_sees_every_other_through_the_mean():
    mixer = randomised(Mamba2Mixer(8, d_state=5, headdim=4, dtype=torch.float64))
    u = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    for t in range(6):
        (gradient,) = torch.autograd.grad(mixer(u)[0, t].sum(), u)
        assert (gradient[0].abs().sum(-1) > 0).all()


# In training on a CPU the operator scans the mean; else it is handed what the mean leaves.
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(1, 100), (3, 150), (1, 1100)])
def test_all_ways_of_taking_the_mean_are_one(batch, length, reverse, monkeypatch, assert_near):
    mixer = randomised(Mamba2Mixer(8, d_state=5, headdim=4, reverse=reverse, dtype=torch.float64))
    u = torch.randn(batch, length, 8, dtype=torch.float64, requires_grad=True)

    def values() -> list[torch.Tensor]:
        out = mixer(u)
        return [out, *torch.autograd.grad(out.square().sum(), [u, *mixer.parameters()])]

    expected = values()
    monkeypatch.setattr("patchscale.models.block._SCAN_A_HEADING", ())
    for actual, value in zip(values(), expected, strict=True):
        assert_near(actual, value, 1e-11)
    for stream in (1024, 60):
        monkeypatch.setattr("patchscale.models.block.STREAM_TOKENS", stream)
        with torch.inference_mode():
            assert_near(mixer(u), expected[0], 1e-11)


def test_appending_the_mean_has_the_gradients_of_its_definition(assert_near):
    def defined(u):
        return torch.cat([u, u.mean(1, keepdim=True)], dim=1)

    u = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(append_mean(u), defined(u))
    assert torch.autograd.gradcheck(append_mean, u)
    assert torch.autograd.gradgradcheck(append_mean, u)
    several, along = torch.randn(2, 3, 7, 5, dtype=torch.float64), torch.randn(3, 7, 5, dtype=torch.float64)
    assert_near(torch.func.vmap(append_mean)(several), torch.stack([defined(each) for each in several]), 1e-12)
    assert_near(torch.func.jvp(append_mean, (u.detach(),), (along,))[1], defined(along), 1e-12)


@pytest.mark.parametrize("grad", [True, False])
def test_mixer_under_autocast_keeps_steps_and_decays_in_float32(grad, monkeypatch):
    seen = {}

    def spy(projected, conv_weight, conv_bias, dt_bias, A, *rest, **options):
        seen.update(projected=projected.dtype, A=A.dtype, initial_state=options["initial_state"].dtype)
        return mix_tokens(projected, conv_weight, conv_bias, dt_bias, A, *rest, **options)

    monkeypatch.setattr("patchscale.models.block.mix_tokens", spy)
    monkeypatch.setattr("patchscale.models.block._SCAN_A_HEADING", ())
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        out = Mamba2Mixer(32)(torch.randn(2, 100, 32))
    assert seen == {"projected": torch.bfloat16, "A": torch.float32, "initial_state": torch.float32}
    assert out.dtype == torch.bfloat16


def test_swiglu_is_its_formula(assert_near):
    mlp = randomised(SwiGLU(10, dtype=torch.float64))
    x = torch.randn(3, 10, dtype=torch.float64)
    gate = x @ mlp.w1.weight.t() + mlp.w1.bias
    value = x @ mlp.w2.weight.t() + mlp.w2.bias
    assert mlp.w1.out_features == 25
    assert_near(mlp(x), (gate * gate.sigmoid() * value) @ mlp.w3.weight.t() + mlp.w3.bias, 1e-12)


def block(drop_path: float = 0.0) -> Block:
    made = Block(8, d_state=5, headdim=4, expand=2, reverse=False, drop_path=drop_path, dtype=torch.float64)
    return randomised(made)


def test_block_adds_both_branches_behind_their_norms(assert_near):
    b, x = block(), torch.randn(2, 5, 8, dtype=torch.float64)

    def rms_norm(tokens, weight):
        return tokens / torch.sqrt(tokens.pow(2).mean(-1, keepdim=True) + 1e-5) * weight

    middle = x + b.mixer(rms_norm(x, b.norm.weight))
    assert_near(b(x), middle + b.mlp(rms_norm(middle, b.norm_mlp.weight)), 1e-12)


def test_drop_path_drops_each_branch_for_itself_and_scales_what_it_keeps(assert_near):
    """Per sample, one of four outcomes: each branch either dropped or multiplied by 1 / keep."""
    rate = 0.5
    dropping = block(rate)
    plain = copy.deepcopy(dropping)
    plain.drop_path = torch.nn.Identity()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    outcomes = []
    for keep_mixer in (0, 1):
        middle = x + keep_mixer / (1 - rate) * plain.mixer(plain.norm(x))
        outcomes += [middle + keep_mlp / (1 - rate) * plain.mlp(plain.norm_mlp(middle)) for keep_mlp in (0, 1)]
    torch.manual_seed(0)
    out = dropping.train()(x.expand(64, -1, -1))
    chosen = torch.stack([(out - o).flatten(1).norm(dim=1) for o in outcomes]).min(0)
    assert chosen.values.max() < 1e-10
    assert set(chosen.indices.tolist()) == {0, 1, 2, 3}
    assert_near(dropping.eval()(x), plain(x), 1e-12)


def test_initial_values_are_in_the_published_ranges():
    torch.manual_seed(0)
    mixer = Mamba2Mixer(512, headdim=4)  # 256 heads
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= A.min() < 1.5
    assert 15.5 < A.max() <= 16
    assert 0.000999 < dt.min() < 0.0012
    assert 0.085 < dt.max() <= 0.1001
    # Log-uniform: half of the steps lie under the geometric mean of the ends.
    assert (dt < 0.01).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(mixer.D, torch.ones(256))
    assert torch.equal(mixer.norm.weight, torch.ones(1024))
    for linear, fan_in in (
        (mixer.in_proj.weight, 512),
        (mixer.out_proj.weight, 1024),
        (mixer.conv1d.weight, CONV_WIDTH),
    ):
        bound = 1 / math.sqrt(fan_in)
        assert linear.abs().max() <= bound
        assert linear.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert mixer.conv1d.bias.abs().max() <= 0.5
    assert mixer.conv1d.bias.std().item() == pytest.approx(0.5 / math.sqrt(3), rel=0.1)


def test_steps_above_20_are_not_bent():
    # softplus is the identity above 20 in the published code; ours must not overflow there either.
    mixer = Mamba2Mixer(32)
    with torch.no_grad():
        mixer.dt_bias.fill_(1000.0)
    out = mixer(torch.randn(1, 5, 32, requires_grad=True))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize(
    ("embed_dim", "headdim", "expand", "advice"), [(48, 64, 2, 32), (10, 64, 1, 64), (10, 6, 2, 3)]
)
def test_widths_that_are_no_whole_heads_are_refused(embed_dim, headdim, expand, advice):
    with pytest.raises(UserError, match=f"multiple of {advice}"):
        Mamba2Mixer(embed_dim, headdim=headdim, expand=expand)
    Mamba2Mixer(advice, headdim=headdim, expand=expand)  # the way out works


def test_meta_device_and_dtype_reach_every_parameter():
    b = Block(32, 64, 64, 2, True, 0.1, device=torch.device("meta"), dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in b.parameters()} == {("meta", torch.bfloat16)}


def test_the_convolution_s_bias_need_not_be_a_parameter():
    module = block()
    x = torch.randn(2, 197, 8, dtype=torch.float64)
    values = {name: parameter.detach() for name, parameter in module.named_parameters()}
    assert torch.equal(torch.func.functional_call(module, values, x), module(x))


def test_the_dtype_under_autocast_does_not_depend_on_how_many_tokens_there_are():
    mixer = block().mixer.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert {mixer(torch.randn(1, tokens, 8)).dtype for tokens in (50, 500, 1500)} == {torch.bfloat16}
