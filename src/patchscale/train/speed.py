"""How fast a run is, what it waits for, and how much of its device it uses."""

import copy
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from patchscale.data.transforms import Preprocessing
from patchscale.ops.linear import linear
from patchscale.train.processes import Processes

_WARM_UP_STEPS = 10
_SLOW_LOADER = 0.2  # of the time


class Speed:
    """Measures a run from its start, or from when it went on.

    Args:
        model: not yet divided over processes.
        preprocessing: says what an image's tensor is like.
        precision: the recipe's.
        processes: of the run.
        patch_sizes: that steps are drawn from, if any.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        precision: str,
        processes: Processes,
        patch_sizes: tuple[int, ...] = (),
    ) -> None:
        self.device, self.count = processes.device, processes.count
        self._flops = _training_flops(model, preprocessing, patch_sizes) if processes.is_first else None
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "64-true": torch.float64}
        self._peak = matrix_peak(self.device, dtype.get(precision, torch.float32)) if self._flops else None
        self._steps = self._images = 0
        self._busy = self._waited = 0.0
        self._told = False

    def start(self) -> None:
        """Images are waited for from now on."""
        self._mark = time.perf_counter()
        self._waiting = 0.0

    def has_images(self) -> None:
        """They are here."""
        self._waiting = time.perf_counter() - self._mark

    def did(self, images: int) -> float:
        """A step was done, and the next images are waited for; returns its seconds, waiting included."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self._steps += 1
        if self._steps > 1:  # the first warms up
            self._busy += seconds
            self._waited += self._waiting
            self._images += images
        else:
            self._first = images / seconds
        return seconds

    @property
    def images_per_second(self) -> float:
        return self._images / self._busy if self._busy else self._first

    @property
    def waiting(self) -> float:
        """Share of the time that goes by waiting for images."""
        return self._waited / self._busy if self._busy else 0.0

    @property
    def memory(self) -> int | None:
        """Most bytes in use on a GPU so far."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    @property
    def utilisation(self) -> float | None:
        """Of the measured matrix peak of all devices, what the model's FLOPs take, nothing recomputed counted."""
        if not self._flops or not self._peak or not self._busy:
            return None
        return self.images_per_second * self._flops / (self._peak * self.count)

    def loader_is_slow(self) -> bool:
        """True once, when it is clear that reading images holds up the run."""
        if self._told or self._steps < _WARM_UP_STEPS or self.waiting < _SLOW_LOADER:
            return False
        self._told = True
        return True


def _training_flops(model: nn.Module, preprocessing: Preprocessing, patch_sizes: tuple[int, ...]) -> float | None:
    """FLOPs of one image forward and backward, the mean over patch sizes."""
    counts = [forward_flops(model, preprocessing, size) for size in patch_sizes or (None,)]
    known = [count for count in counts if count is not None]
    return 3 * sum(known) / len(known) if len(known) == len(counts) else None  # a backward pass is twice a forward


def forward_flops(model: nn.Module, preprocessing: Preprocessing, patch_size: int | None = None) -> int | None:
    """FLOPs of one image; None for a model that cannot be counted."""
    try:
        shapes = copy.deepcopy(model).to("meta").float()
        return count_flops(shapes, preprocessing.channels, preprocessing.img_size, patch_size=patch_size)
    except (RuntimeError, NotImplementedError, ValueError):
        return None


def count_flops(
    model: nn.Module,
    channels: int,
    img_size: tuple[int, int],
    training: bool = False,
    patch_size: int | None = None,
) -> int:
    """FLOPs of one image, by PyTorch's counter (a product and a sum are two) on tensors without data.

    Args:
        model: on the meta device; left in evaluation or training, whichever was counted.
        channels: of an image.
        img_size: height and width in pixels.
        training: forward and backward instead of forward alone.
        patch_size: that the model is called with, if not its own.
    """
    image = torch.empty(1, channels, *img_size, device="meta")
    model.train(training)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        out = model(image, **({} if patch_size is None else {"patch_size": patch_size}))
        if training:
            (out[0] if isinstance(out, tuple) else out).sum().backward()
    return counter.get_total_flops()


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of a few."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        linear(a, a)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
