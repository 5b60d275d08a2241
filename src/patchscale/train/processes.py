"""The processes of a run: how many there are, what they agree on, and how none waits for one that has failed."""

import datetime
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from patchscale.errors import UserError, first_line
from patchscale.train.device import resolve_device
from patchscale.train.recipe import Recipe

# Longer than any honest wait for another process: evaluation and writing a checkpoint are in step.
TIMEOUT = datetime.timedelta(minutes=30)
_POLL_SECONDS = 1.0
_READ_SECONDS = 3.0
_FAILED = "patchscale/failed"


def make_fabric(recipe: Recipe) -> Fabric:
    """Lightning Fabric for the processes that torchrun or Slurm has started, or for as many as the recipe asks for.

    Raises:
        UserError: the recipe asks for other numbers than were started, for processes that cannot share its batch, or
            for what this machine cannot do.
    """
    device = resolve_device(recipe.device)
    devices, nodes = _counts(recipe)
    accelerator = {"cuda": "cuda", "mps": "mps"}.get(device.type, "cpu")
    many = devices * nodes > 1
    if accelerator == "cuda" and devices > torch.cuda.device_count():
        raise UserError(f"--devices is {devices}, this machine has {torch.cuda.device_count()} GPUs")
    if many and device.index is not None:
        raise UserError(f"--device is {recipe.device}: with {devices * nodes} processes give cuda, without a number")
    if many and accelerator == "mps":
        raise UserError("--devices above 1 needs NVIDIA GPUs or --device cpu")
    if recipe.precision == "16-mixed" and accelerator != "cuda":
        raise UserError(f"--precision 16-mixed needs an NVIDIA GPU, not {device}; bf16-mixed runs everywhere")
    if recipe.strategy == "fsdp" and recipe.precision == "16-mixed":
        raise UserError("--precision 16-mixed does not go with --strategy fsdp; use bf16-mixed")
    images_per_process(recipe.global_batch, devices * nodes)  # before so many processes are started
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    strategy: Any = "auto"
    if recipe.strategy == "fsdp":
        strategy = ModelParallelStrategy(
            shard, data_parallel_size=devices * nodes, tensor_parallel_size=1, timeout=TIMEOUT
        )
    elif many or recipe.strategy == "ddp":
        strategy = DDPStrategy(timeout=TIMEOUT)
    chosen: Any = [device.index] if device.index is not None else devices
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*`srun` command")  # one process on a machine with Slurm is fine
            return Fabric(
                accelerator=accelerator,
                strategy=strategy,
                devices=chosen,
                num_nodes=nodes,
                precision=recipe.precision,
            )
    except (ValueError, RuntimeError) as e:
        raise UserError(f"cannot run on {devices} x {nodes} {device}: {first_line(e)}") from e


