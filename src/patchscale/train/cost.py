"""What a training step costs, found by taking a model through one on tensors without data.

Every operator that the step calls is met in turn: its arithmetic by the formula that PyTorch's counter knows for it,
the bytes that it reads and writes, and what is alive in memory while it runs. So the figures follow from the model's
own code, whatever the model is.
"""

import contextlib
import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from patchscale.models.backbone import Backbone
from patchscale.models.tokens import grid_size
from patchscale.ops.chunks import chunk_bounds, is_stateless
from patchscale.ops.mixer import workspace_bytes
from patchscale.train.build import recompute_blocks
from patchscale.train.recipe import Precision

# What the backward pass computes again instead of keeping it: nothing; all but what linear layers gave; blocks.
Recompute = Literal["nothing", "all but products", "blocks"]
RECOMPUTE: tuple[Recompute, ...] = ("nothing", "all but products", "blocks")

# What autocast computes matrix products in.
_CAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

# Values that AdamW keeps of each parameter.
_STATES = 2
# Of each parameter, AdamW's step reads it, its gradient and both states, and writes all but the gradient.
_OPTIMISER_PASSES = 7


class Operation(NamedTuple):
    """One call of an operator."""

    kind: str
    """matrix, attention, scan, or elementwise: whatever has no matrix product in it."""
    dtype: torch.dtype
    flops: int
    moved: int
    """Bytes: each tensor that it takes or gives, once."""


@dataclass(frozen=True)
class Machine:
    """What a device does at best."""

    name: str
    flops: dict[torch.dtype, float]
    """Per second, by what is multiplied; dense, summed in float32."""
    bandwidth: float
    """Bytes of memory read or written, per second."""
    per_call: float = 0.0
    """Seconds that calling an operator takes, however little it does."""


def _gpu(name: str, half: float, single: float, bandwidth: float, double: float = 1 / 2) -> Machine:
    """double: float64's share of float32's rate; of 128 lanes of an Ada multiprocessor, two (its whitepaper)."""
    tera = {torch.float16: half, torch.bfloat16: half, torch.float32: single, torch.float64: single * double}
    return Machine(name, {dtype: 1e12 * flops for dtype, flops in tera.items()}, 1e9 * bandwidth)


# Published peaks: TFLOP/s of tensor cores in 16 bits (dense: datasheets print twice as much, for sparse matrices), of
# float32 outside them, as PyTorch multiplies it by default, and GB/s.
GPUS: dict[str, Machine] = {
    # NVIDIA A100 datasheet (1758950): 312 (624 sparse), 19.5; 40 GB 1,555, 80 GB SXM 2,039.
    "a100": _gpu("A100 SXM 80 GB", 312, 19.5, 2039),
    "a100-40gb": _gpu("A100 SXM 40 GB", 312, 19.5, 1555),
    # NVIDIA H100 datasheet: 989.4 (1,979 sparse), 67; SXM5 80 GB 3,350.
    "h100": _gpu("H100 SXM 80 GB", 989.4, 67, 3350),
    # NVIDIA H200 datasheet: the same chip, with 141 GB at 4,800.
    "h200": _gpu("H200 SXM 141 GB", 989.4, 67, 4800),
    # NVIDIA DGX B200 datasheet, an eighth of it: 2,250 (4,500 sparse), 75; 8,000.
    "b200": _gpu("B200 SXM 180 GB", 2250, 75, 8000),
    # NVIDIA L40S datasheet: 362.05 (733 sparse), 91.6; 864.
    "l40s": _gpu("L40S 48 GB", 362.05, 91.6, 864, double=1 / 64),
    # NVIDIA L4 datasheet: 121 (242 sparse), 30.3; 300.
    "l4": _gpu("L4 24 GB", 121, 30.3, 300, double=1 / 64),
    # NVIDIA Ada GPU architecture whitepaper, appendix A: 165.2 (330.4 sparse), 82.6; 1,008.
    "rtx4090": _gpu("GeForce RTX 4090 24 GB", 165.2, 82.6, 1008, double=1 / 64),
}


