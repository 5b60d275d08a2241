"""From a recipe to the parts of its run: folder, data, model."""

import difflib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from torch import nn
from torch.utils.data import DataLoader

from patchscale.data.sampling import EpochSampler
from patchscale.data.sources import Source, Transform, Transformed, Unreadable, collate, open_source
from patchscale.data.transforms import Preprocessing
from patchscale.errors import UserError
from patchscale.files import make_folder
from patchscale.models.adventurer import Adventurer
from patchscale.models.published import evaluation_crop
from patchscale.train.checkpoint import LAST
from patchscale.train.device import default_workers
from patchscale.train.recipe import Recipe


def open_sources(recipe: Recipe) -> tuple[Source, Source]:
    """The training and the validation images of a recipe."""
    return open_source(recipe.data, "train", recipe.limit_train), open_source(recipe.data, "val", recipe.val_limit)


def model_arguments(recipe: Recipe, source: Source) -> dict[str, Any]:
    """What timm makes the recipe's model from."""
    given = {
        "img_size": recipe.img_size,
        "patch_size": recipe.patch_size,
        "embed_dim": recipe.embed_dim,
        "depth": recipe.depth,
        "flip": recipe.flip,
        "drop_path_rate": recipe.drop_path or None,
    }
    fixed = {"num_classes": len(source.classes), "in_chans": source.channels}
    return fixed | {name: value for name, value in given.items() if value is not None}


def create_model(name: str, arguments: dict[str, Any]) -> nn.Module:
    """A model by name, with near names where there is none such.

    Raises:
        UserError: an unknown name, or arguments that the model does not take.
    """
    check_model_name(name)
    try:
        model = timm.create_model(name, **arguments)
    except TypeError as e:
        raise UserError(f"{name} cannot be made with {arguments}: {e}") from e
    if isinstance(model, Adventurer):
        arguments["flip"] = model.flip
        arguments["img_size"], arguments["patch_size"] = model.patch_embed.img_size, model.patch_embed.patch_size
    return model


def check_model_name(name: str) -> None:
    """Refuse an unknown model name, naming near ones.

    Raises:
        UserError: there is no such model.
    """
    if name.startswith(("hf-hub:", "local-dir:")) or timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models("adventurer_*") + timm.list_models(), n=4, cutoff=0.6)
    hint = f"; did you mean {', '.join(near)}?" if near else "; `patchscale models` lists them"
    raise UserError(f"unknown model {name!r}{hint}")


def preprocessing_for(recipe: Recipe, model: nn.Module, source: Source) -> Preprocessing:
    """How the recipe's model is fed in evaluation."""
    cfg = timm.data.resolve_model_data_config(model)
    patch_embed = getattr(model, "patch_embed", None)
    size = to_2tuple(recipe.img_size) if recipe.img_size is not None else cfg["input_size"][1:]
    size = getattr(patch_embed, "img_size", None) or size
    patch = getattr(patch_embed, "patch_size", (16, 16))
    crop = recipe.eval_crop if recipe.eval_crop is not None else evaluation_crop(max(patch), max(size))
    return Preprocessing(tuple(size), source.channels, source.mean, source.std, crop)


def make_loader(
    source: Source,
    transform: Transform,
    batch_size: int,
    workers: int | None,
    device: torch.device,
    sampler: EpochSampler | None = None,
) -> DataLoader:
    """Batches of (images, labels, unreadable); a sampler is for training, without the incomplete last batch."""
    return DataLoader(
        Transformed(source, transform),
        batch_size,
        sampler=sampler,
        drop_last=sampler is not None,
        num_workers=default_workers(device) if workers is None else workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )


def refuse_or_note(item: Unreadable, skip: bool, note: Callable[[str], None]) -> None:
    """Stop at an image that cannot be read, or say that it is left out.

    Raises:
        UserError: unless ``skip``.
    """
    if not skip:
        raise UserError(
            f"cannot read {item.path}: {item.reason}; repair or remove it, or pass --skip-unreadable to leave it out"
        )
    note(f"left out {item.path}: {item.reason}")


def run_folder(recipe: Recipe, resume: Path | None) -> Path:
    """The folder of a run, made and found to be writable.

    Raises:
        UserError: it cannot be written to, or holds another run.
    """
    if resume is not None:
        folder = resume if resume.is_dir() else resume.parent
    else:
        folder = recipe.output or Path("runs") / f"{recipe.model}_{time.strftime('%Y%m%d-%H%M%S')}"
        if (folder / LAST).exists():
            raise UserError(f"{folder} holds a run: go on with --resume {folder}, or choose another --output")
    make_folder(folder)
    return folder
