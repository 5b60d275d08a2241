"""What the families share: one way from an image to tokens, and from tokens to maps, at any image and patch size."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from timm.layers import to_2tuple
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args, update_model_input_size
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from patchscale.errors import UserError
from patchscale.models.tokens import (
    PatchEmbed,
    Size,
    position_entries,
    resize_pos_embed,
    sincos_positions,
)
from patchscale.models.weight_files import fill, read_checkpoint
from patchscale.ops.linear import PRODUCTS

Positions = Literal["learn", "sincos", "none"]

# What a linear layer runs.
_PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, *PRODUCTS]


class Backbone(nn.Module):
    """timm's model contract over patches and a class token at either end, at any image and patch size.

    A family gives the attributes below, ``embed``, ``trunk`` and ``forward_head``, and how it starts and is pruned.

    Attributes:
        patch_embed: image to patches.
        pos_embed: the learned position table, (1, entries, embed_dim); None where positions are not learned.
        pos_grid: (rows, columns) of the patches in that table. Usually the patches' own; where it is another, positions
            are resampled in every pass.
        positions: how tokens know their place.
        num_prefix_tokens: tokens before the patches.
        num_suffix_tokens: tokens after them.
        grad_checkpointing: whether blocks are recomputed in the backward pass.
        keep_products: whether the results of linear layers are kept then.
    """

    patch_embed: PatchEmbed
    pos_embed: Any
    pos_grid: tuple[int, int]
    positions: Positions = "learn"
    num_prefix_tokens: int = 0
    num_suffix_tokens: int = 0
    embed_dim: int
    feature_info: list[dict[str, Any]]
    forward_head: Callable[..., Tensor]
    grad_checkpointing: bool = False
    keep_products: bool = False

    def embed(self, x: Tensor, patch_size: Size | None = None) -> Tensor:
        """(batch, channels, height, width) -> (batch, tokens, embed_dim): what enters the first block."""
        raise NotImplementedError

    def trunk(self) -> tuple[nn.Sequential, nn.Module]:
        """The blocks, and the norm after the last one."""
        raise NotImplementedError

    def load_pretrained(self, path: str) -> None:
        """Fill the model from a published file; timm calls this. A head of other classes keeps its own weights."""
        fill(self, read_checkpoint(path), strict=False)

    def set_grad_checkpointing(self, enable: bool = True, keep_products: bool = False) -> None:
        """Recompute each block in the backward pass instead of storing what it computed.

        Args:
            enable: or store everything again.
            keep_products: store what the linear layers computed, most of the arithmetic, and recompute the rest.
        """
        self.grad_checkpointing, self.keep_products = enable, keep_products

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Change the image size and the patch size of the model, weights included.

        The patch embedding is resized by pseudo-inverse, learned positions by bicubic resampling, the entry of the
        class token kept. Fixed positions stay on the map they were on.

        Raises:
            UserError: the patch does not divide the image.
        """
        self.patch_embed.set_input_size(img_size, patch_size)
        grid = self.patch_embed.grid_size
        if self.pos_embed is not None:
            resized = resize_pos_embed(self.pos_embed.data, self.pos_grid, grid, *position_entries(self))
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
            self.pos_grid = grid
        for info in self.feature_info:
            info["reduction"] = max(self.patch_embed.patch_size)
        update_model_input_size(self, self.patch_embed.img_size, patch_size=self.patch_embed.patch_size)
        update_model_args(self, pos_grid=None if self.pos_grid == grid else self.pos_grid)

    def forward_features(self, x: Tensor, patch_size: Size | None = None, visible: Tensor | None = None) -> Tensor:
        """(batch, channels, height, width) -> (batch, tokens, embed_dim), normed, the class token at its end.

        Args:
            x: images.
            patch_size: as in :meth:`forward`.
            visible: (batch, kept), which patches of each image enter the blocks, by their number in reading order and
                in that order; all if None. They have the positions that they have in the image, and nothing else
                tells where the others would have been.

        Raises:
            UserError: as :meth:`forward`; or some patches alone of images that are cut over a ``sequence_group``.
        """
        x = self.embed(x, patch_size)
        if visible is not None:
            x = self._keep(x, visible)
        blocks, norm = self.trunk()
        for block in blocks:
            x = self._run(block, x)
        return norm(x)

    def forward(self, x: Tensor, patch_size: Size | None = None) -> Tensor:
        """Classify images.

        Args:
            x: (batch, channels, height, width).
            patch_size: size of the patches in this pass, where not the one that the model stores: the patch embedding
                is resized on the fly, and positions are resampled. One set of weights so serves, and learns at, any
                patch size (FlexiViT, arXiv 2212.08013).

        Returns:
            (batch, num_classes).

        Raises:
            UserError: the patch does not divide the image, or the model takes other images.
        """
        return self.forward_head(self.forward_features(x, patch_size))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        patch_size: Size | None = None,
    ) -> Any:
        """The patch tokens after chosen blocks, for dense prediction; timm's contract.

        Args:
            x: (batch, channels, height, width).
            indices: the last n blocks if a number, these blocks if a list, all if None.
            return_prefix_tokens: give (patches, class token) pairs, the class token as (batch, 1, embed_dim). timm's
                word, whichever end of the sequence it stands at.
            norm: apply the final norm to each.
            stop_early: do not run the blocks after the last one asked for.
            output_fmt: ``"NCHW"``, (batch, embed_dim, rows, columns), or ``"NLC"``, (batch, patches, embed_dim).
            intermediates_only: leave out the final features.
            output_dict: give ``image_features``, ``image_intermediates`` and ``image_intermediates_prefix``.
            patch_size: as in :meth:`forward`.

        Returns:
            (final features as ``forward_features`` gives them, intermediates), unless asked otherwise.

        Raises:
            UserError: an unknown ``output_fmt``, ``"NCHW"`` of a slice of the patches, or sizes that do not fit.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        if output_fmt == "NCHW" and not self.holds_whole_images:
            raise UserError("the patches are cut over a sequence_group and make no map here: ask for output_fmt='NLC'")
        blocks, last_norm = self.trunk()
        take, last = feature_take_indices(len(blocks), indices)
        grid = self.patch_embed.grid_of((x.shape[-2], x.shape[-1]), patch_size)
        x = self.embed(x, patch_size)
        taken = []
        for i, block in enumerate(blocks[: last + 1] if stop_early else blocks):
            x = self._run(block, x)
            if i in take:
                taken.append(last_norm(x) if norm else x)

        parts = [self.split_tokens(t) for t in taken]
        patches = [p for p, _ in parts]
        others = [o for _, o in parts]
        return_prefix_tokens &= self.num_prefix_tokens + self.num_suffix_tokens > 0
        if output_fmt == "NCHW":
            patches = [p.transpose(1, 2).unflatten(2, grid).contiguous() for p in patches]
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": patches}
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = others
            if not intermediates_only:
                result["image_features"] = last_norm(x)
            return result
        intermediates = list(zip(patches, others, strict=True)) if return_prefix_tokens else patches
        return intermediates if intermediates_only else (last_norm(x), intermediates)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] | tuple[int, ...] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Tensor]:
        """DINO's interface to :meth:`forward_intermediates`."""
        return self.forward_intermediates(
            x,
            n if isinstance(n, int) else list(n),
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def split_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, tokens, embed_dim) -> the patches, and the class token and its like, whichever end it stands at."""
        first, last = self.num_prefix_tokens, x.shape[1] - self.num_suffix_tokens
        return x[:, first:last], x[:, :first] if first else x[:, last:]

    def _keep(self, x: Tensor, visible: Tensor) -> Tensor:
        if not self.holds_whole_images:
            raise UserError("the patches are cut over a sequence_group: some of them alone cannot be chosen there")
        patches, others = self.split_tokens(x)
        patches = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[2]))
        return torch.cat([others, patches] if self.num_prefix_tokens else [patches, others], dim=1)

    @property
    def holds_whole_images(self) -> bool:
        """Whether all patches of an image are in this process."""
        return True

    def positions_on(self, grid: Any) -> Any:
        """Positions of a grid of patches and of the other tokens that have any; None for a model without positions.

        Args:
            grid: (rows, columns).

        Returns:
            (1, entries, embed_dim), of the parameters' dtype: under autocast tokens may have another.
        """
        if self.positions == "none":
            return None
        kernel = self.patch_embed.proj.weight
        return _positions_on(self.pos_embed, grid, self.pos_grid, *position_entries(self), kernel)

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if not self.grad_checkpointing:
            return block(x)
        keep = partial(create_selective_checkpoint_contexts, _PRODUCTS) if self.keep_products else noop_context_fn
        return checkpoint(block, x, use_reentrant=False, context_fn=keep)


@torch.fx.wrap  # a graph of the model holds this as one node, and asks for the grid of each image
def _positions_on(
    pos_embed: Tensor | None, grid: Any, table_grid: tuple[int, int], before: int, after: int, kernel: Tensor
) -> Tensor:
    rows, columns = int(grid[0]), int(grid[1])
    if pos_embed is not None:
        return resize_pos_embed(pos_embed, table_grid, (rows, columns), before, after)
    fixed = sincos_positions((rows, columns), kernel.shape[0], table_grid, kernel.device, kernel.dtype)
    return torch.nn.functional.pad(fixed, (0, 0, before, after))  # other tokens stand nowhere


def check_positions(pos_embed: str, embed_dim: int, pos_grid: Size | None) -> None:
    """Refuse positions that there are none of, or not at this width, or on a grid without places.

    Raises:
        UserError: saying which.
    """
    check_choice("pos_embed", pos_embed, get_args(Positions))
    if pos_embed == "sincos" and embed_dim % 4:
        raise UserError(f"sin-cos positions need an embed_dim that is a multiple of 4, not {embed_dim}")
    if pos_grid is not None and (len(to_2tuple(pos_grid)) != 2 or min(to_2tuple(pos_grid)) < 1):
        raise UserError(f"pos_grid is {pos_grid}, expected at least 1 row and 1 column")


def check_rates(**rates: float) -> None:
    """Refuse shares that are none.

    Raises:
        UserError: naming the first.
    """
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            raise UserError(f"{name} is {rate}, expected 0 to 1")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Refuse what is none of the choices.

    Raises:
        UserError: naming them.
    """
    if value not in choices:
        raise UserError(f"{name} is {value!r}, expected one of {', '.join(repr(c) for c in choices)}")
