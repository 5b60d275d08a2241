"""Scoring a checkpoint, from the file alone, and finding out which flip rule it was trained with."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from patchscale.data.sources import Source, open_source
from patchscale.errors import UserError
from patchscale.models.adventurer import FLIP_RULES, Adventurer, Flip
from patchscale.models.tokens import grid_size
from patchscale.models.weight_files import Which
from patchscale.tasks.classification import Classification, Scores
from patchscale.tasks.masked_autoencoding import MaskedAutoencoding
from patchscale.train.build import make_loader, refuse_or_note
from patchscale.train.checkpoint import load_autoencoder, load_model
from patchscale.train.device import autocast, resolve_device
from patchscale.train.memory import images_that_fit, memory_here, tight
from patchscale.train.recipe import Precision
from patchscale.train.speed import forward_flops

FLIP_TRIAL_IMAGES = 500


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found."""

    scores: Any
    """:class:`~patchscale.tasks.classification.Scores` of a classifier, or those of its own task."""
    recorded: Any
    """What training found for the same weights, if they come from a run."""
    flip_trials: dict[Flip, Scores]
    """With ``flip="auto"``: each rule's scores on the first images."""
    flip: str | None
    by_patch: tuple["AtPatch", ...] = ()
    """With ``patch_sizes``: the scores at each, of which ``scores`` are the first."""


@dataclass(frozen=True)
class AtPatch:
    """What the same weights score and cost at a patch size."""

    patch_size: int
    patches: int
    """Of an image."""
    flops: int | None
    """Of an image, a product and a sum being two; None where they are not counted."""
    seconds: float
    """For an image, reading it included."""
    scores: Scores


