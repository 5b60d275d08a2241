"""Weights in and out of a model: load them, make the model a file belongs to, write them for timm and the Hub."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.layers import to_2tuple
from timm.models import VisionTransformer, get_model_args
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from patchscale.errors import UserError, first_line
from patchscale.files import make_folder, write_atomically
from patchscale.models.adventurer import Adventurer
from patchscale.models.backbone import Backbone
from patchscale.models.published import ADVENTURER, DEIT, PATCH_SIZES, PIXEL_TRANSFORMER
from patchscale.models.tokens import Resize, square_side
from patchscale.models.weight_files import Checkpoint, Which, class_entries, fill, read_checkpoint, refuse_more_tokens

_logger = logging.getLogger(__name__)

# Named here, so that no record can: a model that a file tells of is filled from this file and no other.
_FROM_NOWHERE: dict[str, Any] = {
    "pretrained": False,
    "pretrained_cfg": None,
    "pretrained_cfg_overlay": None,
    "checkpoint_path": None,
    "cache_dir": None,
}


def load_weights(
    model: nn.Module,
    source: str | os.PathLike,
    *,
    which: Which = "model",
    strict: bool = True,
    resize: Resize = "correct",
) -> nn.Module:
    """Load weights into a model, resizing patches and positions to its own patch size and image size.

    Args:
        model: the model to fill, in place.
        source: a ``.pth`` of the published code, one of this library's or timm's checkpoints, a ``.safetensors``, a
            folder with one, a URL, or a Hugging Face Hub id (``"user/name"`` or ``"user/name/file"``).
        which: the trained weights, or their exponential moving average where the file has one.
        strict: refuse a head of another number of classes; if False, the model keeps its own head then.
        resize: ``"published"`` resizes positions as the published code does: it takes the first one for the class
            token's, although this model has that last. To repeat a published recipe to the letter.

    Returns:
        The model.

    Raises:
        UserError: no such file, not a checkpoint, a file that would run code, or tensors that do not fit (which one,
            and both shapes).
    """
    checkpoint = read_checkpoint(source, which)
    fill(model, checkpoint, strict, resize)
    warning = difference_warning(model, checkpoint)
    if warning:
        _logger.warning("%s", warning)
    return model


def difference_warning(model: nn.Module, checkpoint: Checkpoint) -> str:
    """What to tell a user whose weights fit the model by their shapes, and were trained as another; "" if none.

    The flip rule, a ViT's heads and whether positions are fixed or absent leave no trace in a state dict. What the file
    records of them is compared with the model.
    """
    trained = _untraced(_recorded_model(checkpoint)) | ({"flip": checkpoint.flip} if checkpoint.flip else {})
    own = _untraced(model)
    wanted = {name: value for name, value in trained.items() if own.get(name, value) != value}
    if not wanted:
        return ""
    texts = [f"{name}={value!r} (the model has {own[name]!r})" for name, value in wanted.items()]
    way_out = "create the model with " + ", ".join(f"{name}={value!r}" for name, value in wanted.items())
    if "num_heads" in wanted:
        way_out += f", as {checkpoint.extra['model_name']} has"
    if "flip" in wanted:
        way_out += ", or let `patchscale eval --flip auto` choose on labelled images"
    return f"{checkpoint.path.name} goes with {', '.join(texts)}: {way_out}"


def _untraced(model: nn.Module | None) -> dict[str, Any]:
    """Arguments of a model that its tensors do not tell."""
    found: dict[str, Any] = {}
    if isinstance(model, Adventurer):
        found["flip"] = model.flip
    if isinstance(model, VisionTransformer):
        blocks: Any = model.blocks
        heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None)  # timm has blocks of other kinds too
        if heads is not None:
            found["num_heads"] = heads
    if isinstance(model, Backbone):
        found["pos_embed"] = model.positions
    return found


def _recorded_model(checkpoint: Checkpoint) -> nn.Module | None:
    """The model that a file says it belongs to, without memory for weights; None if it does not say or it is none."""
    name, arguments = (checkpoint.extra.get(k) for k in ("model_name", "model_args"))
    if not isinstance(name, str) or not isinstance(arguments, dict) or not timm.is_model(name):
        return None
    try:
        with torch.device("meta"):  # one block tells
            return timm.create_model(name, **_FROM_NOWHERE, **(arguments | {"depth": 1}))
    except (UserError, TypeError, ValueError, KeyError, RuntimeError, AssertionError):
        return None


def infer_model_args(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The constructor arguments of the Adventurer or ViT that a state dict belongs to, read off its tensors' shapes.

    The grid is taken to be square. A ViT's heads leave no trace in the shapes: they are taken to be as many as DeiT's
    and ViT's are at that width (the tiny pixel transformer's are not; this library's own files say so).

    Raises:
        UserError: the tensors are of neither.
    """
    is_vit = "blocks.0.attn.qkv.weight" in weights
    embed_dim, in_chans, *patch = _sizes(weights, "patch_embed.proj.weight", 4)
    entries = _sizes(weights, "pos_embed", 3)[1]
    grid = square_side(entries - class_entries(weights))
    return {
        "img_size": (grid * patch[0], grid * patch[1]),
        "patch_size": tuple(patch),
        "in_chans": in_chans,
        "num_classes": _sizes(weights, "head.weight", 2)[0] if "head.weight" in weights else 0,
        "embed_dim": embed_dim,
        "depth": 1 + max((int(m[1]) for k in weights if (m := re.match(r"(?:layers|blocks)\.(\d+)\.", k))), default=0),
    } | (_vit_args if is_vit else _adventurer_args)(weights, embed_dim)


