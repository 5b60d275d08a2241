"""A study: which runs it is made of.

A study file is TOML::

    name = "digits"
    hold = "epochs"            # or "flops": cheaper runs get more epochs, until all have cost what the dearest does
    [all]                      # fields of every run, as in `patchscale train --help`; a list of values is swept
    model = "adventurer_tiny_patch1"
    data = "digits"
    patch_size = [8, 4, 2, 1]
    seed = [0, 1, 2]
    [[arm]]                    # optional: each arm sweeps its own fields, and ``all``'s
    control = "scale"          # what its runs are called and compared under; `scale` by default
    [[arm]]
    control = "length"
    tokens_a_side = 8          # the image grows and shrinks with the patch
    [[arm]]
    control = "curriculum"
    recipe = "digits_three_stage"   # runs of several stages; ``all`` changes each
"""

import functools
import itertools
import json
import logging
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from timm.layers import to_2tuple
from torch import nn

from patchscale.data.sources import Source, open_source
from patchscale.errors import UserError, first_line
from patchscale.scaling.results import CONTROL
from patchscale.train.build import create_model, model_arguments, trained_module
from patchscale.train.recipe import Recipe, fits
from patchscale.train.speed import count_flops
from patchscale.train.stages import read_recipe_file

_logger = logging.getLogger(__name__)

Hold = Literal["epochs", "flops"]
# What runs of a study of equal FLOPs may differ by without a word.
_EQUAL = 0.05
SINGLE_STAGE = "train"

