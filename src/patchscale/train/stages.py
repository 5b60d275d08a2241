"""Runs of several stages: recipe files, and the runner that starts each stage from the last one's weights.

A recipe file is TOML::

    base = "adventurer_base_patch16"   # optional: start from another recipe's stages
    stages = ["pretrain", "finetune"]  # optional: which of them, in this order
    [all]                              # fields of every stage, as in `patchscale train --help`
    model = "adventurer_base_patch8"
    [stage.finetune]                   # fields of one stage, new or the base's; these come last
    epochs = 10
    [published]                        # what the authors report; read by people

Later lines win: the base's fields, then ``all``, then the stage's own.
"""

import difflib
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from patchscale.data.sources import Source
from patchscale.errors import UserError, first_line
from patchscale.train.build import (
    create_model,
    open_sources,
    preprocessing_for,
    size_arguments,
    trained_module,
    training_transform,
)
from patchscale.train.checkpoint import LAST, has_training_state, read_training_state
from patchscale.train.logs import check_trackers
from patchscale.train.loop import train
from patchscale.train.observer import Observer, Result
from patchscale.train.optimiser import freeze
from patchscale.train.recipe import Recipe

# Inside the installed package, or beside it in the repository.
_FOLDERS = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[3] / "recipes")
_KEYS = {"base", "stages", "all", "stage", "published"}


class RecipeFile(NamedTuple):
    """What a recipe file says: the fields of each stage, by the stage's name, in order, and what was published."""

    name: str
    stages: dict[str, dict[str, Any]]
    published: dict[str, Any]


class StageResult(NamedTuple):
    """One stage of a run; the result of one that was finished before has no reports."""

    name: str
    folder: Path
    result: Result


def recipe_names() -> list[str]:
    """The recipes that come with the library."""
    return sorted({path.stem for folder in _FOLDERS if folder.is_dir() for path in folder.glob("*.toml")})


def read_recipe_file(name: str) -> RecipeFile:
    """Read a recipe by its name, or from a file of the user's own.

    Raises:
        UserError: there is none of that name (near ones are named), the file is not TOML, or it says something that a
            recipe cannot say.
    """
    return _read(name, Path(), ())


def _read(name: str, beside: Path, readers: tuple[Path, ...]) -> RecipeFile:
    path = _find(name, beside)
    if path in readers:
        raise UserError(f"{path} is its own base")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise UserError(f"{path} is not a recipe: {first_line(e)}") from e
    unknown = content.keys() - _KEYS
    if unknown:
        raise UserError(f"{path} has {', '.join(sorted(unknown))}; a recipe has {', '.join(sorted(_KEYS))}")
    for key, kind in (("base", str), ("stages", list), ("all", dict), ("stage", dict), ("published", dict)):
        if key in content and not isinstance(content[key], kind):
            raise UserError(f"{path}: {key} is {content[key]!r}; see the head of a recipe that comes with patchscale")
    own = content.get("stage", {})
    bad = next((k for k, v in own.items() if not isinstance(v, dict)), None)
    if bad is not None:
        raise UserError(f"{path}: stage.{bad} is {own[bad]!r}; the fields of a stage go under [stage.NAME]")
    base = _read(content["base"], path.parent, (*readers, path)) if "base" in content else None
    known = (base.stages if base else {}) | {name: {} for name in own if not base or name not in base.stages}
    chosen = content.get("stages", list(known))
    missing = [str(name) for name in chosen if name not in known]
    if missing or not chosen:
        what = f"no stage {', '.join(missing)}" if missing else "no stages"
        raise UserError(f"{path} has {what}; it has {', '.join(known) or '[stage.NAME] nowhere'}")
    stages = {name: known[name] | content.get("all", {}) | own.get(name, {}) for name in chosen}
    for stage, values in stages.items():
        unknown = values.keys() - {f.name for f in fields(Recipe)}
        if unknown:
            raise UserError(f"{path}, stage {stage}: {_unknown_fields(unknown)}")
    return RecipeFile(path.stem, stages, content.get("published", {}))


def _find(name: str, beside: Path) -> Path:
    if name.endswith(".toml"):
        path = beside / Path(name).expanduser()
        if path.is_file():
            return path.resolve()
        raise UserError(f"no such recipe file: {path}")
    found = next((f / f"{name}.toml" for f in (beside, *_FOLDERS) if (f / f"{name}.toml").is_file()), None)
    if found is not None:
        return found.resolve()
    names = recipe_names()
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5) or names[:4]
    raise UserError(f"unknown recipe {name!r}; did you mean {', '.join(near)}? A file of your own ends in .toml")


