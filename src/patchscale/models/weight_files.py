"""Weight files: found, read without running anyone's code, and put into a model."""

import argparse
import hashlib
import http.client
import json
import math
import os
import pathlib
import pickle
import pickletools
import re
from collections.abc import Set
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import safetensors
import torch
from timm.layers import to_2tuple
from timm.models._hub import download_cached_file, get_cache_dir
from timm.models._input import get_pretrained_grid_size, update_model_args
from torch import Tensor, nn

from patchscale.errors import UserError, first_line
from patchscale.models.tokens import Resize, fit_tokens, grid_size, position_entries, square_side

Which = Literal["model", "ema"]

# Types a checkpoint may name beside tensors and plain containers: they hold values and run nothing. Published files
# carry their command line as a Namespace, and a PosixPath in it where Slurm started them.
_INERT_TYPES: list[Any] = [
    argparse.Namespace,
    # Read as a pure path, which exists on Windows too; Python 3.13 names the module otherwise.
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
]
_STATE_KEYS: dict[str, tuple[str, ...]] = {
    "model": ("model", "state_dict"),
    "ema": ("model_ema", "state_dict_ema"),
}


class Checkpoint(NamedTuple):
    """A file's content: one set of weights, and everything else it says."""

    weights: dict[str, Tensor]
    extra: dict[str, Any]
    path: Path

    @property
    def grid(self) -> tuple[int, int] | None:
        """The (rows, columns) of patches that have positions, None if the file does not tell."""
        config = self.extra.get("model_args")
        kernel = self.weights.get("patch_embed.proj.weight")
        if isinstance(config, dict) and "img_size" in config and kernel is not None and kernel.ndim == 4:
            try:
                if config.get("pos_grid") is not None:
                    rows, columns = map(int, to_2tuple(config["pos_grid"]))
                else:
                    extend = int(config.get("extend", 1))
                    patches = grid_size(config["img_size"], (kernel.shape[2], kernel.shape[3]))
                    rows, columns = (n * extend for n in patches)
                if min(rows, columns) < 1:
                    raise ValueError(f"{rows} rows and {columns} columns")
                return rows, columns
            except (TypeError, ValueError) as e:
                raise UserError(f"{self.path} records sizes that make no grid: {first_line(e)}") from e
        # The published code makes square images alone.
        positions = self.weights.get("pos_embed")
        if positions is None or positions.ndim != 3 or not isinstance(self.extra.get("args"), argparse.Namespace):
            return None
        side = square_side(positions.shape[1] - class_entries(self.weights))
        return side, side

    @property
    def flip(self) -> str | None:
        """The flip rule these weights were trained or published with, None if the file does not tell."""
        config = self.extra.get("model_args")
        if isinstance(config, dict) and "flip" in config:
            return config["flip"]
        # Files of the published code hold its command line; that code runs one rule only.
        return "released" if isinstance(self.extra.get("args"), argparse.Namespace) else None


def class_entries(weights: dict[str, Tensor]) -> int:
    """How many positions of a state dict are the class token's: one; none in DeiT III, whose layers are scaled."""
    entries = weights["pos_embed"].shape[1]
    none = "blocks.0.ls1.gamma" in weights and math.isqrt(entries) ** 2 == entries
    return int("cls_token" in weights and not none)


def read_checkpoint(source: str | os.PathLike, which: Which = "model") -> Checkpoint:
    """Read a weight file; arguments and errors as :func:`load_weights`."""
    if which not in _STATE_KEYS:
        raise UserError(f"which is {which!r}, expected one of {', '.join(map(repr, _STATE_KEYS))}")
    path = _locate(source)
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    except UserError as e:
        if not _is_url(source):
            raise
        raise UserError(f"{e}. It was downloaded from {source}: delete it to have it downloaded again") from e
    extra: dict[str, Any] = {}
    weights: Any = content
    holders = {key for keys in _STATE_KEYS.values() for key in keys}
    if holders & content.keys():
        weights = next((content[key] for key in _STATE_KEYS[which] if content.get(key) is not None), None)
        extra = {k: v for k, v in content.items() if k not in holders}
        if weights is None:
            there = sorted(w for w, keys in _STATE_KEYS.items() if any(content.get(k) is not None for k in keys))
            raise UserError(f"{path} has no {which!r} weights; it has {', '.join(map(repr, there)) or 'none'}")
    elif which == "ema":
        raise UserError(f"{path} holds one set of weights, no moving average; load it with which='model'")
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()) or not weights:
        raise UserError(f"{path} is not a checkpoint: expected a mapping of names to tensors")
    # What DistributedDataParallel puts before names, and torch.compile anywhere in them.
    weights = {k.replace("_orig_mod.", "").removeprefix("module."): v for k, v in weights.items()}
    return Checkpoint(weights, extra, path)