def _sizes(weights: dict[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """A tensor's shape, where it has so many dimensions and is not empty.

    Raises:
        UserError: it has not, or is not there.
    """
    found = tuple(weights[name].shape) if name in weights else None
    if found is None or len(found) != dimensions or 0 in found:
        what = "missing" if found is None else f"{found}, expected {dimensions} dimensions, none of them 0"
        raise UserError(f"these weights are neither an Adventurer's nor a vision transformer's: {name} is {what}")
    return found


def _adventurer_args(weights: dict[str, Tensor], embed_dim: int) -> dict[str, Any]:
    (heads,) = _sizes(weights, "layers.0.mixer.A_log", 1)
    (d_inner,) = _sizes(weights, "layers.0.mixer.norm.weight", 1)
    channels = _sizes(weights, "layers.0.mixer.conv1d.weight", 3)[0]
    return {"d_state": (channels - d_inner) // 2, "headdim": d_inner // heads, "expand": d_inner // embed_dim}


def _vit_args(weights: dict[str, Tensor], embed_dim: int) -> dict[str, Any]:
    has_class_token = "cls_token" in weights
    heads = {size["embed_dim"]: size["num_heads"] for size in DEIT.sizes.values()}
    patch = max(weights["patch_embed.proj.weight"].shape[2:])
    if embed_dim == PIXEL_TRANSFORMER.sizes["tiny"]["embed_dim"] and patch <= 8:
        _logger.warning(
            "these weights may be DeiT-Tiny's, of 3 heads, or the tiny pixel transformer's, of 12; taken for the "
            "first. For the second: load_weights(timm.create_model('pixel_transformer_tiny_patch%d_32', ...), file)",
            patch,
        )
    return {
        "num_heads": heads.get(embed_dim, max(1, embed_dim // 64)),
        "mlp_ratio": _sizes(weights, "blocks.0.mlp.fc1.weight", 2)[0] / embed_dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "class_token": has_class_token,
        "no_embed_class": has_class_token and not class_entries(weights),
        # Any value makes the layer; the file fills it.
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in weights else None,
        # timm's place for the last norm tells how the tokens are pooled.
        "global_pool": "token" if has_class_token and "fc_norm.weight" not in weights else "avg",
    }


def create_from_checkpoint(checkpoint: Checkpoint, **overrides: Any) -> nn.Module:
    """The model that a checkpoint holds, with its weights.

    Name and arguments are those that the file records. Where it records none (a published file), the model is an
    Adventurer or a ViT with the sizes of the tensors, an Adventurer with the flip rule of the code that wrote it.

    Args:
        checkpoint: what :func:`read_checkpoint` gave.
        overrides: constructor arguments that come before the file's.

    Raises:
        UserError: the file records no model and its tensors are not of one that is known.
    """
    arguments = checkpoint.extra.get("model_args")
    if arguments is None:
        refuse_more_tokens(checkpoint.weights.keys(), checkpoint.path)
        arguments = infer_model_args(checkpoint.weights)
        if "d_state" in arguments:
            arguments["flip"] = checkpoint.flip or "alternate"
    try:
        arguments = {**arguments, **overrides}
        name = checkpoint.extra.get("model_name") or architecture_name(arguments)
        if not isinstance(name, str) or not timm.is_model(name):
            raise UserError(f"there is no model {name!r}")
        model = timm.create_model(name, **_FROM_NOWHERE, **arguments)
    except (TypeError, KeyError, ValueError, RuntimeError, AssertionError) as e:
        raise UserError(f"{checkpoint.path} records a model that cannot be made: {first_line(e)}") from e
    fill(model, checkpoint)
    return model


def architecture_name(arguments: dict[str, Any]) -> str:
    """The registered name with these sizes, or, for sizes of one's own, one that takes them as arguments."""
    family = DEIT if "num_heads" in arguments else ADVENTURER
    size = next((n for n, s in family.sizes.items() if all(arguments.get(k) == v for k, v in s.items())), "tiny")
    patch, image = to_2tuple(arguments["patch_size"]), to_2tuple(arguments["img_size"])
    patch_part = patch[0] if patch[0] == patch[1] and patch[0] in PATCH_SIZES else 16
    image_part = image[0] if image[0] == image[1] and image[0] in family.img_sizes else 224
    name = f"{family.prefix}_{size}_patch{patch_part}"
    # Without an image size the name is always this library's own; with one, DeiT's four published names are timm's.
    return name if family is DEIT else f"{name}_{image_part}"


def convert(source: str | os.PathLike, destination: str | os.PathLike, which: Which = "model") -> list[Path]:
    """Write a checkpoint as safetensors with the ``config.json`` beside it that timm's loaders read.

    Args:
        source: as in :func:`load_weights`.
        destination: a ``.safetensors`` file, or a folder, where the file is called ``model.safetensors``.
        which: as in :func:`load_weights`.

    Returns:
        The files written.

    Raises:
        UserError: as in :func:`load_weights`; or a ``config.json`` of other weights is in the way.
    """
    destination = Path(destination)
    target = destination if destination.suffix == ".safetensors" else destination / "model.safetensors"
    config_path = target.with_name("config.json")
    if config_path.exists() and not target.exists():
        others = ", ".join(sorted(p.name for p in target.parent.glob("*.safetensors"))) or "something else"
        raise UserError(f"{config_path} describes {others}; write to a folder of its own")
    checkpoint = read_checkpoint(source, which)
    model = create_from_checkpoint(checkpoint)
    record: dict[str, Any] = {k: checkpoint.extra[k] for k in ("preprocessing", "classes") if k in checkpoint.extra}
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]  # timm sets it
    record |= {"model_name": cfg["architecture"], "model_args": get_model_args(model)}
    make_folder(target.parent)

    def write_config(path: Path) -> None:
        fed = record.get("preprocessing")
        data = None if fed is None else {"mean": fed["mean"], "std": fed["std"], "crop_pct": fed["crop"]}
        labels = {"label_names": record["classes"]} if "classes" in record else {}
        save_config_for_hf(model, str(path), model_config=labels, data_config=data)

    def write_weights(path: Path) -> None:
        metadata = {"format": "pt", "patchscale": json.dumps(record)}
        tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
        safetensors.torch.save_file(tensors, path, metadata=metadata)

    write_atomically(target, write_weights)
    write_atomically(config_path, write_config)
    return [target, config_path]
