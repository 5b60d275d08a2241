"""Vision transformers at any patch size: DeiT, and the pixel transformer, whose tokens are single pixels.

- *Training data-efficient image transformers & distillation through attention* (DeiT), arXiv 2012.12877; swept from
  patch 16 to 1 in *Scaling Laws in Patchification*, arXiv 2502.03738
- *An Image is Worth More Than 16x16 Patches: Exploring Transformers on Individual Pixels*, arXiv 2406.09415

Both are timm's ``VisionTransformer``, with its parameter names, so DeiT's and timm's published weights load. The models
are registered with timm: ``timm.create_model("pixel_transformer_tiny_patch1_32", num_classes=100)``.

timm itself has DeiT's four published names (``deit_base_patch16_224`` and the like), and a timm user who types one
expects timm's model: those stay timm's, and train, load and resize here like any other timm model. All other patch and
image sizes are this module's; where the name is timm's, leave out the image size: ``deit_base_patch16``, at 224 px, is
the same network with the same weights, and can be called at any patch size.
"""

import sys
from functools import partial
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from patchscale.errors import UserError
from patchscale.models.backbone import Backbone, Positions, check_positions, check_rates
from patchscale.models.published import DEIT, PIXEL_TRANSFORMER, Family, evaluation_crop
from patchscale.models.tokens import PatchEmbed, Size
from patchscale.models.weight_files import download, fit_for_timm
from patchscale.ops.linear import convert_linear


class ViT(Backbone, VisionTransformer):  # type: ignore[misc]  # it takes a patch size where timm takes masks
    """timm's vision transformer, at any image and patch size.

    Tokens are the class token, *first*, then the patches in reading order. Attention is timm's, through
    ``scaled_dot_product_attention``.

    The published pixel transformer differs from DeiT at the same size in two things only: the tiny one has 12 heads of
    16 channels where DeiT's has 3 of 64 (which takes as many parameters), and its patches are single pixels. Linear
    layers have biases, queries, keys and values too, and the class token has a position of its own: with 100 classes
    at 32 px these are the 5,555,812 parameters of the published summary. Its variant with a table of colours instead of
    the linear patch embedding is left out: it knows no patch size but 1.

    Args:
        img_size: image height and width, or one number for both.
        patch_size: patch height and width, or one number; it must divide the image.
        pos_embed: how tokens know their place: ``"learn"``, ``"sincos"`` (fixed, computed for the grid at hand) or
            ``"none"``.
        pos_grid: rows and columns of the position table, or one number; the patches' own if None. With ``"sincos"``,
            the grid in whose patches distances are counted. A model that is to be called at several patch sizes
            keeps its positions best on the finest of the grids.
        extend: interpolate the tokens to so many times the rows and columns.
        **kwargs: timm's: ``embed_dim``, ``depth``, ``num_heads``, ``num_classes``, ``global_pool``, ...

    Raises:
        UserError: sizes that do not fit each other or are none, a rate outside [0, 1], an unknown ``pos_embed``, or a
            ``pos_grid`` without places.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        pos_embed: Positions = "learn",
        pos_grid: Size | None = None,
        extend: int = 1,
        **kwargs: Any,
    ) -> None:
        for name in ("embed_dim", "depth", "num_heads", "in_chans"):
            if kwargs.get(name, 1) < 1:
                raise UserError(f"{name} is {kwargs[name]}, expected at least 1")
        check_rates(**{name: rate for name, rate in kwargs.items() if name.endswith("_rate")})
        if kwargs.get("dynamic_img_pad"):
            raise UserError("dynamic_img_pad is not for this model: resize or pad images to a whole number of patches")
        embed_dim, heads = kwargs.get("embed_dim", 768), kwargs.get("num_heads", 12)
        if embed_dim % heads:
            raise UserError(
                f"embed_dim is {embed_dim}, which {heads} heads cannot share: give a multiple of {heads}, or num_heads "
                "that divides it"
            )
        check_positions(pos_embed, embed_dim, pos_grid)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            pos_embed="learn" if pos_embed == "learn" else "none",
            embed_layer=partial(PatchEmbed, extend=extend),
            **kwargs,
        )
        convert_linear(self.blocks)
        self.positions = pos_embed
        self.pos_grid = self.patch_embed.grid_size if pos_grid is None else to_2tuple(pos_grid)
        if self.pos_embed is not None and self.pos_grid != self.patch_embed.grid_size:
            others = self.pos_embed.shape[1] - self.patch_embed.num_patches
            rows, columns = self.pos_grid
            self.pos_embed = nn.Parameter(self.pos_embed.new_empty(1, rows * columns + others, self.embed_dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def trunk(self) -> tuple[nn.Sequential, nn.Module]:
        """The blocks, and the norm after the last one."""
        return self.blocks, self.norm

    def embed(self, x: Tensor, patch_size: Size | None = None) -> Tensor:
        """(batch, channels, height, width) -> (batch, 1 + patches, embed_dim), with positions."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x, patch_size))))

    def _pos_embed(self, x: Tensor) -> Tensor:
        """(batch, rows, columns, embed_dim) -> (batch, 1 + rows * columns, embed_dim), with positions."""
        positions = self.positions_on(x.shape[1:3])
        x = x.flatten(1, 2)
        others = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        if positions is None:
            return torch.cat([*others, x], dim=1)
        if self.no_embed_class:
            return self.pos_drop(torch.cat([*others, x + positions], dim=1))
        return self.pos_drop(torch.cat([*others, x], dim=1) + positions)