def _counts(recipe: Recipe) -> tuple[int, int]:
    """Processes on each node, and nodes."""
    found, by = None, ""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        local = int(environment["LOCAL_WORLD_SIZE"])
        found, by = (local, int(environment["WORLD_SIZE"]) // local), "torchrun"
    elif "SLURM_PROCID" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(environment.get("SLURM_NNODES", "1"))
        found, by = (int(environment.get("SLURM_NTASKS", "1")) // nodes, nodes), "Slurm"
    wanted = recipe.devices or 1, recipe.nodes or 1
    if found is None:
        return wanted
    for flag, asked, there in (("--devices", recipe.devices, found[0]), ("--nodes", recipe.nodes, found[1])):
        if asked is not None and asked != there:
            raise UserError(f"{flag} is {asked}, but {by} started {there}: leave it out")
    return found


def images_per_process(global_batch: int, processes: int) -> int:
    """Images of an optimiser step on each process, so that their sum is the same on any number of devices.

    Raises:
        UserError: the processes cannot share the batch equally.
    """
    if global_batch % processes:
        below, above = global_batch // processes * processes, -(-global_batch // processes) * processes
        near = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"--global-batch is {global_batch}, which {processes} processes cannot share: try {near}")
    return global_batch // processes


def shard(module: Any, mesh: DeviceMesh) -> Any:
    """Divide a model's parameters over the processes, block by block (FSDP2)."""
    whole = mesh["data_parallel"]
    for block in getattr(module, "layers", None) or getattr(module, "blocks", ()):
        fully_shard(block, mesh=whole)
    return fully_shard(module, mesh=whole)


class Processes:
    """What the processes of a run do together; a single process is the simplest case."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.rank, self.count, self.device = fabric.global_rank, fabric.world_size, fabric.device
        self.together = self.count > 1
        self._watch = _Watch() if self.together else None

    def divide(self, module: nn.Module) -> None:
        """Divide a module's parameters over the processes, if the strategy divides those of the model."""
        if isinstance(self.fabric.strategy, ModelParallelStrategy):
            shard(module, self.fabric.strategy.device_mesh)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def total(self, *numbers: float) -> list[float]:
        """The sum of each number over the processes."""
        if not self.together:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def tell(self, value: Any) -> Any:
        """What the first process has."""
        return self.fabric.broadcast(value) if self.together else value

    def wait(self) -> None:
        """For all to come here."""
        self.fabric.barrier()

    def fail(self, error: BaseException, status: int) -> None:
        """Tell the others why this process stops, so that they stop too, with the same words."""
        if self._watch is not None:
            self._watch.report(str(error), status)

    def close(self) -> None:
        """No more watching for failures."""
        if self._watch is not None:
            self._watch.stop.set()


class _Watch(threading.Thread):
    """Ends this process when another has failed: it may be waiting for that one in a collective, for ever."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="patchscale-watch")
        self.store = dist.distributed_c10d._get_default_store()
        self.stop, self.reported = threading.Event(), False
        self.start()

    def run(self) -> None:
        while not self.stop.wait(_POLL_SECONDS):
            try:
                if not self.store.check([_FAILED]):
                    continue
                message, status = json.loads(self.store.get(_FAILED))
            except RuntimeError:  # the process that keeps the store is gone, without a word
                message, status = "the first process has gone; its output says why", 1
            if not self.stop.is_set() and not self.reported:
                print(f"patchscale: {message}", file=sys.stderr, flush=True)
                os._exit(status)

    def report(self, message: str, status: int) -> None:
        self.reported = True
        try:
            if not self.store.check([_FAILED]):
                self.store.set(_FAILED, json.dumps([message, status]))
            time.sleep(_READ_SECONDS)  # the others have to read it while the store is there
        except RuntimeError:
            pass


def gathered(tree: Any) -> Any:
    """The same, with every tensor that is divided over the processes whole; all of them have to call."""
    return _map_tensors(tree, lambda t: t.full_tensor() if isinstance(t, DTensor) else t)


def load_weights_whole(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """``load_state_dict`` of whole tensors, into a module that may be divided.

    Raises:
        RuntimeError: as ``load_state_dict``.
    """
    own = module.state_dict()
    module.load_state_dict({k: _divided_like(v, own[k]) if k in own else v for k, v in weights.items()})


def load_optimizer_whole(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``load_state_dict`` of whole tensors, into an optimiser whose parameters may be divided.

    Weight decay, betas and the like stay the optimiser's own: a run may go on with others.

    Raises:
        ValueError: as ``load_state_dict``.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def divided(index: int, values: dict[str, Any]) -> dict[str, Any]:
        like = parameters[index] if index < len(parameters) else None
        return {
            k: _divided_like(v, like) if isinstance(v, Tensor) and like is not None and v.shape == like.shape else v
            for k, v in values.items()
        }

    # All but the rate: a run that was stopped while it was evaluated still reports that of its last step.
    own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state | {"state": {i: divided(i, values) for i, values in state["state"].items()}})
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)


def _divided_like(whole: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return type(tree)((k, _map_tensors(v, function)) for k, v in tree.items())
    if isinstance(tree, list | tuple):
        return type(tree)(_map_tensors(v, function) for v in tree)
    return tree
