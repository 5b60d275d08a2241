"""From a PIL image to a normalised tensor; timm's transforms throughout."""

from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.transforms import MaybeToTensor
from torchvision.transforms import Normalize

from patchscale.data.sources import Transform


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

    def training_transform(self, crop_scale: tuple[float, float], hflip: float, color_jitter: float) -> Transform:
        """PIL image -> (channels, height, width), by a random resized crop, a flip and colour jitter.

        Args:
            crop_scale: range of the crop's share of the image's area.
            hflip: probability of a horizontal flip.
            color_jitter: strength in brightness, contrast and saturation; 0 for none.
        """
        return create_transform(
            (self.channels, *self.img_size),
            is_training=True,
            interpolation="bicubic",
            mean=self.mean,
            std=self.std,
            scale=crop_scale,
            hflip=hflip,
            color_jitter=color_jitter or None,  # type: ignore[arg-type]  # timm takes None for none
        )
