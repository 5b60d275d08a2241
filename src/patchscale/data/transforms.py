"""From a PIL image to a normalised tensor; timm's transforms throughout."""

from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.transforms import MaybeToTensor
from torchvision.transforms import InterpolationMode, Normalize, RandomCrop, Resize

from patchscale.data.sources import Transform
from patchscale.errors import UserError, first_line

CROP_PADDING = 4
"""Pixels around an image before a simple random crop (published)."""


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

    def transform(self) -> Transform:
        """PIL image -> (channels, height, width)."""
        return create_transform(
            (self.channels, *self.img_size),
            is_training=False,
            interpolation="bicubic",
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop,
        )

    def visible(self, image: Image.Image) -> Image.Image:
        """What :meth:`transform` leaves of an image, as an image."""
        steps: Any = self.transform()
        for step in steps.transforms:
            if not isinstance(step, Normalize | MaybeToTensor):
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
        return transform
