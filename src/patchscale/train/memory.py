"""How many images a CPU takes at once. Where a GPU raises an error, the system ends a process without a word."""

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

from patchscale.models.backbone import Backbone
from patchscale.models.tokens import grid_size
from patchscale.train.cost import training_cost
from patchscale.train.recipe import Precision

# Of the memory, for one run: another may go on beside it, and images wait in it.
_SHARE = 0.5
# No family keeps more bytes than these for each token, channel and block: 64 numbers. Most steps need so little of the
# memory that no closer look is worth its second.
_MOST_BYTES = 4 * 64


def images_that_fit(
    model: nn.Module,
    img_size: tuple[int, int],
    images: int,
    precision: Precision,
    patch_sizes: tuple[int, ...] = (),
    memory: int | None = None,
) -> int:
    """How many of a step's images fit at once, at most; by the cost model, within half of the memory. 0: not even one.

    It depends on the machine, not on what else runs there, so that a run that goes on is cut as it was.

    Args:
        model: of this library; of others all images are taken to fit. Blocks may be recomputed.
        img_size: height and width in pixels.
        images: of a step.
        precision: as in a recipe.
        patch_sizes: that steps are drawn from, if any.
        memory: in bytes, for this process; by default this machine's.
    """
    if not isinstance(model, Backbone):
        return images
    room = int(_SHARE * (memory_here() if memory is None else memory))
    finest = min(patch_sizes, default=model.patch_embed.patch_size)
    rows, columns = (side * model.patch_embed.extend for side in grid_size(img_size, finest))
    if images * rows * columns * model.embed_dim * len(model.feature_info) * _MOST_BYTES < room:
        return images
    if patch_sizes:
        model = copy.deepcopy(model)
        model.set_input_size(patch_size=finest)

    def peak_of(number: int) -> int:
        return training_cost(model, img_size, number, precision).peak

    peak = peak_of(images)
    return images if peak <= room else largest_batch(peak_of, room, (images, peak))


def tight(memory: int) -> str:
    """What to say where not one image fits. The estimate may be too high: it is tried all the same."""
    return (
        f"a single image may need more than half of the {memory / 2**30:.3g} GiB of memory, and the system may end "
        "this without a word: larger patches, smaller images or a smaller --extend need less"
    )


def largest_batch(peak_of: Callable[[int], int], room: int, known: tuple[int, int]) -> int:
    """The most images whose peak is within the room, 0 if not one's is; the peak grows nearly evenly with them.

    Args:
        peak_of: bytes that so many images take.
        room: bytes.
        known: a number of images, and their peak.
    """
    low, high = (0, 0), known
    if known[1] <= room:
        low, high = high, (2 * known[0], peak_of(2 * known[0]))
    while high[1] <= room:
        batch = max(high[0] + 1, int(high[0] + (room - high[1]) * (high[0] - low[0]) / max(1, high[1] - low[1])))
        low, high = high, (batch, peak_of(batch))
    if low[0] == 0:
        one = peak_of(1)
        if one > room:
            return 0
        low = (1, one)
    while high[0] - low[0] > 1:
        share = (room - low[1]) / max(1, high[1] - low[1])
        batch = min(high[0] - 1, max(low[0] + 1, int(low[0] + share * (high[0] - low[0]))))
        peak = peak_of(batch)
        if peak <= room:
            low = (batch, peak)
            if room - peak < (high[1] - low[1]) / max(1, high[0] - low[0]):
                break  # one more would not fit
        else:
            high = (batch, peak)
    return low[0]


def memory_here() -> int:
    """Bytes that this machine has, or that its container may use; without limit where Python cannot tell (Windows)."""
    try:
        here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return sys.maxsize
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            here = min(here, int(Path(limit).read_text()))
        except (OSError, ValueError):  # none, or "max"
            continue
    return here