def fill(model: nn.Module, checkpoint: Checkpoint, strict: bool = True, resize: Resize = "correct") -> dict[str, str]:
    """Put a checkpoint's weights into a model; arguments and errors as :func:`load_weights`.

    Returns:
        What was resized and how, in words.
    """
    if resize not in get_args(Resize):
        raise UserError(f"resize is {resize!r}, expected one of {', '.join(map(repr, get_args(Resize)))}")
    weights = dict(checkpoint.weights)
    own = model.state_dict()
    refuse_more_tokens(weights.keys() - own.keys(), checkpoint.path)
    resized = fit_tokens(model, weights, checkpoint.grid, resize)
    heads = _heads(model)
    head_keys = sorted(k for k in weights if k.startswith(heads))  # safetensors has an order of its own
    own_head = sorted(k for k in own if k.startswith(heads))
    fits = head_keys == own_head and all(own[k].shape == weights[k].shape for k in head_keys)
    keep_head = not own_head or not (strict or fits)
    for key in head_keys if keep_head else ():
        del weights[key]
    problems = [
        f"{k} is {tuple(weights[k].shape)} in the file and {tuple(own[k].shape)} in the model"
        for k in own
        if k in weights and own[k].shape != weights[k].shape
    ]
    problems += [f"{k} is missing from the file" for k in own if k not in weights and not (keep_head and k in own_head)]
    problems += [f"{k} is not in the model" for k in weights if k not in own]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        way_out = (
            "give the model the same num_classes, or pass strict=False to keep its own head"
            if problems[0].startswith(heads)
            else "create the model with the sizes of the file (patchscale.create_from_checkpoint does)"
        )
        raise UserError(f"{checkpoint.path} does not fit the model: {problems[0]}{more}; {way_out}")
    model.load_state_dict(weights, strict=False)
    if getattr(model, "positions", None) == "sincos" and checkpoint.grid is not None:
        # Fixed positions are counted in the patches that the weights learned with, as set_input_size leaves them.
        filled: Any = model
        filled.pos_grid = checkpoint.grid
        update_model_args(model, pos_grid=checkpoint.grid)
    return resized


def _heads(model: nn.Module) -> tuple[str, ...]:
    """What the names of a model's classifiers begin with; timm records it, for a classifier may be a part of a head."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or "head"
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def refuse_more_tokens(names: Set[str], path: Path) -> None:
    """Refuse weights with tokens beside the class token, which change what all positions mean.

    Raises:
        UserError: naming them.
    """
    more = {"dist_token": "a distilled DeiT's: take the file of the same size that is not", "reg_token": "registers"}
    for name in sorted(more.keys() & names):
        raise UserError(
            f"{path} has a {name} ({more[name]}); create the model that has one, by timm, and load the file into that"
        )


def fit_for_timm(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What timm calls on weights it has read itself (``hf-hub:`` and ``local-dir:`` models)."""
    weights = dict(weights.get("model", weights))  # a published file, given as pretrained_cfg_overlay={"file": ...}
    patches = weights["pos_embed"].shape[1] - sum(position_entries(model)) if "pos_embed" in weights else 0
    grid = getattr(model, "pretrained_model_args", {}).get("pos_grid")
    if grid is None:
        grid = get_pretrained_grid_size(model, weights.get("patch_embed.proj.weight"), patches)
    rows_and_columns = None if grid is None else to_2tuple(grid)
    fit_tokens(model, weights, rows_and_columns)
    return weights


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
        extra = json.loads(metadata.get("patchscale", "{}"))
        if not isinstance(extra, dict):
            raise ValueError(f"its record is a {type(extra).__name__}")
    except (safetensors.SafetensorError, ValueError, OSError) as e:
        raise UserError(f"{path} is not a whole safetensors file ({e}): copy or download it again") from e
    return {"model": weights, **extra}


