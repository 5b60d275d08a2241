"""Training checkpoints: the weights, what is needed to use them, and what is needed to go on."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import resolve_input_data_config
from torch import nn

from patchscale.data.transforms import Preprocessing
from patchscale.errors import UserError
from patchscale.files import write_atomically
from patchscale.models.published import evaluation_crop
from patchscale.models.weight_files import Checkpoint, Which, read_checkpoint, read_pickle
from patchscale.models.weights import create_from_checkpoint
from patchscale.train.recipe import Recipe

LAST, BEST = "last.pt", "best.pt"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, atomically.

    Raises:
        UserError: the file system refuses.
    """
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def read_training_state(path: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote for a run, from a file or from a run's folder (its last one).

    Raises:
        UserError: no such file, or not a run's checkpoint.
    """
    file = path / LAST if path.is_dir() else path
    if not file.exists():
        raise UserError(f"cannot resume: {file} does not exist")
    state = read_pickle(file)
    missing = {"model", "optimizer", "recipe", "epoch"} - state.keys()
    if missing:
        raise UserError(f"cannot resume: {file} is not a training checkpoint (it has no {', '.join(sorted(missing))})")
    return state


class LoadedModel(NamedTuple):
    """A model with its weights and what is needed to use it."""

    model: nn.Module
    checkpoint: Checkpoint
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of the run that made it, if one did."""
        values = self.checkpoint.extra.get("recipe")
        return None if values is None else Recipe.from_dict(values)


def load_model(weights: str, which: Which = "model", flip: str | None = None) -> LoadedModel:
    """Make the model that a weight file holds, ready to be fed.

    Args:
        weights: a file, a run's folder (its best checkpoint), a URL or a Hub id.
        which: trained weights or their moving average.
        flip: scan rule to use instead of the file's.

    Raises:
        UserError: as :func:`patchscale.load_weights`.
    """
    checkpoint = read_checkpoint(weights, which)
    model = create_from_checkpoint(checkpoint, **({} if flip is None else {"flip": flip}))
    classes = checkpoint.extra.get("classes")
    recorded = checkpoint.extra.get("preprocessing")
    if recorded is not None:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in recorded.items()}
        preprocessing = Preprocessing(**fields)
    else:
        config = resolve_input_data_config(model)
        channels, *size = config["input_size"]
        patch_embed: Any = model.patch_embed
        crop = evaluation_crop(max(patch_embed.patch_size), max(size))
        preprocessing = Preprocessing((size[0], size[1]), channels, config["mean"], config["std"], crop)
    return LoadedModel(model.eval(), checkpoint, preprocessing, None if classes is None else tuple(classes))
