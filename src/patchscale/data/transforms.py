"""From a PIL image to a normalised tensor; timm's transforms throughout."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from timm.data.transforms import MaybeToTensor
from torch import Tensor
from torchvision.transforms import InterpolationMode, Normalize, RandomCrop, Resize

from patchscale.data.sources import Transform
from patchscale.errors import UserError, first_line

CROP_PADDING = 4
"""Pixels around an image before a simple random crop (published)."""


_SWAP_SEED = 0


class PixelSwaps:
    """The same pixels change places in every image (arXiv 2406.09415, section on pixel permutation).

    What is near in an image is then no longer near in its patches. No pixel is in two pairs: with half as many swaps as
    there are pixels, all change places.

    Args:
        img_size: height and width.
        swaps: pairs of pixels.
        distance: the two are at most so many rows and so many columns apart; any if None. (The paper's own measure of
            distance is not known.)

    Raises:
        UserError: the image does not hold as many pairs.
    """

    def __init__(self, img_size: tuple[int, int], swaps: int, distance: int | None = None) -> None:
        height, width = img_size
        random = np.random.RandomState(_SWAP_SEED)  # whose numbers are promised to stay as they are
        order = random.permutation(height * width)
        if distance is None:
            pairs = order[: len(order) // 2 * 2].reshape(-1, 2)[:swaps]
        else:
            pairs = _near_pairs(order, img_size, swaps, distance, random)
        if len(pairs) < swaps:
            near = "" if distance is None else f" at most {distance} apart"
            there = f"an image of {height}x{width} pixels has {len(pairs)} pairs{near}"
            raise UserError(f"--pixel-swaps is {swaps}, {there}: give no more")
        index = np.arange(height * width)
        index[pairs[:, 0]], index[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
        self.index = torch.from_numpy(index)

    def __call__(self, image: Tensor) -> Tensor:
        """(..., height, width) -> the same."""
        return image.flatten(-2)[..., self.index.to(image.device)].view_as(image)


def _near_pairs(
    order: np.ndarray, img_size: tuple[int, int], swaps: int, distance: int, random: np.random.RandomState
) -> np.ndarray:
    """(pairs, 2): pixels in this order, each with one of the free ones near it, as long as there are any."""
    free = np.ones(img_size, bool)
    pairs: list[tuple[int, int]] = []
    for pixel in order:
        row, column = divmod(int(pixel), img_size[1])
        if len(pairs) == swaps:
            break
        if not free[row, column]:
            continue
        free[row, column] = False
        top, left = max(row - distance, 0), max(column - distance, 0)
        rows, columns = np.nonzero(free[top : row + distance + 1, left : column + distance + 1])
        if len(rows):
            chosen = random.randint(len(rows))
            other = top + rows[chosen], left + columns[chosen]
            free[other] = False
            pairs.append((int(pixel), int(other[0] * img_size[1] + other[1])))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class Preprocessing:
    """What evaluation does to an image: resize the shorter side to size / crop, bicubic, and crop the centre.

    Stored in checkpoints, so that a model is always fed as it was trained.
    """

    img_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float
    pixel_swaps: int = 0
    """Pairs of pixels that change places last of all, in training too; see :class:`PixelSwaps`."""
    swap_distance: int | None = None

    @property
    def last_steps(self) -> list[PixelSwaps]:
        """What is done to the finished tensor."""
        return [PixelSwaps(self.img_size, self.pixel_swaps, self.swap_distance)] if self.pixel_swaps else []

    def transform(self) -> Transform:
        """PIL image -> (channels, height, width)."""
        transform: Any = create_transform(
            (self.channels, *self.img_size),
            is_training=False,
            interpolation="bicubic",
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop,
        )
        transform.transforms += self.last_steps
        return transform

    def visible(self, image: Image.Image) -> Image.Image:
        """What :meth:`transform` leaves of an image, as an image, with every pixel in its place."""
        steps: Any = self.transform()
        for step in steps.transforms:
            if not isinstance(step, Normalize | MaybeToTensor | PixelSwaps):
                image = step(image)
        return image

    def training_transform(
        self,
        crop_scale: tuple[float, float],
        hflip: float,
        color_jitter: float,
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
        simple_random_crop: bool = False,
        grayscale: float = 0.0,
    ) -> Transform:
        """PIL image -> (channels, height, width), cropped at random, flipped and changed in its colours.

        Args:
            crop_scale: range of the crop's share of the image's area.
            hflip: probability of a horizontal flip.
            color_jitter: strength in brightness, contrast and saturation; 0 for none. RandAugment replaces it.
            auto_augment: timm's name of a policy: ``"3a"`` is 3-Augment (DeiT III, arXiv 2204.07118: one of grey,
                solarised, blurred), ``"rand-m9-mstd0.5-inc1"`` RandAugment.
            random_erasing: probability of erasing a rectangle, filled with noise.
            simple_random_crop: instead of the crop above, resize the shorter side to the image size, pad 4 pixels by
                reflection and crop at random (DeiT III).
            grayscale: probability of losing all colour.

        Raises:
            UserError: timm does not know the policy.
        """
        height, width = self.img_size
        if simple_random_crop and min(height, width) <= CROP_PADDING:
            raise UserError(f"--simple-random-crop needs images of more than {CROP_PADDING} pixels on each side")
        try:
            transform: Any = create_transform(
                (self.channels, height, width),
                is_training=True,
                interpolation="bicubic",
                mean=self.mean,
                std=self.std,
                scale=crop_scale,
                hflip=hflip,
                color_jitter=color_jitter or None,  # type: ignore[arg-type]  # timm takes None for none
                auto_augment=auto_augment,
                re_prob=random_erasing,
                re_mode="pixel",
                grayscale_prob=grayscale,
            )
        except (AssertionError, KeyError, ValueError) as e:
            raise UserError(
                f"--auto-augment {auto_augment!r} is no policy that timm knows ({first_line(e)}); try 3a for "
                "3-Augment, or rand-m9-mstd0.5-inc1 for RandAugment"
            ) from e
        if simple_random_crop:
            resize = Resize(max(height, width), InterpolationMode.BICUBIC)
            crop = RandomCrop((height, width), padding=CROP_PADDING, padding_mode="reflect")
            transform.transforms[:1] = [resize, crop]
        for step in transform.transforms:
            _let_posterize_keep_no_bits(step)
        transform.transforms += self.last_steps
        return transform


def _let_posterize_keep_no_bits(step: Any) -> None:
    """At its strongest, timm's posterize keeps none of 8 bits: black, which Pillow 13 refuses instead.

    One image in some hundreds meets it under ``rand-m9-mstd0.5-inc1``.
    """
    policy = [op for several in getattr(step, "policy", []) for op in several]
    for op in [*getattr(step, "ops", []), *policy]:
        if getattr(op, "aug_fn", None) is posterize:
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    return posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)