@dataclass(frozen=True)
class Cost:
    """Of one training step on one device."""

    batch: int
    """Images."""
    tokens: int
    """Patches of an image."""
    parameters: int
    recompute: Recompute
    forward_flops: int
    training_flops: int
    """Forward, backward and what is recomputed; a multiply-add is two."""
    trained: int
    """Bytes of the parameters that the optimiser moves."""
    held: int
    """Bytes that stay from step to step: parameters, the optimiser's states, and the batch."""
    peaks: tuple[int, ...]
    """Most bytes on top of them in the forward pass, in the backward pass of the last block, and after that:
    activations, gradients, and what operators need while they run."""
    operations: dict[Operation, int]
    """How often each is called."""

    @property
    def working(self) -> int:
        """Most bytes on top of those held."""
        return max(self.peaks)

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.held + self.working

    @property
    def moved(self) -> int:
        """Bytes read and written, if every operator meets its tensors in memory."""
        return sum(op.moved * calls for op, calls in self.operations.items()) + _OPTIMISER_PASSES * self.trained

    def seconds_at_best(self, machine: Machine) -> float:
        """The roofline: every operator takes as long as its arithmetic or its memory traffic does, the longer one.

        S. Williams, A. Waterman, D. Patterson, *Roofline*, 2009 (doi 10.1145/1498765.1498785), operator by operator.
        """
        seconds = _OPTIMISER_PASSES * self.trained / machine.bandwidth
        for op, calls in self.operations.items():
            arithmetic = op.flops / machine.flops[op.dtype] if op.flops else 0.0
            seconds += calls * (max(arithmetic, op.moved / machine.bandwidth) + machine.per_call)
        return seconds

    def repeat(self, longer: "Cost", times: int) -> "Cost":
        """What it would be with what a longer model has more, so many times over: exact where blocks are alike.

        But for the last of the peaks, which lies at the first block or at the last but one: where that changes with the
        number of blocks, it is a little more than said here.
        """
        operations = {
            op: calls + times * (longer.operations.get(op, 0) - calls)
            for op in self.operations | longer.operations
            for calls in [self.operations.get(op, 0)]
        }
        totals = ("parameters", "forward_flops", "training_flops", "trained", "held")
        sums = {n: getattr(self, n) + times * (getattr(longer, n) - getattr(self, n)) for n in totals}
        peaks = tuple(short + times * (long - short) for short, long in zip(self.peaks, longer.peaks, strict=True))
        return replace(self, operations=operations, peaks=peaks, **sums)


def training_cost(
    model: nn.Module,
    img_size: tuple[int, int],
    batch: int,
    precision: Precision = "32-true",
    recompute: Recompute = "nothing",
) -> Cost:
    """The cost of a step of AdamW on a batch of labelled images.

    What runs is what a CPU runs: on a GPU attention and the scan have other kernels, whose outputs are alike.

    Args:
        model: a classifier with ``patch_embed``; it may be on the meta device, and stays as it is.
        img_size: height and width of the images.
        batch: images.
        precision: as in a recipe.
        recompute: what is not kept for the backward pass.

    Raises:
        UserError: the patch does not divide the image, or the model cannot recompute what is asked for.
    """
    patch_embed: Any = model.patch_embed
    rows, columns = grid_size(img_size, patch_embed.patch_size)
    model = copy.deepcopy(model).to("meta").train()
    if recompute != "nothing":
        recompute_blocks(model, keep_products=recompute == "all but products")
    dtype = torch.float64 if precision == "64-true" else torch.float32
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() * dtype.itemsize for p in model.parameters() if p.requires_grad)
    step = _Step()
    with step:
        model._apply(lambda t: torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype))
        images = torch.empty(batch, patch_embed.proj.in_channels, *img_size, dtype=dtype)
        labels = torch.empty(batch, dtype=torch.long)
        held = step.start()
        with autocast_of(precision), _when_last_is_done(model, step.next_phase):
            logits = model(images)
        loss = F.cross_entropy(logits.to(torch.promote_types(dtype, torch.float32)), labels)
        forward_flops = step.flops
        step.next_phase()
        loss.backward()
    return Cost(
        batch,
        rows * columns,
        parameters,
        recompute,
        forward_flops,
        step.flops,
        trained,
        held + _STATES * trained,
        tuple(peak - held for peak in step.peaks),
        dict(step.operations),
    )


