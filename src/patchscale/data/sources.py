"""Data sets by name: ``digits``, ``cifar10:PATH``, ``cifar100:PATH``, ``inat:PATH``, ``folder:PATH``, or timm's."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder

from patchscale.data.sampling import Draw
from patchscale.errors import UserError, first_line

Split = Literal["train", "val"]

# What timm's data sets begin with, before a slash.
_TIMM = ("hfds", "hfids", "tfds", "torch", "wds")
KINDS = (
    "digits, cifar10:PATH, cifar100:PATH, inat:PATH, folder:PATH, or a name timm knows (hfds/NAME, wds/NAME:PATH, "
    "torch/NAME:PATH)"
)
_SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
_SAMPLE_SEED = 0


@dataclass(frozen=True)
class Source:
    """One split of a data set: ``dataset[i]`` is (PIL image, class index)."""

    dataset: Dataset
    classes: tuple[str, ...]
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    note: str = ""

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def sample(self, count: int) -> "Source":
        """A random sample of at most ``count`` images, in order, the same every time."""
        if count >= len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(_SAMPLE_SEED))[:count]
        return replace(self, dataset=Subset(self.dataset, sorted(chosen.tolist())))


class Unreadable(NamedTuple):
    """Stands for an image that could not be read, on its way from a loader's worker to the main process."""

    path: str
    reason: str


def open_source(name: str, split: Split, limit: int | None = None) -> Source:
    """Open one split of a data set.

    Args:
        name: ``digits`` (1,797 scans of 8 x 8 from scikit-learn, 80% for training), ``cifar100:PATH`` (the compact
            copy in WebP sheets, or torchvision's ``cifar-100-python``), ``cifar10:PATH`` (torchvision's
            ``cifar-10-batches-py``), ``inat:PATH`` (iNaturalist 2021 as torchvision lays it out, ``2021_train`` or
            ``2021_train_mini``, and ``2021_valid``), ``folder:PATH`` (one folder a class, under ``train`` and ``val``
            or as a single split), or ``hfds/...``, ``wds/...``, ``torch/...`` for timm.
        split: ``"train"`` or ``"val"``.
        limit: take this many images, a random sample that is the same every time; all if None.

    Raises:
        UserError: an unknown name, a missing or empty folder, a data set of a single class, a class to evaluate on that
            is none to train on.
    """
    kind, _, path = name.partition(":")
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} images leaves none; leave it out to take all")
    if kind == "digits" and not path:
        source = _digits(split)
    elif kind == "cifar100" and path:
        source = _cifar100(Path(path).expanduser(), split, limit)
    elif kind == "cifar10" and path:
        source = _cifar10(Path(path).expanduser(), split)
    elif kind == "inat" and path:
        source = _inaturalist(Path(path).expanduser(), split)
    elif kind == "folder" and path:
        source = _folder(Path(path).expanduser(), split)
    elif kind.partition("/")[0] in _TIMM and "/" in kind:
        source = _timm(kind, path or None, split)
    else:
        which = " (a folder; say of what kind)" if Path(name).expanduser().is_dir() else ""
        raise UserError(f"unknown data {name!r}{which}; expected {KINDS}")
    if not len(source):
        raise UserError(f"{name} has no images to {'train on' if split == 'train' else 'evaluate on'}")
    if len(source.classes) < 2:
        raise UserError(f"{name} has a single class, {source.classes[0]!r}; a classifier needs two or more")
    return source if limit is None else source.sample(limit)


