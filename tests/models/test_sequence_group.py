"""A model whose tokens are cut over processes, against the same model in one: 2 and 4 processes, gloo, on the CPU."""

import copy
import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from patchscale import UserError
from patchscale.models import Adventurer, block

PROCESSES = 4
SIZES = (2, PROCESSES)
IMG_SIZE = (7, 9)  # 63 patches of one pixel, which neither 2 nor 4 divide; slices begin and end within rows
DTYPES = {"float64": torch.float64, "float32": torch.float32}
# Sums over all tokens of terms of either sign lose more digits.
TOLERANCES = {"float64": (1e-12, 1e-12), "float32": (1e-5, 1e-4)}
SUMS = ("A_log", "dt_bias")
CASES = [(size, dtype) for size in SIZES for dtype in DTYPES]
TRAINED: dict[str, dict] = {
    "plain": {},
    "checkpointed": {"checkpointing": True},
    "pooled": {"global_pool": "avg"},
    "all tokens": {"global_pool": ""},
    "resized": {"dynamic_img_size": True, "img_size": (5, 8)},
    "drop path": {"drop_path_rate": 0.5, "drop_rate": 0.3},
}

Pairs = dict[str, tuple[Tensor, Tensor]]  # what the processes computed together, and what one computes


def model_of(dtype: torch.dtype = torch.float64, checkpointing: bool = False, **options) -> Adventurer:
    torch.manual_seed(0)
    options = {"img_size": IMG_SIZE, "patch_size": 1, "num_classes": 3, "depth": 2} | options
    model = Adventurer(**options, embed_dim=8, headdim=4, d_state=5, dtype=dtype)
    model.set_grad_checkpointing(checkpointing)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
    return model


def image(seed: int = 0, dtype: torch.dtype = torch.float64, size: tuple[int, int] = IMG_SIZE) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_of(model: torch.nn.Module, x: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 2]))


