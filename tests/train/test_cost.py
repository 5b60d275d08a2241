"""The cost model against PyTorch's counter, real memory and what must hold of any cost."""

import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from patchscale.bench.measure import hand_back_freed_memory, isolated, peak_memory, preload
from patchscale.errors import UserError
from patchscale.ops import linear, mixer, native
from patchscale.train.build import recompute_blocks
from patchscale.train.cost import GPUS, RECOMPUTE, Machine, training_cost

SMALL = {"img_size": 32, "embed_dim": 64, "depth": 3, "num_classes": 10}
NAMES = ("adventurer_tiny_patch16_224", "deit_tiny_patch16", "pixel_transformer_tiny_patch1_32")
TIMMS = "vit_tiny_patch16_224"


def make(name, **arguments):
    arguments = SMALL | arguments | ({} if name.startswith("adventurer") else {"num_heads": 2})
    return timm.create_model(name, **arguments)


def step(model, batch, dtype=torch.float32, cast=None):
    images = torch.zeros(batch, 3, *model.patch_embed.img_size, dtype=dtype)
    with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
        logits = model(images)
    F.cross_entropy(logits.float(), torch.zeros(batch, dtype=torch.long)).backward()


@pytest.mark.parametrize("patch_size", [16, 8, 4, 2, 1])
@pytest.mark.parametrize("name", [*NAMES, TIMMS])
def test_flops_are_the_counters(name, patch_size):
    model = make(name, patch_size=patch_size, img_size=16).train()
    cost = training_cost(model, (16, 16), 2)
    with FlopCounterMode(display=False) as forward:
        model(torch.zeros(2, 3, 16, 16))
    with FlopCounterMode(display=False) as training:
        step(model, 2)
    assert cost.forward_flops == forward.get_total_flops()
    assert cost.training_flops == training.get_total_flops()
    assert cost.tokens == (16 // patch_size) ** 2
    assert cost.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", NAMES)
def test_recomputed_flops_are_the_counters(name, recompute, monkeypatch):
    # In oneDNN a block's last product is computed again too, for nothing: autograd keeps what it is of after it.
    monkeypatch.setattr(linear, "mkl_is_slow", lambda: False)
    model = make(name, patch_size=4).train()
    cost = training_cost(model, (32, 32), 1, recompute=recompute)
    if recompute != "nothing":
        recompute_blocks(model, recompute == "all but products")
    with FlopCounterMode(display=False) as counter:
        step(model, 1)
    assert cost.training_flops == counter.get_total_flops()


def test_flops_of_mixed_precision_and_other_flips_are_the_counters():
    model = make(NAMES[0], patch_size=4, flip="released").train()
    with FlopCounterMode(display=False) as counter:
        step(model, 1, cast=torch.bfloat16)
    assert training_cost(model, (32, 32), 1, "bf16-mixed").training_flops == counter.get_total_flops()


def test_a_model_is_left_as_it_is():
    model = make(NAMES[0], patch_size=8).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training_cost(model, (32, 32), 2, recompute="blocks")
    assert not model.training
    assert not model.grad_checkpointing
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(torch.zeros(1, 3, 32, 32))  # nothing of the tensors without data is left behind


@pytest.mark.parametrize("name", NAMES[:2])
def test_more_costs_more(name):
    costs = {
        (patch, batch): training_cost(make(name, patch_size=patch), (32, 32), batch)
        for patch, batch in ((8, 1), (4, 1), (2, 1), (2, 2), (2, 4))
    }
    cheapest, *others = costs.values()
    for cost in others:
        for what in ("training_flops", "moved", "peak"):
            assert getattr(cost, what) > getattr(cheapest, what)
        assert cost.seconds_at_best(GPUS["a100"]) > cheapest.seconds_at_best(GPUS["h200"])
        cheapest = cost
    assert costs[2, 4].training_flops == 4 * costs[2, 1].training_flops
    assert costs[2, 4].forward_flops * 2 < costs[2, 4].training_flops < costs[2, 4].forward_flops * 4


@pytest.mark.parametrize("name", NAMES[:2])
def test_recomputing_takes_arithmetic_for_memory(name):
    model = make(name, patch_size=2)
    nothing, products, blocks = (training_cost(model, (32, 32), 4, recompute=r) for r in RECOMPUTE)
    assert nothing.peak > products.peak > blocks.peak
    assert nothing.training_flops <= products.training_flops < blocks.training_flops
    assert nothing.held == products.held == blocks.held


@pytest.mark.parametrize("name", NAMES[:2])
def test_blocks_are_alike(name):
    """What the plan builds on: a deep model's cost from two shallow ones'."""
    few, some = (2, 3) if name != NAMES[0] else (2, 4)
    for recompute in ("nothing", "blocks"):
        short, long, deep = (
            training_cost(make(name, patch_size=4, depth=d), (32, 32), 2, "bf16-mixed", recompute)
            for d in (few, some, 6)
        )
        found = short.repeat(long, (6 - few) // (some - few))
        assert found.operations == deep.operations
        assert (found.forward_flops, found.training_flops) == (deep.forward_flops, deep.training_flops)
        assert (found.parameters, found.held) == (deep.parameters, deep.held)
        assert found.peak == pytest.approx(deep.peak, rel=0.01)


def test_the_roofline_is_the_slower_of_arithmetic_and_memory():
    cost = training_cost(make(NAMES[1], patch_size=8), (32, 32), 8)
    slow_memory = Machine("", {torch.float32: 1e30}, 1e9)
    slow_arithmetic = Machine("", {torch.float32: 1e9}, 1e30)
    assert cost.seconds_at_best(slow_memory) == pytest.approx(cost.moved / 1e9)
    assert cost.seconds_at_best(slow_arithmetic) == pytest.approx(cost.training_flops / 1e9)
    both = Machine("", {torch.float32: 1e9}, 1e9)
    together = cost.seconds_at_best(slow_memory) + cost.seconds_at_best(slow_arithmetic)
    assert max(cost.moved, cost.training_flops) / 1e9 <= cost.seconds_at_best(both) <= together


MEASURED = [(NAMES[0], "nothing"), (NAMES[0], "blocks"), (NAMES[1], "nothing")]
WIDER = {"patch_size": 2, "embed_dim": 128}


def _measured():
    torch.set_num_threads(1)
    hand_back_freed_memory()
    found = []
    for name, recompute in MEASURED:
        model = make(name, **WIDER).train()
        if recompute != "nothing":
            recompute_blocks(model, recompute == "all but products")
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def call(model=model, optimizer=optimizer):
            step(model, 8)
            optimizer.step()
            optimizer.zero_grad()

        found.append(peak_memory(call, torch.device("cpu"), first_differs=True))
    return found


def test_peak_memory_is_what_is_measured():
    preload(["timm", "torch", "patchscale.train.build"])
    for (name, recompute), measured in zip(MEASURED, isolated(_measured), strict=True):
        if measured is None:
            pytest.skip("this system does not tell how much memory a call takes")
        cost = training_cost(make(name, **WIDER), (32, 32), 8, recompute=recompute)
        assert cost.working == pytest.approx(measured, rel=0.15)


class _Live(TorchDispatchMode):
    """Bytes of the tensors alive that were made while it is entered."""

    def __init__(self, given):
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {t.untyped_storage()._cdata: 0 for t in given if t is not None}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, key):
        self.live -= self.sizes.pop(key)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "stateless"),
    [
        (16, 17, 2, False),
        (4, 257, 4, False),
        (1, 1025, 8, False),
        (8, 65, 24, False),
        (16, 18, 2, True),
        (8, 66, 24, True),
    ],
)
def test_the_mixers_workspace_is_what_it_makes(batch, length, heads, stateless, reverse):
    for expected, made in _expected_and_made(batch, length, heads, stateless, reverse, False):
        assert expected == pytest.approx(made, rel=0.35)