def read_pickle(path: Path) -> dict[str, Any]:
    """Everything in a file that torch.save wrote, tensors and plain values alone.

    Raises:
        UserError: not a whole checkpoint, or one that would run code.
    """
    try:
        with torch.serialization.safe_globals(_INERT_TYPES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        named = _forbidden_global(path, str(e))
        if named:
            raise UserError(
                f"{path} is refused: loading it would run {named}; nothing but tensors and plain values is ever "
                "unpickled. If you trust its author, have them save the state dict alone, or as safetensors"
            ) from e
        raise UserError(f"{path} is not a checkpoint, or not a whole one: copy or download it again") from e
    except Exception as e:  # a damaged pickle ends in any error there is
        raise UserError(f"{path} is not a whole checkpoint ({first_line(e)}): copy or download it again") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a mapping of tensors")
    return content


def _forbidden_global(path: Path, message: str) -> str | None:
    """The globals that a file names and that are not allowed, without running any."""
    try:
        with torch.serialization.safe_globals(_INERT_TYPES):
            named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, pickle.UnpicklingError, EOFError):
        named = []  # not a zip file: an old checkpoint, or a bare pickle
    if named:
        return ", ".join(named)
    match = re.search(r"GLOBAL\s+`?([\w.]+\.\w+)", message)
    return match[1] if match else _first_global_of_bare_pickle(path)


# What torch's own reader allows in every file, as far as it matters to name another.
_HARMLESS = ("torch.", "collections.", "argparse.Namespace", "pathlib.")


def _first_global_of_bare_pickle(path: Path) -> str | None:
    strings: list[str] = []
    try:
        with open(path, "rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                name = None
                if opcode.name in ("GLOBAL", "INST"):
                    name = str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    name = ".".join(strings[-2:])
                elif isinstance(argument, str):
                    strings.append(argument)
                if name is not None and not name.startswith(_HARMLESS):
                    return name
    except (ValueError, IndexError, UnicodeDecodeError):
        pass  # not a pickle at all
    return None


def _is_url(source: str | os.PathLike) -> bool:
    return str(source).startswith(("http://", "https://"))


def _locate(source: str | os.PathLike) -> Path:
    text, path = str(source), Path(source)
    if path.is_dir():
        # What timm calls an exported model, and what a training run calls its best checkpoint.
        known = [path / name for name in ("model.safetensors", "best.pt") if (path / name).exists()]
        weights = known[:1] or sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pth"))
        if len(weights) == 1:
            return weights[0]
        stages = sorted(f.parent.name for f in path.glob("*/best.pt"))
        if stages and not weights:
            raise UserError(f"{path} is a run of several stages; name one of them: {', '.join(stages)}")
        raise UserError(f"{path} holds {len(weights)} weight files; name one of them")
    if path.exists():
        return path
    if _is_url(source):
        try:
            # A folder for each URL: timm keeps files by their names alone, and many are called model.safetensors.
            folder = Path(get_cache_dir(), hashlib.sha256(text.encode()).hexdigest()[:16])
            return Path(download_cached_file(text, check_hash=False, cache_dir=folder))
        except (OSError, ValueError, http.client.HTTPException) as e:
            raise UserError(
                f"cannot download {text} ({first_line(e)}): check the address, or fetch the file where there is a "
                "network and give its path"
            ) from e
    # A Hub id looks like a relative path: one that begins in a folder of this machine is a path.
    parts = text.removeprefix("hf-hub:").split("/")
    names_a_file = path.suffix in (".pth", ".pt", ".safetensors")
    is_id = len(parts) == (3 if names_a_file else 2) and all(re.fullmatch(r"[\w-][\w.-]*", part) for part in parts)
    if is_id and (text.startswith("hf-hub:") or not Path(parts[0]).exists()):
        return download("/".join(parts[:2]), parts[2] if names_a_file else "model.safetensors")
    raise UserError(f"no such weight file: {text}")


def download(repository: str, filename: str, cache_dir: str | Path | None = None) -> Path:
    """A file of a Hugging Face Hub repository, from the cache where it is there.

    Raises:
        UserError: no such file, or no network; the message gives the URL.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    url = f"https://huggingface.co/{repository}/resolve/main/{filename}"
    try:
        return Path(huggingface_hub.hf_hub_download(repository, filename, cache_dir=cache_dir))
    except LocalEntryNotFoundError as e:
        raise UserError(
            f"cannot reach the Hugging Face Hub for {url}: fetch it where there is a network, then give its path"
        ) from e
    except (EntryNotFoundError, HfHubHTTPError) as e:
        raise UserError(f"{url}: {first_line(e)}") from e