def evaluate(
    weights: str,
    data: str | None = None,
    which: Which = "model",
    flip: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    precision: Precision | None = None,
    device: str | None = None,
    workers: int | None = None,
    skip_unreadable: bool = False,
    patch_sizes: tuple[int, ...] = (),
    note: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Score a weight file on the validation images of a data set.

    What is not given comes from the run that made the file, if one did.

    Args:
        weights: a run's folder (its best checkpoint), a file, a URL or a Hub id.
        data: as in a recipe.
        which: trained weights or their moving average.
        flip: scan rule instead of the file's; ``"auto"`` tries all on 500 images and keeps the most accurate, the one
            of lower loss where two are equal.
        limit: score this many images, a fixed random sample; 0 for all.
        batch_size: images at a time, 64 by default.
        precision: ``"32-true"`` or ``"bf16-mixed"``.
        device: by default the GPU where there is one.
        workers: processes that read images.
        skip_unreadable: leave out images that cannot be read.
        patch_sizes: score the weights at each of these instead of their own; patch embedding and positions are
            resized, nothing is trained.
        note: told of things a user should know.
        progress: told (images done, images in all).

    Raises:
        UserError: no data set given or recorded, one of other classes, bad weights, a patch that does not divide the
            image, no images at a time, or fewer than no workers.
    """
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}, expected 1 or more")
    if workers is not None and workers < 0:
        raise UserError(f"--workers is {workers}, expected 0 or more")
    place = resolve_device(device)
    loaded = load_model(weights, which, None if flip == "auto" else flip)
    grids = [grid_size(loaded.preprocessing.img_size, size) for size in patch_sizes]
    if patch_sizes and not hasattr(loaded.model, "set_input_size"):
        raise UserError(f"{weights} holds a {type(loaded.model).__name__}, whose patch size cannot be changed")
    recipe = loaded.recipe
    painter = load_autoencoder(loaded, which)
    if painter is not None and (flip == "auto" or patch_sizes):
        raise UserError(f"{weights} is of masked autoencoding: --flip auto and --patch-size are for classifiers")
    if data is None and recipe is None:
        raise UserError(f"{weights} does not say what data it was trained on: give --data")
    if limit is None and recipe is not None and data in (None, recipe.data):
        limit = recipe.val_limit
    source = open_source(data or recipe.data, "val", limit or None)
    if painter is None and loaded.model.num_classes == 0:
        raise UserError(f"{weights} has no classifier: train one, with --weights {weights}")
    if painter is None and len(source.classes) != loaded.model.num_classes:
        raise UserError(f"the model has {loaded.model.num_classes} classes, the data {len(source.classes)}")
    if painter is None and loaded.classes is not None:
        _compare_classes(loaded.classes, source.classes, note)
    if source.channels != loaded.preprocessing.channels:
        raise UserError(f"the model takes {loaded.preprocessing.channels} channels, the data has {source.channels}")
    if source.note:
        note(source.note)
    precision = precision or (recipe.precision if recipe else "32-true")
    if batch_size is None:
        batch_size = recipe.images_at_once if recipe else 64
        if place.type == "cpu":
            batch_size = images_that_fit(
                loaded.model, loaded.preprocessing.img_size, batch_size, precision, patch_sizes
            )
            if not batch_size:
                note(tight(memory_here()))
                batch_size = 1
    dtype = torch.float64 if precision == "64-true" else torch.float32
    model: Any = (painter or loaded.model).to(place, dtype)
    task = Classification(len(source.classes)) if painter is None else MaskedAutoencoding(painter)

    def score(images: Source, model: nn.Module) -> Any:
        loader = make_loader(images, loaded.preprocessing.transform(), batch_size, workers, place)
        with autocast(place, precision):
            return task.evaluate(model, _batches(loader, place, dtype, skip_unreadable, note, progress))

    trials: dict[Flip, Scores] = {}
    if flip == "auto":
        if not isinstance(model, Adventurer):
            raise UserError("--flip auto is for Adventurer models alone")
        few = source.sample(FLIP_TRIAL_IMAGES)
        for rule in FLIP_RULES:
            model.set_flip(rule)
            trials[rule] = score(few, model)
        model.set_flip(max(trials, key=lambda rule: (trials[rule].top1, -trials[rule].loss)))
    recorded = loaded.checkpoint.extra.get("ema_scores" if which == "ema" else "scores")
    by_patch = []
    for size, (rows, columns) in zip(patch_sizes, grids, strict=True):
        resized = copy.deepcopy(model)
        resized.set_input_size(patch_size=(size, size))
        start = time.perf_counter()
        found = score(source, resized)
        seconds = (time.perf_counter() - start) / found.images
        by_patch.append(AtPatch(size, rows * columns, forward_flops(resized, loaded.preprocessing), seconds, found))
    scores = by_patch[0].scores if by_patch else score(source, model)
    before = task.scores_type(**recorded) if recorded else None
    return Evaluation(scores, before, trials, getattr(model, "flip", None), tuple(by_patch))


def _compare_classes(learned: tuple[str, ...], found: tuple[str, ...], note: Callable[[str], None]) -> None:
    place = next((i for i, names in enumerate(zip(learned, found, strict=True)) if names[0] != names[1]), None)
    if place is None:
        return
    words = f"class {place} of the weights is {learned[place]!r}, of the data {found[place]!r}"
    if set(learned) & set(found):
        raise UserError(f"{words}: the data needs the classes that the weights have learned, in their order")
    note(f"{words}; no name is in both, so classes are taken to be in the same order")


def _batches(
    loader: DataLoader,
    device: torch.device,
    dtype: torch.dtype,
    skip_unreadable: bool,
    note: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> Iterator[tuple[Tensor, Tensor]]:
    total = len(loader.dataset)  # type: ignore[arg-type]
    done = 0
    for images, labels, unreadable in loader:
        for item in unreadable:
            refuse_or_note(item, skip_unreadable, note)
        done += len(labels) + len(unreadable)
        if len(labels):
            yield images.to(device, dtype), labels.to(device)
        progress(done, total)
