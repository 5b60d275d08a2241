"""What training costs at every patch size, before it is paid: arithmetic, memory and time, of attention and the scan.

Arithmetic and memory come from the cost model (`cost.py`). Time on this machine is measured on shorter steps of the
same model and carried over to the real one in the proportion that the cost model says; time on a GPU that is not here
is the cost model's alone.
"""

import difflib
import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import tyro
from timm.layers import to_2tuple
from torch import nn

from patchscale.bench.measure import ceilings
from patchscale.errors import UserError
from patchscale.models.adventurer import Adventurer
from patchscale.models.published import check_model_name
from patchscale.models.tokens import grid_size
from patchscale.train.build import create_model
from patchscale.train.cost import GPUS, RECOMPUTE, Cost, Machine, Recompute, autocast_of, blocks_of, training_cost
from patchscale.train.device import resolve_device
from patchscale.train.memory import largest_batch
from patchscale.train.recipe import Precision

# Steps are cut short to about so many seconds, at fewest to so many blocks of one image. Four times as many images take
# four times as long at most, and less where the calls themselves, not the arithmetic, take the time.
_PROBE_SECONDS = 0.5
_MOST_SECONDS = 4.0
_PROBE_BLOCKS = 4
_PROBE_ROUNDS = 3
_MAX_ROUNDS = 30
# Of the memory to be fitted, what fragmentation and the device's own needs may take.
SPARE = 0.05
_UNITS = {"B": 1} | {f"{p}{b}": base**i for b, base in (("B", 1000), ("iB", 1024)) for i, p in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class Options:
    """What is to be trained, and where."""

    model: tyro.conf.Positional[str]
    """A name that `patchscale models` lists, or a timm vision transformer's."""
    img_size: int | None = None
    """Image size in pixels; by default the one in the model's name."""
    patch_sizes: tuple[int, ...] = (16, 8, 4, 2, 1)
    """Patch sizes in pixels."""
    embed_dim: int | None = None
    """Width; by default the model's."""
    depth: int | None = None
    """Blocks; by default the model's."""
    num_classes: int = 1000
    """Classes of the head."""
    batch_size: int = 64
    """Images a step, on one device."""
    images: int = 1_281_167
    """Images an epoch; by default ImageNet-1k's."""
    precision: Precision = "32-true"
    """As in training."""
    gpu: str | None = None
    """Estimate the time on this GPU from its published peaks; by default it is measured here."""
    device: str | None = None
    """Measure on this one (cpu, cuda, ...); by default the GPU where there is one."""
    fit_memory: str | None = None
    """Say also how many images a step fit into so much memory (80GiB), and what must be recomputed."""
    plot: Path | None = None
    """Draw time, memory and FLOPs by tokens here, as PNG."""


@dataclass(frozen=True)
class Row:
    """One model at one patch size."""

    subject: "Subject"
    patch_size: int
    costs: dict[Recompute, Cost]
    """By what is recomputed."""
    seconds: float
    """Of a training step that recomputes nothing."""

    @property
    def family(self) -> str:
        """scan or attention."""
        return self.subject.family

    @property
    def cost(self) -> Cost:
        return self.costs["nothing"]


@dataclass(frozen=True)
class Subject:
    """A model at any patch size."""

    name: str
    arguments: dict[str, Any]
    img_size: tuple[int, int]
    family: str
    embed_dim: int
    depth: int

    def make(self, device: str = "meta", **changes: Any) -> nn.Module:
        """The model, or one with other arguments."""
        with torch.device(device):
            return create_model(self.name, self.arguments | {"img_size": self.img_size} | changes)

    def cost(
        self,
        patch_size: int,
        batch: int,
        precision: Precision,
        recompute: Recompute = "nothing",
        depth: int | None = None,
    ) -> Cost:
        """Of a training step, of all blocks unless a depth is given.

        Of a deep model, the cost is that of a few blocks, and of as many more as there are. Every second block of an
        Adventurer scans from the right, so they are counted in pairs.
        """
        depth = self.depth if depth is None else depth
        alike = 2 if self.family == "scan" else 1
        more, odd = divmod(depth - 2, alike)
        costs = [
            training_cost(self.make(patch_size=patch_size, depth=d), self.img_size, batch, precision, recompute)
            for d in ([depth] if odd or depth <= 2 + alike else [2, 2 + alike])
        ]
        return costs[0] if len(costs) == 1 else costs[0].repeat(costs[1], more)


def subjects(options: Options) -> list[Subject]:
    """The model asked for, then one of the other family of the same width and depth.

    Raises:
        UserError: no such model, one without patches, or a patch size that does not divide the image.
    """
    check_model_name(options.model)
    given = {"embed_dim": options.embed_dim, "depth": options.depth, "num_classes": options.num_classes}
    arguments = {name: value for name, value in given.items() if value is not None}
    own_size = timm.get_pretrained_cfg(options.model).input_size[-1]  # type: ignore[union-attr]
    img_size = to_2tuple(own_size if options.img_size is None else options.img_size)
    if not options.patch_sizes:
        raise UserError("--patch-sizes names none")
    twice = next((size for size in options.patch_sizes if options.patch_sizes.count(size) > 1), None)
    if twice is not None:
        raise UserError(f"--patch-sizes names {twice} twice")
    for patch_size in options.patch_sizes:
        grid_size(img_size, patch_size)
    counts = {"batch-size": options.batch_size, "images": options.images, "num-classes": options.num_classes}
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"--{name} is {value}, expected at least 1")
    with torch.device("meta"):
        model: Any = create_model(options.model, {})
    if blocks_of(model) is None or not hasattr(getattr(model, "patch_embed", None), "patch_size"):
        raise UserError(
            f"{options.model} has no patches of a size to choose: take an Adventurer or a vision transformer"
        )
    family = "scan" if isinstance(model, Adventurer) else "attention"
    width = model.embed_dim if options.embed_dim is None else options.embed_dim
    depth = len(model.layers if family == "scan" else model.blocks) if options.depth is None else options.depth
    if depth < 1:
        raise UserError(f"--depth is {depth}, expected at least 1")
    if family == "attention" and options.embed_dim is not None:
        arguments["num_heads"] = _heads(width)
    asked = Subject(options.model, arguments, img_size, family, width, depth)
    asked.make(patch_size=max(options.patch_sizes))  # refuses a width that it cannot have
    return [asked, _counterpart(asked, options)]


