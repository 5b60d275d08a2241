"""Which checkpoint a run goes on from, if from any, and whether its recipe allows it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from patchscale.errors import UserError
from patchscale.train.checkpoint import BEST, LAST, has_training_state, read_training_state
from patchscale.train.logs import METRICS
from patchscale.train.recipe import Recipe


def source_to_go_on_from(folder: Path, resume: Path | None) -> Path | None:
    """The folder or checkpoint that a run goes on from; None for a run that begins.

    Args:
        folder: the run's.
        resume: another folder, or a checkpoint, that was asked for.

    Raises:
        UserError: the folder holds what came of a run, and nothing to go on from.
    """
    if resume is not None:
        return resume
    if has_training_state(folder):
        return folder
    # A run writes its first LAST before any of these: where it was killed before that, it begins again.
    left = [file for file in (folder / BEST, *sorted(folder.glob("epoch_*.pt"))) if file.exists()]
    left += [file for file in (folder / METRICS,) if file.exists() and file.stat().st_size]
    if left:
        raise UserError(
            f"{folder} holds what is left of another run ({', '.join(file.name for file in left)}, and no {LAST} to go "
            "on from): choose another --output"
        )
    return None


def state_to_go_on_from(source: Path, recipe: Recipe, override: bool, note: Callable[[str], None]) -> dict[str, Any]:
    """What a run goes on from.

    Args:
        source: a run's folder, or a checkpoint.
        recipe: of now.
        override: go on although the run began with another recipe.
        note: told of changes in the recipe, and of damaged files.

    Raises:
        UserError: as :func:`read_training_state`; or the recipe has changed, without ``override`` or in what a run
            cannot change.
    """
    state = read_training_state(source, note)
    changes = Recipe.from_dict(state["recipe"]).changes(recipe)
    if not changes:
        return state
    text = "; ".join(f"{k} was {there!r}, is now {here!r}" for k, (there, here) in changes.items())
    if not override:
        raise UserError(
            f"{source} holds a run of another recipe: {text}. Give --override-recipe to go on with the new one, or "
            "another --output to begin anew"
        )
    if "freeze" in changes:  # the optimiser has a state for what was trained alone, and knows it by number
        raise UserError(
            f"a run cannot go on with another --freeze ({text}): leave it as it was, or begin a run with another "
            f"--output and --weights {source}"
        )
    note(f"going on with a changed recipe: {text}")
    return state


def check_place(state: dict[str, Any], steps_per_epoch: int) -> None:
    """See that the steps that were done lie where they did: the order of images and the schedule are counted in steps.

    Args:
        state: that the run goes on from.
        steps_per_epoch: of now.

    Raises:
        UserError: an epoch had another number of steps.
    """
    step, epochs = state["step"], state["epoch"]
    before = state.get("steps_per_epoch")  # not in checkpoints of earlier versions
    fits = epochs * steps_per_epoch <= step <= (epochs + 1) * steps_per_epoch
    if before == steps_per_epoch or (before is None and fits):
        return
    was = f"{step} steps took it to epoch {epochs + 1}" if before is None else f"there were {before}"
    raise UserError(
        f"a run cannot go on with {steps_per_epoch} steps an epoch where {was}: leave --global-batch and the number of "
        "images (--limit-train, --repeated-aug, the data) as they were, or begin a run with --weights and another "
        "--output"
    )