def gradients(model: torch.nn.Module, x: Tensor, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Of the image and of every parameter."""
    model.zero_grad()
    x.grad = None
    loss().backward()
    return {"image": x.grad.clone()} | {n: p.grad.clone() for n, p in model.named_parameters()}


def together(group: dist.ProcessGroup, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for tensor in tensors.values():
        dist.all_reduce(tensor, group=group)
    return tensors


def joined(group: dist.ProcessGroup, tokens: Tensor) -> Tensor:
    """All processes' patches, and the class token, from (batch, own patches + 1, channels)."""
    slices: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(slices, tokens.detach(), group=group)
    return torch.cat([*(s[:, :-1] for s in slices), slices[0][:, -1:]], dim=1)


def trained(group: dist.ProcessGroup | None, dtype: torch.dtype, case: str) -> dict[str, Tensor]:
    """Logits, and the average over the processes of their gradients, from the same loss on every process."""
    model, x = model_of(dtype, sequence_group=group, **TRAINED[case]), image(dtype=dtype).requires_grad_()
    weights = torch.randn(2, math.prod(IMG_SIZE) + 1, 3, generator=torch.Generator().manual_seed(1)).to(dtype)

    def loss() -> Tensor:
        if case != "all tokens":
            return loss_of(model, x)
        out = model(x)
        if group is None:
            return (out * weights).sum()
        # Every process's loss is of its own patches; the class token's is the same on all.
        own = model.sequence_group.slice_of(math.prod(IMG_SIZE))
        size = dist.get_world_size(group)
        return size * (out[:, :-1] * weights[:, own]).sum() + (out[:, -1] * weights[:, -1]).sum()

    torch.manual_seed(1)
    found = gradients(model, x, loss)
    if group is not None:
        found = {name: g / dist.get_world_size(group) for name, g in together(group, found).items()}
    torch.manual_seed(1)
    logits = model(x).detach()
    return found | {"logits": joined(group, logits) if group is not None and case == "all tokens" else logits}


@functools.cache
def trained_alone(dtype: torch.dtype, case: str) -> dict[str, Tensor]:
    return trained(None, dtype, case)


def train(group: dist.ProcessGroup, dtype: torch.dtype, case: str) -> Pairs:
    actual, expected = trained(group, dtype, case), trained_alone(dtype, case)
    return {name: (actual[name], expected[name]) for name in expected}


def infer(group: dist.ProcessGroup, dtype: torch.dtype) -> Pairs:
    """Without gradients, streamed."""
    model, x = model_of(dtype).eval(), image(dtype=dtype)
    pairs: Pairs = {}
    with torch.no_grad():
        for cut in (None, group):
            model.set_sequence_group(cut)
            features, maps = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
            found = {"logits": model(x), "features": features} | {
                f"block {i}": torch.cat(both, dim=1) for i, both in enumerate(maps)
            }
            for name, value in found.items():
                pairs[name] = (value, value) if cut is None else (value, pairs[name][1])
    return {k: (a if k == "logits" else joined(group, a), e) for k, (a, e) in pairs.items()}


def autocast(group: dist.ProcessGroup) -> Pairs:
    """In bfloat16, beside one process in float32."""
    model, x = model_of(torch.float32), image(dtype=torch.float32)
    results = []
    for cut, precision in ((None, nullcontext()), (group, torch.autocast("cpu", torch.bfloat16))):
        model.set_sequence_group(cut)
        with precision:
            results.append(loss_of(model, x))
    results[1].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    return {"loss": (results[1].detach(), results[0].detach())}


def sum_of_losses(group: dist.ProcessGroup) -> Pairs:
    """Losses that differ between the processes: their gradients add up to those of the sum."""
    model, x = model_of(), image().requires_grad_()
    scales = [1.0 + 3.0 * r for r in range(dist.get_world_size(group))]
    expected = gradients(model, x, lambda: sum(scales) * loss_of(model, x))
    model.set_sequence_group(group)
    actual = together(group, gradients(model, x, lambda: scales[dist.get_rank(group)] * loss_of(model, x)))
    return {name: (actual[name], expected[name]) for name in expected}


def beside_data_parallel(own: dist.ProcessGroup) -> Pairs:
    """Two groups of two, an image each, all in one DistributedDataParallel as it comes."""
    images, plain = [image(seed) for seed in range(2)], model_of()
    expected: dict[str, Tensor] = {}
    for x in images:
        for name, gradient in gradients(plain, x.requires_grad_(), lambda x=x: loss_of(plain, x) / 2).items():
            expected[name] = expected.get(name, 0) + gradient
    model = model_of(sequence_group=own)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001)
    loss_of(wrapped, images[dist.get_rank() // 2]).backward()
    return {name: (p.grad, expected[name]) for name, p in model.named_parameters()}


def refusals(pair: object, group: dist.ProcessGroup) -> dict[str, str]:
    def message(call: Callable[[], object]) -> str:
        try:
            call()
        except UserError as error:
            return str(error)
        return "nothing was raised"

    model = model_of(sequence_group=group)
    small = model_of(img_size=(2, 5), sequence_group=group)
    with torch.no_grad():
        return {
            "short": message(lambda: small(image(size=(2, 5)))),
            "images": message(lambda: model(image(seed=dist.get_rank()))),
            "map": message(lambda: model.forward_intermediates(image())),
            "member": message(lambda: model_of(sequence_group=pair)) if dist.get_rank() >= 2 else "",
            "type": message(lambda: model_of(sequence_group="gloo")),
        }


def copied(group: dist.ProcessGroup) -> Pairs:
    """A deep copy (an average of weights, say) is cut over the same processes."""
    model = model_of(sequence_group=group)
    with torch.no_grad():
        return {"logits": (copy.deepcopy(model)(image()), model_of()(image()))}


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    block.STREAM_TOKENS = block.BLOCK_TOKENS = 9  # several blocks a slice, the last of them shorter
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(minutes=10))
    everybody = dist.new_group()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results: dict = {}
    for size, group in ((2, pairs[rank // 2]), (PROCESSES, everybody)):
        for name, dtype in DTYPES.items():
            for case in TRAINED if dtype == torch.float64 else ["plain"]:
                results[size, name, case] = train(group, dtype, case)
            results[size, name, "inference"] = infer(group, dtype)
        results[size, "bfloat16", "autocast"] = autocast(group)
        results[size, "float64", "sum of losses"] = sum_of_losses(group)
        results[size, "float64", "copied"] = copied(group)
    results[PROCESSES, "float64", "beside data parallel"] = beside_data_parallel(pairs[rank // 2])
    results["refusals"] = refusals(pairs[0], everybody)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """What every process found, from one start of them all."""
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (str(folder),), PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def check(results: list[dict], size: int, dtype: str, case: str, assert_near) -> None:
    # Positions are resized in float32 whatever the model's precision.
    plain, sums = TOLERANCES["float32" if case == "resized" else dtype] if dtype in TOLERANCES else (3e-2, 3e-2)
    for rank, found in enumerate(results):
        pairs = found[size, dtype, case]
        assert pairs
        for name, (actual, expected) in pairs.items():
            tolerance = sums if name.endswith(SUMS) else plain
            assert_near(actual, expected, tolerance, f"{name} on process {rank}")


@pytest.mark.parametrize(("dtype", "case"), [*(("float64", case) for case in TRAINED), ("float32", "plain")])
@pytest.mark.parametrize("size", SIZES)
def test_logits_and_mean_gradients_are_those_of_one_process(results, size, dtype, case, assert_near):
    check(results, size, dtype, case, assert_near)


@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_streamed_inference_and_features_are_those_of_one_process(results, size, dtype, assert_near):
    check(results, size, dtype, "inference", assert_near)


@pytest.mark.parametrize("size", SIZES)
def test_gradients_add_up_to_those_of_the_sum_of_losses(results, size, assert_near):
    check(results, size, "float64", "sum of losses", assert_near)


@pytest.mark.parametrize("size", SIZES)
def test_under_autocast(results, size, assert_near):
    check(results, size, "bfloat16", "autocast", assert_near)


@pytest.mark.parametrize("size", SIZES)
def test_a_deep_copy_is_cut_too(results, size, assert_near):
    check(results, size, "float64", "copied", assert_near)


def test_distributed_data_parallel_over_two_groups_needs_no_more(results, assert_near):
    check(results, PROCESSES, "float64", "beside data parallel", assert_near)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("short", "10 patches are too few for 4 processes, which need 3 each: cut the sequence over 3 or fewer"),
        ("images", "process 1 of the sequence group was given another image than process 0"),
        ("map", "output_fmt='NLC'"),
        ("type", "sequence_group is 'gloo', expected a process group"),
    ],
)
def test_refusals(results, what, words):
    for found in results:
        assert words in found["refusals"][what]


def test_a_group_without_this_process_is_refused(results):
    for found in results[2:]:
        assert "sequence_group does not hold this process (rank " in found["refusals"]["member"]


def test_a_group_before_init_process_group_is_refused():
    with pytest.raises(UserError, match="init_process_group first"):
        model_of(sequence_group=object())
