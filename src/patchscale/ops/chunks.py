"""How the scan cuts a sequence: into chunks, blocks of chunks that fit the cache, and groups of a batch's samples."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Longer chunks move fewer states, but compute more, and more heads decay too strongly in one for factors.
DEFAULT_CHUNK_SIZE = 64

# Elements of x in a block: 1.5 MiB in float32, found best on a core with 1 MiB of L2; smaller ones pay for more calls.
_BLOCK_ELEMENTS = 393216


class Block(NamedTuple):
    """Chunks of equal length, side by side, that the scan meets from one end."""

    start: int
    stop: int
    chunks: int
    place: int  # among the blocks, counted as tokens stand
    first: int  # its first chunk's number, likewise
    reverse: bool
    seen: Tensor  # (t, s): 1 where s is not after t in scan order, else 0
    unseen: Tensor  # the opposite, as truth values

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def numbers(self) -> slice:
        """Of its chunks."""
        return slice(self.first, self.first + self.chunks)

    @property
    def in_scan_order(self) -> range:
        """Places in the block."""
        return range(self.chunks - 1, -1, -1) if self.reverse else range(self.chunks)


class Plan(NamedTuple):
    """How a sequence is cut into chunks and blocks; chunks are numbered as tokens stand."""

    reverse: bool  # whether tokens are scanned from the right,
    body: int  # as far as these are concerned
    chunks: int
    blocks: tuple[Block, ...]  # in scan order
    block_tokens: tuple[int, ...]  # how many tokens and chunks the blocks have, as tokens stand
    block_chunks: tuple[int, ...]
    preceding: Tensor  # of every chunk, the one before it in scan order (their number if none); then the last chunk
    padded: Tensor  # (chunk, place in scan order): the token there, or the length where there is none
    place: Tensor  # (token,): where it stands in ``padded``, flattened
    chunk_of: Tensor  # (token,)
    starts: Tensor  # (chunks + 1,), on the CPU: the places in the scan where they start, and its length
    samples: int  # of a batch at a time

    def groups(self, batch: int) -> list[slice]:
        """Of samples, in so large a batch."""
        return [slice(s, min(s + self.samples, batch)) for s in range(0, batch, self.samples)]


@functools.lru_cache(maxsize=64)
def plan(
    length: int,
    reverse: bool,
    suffix: int,
    chunk_size: int,
    samples: int,
    chunks_per_block: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Plan:
    """Cut a sequence; a suffix that follows a reversed body has chunks of its own."""
    with torch.device("cpu"):  # whatever the caller's default is
        bounds = chunk_bounds(length, reverse, suffix, chunk_size)
        runs = cut_into_runs(length, reverse, suffix, chunk_size, chunks_per_block)
        order = [i for run in runs for i in run.chunks]
        preceding = torch.empty(len(bounds) + 1, dtype=torch.long)
        for i, j in itertools.pairwise([len(bounds), *order, len(bounds)]):
            preceding[j] = i

        padded = torch.full((len(bounds), max((e - s for s, e in bounds), default=1)), length)
        chunk_of = torch.empty(length, dtype=torch.long)
        for run in runs:
            for i in run.chunks:
                tokens = torch.arange(*bounds[i])
                padded[i, : run.size] = tokens.flip(0) if run.reverse else tokens
                chunk_of[tokens] = i
        place = torch.empty(length + 1, dtype=torch.long)
        place[padded.flatten()] = torch.arange(padded.numel())

        seen: dict[tuple[int, bool], Tensor] = {}
        blocks = []
        places = {first: place for place, first in enumerate(sorted(min(run.chunks) for run in runs))}
        for run in runs:
            first = min(run.chunks)
            if (run.size, run.reverse) not in seen:
                ones = torch.ones(run.size, run.size, dtype=dtype, device=device)
                seen[run.size, run.reverse] = ones.triu() if run.reverse else ones.tril()
            mask = seen[run.size, run.reverse]
            start, stop = bounds[first][0], bounds[max(run.chunks)][1]
            blocks.append(Block(start, stop, len(run.chunks), places[first], first, run.reverse, mask, mask == 0))
        standing = sorted(blocks, key=lambda block: block.start)
        return Plan(
            reverse,
            length - suffix if reverse else length,
            len(bounds),
            tuple(blocks),
            tuple(block.stop - block.start for block in standing),
            tuple(block.chunks for block in standing),
            preceding.to(device),
            padded.to(device),
            place[:length].to(device),
            chunk_of.to(device),
            torch.tensor([0, *itertools.accumulate(bounds[i][1] - bounds[i][0] for i in order)]),
            samples,
        )


def chunk_bounds(length: int, reverse: bool, suffix: int, chunk_size: int) -> list[tuple[int, int]]:
    """(start, stop) of the chunks: all of one size but the body's last, which takes what is left, and a suffix's."""
    body = length - suffix if reverse else length
    starts = [chunk_size * i for i in range(_number_of_chunks(body, chunk_size))]
    bounds = [*itertools.pairwise([*starts, body])]
    return bounds + [(s, min(s + chunk_size, length)) for s in range(body, length, chunk_size)]


def _number_of_chunks(length: int, chunk_size: int) -> int:
    return max(1, round(length / chunk_size)) if length else 0


class Run(NamedTuple):
    """Chunks that are a block."""

    chunks: list[int]  # their numbers, in scan order
    size: int  # of each
    reverse: bool


def cut_into_runs(length: int, reverse: bool, suffix: int, chunk_size: int, most: int) -> list[Run]:
    """In scan order: chunks that are alike and stand side by side, at most so many at a time."""
    bounds = chunk_bounds(length, reverse, suffix, chunk_size)
    from_right = [reverse and stop <= length - suffix for _, stop in bounds]
    order = [i for i in reversed(range(len(bounds))) if from_right[i]]
    order += [i for i in range(len(bounds)) if not from_right[i]]

    def kind(i: int) -> tuple[int, bool]:
        return bounds[i][1] - bounds[i][0], from_right[i]

    runs: list[Run] = []
    for alike, group in itertools.groupby(order, kind):
        chunks = [*group]
        # In as few runs as with the most in each, but the last much like the others.
        count = math.ceil(len(chunks) / math.ceil(len(chunks) / most))
        runs += [Run(chunks[i : i + count], *alike) for i in range(0, len(chunks), count)]
    return runs


def take(samples: slice, *tensors: Tensor | None) -> list[Any]:
    """Of those samples; None stays None."""
    return [None if tensor is None else tensor[samples] for tensor in tensors]


def is_stateless(chunks: int, initial_state: Tensor | None, want_final: bool) -> bool:
    """Whether a scan is one masked product: so many chunks, no state before them, and none wanted after them."""
    return chunks == 1 and initial_state is None and not want_final


def is_one_chunk(length: int) -> bool:
    """Whether so many tokens, scanned in one direction, are a single chunk."""
    return _number_of_chunks(length, DEFAULT_CHUNK_SIZE) == 1


def cut(x: Tensor, length: int, width: int, reverse: bool, suffix: int, chunk_size: int) -> Plan:
    """The plan of so many of the tokens (batch, length, ...); a block of a group of samples fits the cache.

    width: heads * headdim.
    """
    sizes = group_and_block(x.shape[0], length, width, chunk_size)
    return plan(length, reverse, suffix, chunk_size, *sizes, work_dtype(x), x.device)


def group_and_block(batch: int, length: int, width: int, chunk_size: int) -> tuple[int, int]:
    """How many samples are a group, and how many chunks a block at most; width: heads * headdim."""
    chunk_elements = max(1, min(chunk_size, length) * width)
    samples = min(max(1, _BLOCK_ELEMENTS // chunk_elements), max(1, batch))
    return samples, max(1, _BLOCK_ELEMENTS // (chunk_elements * samples))


def work_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