def autocast_of(precision: Precision, device: str = "cpu") -> torch.autocast:
    """What a forward pass runs in."""
    return torch.autocast(device, _CAST.get(precision, torch.bfloat16), enabled=precision in _CAST)


def blocks_of(model: nn.Module) -> nn.Sequential | None:
    """The blocks that a model runs one after the other, of this library or of timm; None if it has no such."""
    blocks = model.trunk()[0] if isinstance(model, Backbone) else getattr(model, "blocks", None)
    return blocks if isinstance(blocks, nn.Sequential) else None


@contextlib.contextmanager
def _when_last_is_done(model: nn.Module, call: Callable[[], None]) -> Iterator[None]:
    """Have the backward pass of what is computed inside call this when it has left the last block."""
    blocks = blocks_of(model)
    if blocks is None or len(blocks) < 2:
        yield
        return

    def tell(module: nn.Module, given: Any, out: Tensor) -> None:
        if out.requires_grad:  # no gradient reaches what is frozen
            out.register_hook(lambda grad: call())

    handle = blocks[-2].register_forward_hook(tell)
    try:
        yield
    finally:
        handle.remove()


class _Step(FakeTensorMode):
    """Meets every operator that is called while it is entered; tensors made meanwhile have no data."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[Operation] = Counter()
        self.peaks = [0]
        self.flops = self._live = 0
        self._sizes: dict[int, int] = {}
        self._nested = False

    def start(self) -> int:
        """Count from now on; returns the bytes alive."""
        self.operations.clear()
        self.flops, self.peaks = 0, [self._live]
        return self._live

    def next_phase(self) -> None:
        """Count peaks apart from now on."""
        self.peaks.append(self._live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # asked for more often than anything else
        if self._nested:  # an operator made of others is met once
            return super().__torch_dispatch__(func, types, args, kwargs)
        self._nested = True
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._nested = False
        given, made = list(_tensors((args, kwargs))), list(_tensors(out))
        known = {_key(t) for t in given}
        for t in made:
            self._keep(t)
        self.peaks[-1] = max(self.peaks[-1], self._live + _workspace(func, args))
        if func._schema.is_mutable or any(_key(t) not in known for t in made):  # else it gives another view
            formula = flop_registry.get(func._overloadpacket)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            self.flops += flops
            first = next(iter(given or made), None)
            if first is not None and not func._overloadpacket.__name__.startswith(("empty", "new_empty")):
                moved = sum(_size(t) for t in (*given, *made))
                self.operations[Operation(_kind(func, flops), first.dtype, flops, moved)] += 1
        return out

    def _keep(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._live += storage.nbytes()
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._live -= self._sizes.pop(key)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (t for t in tree_leaves(tree) if isinstance(t, Tensor))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(tensor: Tensor) -> int:
    """Bytes; of an expanded tensor those that there are."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that an operator of this project needs while it runs; PyTorch's own need none to speak of.

    The native mixer is counted as the plain one, which needs some MiB more.
    """
    if func is torch.ops.patchscale.mix_tokens.default:
        tensors, backward, want_final, options = args[:9], False, args[15], args[9:14]
    elif func is torch.ops.patchscale.mix_tokens_backward.default:
        tensors, backward, want_final, options = args[2:11], True, args[11].ndim > 1, args[14:19]
    else:
        return 0
    projected, conv_weight, _, _, A, _, norm_weight, _, initial_state = tensors
    batch, length, _ = projected.shape
    d_inner, heads = norm_weight.shape[0], A.shape[0]
    d_state = (conv_weight.shape[0] - d_inner) // 2
    itemsize = torch.promote_types(projected.dtype, torch.float32).itemsize
    reverse, suffix, _, _, chunk_size = options
    chunks = len(chunk_bounds(length, reverse, suffix, chunk_size))
    stateless = is_stateless(chunks, initial_state, want_final)
    sizes = batch, length, d_inner, heads, d_state, itemsize
    return workspace_bytes(*sizes, backward, stateless, reverse, suffix)


def _kind(func: Any, flops: int) -> str:
    name = str(func)
    if name.startswith("patchscale."):
        return "scan"
    if "scaled_dot_product" in name:
        return "attention"
    return "matrix" if flops else "elementwise"