def _counterpart(asked: Subject, options: Options) -> Subject:
    sizes = {"embed_dim": asked.embed_dim, "depth": asked.depth, "num_classes": options.num_classes}
    if asked.family == "attention":
        return replace(asked, name="adventurer_tiny_patch16_224", arguments=sizes, family="scan")
    sizes["num_heads"] = _heads(asked.embed_dim)
    return replace(asked, name="deit_tiny_patch16", arguments=sizes, family="attention")


def _heads(embed_dim: int) -> int:
    """DeiT's heads have 64 channels (arXiv 2012.12877, table 1); where the width cannot be shared so, larger ones."""
    return next(heads for heads in range(max(1, embed_dim // 64), 0, -1) if embed_dim % heads == 0)


def plan(options: Options, note: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Cost and time of a training step, patch size by patch size.

    Args:
        options: what, and where.
        note: told what is being done.

    Returns:
        A row for each patch size of the model asked for, then of its counterpart.

    Raises:
        UserError: as :func:`subjects`, an unknown GPU or device, or both.
    """
    every = subjects(options)
    if options.gpu is not None and options.device is not None:
        raise UserError("--gpu is an estimate and --device is measured on: give one of them")
    machine = find_gpu(options.gpu) if options.gpu is not None else None
    device = torch.device("meta") if machine is not None else resolve_device(options.device)
    measured = None if machine is not None else measure_machine(device, options.precision)
    rows = []
    for subject in every:
        for patch_size in options.patch_sizes:
            note(f"{subject.name}, patch {patch_size}")
            costs = {
                recompute: subject.cost(patch_size, options.batch_size, options.precision, recompute)
                for recompute in possible(subject.make(patch_size=patch_size))
            }
            if measured is None:
                assert machine is not None
                seconds = costs["nothing"].seconds_at_best(machine)
            else:
                seconds = probe(subject, patch_size, costs["nothing"], options.precision, device, measured)
            rows.append(Row(subject, patch_size, costs, seconds))
    return rows


def possible(model: nn.Module) -> list[Recompute]:
    """What a model can recompute."""
    return [r for r in RECOMPUTE if r != "all but products" or hasattr(model, "keep_products")]


def find_gpu(name: str) -> Machine:
    """A GPU by name, capitals, spaces and NVIDIA's own name aside.

    Raises:
        UserError: an unknown one; names near ones.
    """
    key = re.sub(r"nvidia|geforce|[\s_-]+", "", name.lower())
    known = {gpu.replace("-", ""): machine for gpu, machine in GPUS.items()}
    if key not in known:
        near = difflib.get_close_matches(name.lower(), GPUS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(GPUS)}"
        raise UserError(f"unknown GPU {name!r}; {hint}")
    return known[key]


def measure_machine(device: torch.device, precision: Precision) -> Machine:
    """What a device here does at best; takes a second."""
    dtypes = {"32-true": [torch.float32], "64-true": [torch.float64], "16-mixed": [torch.float32, torch.float16]}
    found = {dtype: ceilings(device, dtype) for dtype in dtypes.get(precision, [torch.float32, torch.bfloat16])}
    per_call = 1e-5
    return Machine(
        str(device), {d: c.flops for d, c in found.items()}, max(c.bandwidth for c in found.values()), per_call
    )


def probe(
    subject: Subject, patch_size: int, cost: Cost, precision: Precision, device: torch.device, machine: Machine
) -> float:
    """Seconds of a training step, from shorter ones on this device.

    Images are left out until a step takes a moment. What one more image takes comes from steps on two numbers of them:
    time need not be in proportion, least where there are few tokens. Where even one image takes long, blocks are left
    out and then tokens; the cost model then says what share of the real step was measured.

    Args:
        subject: the model.
        patch_size: in pixels.
        cost: of the real step.
        precision: as in training.
        device: where to measure.
        machine: its peaks.
    """
    rows, columns = grid_size(subject.img_size, patch_size)
    depth = subject.depth
    while True:
        cut = replace(subject, img_size=(rows * patch_size, columns * patch_size))
        if cut.cost(patch_size, 1, precision, depth=depth).seconds_at_best(machine) < _PROBE_SECONDS:
            break
        if depth > _PROBE_BLOCKS:
            depth = max(_PROBE_BLOCKS, depth // 2)
        elif min(rows, columns) >= 64:
            rows, columns = rows // 2, columns // 2
        else:
            break
    every = [depth] if depth == subject.depth else [1, depth]
    steps = [
        training_step(cut.make("cpu", patch_size=patch_size, depth=d), cut.img_size, precision, device) for d in every
    ]
    fewer, images = 0, 1
    while images < cost.batch and 4 * time_in_turn([partial(steps[-1], images)], 1)[0][0] < _MOST_SECONDS:
        fewer, images = images, min(4 * images, cost.batch)
    counts = [images] if images == cost.batch or not fewer else [fewer, images]
    calls = [partial(step, number) for number in counts for step in steps]
    times = [min(own) for own in time_in_turn(calls, _PROBE_ROUNDS, 2 * _PROBE_SECONDS)]
    totals = times
    if len(steps) > 1:  # of one block and of several, by number of images
        pairs = zip(times[::2], times[1::2], strict=True)
        totals = [one + (subject.depth - 1) * (some - one) / (depth - 1) for one, some in pairs]
    if cut.img_size == subject.img_size and counts[-1] == cost.batch:
        return totals[-1]
    if cut.img_size == subject.img_size and len(counts) > 1:
        return totals[-1] + (cost.batch - images) * (totals[-1] - totals[0]) / (images - fewer)
    measured = cut.cost(patch_size, images, precision)
    return totals[-1] * cost.seconds_at_best(machine) / measured.seconds_at_best(machine)


def training_step(
    model: nn.Module, img_size: tuple[int, int], precision: Precision, device: torch.device
) -> Callable[[int], None]:
    """A step of AdamW, to be called with a number of images; they are random."""
    dtype = torch.float64 if precision == "64-true" else torch.float32
    model = model.to(device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-8, fused=True)
    patch_embed: Any = model.patch_embed

    def step(number: int) -> None:
        images = torch.zeros(number, patch_embed.proj.in_channels, *img_size, device=device, dtype=dtype)
        labels = torch.zeros(number, dtype=torch.long, device=device)
        with autocast_of(precision, device.type):
            logits = model(images)
        F.cross_entropy(logits.to(torch.promote_types(dtype, torch.float32)), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return step


def time_in_turn(calls: Sequence[Callable[[], None]], rounds: int, at_least: float = 0.0) -> list[list[float]]:
    """Seconds of each call, one after the other, so that a slow spell meets all.

    On one thread these are the processor's seconds: what other programs on the same core take is not in them.

    Args:
        calls: what to time.
        rounds: how often at least, after a round that warms up.
        at_least: seconds that all of it takes at least; short calls are timed more often, `_MAX_ROUNDS` at most.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in calls]
    for number in range(1 + max(rounds, _MAX_ROUNDS)):
        if number > rounds and sum(map(sum, times)) >= at_least:
            break
        for call, own in zip(calls, times, strict=True):
            start = clock()
            call()
            if number:
                own.append(clock() - start)
    return times


@dataclass(frozen=True)
class Fit:
    """How many images a step fit into memory."""

    patch_size: int
    recompute: Recompute
    batch: int
    """The most; 0 if not one does."""


def fit_memory(options: Options, rows: Sequence[Row], memory: int) -> list[Fit]:
    """The largest batches of the model asked for, by patch size and by what is recomputed, cheapest first.

    A twentieth of the memory is left to fragmentation and to what the device itself needs.

    Args:
        options: the plan's.
        rows: the plan.
        memory: bytes.
    """
    subject = rows[0].subject
    room = int(memory * (1 - SPARE))
    fits = []
    for row in rows:
        if row.subject is not subject:
            continue
        for recompute, cost in row.costs.items():

            def peak_of(batch: int, patch_size: int = row.patch_size, recompute: Recompute = recompute) -> int:
                return subject.cost(patch_size, batch, options.precision, recompute).peak

            batch = largest_batch(peak_of, room, (cost.batch, cost.peak))
            fits.append(Fit(row.patch_size, recompute, batch))
    return fits


def read_memory(text: str) -> int:
    """Bytes of a size such as 80GiB or 500MB.

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)\s*", text)
    if match is None or not float(match[1]):
        raise UserError(f"--fit-memory is {text!r}, expected a number and a unit, as in 80GiB or 512MB")
    return int(float(match[1]) * _UNITS[match[2]])


def crossovers(rows: Sequence[Row]) -> dict[str, str]:
    """By FLOPs, time and peak memory of a training step: from how many tokens on the scan takes less than attention.

    Between two patch sizes, the ratio of the two is taken for a power of the number of tokens.
    """
    of: dict[str, Callable[[Row], float]] = {
        "FLOPs": lambda row: row.cost.training_flops,
        "time": lambda row: row.seconds,
        "memory": lambda row: row.cost.peak,
    }
    return {name: _crossover(rows, value) for name, value in of.items()}


def _crossover(rows: Sequence[Row], value: Callable[[Row], float]) -> str:
    points: dict[int, dict[str, float]] = {}
    for row in rows:
        points.setdefault(row.cost.tokens, {})[row.family] = value(row)
    ratios = [(tokens, math.log(at["scan"] / at["attention"])) for tokens, at in sorted(points.items())]
    (first, start), (last, _) = ratios[0], ratios[-1]
    for (before, above), (after, below) in itertools.pairwise(ratios):
        if above > 0 >= below:
            where = math.exp(math.log(before) + math.log(after / before) * above / (above - below))
            return f"the scan takes less from about {where:,.0f} tokens on"
    less = "scan" if start <= 0 else "attention"
    if first == last:
        return f"{less} takes less at {first:,} tokens"
    return f"{less} takes less throughout, from {first:,} to {last:,} tokens"
