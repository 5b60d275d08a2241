"""JPEG files decoded, cropped and normalised where the model computes, instead of by the loader's workers.

Data-centre GPUs decode JPEG in hardware, where a machine's CPU cores may be too few to feed a small model. The pictures
differ a little from those of the workers: decoders and resizing on tensors round otherwise than PIL.
"""

import random
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.io import decode_jpeg
from torchvision.transforms import InterpolationMode, v2

from patchscale.data.sampling import Draw
from patchscale.data.sources import Source, Unreadable, path_of
from patchscale.data.transforms import Preprocessing
from patchscale.errors import UserError, first_line

_JPEG = b"\xff\xd8\xff"


class Encoded(NamedTuple):
    """A JPEG file's bytes, on their way to the device."""

    data: Tensor
    seed: int | None
    """Of the augmentation."""
    path: str


class EncodedFiles(Dataset):
    """A source's files as they are; ``[i]`` is (:class:`Encoded`, class index), or an :class:`Unreadable`.

    Raises:
        UserError: the data set is not one of image files.
    """

    def __init__(self, source: Source) -> None:
        self.dataset = inner = source.dataset
        while isinstance(inner, Subset):
            inner = inner.dataset
        if not hasattr(inner, "samples"):
            raise UserError("--decode device needs data in files of their own (folder:PATH, inat:PATH)")

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, item: int | Draw) -> tuple[Encoded, int] | Unreadable:
        index = item.image if isinstance(item, Draw) else item
        path, label = path_of(self.dataset, index), label_of(self.dataset, index)
        try:
            data = Path(path).read_bytes()
        except OSError as e:
            return Unreadable(path, first_line(e))
        if not data.startswith(_JPEG):
            return Unreadable(path, "not a JPEG file, which --decode device needs")
        counts = not isinstance(item, Draw) or item.counts
        bytes_ = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return Encoded(bytes_, item.seed if isinstance(item, Draw) else None, path), label if counts else -1


def label_of(dataset: Any, index: int) -> int:
    """An image's class, without reading it."""
    while hasattr(dataset, "indices"):  # a subset
        dataset, index = dataset.dataset, dataset.indices[index]
    return int(dataset.samples[index][1])


def collate_encoded(items: list[tuple[Encoded, int] | Unreadable]) -> tuple[list[Encoded], Tensor, list[Unreadable]]:
    """(files, labels (n,), the unreadable ones, which are left out of both)."""
    good = [item for item in items if not isinstance(item, Unreadable)]
    labels = torch.tensor([label for _, label in good], dtype=torch.long)
    return [file for file, _ in good], labels, [item for item in items if isinstance(item, Unreadable)]


class Decoder:
    """Makes batches of images out of files' bytes, on a device.

    Args:
        preprocessing: of the run.
        augmentation: crop_scale, hflip, color_jitter and random_erasing as
            :meth:`~patchscale.data.transforms.Preprocessing.training_transform` takes them; None to evaluate.
        device: an NVIDIA GPU decodes in hardware where it can; a CPU does the same work, for tests.

    Raises:
        UserError: images that are not square.
    """

    def __init__(self, preprocessing: Preprocessing, augmentation: dict[str, Any] | None, device: torch.device) -> None:
        self.device, self.mode = device, "RGB" if preprocessing.channels == 3 else "GRAY"
        bicubic, size = InterpolationMode.BICUBIC, preprocessing.img_size
        if size[0] != size[1]:
            raise UserError(f"--decode device makes square images, not {size[0]} x {size[1]}; use --decode workers")
        steps: list[Any]
        if augmentation is None:
            steps = [v2.Resize(int(size[0] / preprocessing.crop), bicubic), v2.CenterCrop(size)]
        else:
            steps = [v2.RandomResizedCrop(size, augmentation["crop_scale"], interpolation=bicubic)]
            steps += [v2.RandomHorizontalFlip(augmentation["hflip"])]
            if augmentation["color_jitter"]:
                steps += [v2.ColorJitter(*3 * [augmentation["color_jitter"]])]
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocessing.mean, preprocessing.std)]
        if augmentation is not None and augmentation["random_erasing"]:
            steps += [RandomErasing(augmentation["random_erasing"], mode="pixel", device=str(device))]
        steps += preprocessing.last_steps
        self.transform = v2.Compose(steps)

    def __call__(self, files: list[Encoded], labels: Tensor) -> tuple[Tensor, Tensor, list[Unreadable]]:
        """(images (n, channels, height, width) on the device, labels (n,), what is no whole JPEG file)."""
        decoded = self._decode(files)
        bad = [Unreadable(f.path, d) for f, d in zip(files, decoded, strict=True) if isinstance(d, str)]
        images = [self._augment(d, f.seed) for f, d in zip(files, decoded, strict=True) if not isinstance(d, str)]
        kept = torch.tensor([not isinstance(d, str) for d in decoded], dtype=torch.bool)
        return torch.stack(images) if images else torch.empty(0, device=self.device), labels[kept], bad

    def _decode(self, files: list[Encoded]) -> list[Tensor | str]:
        """Each image, (channels, height, width) bytes, or why it cannot be read."""
        try:
            return list(self._read([f.data for f in files])) if files else []
        except RuntimeError:  # one of them; all together they decode faster
            return [self._decode_one(f) for f in files]

    def _decode_one(self, file: Encoded) -> Tensor | str:
        try:
            return self._read([file.data])[0]
        except RuntimeError as e:
            return first_line(e)

    def _read(self, data: list[Tensor]) -> list[Tensor]:
        with warnings.catch_warnings():
            # torchvision means to hand its decoders on to torchcodec.
            warnings.filterwarnings("ignore", message=".*TorchCodec.*")
            return decode_jpeg(data, mode=self.mode, device=self.device)  # type: ignore[return-value]

    def _augment(self, image: Tensor, seed: int | None) -> Tensor:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
        return self.transform(image)
