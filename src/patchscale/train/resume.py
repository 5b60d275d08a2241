"""Which checkpoint a run goes on from, if from any, and whether its recipe allows it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from patchscale.errors import UserError
from patchscale.train.checkpoint import LAST, read_training_state
from patchscale.train.recipe import Recipe


def source_to_go_on_from(folder: Path, resume: Path | None) -> Path | None:
    """The folder or checkpoint that a run goes on from; None for a run that begins.

    Args:
        folder: the run's.
        resume: another folder, or a checkpoint, that was asked for.
    """
    return resume or (folder if (folder / LAST).exists() else None)


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
