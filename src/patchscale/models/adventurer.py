"""Adventurer: images as causal sequences, scanned by Mamba-2 in linear time.

- *Adventurer: Optimizing Vision Mamba Architecture Designs for Efficiency*, arXiv 2410.07599
- *Scaling Laws in Patchification: An Image Is Worth 50,176 Tokens And More*, arXiv 2502.03738

Parameter names are those of the published checkpoints. The models are registered with timm:
``timm.create_model("adventurer_base_patch16_224")``.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from patchscale.errors import UserError
from patchscale.models.backbone import Backbone, Positions, check_choice, check_positions, check_rates
from patchscale.models.block import CONV_WIDTH, NORM_EPS, Block
from patchscale.models.published import DEFAULT_IMG_SIZE, IMG_SIZES, PATCH_SIZES, PUBLISHED, SIZES, evaluation_crop
from patchscale.models.tokens import PatchEmbed, Size, grid_size
from patchscale.models.weight_files import download, fit_for_timm
from patchscale.ops.sequence_parallel import SequenceGroup

Flip = Literal["alternate", "pairs", "released"]

# Which blocks scan from the right. The paper draws a flip after every block; the published code's `n // 2 == 1` flips
# blocks 2 and 3 alone, which its author calls a bug (issue 6 of wangf3014/Adventurer) that either other rule mends.
FLIP_RULES: dict[Flip, Callable[[int], bool]] = {
    "alternate": lambda n: n % 2 == 1,
    "pairs": lambda n: (n // 2) % 2 == 1,
    "released": lambda n: n // 2 == 1,
}
GLOBAL_POOLS = ("token", "avg", "")


class Adventurer(Backbone):
    """The Adventurer backbone and classifier, with timm's model contract.

    Tokens are the patches in reading order, then the class token, *last*: ``num_prefix_tokens`` is 0. The state dict
    has the published keys.

    Args:
        img_size: image height and width, or one number for both.
        patch_size: patch height and width, or one number; it must divide the image.
        in_chans: image channels.
        num_classes: classes of the head; 0 for none.
        global_pool: ``"token"`` (the class token), ``"avg"`` (the mean of the patches) or ``""`` (all tokens).
        embed_dim: width.
        depth: blocks.
        d_state: state size of the scan.
        headdim: channels of one scan head.
        expand: inner width of the mixer over ``embed_dim``.
        flip: which blocks scan from the right: ``"alternate"`` (every second one, what the paper draws),
            ``"pairs"`` (two by two) or ``"released"`` (blocks 2 and 3 alone, what the published code runs).
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth. As published, block i of n drops with
            ``([0] + linspace(0, drop_path_rate, n))[i]``, so the full rate is never reached.
        dynamic_img_size: accept any image that the patch divides, resampling positions on the fly.
        pos_embed: how tokens know their place, beside the order of the scan: ``"learn"``, ``"sincos"`` (fixed, computed
            for the grid at hand) or ``"none"``.
        pos_grid: rows and columns of the position table, or one number; the patches' own if None. With ``"sincos"``,
            the grid in whose patches distances are counted. A model that is to be called at several patch sizes keeps
            its positions best on the finest of the grids.
        extend: interpolate the tokens to so many times the rows and columns.
        sequence_group: processes to cut the tokens of an image over; see :meth:`set_sequence_group`.

    Raises:
        UserError: sizes that do not fit each other or are none, a rate outside [0, 1], or an unknown ``flip``,
            ``pos_embed`` or ``global_pool``.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        d_state: int = 64,
        headdim: int = 64,
        expand: int = 2,
        flip: Flip = "alternate",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        pos_embed: Positions = "learn",
        pos_grid: Size | None = None,
        extend: int = 1,
        sequence_group: ProcessGroup | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        widths = {"embed_dim": embed_dim, "d_state": d_state, "headdim": headdim, "expand": expand}
        for name, value in (widths | {"depth": depth, "in_chans": in_chans}).items():
            if value < 1:
                raise UserError(f"{name} is {value}, expected at least 1")
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        check_choice("flip", flip, FLIP_RULES)
        check_choice("global_pool", global_pool, GLOBAL_POOLS)
        check_positions(pos_embed, embed_dim, pos_grid)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 0
        self.num_suffix_tokens = 1
        self.global_pool = global_pool
        self.flip = flip
        self.dynamic_img_size = dynamic_img_size

        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        rows, columns = grid_size(img_size, patch_size)
        self.pos_grid = (rows * extend, columns * extend) if pos_grid is None else to_2tuple(pos_grid)
        self.positions = pos_embed
        self.pos_embed = None
        if pos_embed == "learn":
            self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.pos_grid) + 1, embed_dim, **dd))
        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,
            extend,
            in_chans=in_chans,
            embed_dim=embed_dim,
            strict_img_size=not dynamic_img_size,
            **dd,
        )
        # Before the blocks, as published: saved optimiser states number parameters by it.
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        drop_path_rates = [0.0, *torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()]
        self.layers = nn.Sequential(
            *(
                Block(embed_dim, d_state, headdim, expand, FLIP_RULES[flip](i), drop_path_rates[i], **dd)
                for i in range(depth)
            )
        )
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": max(self.patch_embed.patch_size)}
            for i in range(depth)
        ]
        self.norm_f: nn.Module = nn.RMSNorm(embed_dim, eps=NORM_EPS, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.init_weights(needs_reset=False)
        self.set_sequence_group(sequence_group)

    @torch.no_grad()
    def init_weights(self, needs_reset: bool = True) -> None:
        """The published initialisation.

        As measured on the published code: patch embedding normal with 1.137 / sqrt(fan in) (timm 0.4.12's
        ``lecun_normal_``, whose truncation never bites), tables and head normal with 0.02, linear biases zero, each
        mixer's output projection divided by sqrt(depth), everything else PyTorch's default.

        Args:
            needs_reset: redraw what modules draw for themselves when they are made.
        """
        if needs_reset:
            for module in self.modules():
                if module is not self and hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        proj = self.patch_embed.proj
        nn.init.normal_(proj.weight, std=1.137 / math.sqrt(proj.weight[0].numel()))
        nn.init.zeros_(proj.get_parameter("bias"))
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=0.02)
        for block in self.layers:
            block.mixer.out_proj.weight /= math.sqrt(len(self.layers))
            for linear in block.mlp.children():
                nn.init.zeros_(linear.get_parameter("bias"))
        _init_head(self.head)

    def set_flip(self, flip: Flip) -> None:
        """Change the rule by which blocks scan from the right.

        Raises:
            UserError: an unknown rule.
        """
        check_choice("flip", flip, FLIP_RULES)
        self.flip = flip
        for i, block in enumerate(self.layers):
            block.mixer.reverse = FLIP_RULES[flip](i)
        update_model_args(self, flip=flip)

    def set_sequence_group(self, group: ProcessGroup | None) -> None:
        """Cut the tokens of every image over the processes of a group; None for all of them in this process.

        All processes of the group call the model together, with the same weights, the same image and, when training
        with drop path or dropout, the same state of the random generator. Each embeds and computes its slice of the
        patches, which are cut evenly in reading order, and all compute the class token. Logits are the same on all.
        ``forward_features`` gives this process's patches and then the class token, ``forward_intermediates`` likewise.

        All processes take part in the backward. Gradients, of the parameters and of the image, are of the *mean* of the
        processes' losses once averaged over the processes, and of the sum of their losses once summed. So with the
        same loss of the logits on every process, average: ``DistributedDataParallel`` does, as it is, also over several
        such groups that are given different images. Give the model a group of its own, not one that others
        communicate over during the backward (DistributedDataParallel uses the default group).

        Raises:
            UserError: no process group, one without this process, or a model with ``extend``. When called: images that
                differ, or with fewer than 3 patches for each process.
        """
        if group is not None and self.patch_embed.extend > 1:
            raise UserError("a sequence_group cuts tokens that are patches: it does not go with extend")
        self.sequence_group = None if group is None else SequenceGroup(group)
        for block in self.layers:
            block.mixer.sequence_group = self.sequence_group

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters, beside those of one dimension, that weight decay skips (as published)."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into depth groups, for layer decay; head and last norm decay least."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": r"^layers\.(\d+)",
        }

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a fresh head, and a new ``global_pool`` if one is given.

        Raises:
            UserError: an unknown ``global_pool``.
        """
        if global_pool is not None:
            check_choice("global_pool", global_pool, GLOBAL_POOLS)
            self.global_pool = global_pool
        self.num_classes = num_classes
        dd: dict[str, Any] = {"device": self.cls_token.device, "dtype": self.cls_token.dtype}
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        _init_head(self.head)
        self.head.train(self.training)

    @property
    def holds_whole_images(self) -> bool:
        """Whether all patches of an image are in this process."""
        return self.sequence_group is None

    def trunk(self) -> tuple[nn.Sequential, nn.Module]:
        """The blocks, and the norm after the last one."""
        return self.layers, self.norm_f

    def embed(self, x: Tensor, patch_size: Size | None = None) -> Tensor:
        """(batch, channels, height, width) -> (batch, patches + 1, embed_dim), with positions."""
        if self.sequence_group is not None:
            tokens, positions = self._embed_slice(x, self.sequence_group, patch_size)
        else:
            rows_and_columns = self.patch_embed(x, patch_size)
            tokens = rows_and_columns.flatten(1, 2)
            positions = self.positions_on(rows_and_columns.shape[1:3])
        tokens = torch.cat([tokens, self.cls_token.expand(tokens.shape[0], -1, -1)], dim=1)
        return tokens if positions is None else tokens + positions

    def _embed_slice(self, x: Tensor, group: SequenceGroup, patch_size: Size | None) -> tuple[Tensor, Tensor | None]:
        """This process's patches, (batch, patches, embed_dim), and their positions with that of the class token."""
        group.require_alike(x)
        grid = rows, columns = self.patch_embed.grid_of((x.shape[-2], x.shape[-1]), patch_size)
        own = group.slice_of(rows * columns, least=CONV_WIDTH - 1)
        first = own.start // columns
        tokens = self.patch_embed(x, patch_size, slice(first, -(-own.stop // columns))).flatten(1, 2)
        positions = self.positions_on(grid)
        if positions is not None:
            positions = torch.cat([positions[:, own], positions[:, -1:]], dim=1)
        return tokens[:, own.start - first * columns : own.stop - first * columns], positions

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool what ``forward_features`` gave and classify it; ``pre_logits`` stops before the classifier."""
        if self.global_pool == "token":
            x = x[:, -1]
        elif self.global_pool == "avg":
            x = self._mean_of_patches(x[:, :-1])
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def _mean_of_patches(self, patches: Tensor) -> Tensor:
        if self.sequence_group is None:
            return patches.mean(dim=1)
        total, count = self.sequence_group.sum_and_count(patches)
        return (total / count).to(patches.dtype)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one that ``indices`` asks for; returns the indices as positive numbers."""
        take, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take


def _init_head(head: nn.Module) -> None:
    if isinstance(head, nn.Linear):
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)


def _pretrained_cfg(name: str, patch_size: int, img_size: int) -> dict[str, Any]:
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
    }
    for repository, models in PUBLISHED.items():
        if name in models:
            cfg |= {
                "hf_hub_id": repository,
                "hf_hub_filename": f"{name}.pth",
                "paper_ids": "arXiv:2410.07599" if repository.endswith("Adventurer") else "arXiv:2502.03738",
                "origin_url": f"https://huggingface.co/{repository}",
            }
    return cfg


default_cfgs: dict[str, Any] = {}


def _register(name: str, size: str, patch_size: int, img_size: int, published_name: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs) -> Adventurer:
        arguments: dict[str, Any] = {"patch_size": patch_size, **SIZES[size]}
        if pretrained and not kwargs.get("pretrained_cfg") and not kwargs.get("pretrained_cfg_overlay"):
            file = _download_published(name, published_name, kwargs.get("cache_dir"))
            # The flip rule is what the published evaluation runs; see `patchscale eval --flip auto`.
            arguments |= {"flip": "released", "pretrained_cfg_overlay": {"file": str(file), "custom_load": True}}
        return build_model_with_cfg(
            Adventurer,
            name,
            pretrained,
            pretrained_filter_fn=fit_for_timm,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **(arguments | {k: v for k, v in kwargs.items() if v is not None}),
        )

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"Adventurer-{size.capitalize()}, {patch_size} x {patch_size} patches, {img_size} px."
    default_cfgs.update(generate_default_cfgs({name: _pretrained_cfg(published_name, patch_size, img_size)}))
    setattr(sys.modules[__name__], name, register_model(entrypoint))


def _download_published(name: str, published_name: str, cache_dir: str | None) -> Path:
    repository = next((r for r, models in PUBLISHED.items() if published_name in models), None)
    if repository is None:
        names = ", ".join(name for models in PUBLISHED.values() for name in models)
        raise UserError(
            f"no weights were published for {name}; create one that has some and call set_input_size on it, or pass "
            f"pretrained=False. Published: {names}"
        )
    return download(repository, f"{published_name}.pth", cache_dir)


def _register_all() -> None:
    for size in SIZES:
        for patch_size in PATCH_SIZES:
            for img_size in IMG_SIZES:
                name = f"adventurer_{size}_patch{patch_size}_{img_size}"
                _register(name, size, patch_size, img_size, name)
                if img_size == DEFAULT_IMG_SIZE:
                    _register(f"adventurer_{size}_patch{patch_size}", size, patch_size, img_size, name)


_register_all()
