"""One image of a million tokens, cut over processes: how much memory and time each takes, and that nothing changes.

    torchrun --nproc-per-node 2 examples/sequence_parallel.py --compare

A small Adventurer (width 64, 2 blocks) at patch size 1 on an image of 1,120 x 896 pixels: 1,003,520 tokens, 20 times
those of a 224 x 224 image. One forward pass without gradients, one training step's forward and backward. With
``--compare`` the first process then does the same work alone and prints how far apart the results are.
"""

import argparse
import os
import resource
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from patchscale.models import Adventurer

CLASSES = 10


def run(model: Adventurer, image: Tensor, train: bool) -> tuple[dict[str, Tensor], str]:
    """Logits, with ``train`` the gradients of every parameter, and what it took."""
    start = time.perf_counter()
    with torch.no_grad():
        results = {"logits": model(image)}
    took = f"inference {time.perf_counter() - start:.1f} s"
    if train:
        start = time.perf_counter()
        torch.nn.functional.cross_entropy(model(image), torch.zeros(1, dtype=torch.long)).backward()
        took += f", training {time.perf_counter() - start:.1f} s"
        for name, parameter in model.named_parameters():
            results[name], parameter.grad = parameter.grad, None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return results, f"{took}, peak memory {peak:.2f} GiB"


def apart(actual: Tensor, expected: Tensor) -> float:
    """Relative, in the L2 norm."""
    return ((actual - expected).norm() / expected.norm()).item()


def main(arguments: list[str] | None = None) -> int:
    """Run in every process; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=1120)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--train", action="store_true", help="a training step, too")
    parser.add_argument("--compare", action="store_true", help="with one process, in the end")
    options = parser.parse_args(arguments)

    if "RANK" not in os.environ:
        print("start it with: torchrun --nproc-per-node 2 examples/sequence_parallel.py", file=sys.stderr)
        return 2
    dist.init_process_group("gloo", timeout=timedelta(hours=1))
    rank, processes = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same weights and the same image in every process
    model = Adventurer(
        (options.height, options.width),
        patch_size=1,
        num_classes=CLASSES,
        embed_dim=64,
        depth=options.depth,
        sequence_group=dist.new_group(),
    )
    image = torch.randn(1, 3, options.height, options.width)
    tokens = options.height * options.width
    if rank == 0:
        print(f"{tokens:,} tokens over {processes} processes, {torch.get_num_threads()} threads each", flush=True)

    results, took = run(model, image, options.train)
    own = model.sequence_group.slice_of(tokens)
    for turn in range(processes):
        if turn == rank:
            print(f"process {rank}: tokens {own.start:,} to {own.stop:,}, {took}", flush=True)
        dist.barrier()
    for result in results.values():  # the average, which DistributedDataParallel would take; logits are all the same
        dist.all_reduce(result)
        result /= processes
    if options.compare and rank == 0:
        model.set_sequence_group(None)
        alone, took = run(model, image, options.train)
        print(f"one process: {took} (with all of the above)")
        errors = {name: apart(results[name], expected) for name, expected in alone.items()}
        print(f"relative difference: logits {errors.pop('logits'):.1e}")
        if errors:
            worst = max(errors, key=lambda name: errors[name])
            print(f"relative difference: gradients at most {errors[worst]:.1e} ({worst})")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
