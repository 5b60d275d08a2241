"""Training checkpoints: the weights, what is needed to use them, and what is needed to go on.

A run's folder holds ``last.pt``, ``previous.pt`` (the one before), ``best.pt`` and, if wanted, ``epoch_0010.pt`` and so
on. ``checksums.json`` names the SHA-256 digests that each may have; it is written before the file is renamed, and
keeps the digests before until that is done, so that a crash between the two leaves no good file under suspicion.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
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
from patchscale.tasks.masked_autoencoding import MaskedAutoencoder
from patchscale.train.recipe import Recipe

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
CHECKSUMS = "checksums.json"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, atomically and with a checksum; a ``last.pt`` becomes ``previous.pt``.

    Raises:
        UserError: the file system refuses; the checkpoints are then as they were.
    """

    folder, known = path.parent, _checksums(path.parent)

    def may_be(name: str) -> list[str]:
        """The digests of a file; one of which none was kept is taken as it is."""
        return known.get(name) or ([_digest(folder / name)] if (folder / name).exists() else [])

    def before_rename(complete: Path) -> None:
        now[path.name] = [_digest(complete)]
        if path.name == LAST and path.exists():
            now[PREVIOUS] = may_be(LAST)
        # Until the renaming is done, the files are the old ones: whatever fails, none may come under suspicion.
        _write_checksums(folder, known | {name: [*digests, *may_be(name)] for name, digests in now.items()})
        if PREVIOUS in now:
            _second_name(path, path.with_name(PREVIOUS))

    now: dict[str, list[str]] = {}
    write_atomically(path, lambda temporary: torch.save(state, temporary), before_rename)
    with contextlib.suppress(UserError):  # all is written; a digest too many does no harm
        _write_checksums(folder, known | now)


def _write_checksums(folder: Path, record: dict[str, list[str]]) -> None:
    write_atomically(folder / CHECKSUMS, lambda p: p.write_text(json.dumps(record, indent=1) + "\n"))


def _second_name(path: Path, other: Path) -> None:
    """Let ``other`` be this file too, in place of what it was."""
    spare = other.with_name(f".{other.name}.{os.getpid()}.tmp")
    try:
        os.link(path, spare)
    except OSError:  # a file system without hard links
        try:
            spare.write_bytes(path.read_bytes())
        except OSError:
            spare.unlink(missing_ok=True)
            raise
    os.replace(spare, other)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksums(folder: Path) -> dict[str, list[str]]:
    """The digests that each file may have; none where the record is lost or damaged."""
    try:
        record = json.loads((folder / CHECKSUMS).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return {k: v for k, v in record.items() if isinstance(v, list)} if isinstance(record, dict) else {}


def is_damaged(path: Path) -> bool:
    """Whether a checkpoint's bytes are others than were written; False where no checksum was kept of it."""
    known = _checksums(path.parent).get(path.name)
    return bool(known) and _digest(path) not in known


def has_training_state(folder: Path) -> bool:
    """Whether :func:`read_training_state` finds something in a run's folder, be it damaged."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def read_training_state(path: Path, note: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote for a run, from a file or from a run's folder.

    Of a folder, the last one; if that is damaged, the one before it.

    Args:
        path: file or folder.
        note: told that a damaged one was passed over.

    Raises:
        UserError: no such file, all are damaged, or not a run's checkpoint.
    """
    files = [path / LAST, path / PREVIOUS] if path.is_dir() else [path]
    files = [file for file in files if file.exists()]
    if not files:
        raise UserError(f"cannot resume: {path / LAST if path.is_dir() else path} does not exist")
    for file in files:
        if is_damaged(file):
            note(
                f"{file} is damaged (its checksum is another)"
                + (", trying the one before" if file != files[-1] else "")
            )
            continue
        state = read_pickle(file)
        missing = {"model", "optimizer", "recipe", "step"} - state.keys()
        if missing:
            what = ", ".join(sorted(missing))
            raise UserError(f"cannot resume: {file} is not a training checkpoint (it has no {what})")
        return state
    raise UserError(
        f"cannot resume: {', '.join(map(str, files))} damaged (the checksum is another); start anew elsewhere"
    )


_BACKBONE = "backbone."


def split_weights(module: nn.Module, weights: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights of the model, by the names that they have in any task, and those that the run's task adds to it.

    So the weights of every run load as those of a model. A module that is more than the model holds it as ``backbone``.

    Args:
        module: what is trained.
        weights: its state dict.
    """
    if not isinstance(module, MaskedAutoencoder):
        return weights, {}
    model = {k.removeprefix(_BACKBONE): v for k, v in weights.items() if k.startswith(_BACKBONE)}
    return model, {k: v for k, v in weights.items() if not k.startswith(_BACKBONE)}


def join_weights(module: nn.Module, weights: dict[str, Any], added: dict[str, Any] | None) -> dict[str, Any]:
    """The inverse of :func:`split_weights`."""
    if not isinstance(module, MaskedAutoencoder):
        return weights
    return {_BACKBONE + k: v for k, v in weights.items()} | (added or {})


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


def load_autoencoder(loaded: LoadedModel, which: Which = "model") -> MaskedAutoencoder | None:
    """The masked autoencoder that a model was trained in, with its decoder; None if it was not, or if that is lost.

    Raises:
        UserError: the decoder's weights do not fit.
    """
    recipe = loaded.recipe
    added = (loaded.checkpoint.extra.get("task") or {}).get(which)
    if recipe is None or recipe.task != "masked-autoencoding" or not added:
        return None
    whole = MaskedAutoencoder(loaded.model, recipe.mask_ratio, recipe.decoder_dim, recipe.decoder_depth).eval()
    try:
        whole.load_state_dict(join_weights(whole, loaded.model.state_dict(), added))
    except RuntimeError as e:
        raise UserError(f"{loaded.checkpoint.path} does not fit its recipe: {str(e).splitlines()[-1].strip()}") from e
    return whole