def _pretrained_cfg(name: str, family: Family, patch_size: int, img_size: int) -> dict[str, Any]:
    cfg: dict[str, Any] = {
        "num_classes": 1000,
        "input_size": (3, img_size, img_size),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": evaluation_crop(patch_size, img_size),
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": family.paper,
    }
    if name in _TIMMS_WEIGHTS:
        cfg |= {"hf_hub_id": _TIMMS_WEIGHTS[name], "hf_hub_filename": _WEIGHT_FILE, "license": "apache-2.0"}
    return cfg


# DeiT's published weights, as timm keeps them.
_TIMMS_WEIGHTS = {f"deit_{s}_patch16": f"timm/deit_{s}_patch16_224.fb_in1k" for s in ("tiny", "small", "base")}
_WEIGHT_FILE = "model.safetensors"

default_cfgs: dict[str, Any] = {}


def _register(family: Family, name: str, size: str, patch_size: int, img_size: int) -> None:
    def entrypoint(pretrained: bool = False, **kwargs) -> ViT:
        arguments: dict[str, Any] = {"img_size": img_size, "patch_size": patch_size, **family.sizes[size]}
        if pretrained and not kwargs.get("pretrained_cfg") and not kwargs.get("pretrained_cfg_overlay"):
            file = _download_published(name, kwargs.get("cache_dir"))
            arguments["pretrained_cfg_overlay"] = {"file": file, "custom_load": True}
        return build_model_with_cfg(
            ViT,
            name,
            pretrained,
            pretrained_filter_fn=fit_for_timm,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **(arguments | {k: v for k, v in kwargs.items() if v is not None}),
        )

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"{family.title}-{size.capitalize()}, {patch_size} x {patch_size} patches, {img_size} px."
    default_cfgs.update(generate_default_cfgs({name: _pretrained_cfg(name, family, patch_size, img_size)}))
    setattr(sys.modules[__name__], name, register_model(entrypoint))


def _download_published(name: str, cache_dir: str | None) -> str:
    if name not in _TIMMS_WEIGHTS:
        raise UserError(
            f"no weights were published for {name}; create one that has some and call set_input_size on it, or pass "
            f"pretrained=False. Published: {', '.join(_TIMMS_WEIGHTS)}"
        )
    return str(download(_TIMMS_WEIGHTS[name], _WEIGHT_FILE, cache_dir))


def _register_all() -> None:
    for family in (DEIT, PIXEL_TRANSFORMER):
        for size, patch_size, img_size, name in family.names():
            if not timm.is_model(name):
                _register(family, name, size, patch_size, img_size)


_register_all()