def test_the_native_mixer_needs_less():
    if obstacle := native.available(torch.device("cpu")):
        pytest.skip(obstacle)
    for sizes in ((4, 257, 4, False, True), (1, 1025, 8, False, False), (16, 18, 2, True, True)):
        for expected, made in _expected_and_made(*sizes, True):
            assert made < expected


def _expected_and_made(batch, length, heads, stateless, reverse, natively):
    """Bytes of the forward, and of the backward."""
    headdim, d_state = 64, 64
    d_inner, conv_dim = heads * headdim, heads * headdim + 2 * d_state
    made = [(batch, length, d_inner + conv_dim + heads), (conv_dim, 4), (conv_dim,), (heads,)]
    projected, taps, bias, dt_bias = (torch.zeros(shape) for shape in made)
    given = [projected, taps, bias, dt_bias, -torch.ones(heads), torch.ones(heads), torch.ones(d_inner)]
    given += (
        [None, None] if stateless else [torch.zeros(batch, 3, conv_dim), torch.zeros(batch, heads, headdim, d_state)]
    )
    options = (reverse, 0 if stateless else 1, False, 1e-5, 64, natively)
    forward, backward = mixer._forward, mixer._gradients
    forward(*given, *options, False, True)  # what is worked out once for a length is kept

    with _Live(given) as live:
        out, *kept = forward(*given, *options, False, True)
    given_back = live.live
    grad = torch.ones_like(out)
    found = [live.peak - given_back]
    with _Live([grad, *given, *kept]) as live:
        gradients = backward(grad, None, *given, *kept, *options)
    found.append(live.peak - sum(t.untyped_storage().nbytes() for t in gradients))
    sizes = batch, length, d_inner, heads, d_state, 4
    order = options[:2]
    expected = [mixer.workspace_bytes(*sizes, backward, stateless, *order) for backward in (False, True)]
    return zip(expected, found, strict=True)


def test_a_patch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="33x33 is not a whole number of 8x8 patches"):
        training_cost(make(NAMES[0], patch_size=8), (33, 33), 1)


def test_a_timm_model_cannot_keep_products():
    with pytest.raises(UserError, match="keep-products is for models of this library"):
        training_cost(make(TIMMS, patch_size=8), (32, 32), 1, recompute="all but products")


def test_gpus_for_graphics_are_slow_in_float64():
    assert GPUS["l4"].flops[torch.float64] == pytest.approx(30.3e12 / 64)
    assert GPUS["a100"].flops[torch.float64] == pytest.approx(9.7e12, rel=0.01)
