import pytest
import torch

from patchscale.bench.cases import Case, as_call, bytes_moved, counted_flops, flops, ours, scan_flops, scan_inputs
from patchscale.bench.peers import candidate


def case(subject, training=False, tokens=128, heads=4, batch=2, **rest):
    return Case(subject, training, tokens, batch, heads, device="cpu", dtype="float32", **rest)


def test_flops_of_the_scan_by_hand():
    # Per token: C B^T 2*64*64; per head scores times x 2*64*64, state read and written 2*64*64 each.
    assert scan_flops(128, 8) == 128 * (8192 + 8 * (8192 + 16384)) == 128 * 204_800
    assert scan_flops(1, 1) == 2 * 64 + 2 * 64 + 4 * 64 * 64
    assert flops(case("scan")) == 2 * 128 * (8192 + 4 * 24576)
    assert flops(case("scan", training=True)) == 3 * flops(case("scan"))


def test_flops_of_a_mixer_and_a_block_by_hand():
    # Width 128: in_proj to 2*256 + 2*64 + 4 = 644, out_proj from 256; one class token.
    mixer = 2 * 2 * 129 * (128 * 644 + 256 * 128) + 2 * scan_flops(128, 4)
    assert flops(case("mixer")) == mixer
    assert flops(case("block", training=True)) == 3 * (mixer + 2 * 2 * 129 * 3 * 128 * 320)


def test_flops_of_a_model_by_hand():
    one = case("model", tokens=4, heads=8, model="adventurer_tiny_patch32_64")
    layer = 2 * 2 * 5 * (256 * (2 * 512 + 128 + 8) + 512 * 256 + 3 * 256 * 640) + 2 * scan_flops(4, 8)
    patches, head = 2 * 2 * 4 * 3 * 32 * 32 * 256, 2 * 2 * 256 * 1000
    assert flops(one) == 12 * layer + patches + head
    step = case("step", training=True, tokens=4, heads=8, model="adventurer_tiny_patch32_64")
    assert flops(step) == 3 * (12 * layer + head) + 2 * patches  # images need no gradient


def test_flops_of_an_attention_block_by_hand():
    # qkv, proj and an MLP of 4: 12 width^2; scores and their sum: 4 tokens width a token.
    one = case("block")
    linear, attention = 2 * 2 * 129 * 12 * 128**2, 2 * 4 * 129**2 * 128
    assert counted_flops(one, lambda c: candidate("vit", c)) == linear + attention


def test_bytes_of_the_scan_by_hand():
    x, dt, A, BC = 2 * 128 * 4 * 64, 2 * 128 * 4, 4, 2 * 2 * 128 * 64
    inputs = x + dt + A + BC
    assert bytes_moved(case("scan")) == 4 * (inputs + x)
    assert bytes_moved(case("scan", training=True)) == 4 * (3 * inputs + 2 * x)
    assert bytes_moved(case("mixer")) is None


def test_mild_decay_is_mild_and_fresh_decay_is_not():
    strongest = {}
    for decay in ("fresh", "mild"):
        _, dt, A, _, _ = scan_inputs(case("scan", tokens=6400, heads=24, batch=1, decay=decay))
        strongest[decay] = (dt * A).unflatten(1, (-1, 64)).sum(2).min()
    assert strongest["fresh"] < -62 < -50 < strongest["mild"]


@pytest.mark.parametrize("subject", ["scan", "conv", "mixer", "block", "model", "step"])
def test_every_subject_runs_and_is_the_same_every_time(subject):
    model = "adventurer_tiny_patch32_64" if subject in ("model", "step") else ""
    one = case(subject, training=True, tokens=4, heads=8, model=model)
    first, second = (as_call(one, ours(one))() for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad


def test_no_timed_call_draws_the_outputs_gradient(monkeypatch):
    calls = [as_call(one, ours(one)) for one in (case("conv", training=True, tokens=n) for n in (4, 5, 6, 7))]
    for call in calls:
        call()

    def drawn(*args, **kwargs):
        raise AssertionError("drawn again")

    monkeypatch.setattr(torch, "randn", drawn)
    for call in calls:
        call()


def test_a_training_call_leaves_no_gradients():
    one = case("mixer", training=True, tokens=4)
    made = ours(one)
    as_call(one, made)()
    assert all(t.grad is None for t in (*made.inputs, *made.parameters))
