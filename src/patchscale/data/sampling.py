"""Which image comes next, and with which random numbers: everything follows from the seed and the epoch."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

ROUND = 256
"""The published sampler draws a multiple of this many images an epoch."""


class Draw(NamedTuple):
    """One image of an epoch: its number in the data set, the seed of its augmentation, and whether it counts."""

    image: int
    seed: int = 0
    counts: bool = True


def order_of(images: int, epoch: int, seed: int = 0, repeats: int = 1, processes: int = 1, rank: int = 0) -> list[int]:
    """The images that one process draws in an epoch.

    A permutation of all images, each ``repeats`` times in a row, is dealt out to the processes in turn, as in the
    published code (DistributedSampler and DeiT's RASampler). So n processes, each taking b images, take together what
    one process would that takes n * b, and the repeats of an image go to different processes.

    With repeats, an epoch draws as many images as there are, rounded down to a multiple of 256; all of them where there
    are fewer than 256 (the published sampler then draws none).

    Args:
        images: size of the data set.
        epoch: from 0.
        seed: 0 gives the published order, which depends on the epoch alone.
        repeats: copies of each image (published: 3).
        processes: how many draw.
        rank: which of them this is.

    Returns:
        Indices, ``drawn // processes`` of them.
    """
    # Knuth's multiplicative hash keeps the epochs of one seed away from those of the next; the generator uses 32 bits.
    generator = torch.Generator().manual_seed((seed * 2654435761 + epoch) % 2**32)
    order = torch.randperm(images, generator=generator).repeat_interleave(repeats)
    drawn = images // ROUND * ROUND if repeats > 1 and images >= ROUND else images
    return order[rank::processes][: drawn // processes].tolist()


class EpochSampler(Sampler[Draw]):
    """The draws of one process, epoch by epoch; :meth:`go_to` chooses where to begin."""

    def __init__(self, images: int, seed: int, repeats: int = 1, processes: int = 1, rank: int = 0) -> None:
        self.images, self.seed, self.repeats, self.processes, self.rank = images, seed, repeats, processes, rank
        self.epoch = self.start = 0

    def go_to(self, epoch: int, start: int = 0) -> None:
        """Draw this epoch, from 0, next, less the first ``start`` of this process's draws."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Of a whole epoch."""
        return len(order_of(self.images, 0, 0, self.repeats, self.processes, self.rank))

    def __iter__(self) -> Iterator[Draw]:
        order = order_of(self.images, self.epoch, self.seed, self.repeats, self.processes, self.rank)
        # A seed for each place in the epoch's order, whichever process it falls to.
        seeds = seed_words(self.seed, self.epoch, count=len(order) * self.processes)[self.rank :: self.processes]
        return iter([Draw(image, int(seed)) for image, seed in zip(order, seeds, strict=True)][self.start :])


class ShareSampler(Sampler[Draw]):
    """Every image once over all processes, for evaluation.

    Each process has as many draws as the others, so that they stay in step; those that make up the number do not count.
    """

    def __init__(self, images: int, processes: int = 1, rank: int = 0) -> None:
        self.images, self.processes, self.rank = images, processes, rank

    def __len__(self) -> int:
        return -(-self.images // self.processes)

    def __iter__(self) -> Iterator[Draw]:
        own = [Draw(i) for i in range(self.rank, self.images, self.processes)]
        return iter(own + [Draw(0, counts=False)] * (len(self) - len(own)))


def draw_patch_size(patch_sizes: tuple[int, ...], seed: int, epoch: int, step: int) -> int | None:
    """The patch size of a step, each of them equally likely and the same in every process; None if there are none."""
    if not patch_sizes:
        return None
    # A path longer than that of any process's random numbers in this step, and so other words.
    return patch_sizes[int(seed_words(seed, epoch, step, 0, 1)[0]) % len(patch_sizes)]


def seed_words(*path: int, count: int = 1) -> np.ndarray:
    """``count`` independent 32-bit seeds for a place in a run: its seed, epoch, step."""
    return np.random.SeedSequence(path).generate_state(count)