def _unknown_fields(unknown: set[str]) -> str:
    known = [f.name for f in fields(Recipe)]
    texts = []
    for name in sorted(unknown):
        near = difflib.get_close_matches(name, known, n=1)
        texts.append(f"unknown field {name}" + (f" (did you mean {near[0]}?)" if near else ""))
    return ", ".join(texts)


def run_stages(
    stages: dict[str, Recipe],
    folder: Path,
    only: str | None = None,
    observer: Callable[[str], Observer] = lambda stage: Observer(),
    override: bool = False,
    command: list[str] | None = None,
) -> Iterator[StageResult]:
    """Run stages in order, each in a folder of its own and from the last one's final weights.

    A stage that is finished is passed over, and one that was interrupted goes on: the same call again finishes what
    the first one began. The first stage starts from its recipe's ``weights``, if it names any; so does a stage that is
    run alone; all others start from the stage before, with the trained weights or their average as ``which`` says.

    Args:
        stages: recipes by name.
        folder: gets ``1_NAME``, ``2_NAME``, ...
        only: the name of one stage, or its number from 1.
        observer: made for each stage, and told what happens.
        override: go on with recipes that differ from those that the run began with.
        command: the command line, for the record.

    Yields:
        Each stage, when it is done.

    Raises:
        UserError: a stage cannot be run as its recipe says; nothing is run then. Or ``only`` is none of the stages, or
            its stage would start from one that has not finished.
        TrainingStopped: as :func:`patchscale.train.loop.train`.
    """
    names = list(stages)
    chosen = names if only is None else [_choose(names, only)]
    folders = {name: folder / f"{i}_{name}" for i, name in enumerate(names, start=1)}

    def follows(name: str) -> bool:
        """Whether a stage starts from the one before."""
        return name != names[0] and (only is None or stages[name].weights is None)

    def before(name: str) -> str:
        return names[names.index(name) - 1]

    opened = {stages[chosen[0]].data}  # by the first stage itself
    for name in chosen:
        recipe = stages[name]
        try:
            check_recipe(recipe)
            if recipe.data not in opened:
                open_sources(recipe)
                opened.add(recipe.data)
            if follows(name) and recipe.which == "ema" and stages[before(name)].ema_decay is None:
                raise UserError(f"--which ema is of stage {before(name)}, which keeps no average: give it --ema-decay")
        except UserError as e:
            raise UserError(f"stage {name}: {e}") from e
    for name in chosen:
        recipe, place = replace(stages[name], output=folders[name]), folders[name]
        state = _state(place)
        if state is not None and follows(name):
            recipe = replace(recipe, weights=state["recipe"]["weights"])
        elif follows(name):
            earlier = before(name)
            finished = _state(folders[earlier])
            if finished is None or finished["epoch"] < stages[earlier].epochs:
                raise UserError(
                    f"stage {name} starts from the weights of stage {earlier}, which is not finished in "
                    f"{folders[earlier]}: run that first, or give --weights"
                )
            recipe = replace(recipe, weights=str(folders[earlier] / LAST))
        yield StageResult(name, place, train(recipe, None, observer(name), override, command))


def _choose(names: list[str], only: str) -> str:
    if only in names:
        return only
    if only.isdecimal() and 1 <= int(only) <= len(names):
        return names[int(only) - 1]
    listed = ", ".join(f"{i} ({name})" for i, name in enumerate(names, start=1))
    raise UserError(f"--stage is {only}, expected one of {listed}")


def check_recipe(recipe: Recipe) -> None:
    """Find out what is wrong with a recipe, as far as that takes neither data nor weights, before anything runs.

    Its model is made without memory.

    Raises:
        UserError: there is no such model, augmentation or tracker, the task or the parts to freeze do not fit the
            model, or a step has more images than there are.
    """
    positions = {} if recipe.pos_embed is None else {"pos_embed": recipe.pos_embed}
    with torch.device("meta"):
        model = create_model(recipe.model, size_arguments(recipe) | positions)
        module = trained_module(recipe, model)
    freeze(module, recipe.freeze)
    training_transform(recipe, preprocessing_for(recipe, model, Source(Dataset(), ())))
    check_trackers(recipe.trackers)
    if recipe.limit_train is not None and recipe.global_batch > recipe.limit_train:
        raise UserError(f"--global-batch is {recipe.global_batch}, more than the {recipe.limit_train} of --limit-train")


def _state(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint in a stage's folder; None if it holds none."""
    return read_training_state(folder) if has_training_state(folder) else None