def path_of(dataset: Any, index: int) -> str:
    """Where an image comes from, for messages."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    samples = getattr(dataset, "samples", None)
    if samples is not None:
        return str(samples[index][0])
    if hasattr(dataset, "filename"):
        return str(dataset.filename(index, absolute=True))
    return f"image {index}"


class _Images(Dataset):
    """Images that are already in memory, (n, height, width[, 3]) bytes."""

    def __init__(self, images: np.ndarray, labels: Sequence[int]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


def _digits(split: Split) -> Source:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    parts = train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    images, labels = parts[0 if split == "train" else 1], parts[2 if split == "train" else 3]
    # Mean and standard deviation of the training images.
    return Source(_Images(images, labels), tuple("0123456789"), channels=1, mean=(0.305,), std=(0.376,))


def _cifar100(path: Path, split: Split, limit: int | None) -> Source:
    _expect_folder(path)
    if (path / "labels.npz").exists():
        return _compact_cifar100(path, split, limit)
    from torchvision.datasets import CIFAR100

    try:
        dataset = CIFAR100(str(path), train=split == "train")
    except RuntimeError as e:
        raise UserError(
            f"{path} holds neither the compact copy of CIFAR-100 (labels.npz and .webp sheets) nor torchvision's "
            "cifar-100-python folder"
        ) from e
    return Source(dataset, tuple(dataset.classes))


def _cifar10(path: Path, split: Split) -> Source:
    from torchvision.datasets import CIFAR10

    _expect_folder(path)
    try:
        dataset = CIFAR10(str(path), train=split == "train")
    except RuntimeError as e:
        raise UserError(f"{path} does not hold torchvision's cifar-10-batches-py folder") from e
    return Source(dataset, tuple(dataset.classes))


def _inaturalist(path: Path, split: Split) -> Source:
    """The folders that torchvision's INaturalist makes: in them, each of the 10,000 species is one folder."""
    names = ("2021_train", "2021_train_mini") if split == "train" else ("2021_valid",)
    root = next((path / name for name in names if (path / name).is_dir()), None)
    if root is None:
        raise UserError(
            f"{path} holds no {' or '.join(names)}: iNaturalist 2021 as torchvision.datasets.INaturalist unpacks it"
        )
    return _class_folders(root)