# What an arm has beside a recipe's fields.
_ARM_KEYS: dict[str, Any] = {"control": str, "recipe": str, "tokens_a_side": int}
_KEYS = {"name", "hold", "all", "arm"}
_SHORT = {
    "patch_size": "patch",
    "pos_embed": "pos",
    "pixel_swaps": "swaps",
    "img_size": "px",
    "embed_dim": "width",
    "tokens_a_side": "side",
}
_HINTS = get_type_hints(Recipe)
# What tells two rows of results apart; other fields that are swept go into their control.
_IN_ROWS = {
    "model", "data", "img_size", "patch_size", "tokens_a_side", "extend", "embed_dim", "depth", "epochs", "limit_train",
    "seed",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of a study: a recipe of one or more stages, and what it is compared under."""

    name: str
    """Unique in the study, and the name of its folder."""
    control: str
    recipe: str
    """The name of the recipe that it was made from, or nothing."""
    stages: dict[str, Recipe]


@dataclass(frozen=True)
class Study:
    """The runs, in the order in which the file names them."""

    name: str
    runs: tuple[Run, ...]
    hold: Hold = "epochs"


def read_study(path: Path, changes: dict[str, Any] | None = None, hold: Hold | None = None) -> Study:
    """Read a study file.

    Args:
        path: a .toml file.
        changes: fields for every run, which win over the file's; a list of values is swept.
        hold: wins over the file's.

    Raises:
        UserError: no such file, not TOML, or it says something that a study cannot say.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise UserError(f"{path} is not a study: {first_line(e)}") from e
    try:
        return make_study(content | ({"hold": hold} if hold else {}), path.stem, changes)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e


def make_study(content: dict[str, Any], name: str, changes: dict[str, Any] | None = None) -> Study:
    """A study from what its file holds.

    Raises:
        UserError: it says something that a study cannot say.
    """
    unknown = sorted(content.keys() - _KEYS)
    if unknown:
        raise UserError(f"unknown {', '.join(unknown)}; a study has {', '.join(sorted(_KEYS))}")
    for key, kind in (("name", str), ("all", dict), ("arm", list)):
        if not isinstance(content.get(key, kind()), kind):
            raise UserError(f"{key} is {content[key]!r}; the head of patchscale/scaling/runs.py shows a study file")
    name = content.get("name", name)
    if not name.strip() or name in (".", "..") or re.search(r"[/\\]", name):
        raise UserError(f"name is {name!r}, expected a name for rows and a folder: not empty, without / and \\")
    hold = content.get("hold", "epochs")
    if hold not in get_args(Hold):
        raise UserError(f"hold is {hold!r}, expected one of {', '.join(get_args(Hold))}")
    arms = content.get("arm") or [{}]
    bad = next((arm for arm in arms if not isinstance(arm, dict)), None)
    if bad is not None:
        raise UserError(f"arm has {bad!r} in it; the fields of an arm go under [[arm]]")
    arms = [content.get("all", {}) | arm | (changes or {}) for arm in arms]
    tells_apart = [len({str(arm.get(key)) for arm in arms}) > 1 for key in ("control", "model")]
    runs = [run for arm in arms for run in _runs_of(arm, *tells_apart)]
    names = [run.name for run in runs]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise UserError(f"two runs are {twice}: give their arms different controls, or remove one")
    return Study(name, tuple(_same_flops(runs) if hold == "flops" else runs), hold)


def _runs_of(arm: dict[str, Any], name_control: bool, name_model: bool) -> Iterator[Run]:
    """Every combination of the values that an arm sweeps."""
    values = dict(arm)
    control, recipe = values.pop("control", CONTROL), values.pop("recipe", "")
    for name, value in (("control", control), ("recipe", recipe)):
        if not isinstance(value, str):
            raise UserError(f"{name} is {value!r}, expected one name; each further one is an [[arm]] of its own")
    unknown = sorted(values.keys() - _HINTS.keys() - _ARM_KEYS.keys())
    if unknown:
        raise UserError(f"unknown field {', '.join(unknown)}; see `patchscale train --help`")
    if "output" in values:
        raise UserError("output is for the study as a whole: --output FOLDER")
    swept = {k: v for k, v in values.items() if _is_swept(k, v)}
    empty = next((k for k, v in swept.items() if not v), None)
    if empty is not None:
        raise UserError(f"{empty} is an empty list, expected values to sweep")
    file = read_recipe_file(recipe) if recipe else None
    for combination in itertools.product(*swept.values()):
        chosen = dict(zip(swept, combination, strict=True))
        fields = values | chosen
        side = fields.pop("tokens_a_side", None)
        if side is not None:
            patch_size = _needed(fields, "patch_size")
            for name, value in (("tokens_a_side", side), ("patch_size", patch_size)):
                if not fits(value, int) or value < 1:
                    raise UserError(f"{name} is {value!r}, expected a whole number, 1 or more")
            fields["img_size"] = side * patch_size
        stages = file.stages if file is not None else {SINGLE_STAGE: {}}
        made = {}
        for stage, own in stages.items():
            given = own | fields
            for name in ("model", "data"):
                _needed(given, name)
            made[stage] = Recipe.from_dict(given)
        if made[stage].task != "classification":
            raise UserError(f"a study compares classifiers: the last stage's task is {made[stage].task}")
        words = [control] * name_control + [fields.get("model", "").partition("_patch")[0]] * name_model
        words += [f"{_SHORT.get(k, k)}{v}" for k, v in chosen.items()]
        name = "-".join(re.sub(r"[^\w.]+", "_", word) for word in words if word) or "run"
        untold = [f"{field} {value}" for field, value in chosen.items() if field not in _IN_ROWS]
        if control == CONTROL and made[stage].extend != 1:
            # A row tells it by its tokens; but a law over patch sizes is of one number of tokens at each.
            untold.append(f"extend {made[stage].extend}")
        yield Run(name, ", ".join([control, *untold]), recipe, made)


def _is_swept(field: str, value: Any) -> bool:
    """A list of values; where a single value is a list already, a list of lists."""
    if not isinstance(value, list):
        return False
    if field in _HINTS and get_origin(_HINTS[field]) is tuple:
        return bool(value) and all(isinstance(v, list) for v in value)
    return True


def _needed(fields: dict[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise UserError(f"the study names no {name}: add it under [all], or give --{name.replace('_', '-')}")
    return fields[name]


def _same_flops(runs: list[Run]) -> list[Run]:
    """Cheaper runs with more epochs, so that all take about as many FLOPs as the dearest."""
    if any(len(run.stages) > 1 for run in runs):
        raise UserError('hold = "flops" is for runs of one stage')
    recipes = [next(iter(run.stages.values())) for run in runs]
    costs = [planned_flops(recipe)[1] * recipe.epochs * _images(recipe.data, recipe.limit_train) for recipe in recipes]
    most = max(costs)
    epochs = [round(recipe.epochs * most / cost) for recipe, cost in zip(recipes, costs, strict=True)]
    shares = [cost * e / recipe.epochs / most for recipe, cost, e in zip(recipes, costs, epochs, strict=True)]
    share, name = max(zip(shares, (run.name for run in runs), strict=True), key=lambda pair: abs(pair[0] - 1))
    if abs(share - 1) > _EQUAL:
        _logger.warning(
            "epochs are whole, so that FLOPs are equal to within %.0f%% alone (%s takes %.0f%% of the dearest's); more "
            "epochs make them more equal",
            100 * abs(share - 1),
            name,
            100 * share,
        )
    return [
        replace(run, stages={stage: replace(recipe, epochs=e)})
        for run, e in zip(runs, epochs, strict=True)
        for stage, recipe in run.stages.items()
    ]


@functools.cache
def _images(data: str, limit: int | None) -> int:
    """Of an epoch; a large folder takes a while to list."""
    return len(open_source(data, "train", limit))


def planned_flops(recipe: Recipe) -> tuple[int, int]:
    """Of a recipe's model: FLOPs of one image forward, and of one image in training; the mean of its patch sizes."""
    sources = _open(recipe.data)
    found = []
    for patch_size in recipe.patch_sizes or [None]:
        arguments = model_arguments(recipe, sources) | ({} if patch_size is None else {"patch_size": patch_size})
        with torch.device("meta"):
            model: Any = create_model(recipe.model, arguments)
            module = trained_module(recipe, model)
        height, width = to_2tuple(recipe.img_size or model.pretrained_cfg["input_size"][-1])
        found.append(image_flops(module, sources.channels, (height, width)))
    forward, training = (sum(each) // len(found) for each in zip(*found, strict=True))
    return forward, training


def image_flops(model: nn.Module, channels: int, img_size: tuple[int, int]) -> tuple[int, int]:
    """Of one image forward, and of one image in training; the model is on the meta device."""
    forward, training = (count_flops(model, channels, img_size, training) for training in (False, True))
    return forward, training


_sources: dict[str, Source] = {}


def _open(data: str) -> Source:
    if data not in _sources:
        _sources[data] = open_source(data, "val", 1)
    return _sources[data]


def read_fields(words: Sequence[str]) -> dict[str, Any]:
    """Flags of ``patchscale train`` as fields of a study, several values of one flag to be swept.

    Raises:
        UserError: an unknown flag, one that is given twice, or a value of another type.
    """
    fields: dict[str, Any] = {}
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            groups.append((flag, [value] if value else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise UserError(f"what is {word!r}? Flags come first, then their values")
    for flag, values in groups:
        name = {"batch_size": "global_batch"}.get(flag[2:].replace("-", "_"), flag[2:].replace("-", "_"))
        if name in _ARM_KEYS:
            hint: Any = _ARM_KEYS[name]
        elif name in _HINTS:
            hint = _HINTS[name]
        else:
            raise UserError(f"unknown flag {flag}; see `patchscale train --help` and `patchscale sweep --help`")
        if name in fields:
            raise UserError(f"{flag} is given twice: give all its values after one, as in {flag} 1 2")
        read = [_read_value(flag, value, hint) for value in values] if values else [True]
        several = len(read) > 1 or get_origin(hint) is tuple
        fields[name] = read if several else read[0]
    return fields


def _read_value(flag: str, text: str, hint: Any) -> Any:
    """A word as the first of these kinds that the field takes."""
    hint = get_args(hint)[0] if get_origin(hint) is tuple else hint
    for kind in (int, float, str):
        try:
            value = kind(text)
        except ValueError:
            continue
        if fits(value, hint):
            return value
    if text in ("True", "False", "true", "false") and fits(True, hint):
        return text.lower() == "true"
    raise UserError(f"{flag} is {text!r}; see {flag} in `patchscale train --help`")


def to_recipe_file(run: Run) -> str:
    """A run as a recipe file, so that it can be repeated alone: ``patchscale train --recipe FILE``."""
    lines = [f"# {run.name}, control {run.control}"]
    defaults = Recipe("", "").to_dict()
    for stage, recipe in run.stages.items():
        lines.append(f"[stage.{json.dumps(stage)}]")
        # A TOML value is written as JSON writes it, but for none, which is always the default.
        lines += [f"{k} = {json.dumps(v)}" for k, v in recipe.to_dict().items() if v != defaults[k] and v is not None]
    return "\n".join(lines) + "\n"