def _compact_cifar100(path: Path, split: Split, limit: int | None) -> Source:
    prefix = "train" if split == "train" else "test"
    rows, columns, side = 25, 40, 32
    try:
        labels = np.load(path / "labels.npz", allow_pickle=False)[f"{prefix}_fine"]
        classes = tuple((path / "classes.txt").read_text().split())
        # The images are in random order, so that the first ones are a random sample.
        count = len(labels) if limit is None else min(limit, len(labels))
        sheets = [path / f"{prefix}_{i:02}.webp" for i in range(-(-count // (rows * columns)))]
        decoded = [np.asarray(Image.open(sheet).convert("RGB")) for sheet in sheets]
        tiles = [s.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3) for s in decoded]
        images = np.concatenate(tiles)[:count]
        if count > len(images) or labels.max() >= len(classes):
            raise ValueError(f"{len(labels)} labels up to {labels.max()}, {len(images)} images, {len(classes)} classes")
    except (OSError, ValueError, KeyError, BadZipFile) as e:
        raise UserError(f"{path} is not a whole compact copy of CIFAR-100: {e}") from e
    return Source(_Images(images, labels), classes)


def _folder(path: Path, split: Split) -> Source:
    _expect_folder(path)
    splits = {s: next((path / n for n in names if (path / n).is_dir()), None) for s, names in _SPLIT_FOLDERS.items()}
    root, train = splits[split], splits["train"]
    if root is None and any(splits.values()):
        other = next(f for f in splits.values() if f is not None)
        raise UserError(f"{path} has {other.name} but none of {', '.join(_SPLIT_FOLDERS[split])}")
    if root is None:
        note = f"{path} has no train and val folders: the same images serve as both" if split == "val" else ""
        return _class_folders(_within(path), note=note)
    # A class has the number that it has in training, whichever of them the other split has images of.
    return _class_folders(_within(root), None if train in (None, root) else _within(train))


def _within(root: Path) -> Path:
    """The folder of class folders: also that of PATH/images/CLASS/..."""
    few = list(itertools.islice(_subfolders(root), 2))
    if len(few) == 1 and len(list(itertools.islice(_subfolders(few[0]), 2))) > 1:
        return few[0]
    return root


def _class_folders(root: Path, train: Path | None = None, note: str = "") -> Source:
    here = _class_names_in(root)
    classes = here if train is None else _class_names_in(train)
    unknown = sorted(set(here) - set(classes))
    if unknown:
        raise UserError(f"{root / unknown[0]} is a class that {train} lacks: remove it, or give it images to train on")
    try:
        dataset = _ClassFolders(root, classes, allow_empty=train is not None)
    except FileNotFoundError as e:
        raise UserError(f"{root}: {first_line(e)}") from e
    return Source(dataset, classes, note=note)


def _class_names_in(root: Path) -> tuple[str, ...]:
    names = tuple(sorted(folder.name for folder in _subfolders(root)))
    if not names:
        raise UserError(f"{root} has no class folders: expected {root}/CLASS/IMAGE")
    return names


class _ClassFolders(ImageFolder):
    """One folder a class; classes have the numbers of their places in ``classes``."""

    def __init__(self, root: Path, classes: tuple[str, ...], allow_empty: bool) -> None:
        self._classes = classes
        super().__init__(str(root), loader=_read, allow_empty=allow_empty)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        return list(self._classes), {name: i for i, name in enumerate(self._classes)}


def _subfolders(path: Path) -> Iterator[Path]:
    return (p for p in path.iterdir() if p.is_dir())


def _expect_folder(path: Path) -> None:
    if not path.is_dir():
        raise UserError(f"no such folder: {path}")


def _timm(name: str, root: str | None, split: Split) -> Source:
    from timm.data import create_dataset

    try:
        dataset = create_dataset(name, root=root, split="train" if split == "train" else "validation")
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, ImportError, KeyError) as e:
        raise UserError(f"timm cannot open {name} at {root or 'no path'}: {first_line(e)}") from e
    return Source(dataset, _class_names(name, dataset))


def _class_names(name: str, dataset: Any) -> tuple[str, ...]:
    if hasattr(dataset, "classes"):  # torchvision
        return tuple(map(str, dataset.classes))
    reader = getattr(dataset, "reader", None)
    index = getattr(reader, "class_to_idx", None)
    if index:
        return tuple(map(str, sorted(index, key=index.get)))
    features = getattr(getattr(reader, "dataset", None), "features", {})
    label = features.get(getattr(reader, "label_key", "label"))
    if getattr(label, "names", None):  # Hugging Face datasets
        return tuple(label.names)
    raise UserError(f"{name} does not say what its classes are; use folder:PATH, or a data set with class names")


def _read(path: str) -> Image.Image:
    with Image.open(path) as image:
        return in_mode(image, "RGB")


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """``image`` in a mode of 8 bits a channel, such as "RGB"; of 16 bits the upper 8, where PIL makes all white.

    Raises:
        ValueError: numbers of more bits or of floating point, of which nobody says what is white.
    """
    if image.mode.startswith("I"):  # some files of 16 bits are opened as of 32
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65_535:
            raise ValueError(f"pixels from {values.min()} to {values.max()}: convert it to 8 or 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers: convert it to 8 or 16 bits")
    return image.convert(mode)


Transform = Callable[[Image.Image], torch.Tensor]


class Transformed(Dataset):
    """A source's images as tensors; ``[i]`` is (tensor, class index), or an :class:`Unreadable`.

    An index that is a :class:`Draw` seeds the random numbers of its augmentation, in whichever process it is made. The
    class index of one that does not count is -1.
    """

    def __init__(self, source: Source, transform: Transform) -> None:
        self.dataset, self.transform = source.dataset, transform
        self.mode = "L" if source.channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, item: int | Draw) -> tuple[torch.Tensor, int] | Unreadable:
        if isinstance(item, Draw):
            random.seed(item.seed)
            np.random.seed(item.seed)
            torch.default_generator.manual_seed(item.seed)
        index = item.image if isinstance(item, Draw) else item
        try:
            image, label = self.dataset[index]
            image = in_mode(image, self.mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            return Unreadable(path_of(self.dataset, index), str(e))
        return self.transform(image), label if not isinstance(item, Draw) or item.counts else -1


def collate(items: list[tuple[torch.Tensor, int] | Unreadable]) -> tuple[torch.Tensor, torch.Tensor, list[Unreadable]]:
    """(images (n, channels, height, width), labels (n,), the unreadable ones, which are left out of both)."""
    unreadable = [item for item in items if isinstance(item, Unreadable)]
    good = [item for item in items if not isinstance(item, Unreadable)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([label for _, label in good], dtype=torch.long), unreadable
