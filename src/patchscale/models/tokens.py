"""From an image to a sequence of tokens: patch embedding, and the resizing of patches and positions.

Image sizes, patch sizes and grids are (height, width).
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed as TimmPatchEmbed
from timm.layers import resample_patch_embed, to_2tuple
from timm.models import adapt_input_conv, register_notrace_module
from torch import Tensor, nn

from patchscale.errors import UserError

Size = int | tuple[int, int]
Resize = Literal["correct", "published"]


def grid_size(img_size: Size, patch_size: Size) -> tuple[int, int]:
    """How many patches the image holds, (rows, columns).

    Raises:
        UserError: a size is not positive, or the patch does not divide the image; names the nearest sizes that fit.
    """
    image, patch = to_2tuple(img_size), to_2tuple(patch_size)
    if min(patch) < 1:
        raise UserError(f"patch size {_text(patch)} must be at least 1 pixel on each side")
    if min(image) < 1:
        raise UserError(f"image size {_text(image)} must be at least 1 pixel on each side")
    if image[0] % patch[0] or image[1] % patch[1]:
        below = tuple(max(1, i // p) * p for i, p in zip(image, patch, strict=True))
        above = tuple(-(-i // p) * p for i, p in zip(image, patch, strict=True))
        fitting = _text(below) if below == above else f"{_text(below)} or {_text(above)}"
        raise UserError(
            f"image size {_text(image)} is not a whole number of {_text(patch)} patches; "
            f"the nearest sizes that fit: {fitting}"
        )
    return image[0] // patch[0], image[1] // patch[1]


def _text(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"


@register_notrace_module
class PatchEmbed(TimmPatchEmbed):
    """timm's patch embedding, (batch, channels, height, width) -> (batch, rows, columns, embed_dim).

    It differs in what it refuses: an image that is not a whole number of patches (timm ignores the remainder) and, if
    ``strict_img_size``, an image of another size than it was made for, each as a UserError that names the way out.
    """

    def __init__(self, img_size: Size, patch_size: Size, **kwargs) -> None:
        grid_size(img_size, patch_size)
        super().__init__(img_size, to_2tuple(patch_size), output_fmt="NHWC", **kwargs)

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Change the image size and the patch size; the kernel is resized by pseudo-inverse.

        Raises:
            UserError: the patch does not divide the image.
        """
        img_size = self.img_size if img_size is None else to_2tuple(img_size)
        patch_size = self.patch_size if patch_size is None else to_2tuple(patch_size)
        grid_size(img_size, patch_size)
        super().set_input_size(img_size, patch_size)

    def forward(self, x: Tensor, rows: slice | None = None) -> Tensor:
        """(batch, channels, height, width) -> (batch, rows, columns, embed_dim), of all rows of patches or of these."""
        channels, height, width = x.shape[1:]
        size = (height, width)
        if channels != self.proj.in_channels:
            raise UserError(f"the image has {channels} channels, the model takes {self.proj.in_channels}")
        if self.strict_img_size and size != self.img_size:
            raise UserError(
                f"the image is {_text(size)}, the model was made for {_text(self.img_size)}: resize the image, "
                "call set_input_size, or create the model with dynamic_img_size=True"
            )
        grid_size(size, self.patch_size)
        if rows is not None:
            x = x[:, :, rows.start * self.patch_size[0] : rows.stop * self.patch_size[0]]
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


def resize_patch_embed(weight: Tensor, patch_size: Size) -> Tensor:
    """Resize a patch-embedding kernel by pseudo-inverse (FlexiViT, arXiv 2212.08013, section 3.4).

    Enlarged, it gives on bicubically enlarged patches exactly what the original gave on the originals. Shrinking loses
    information, and is not undone by enlarging again. timm's rule: bicubic with antialiasing.

    Args:
        weight: (embed_dim, channels, height, width).
        patch_size: the new height and width.
    """
    return resample_patch_embed(weight, list(to_2tuple(patch_size)))


def resize_pos_embed(
    pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], class_token: str = "last"
) -> Tensor:
    """Resample learned positions to another grid: bicubic, without antialiasing; the class entry is kept.

    Args:
        pos_embed: (1, rows * columns + 1, channels).
        old_grid: its (rows, columns).
        new_grid: the (rows, columns) wanted.
        class_token: the end at which the class entry stands, ``"last"`` (Adventurer) or ``"first"`` (ViT). The
            published Adventurer code takes the first entry although the model has it last, which shifts the grid.

    Returns:
        (1, new rows * new columns + 1, channels).

    Raises:
        UserError: the table does not fit ``old_grid``.
    """
    rows, columns = old_grid
    if pos_embed.shape[1] != rows * columns + 1:
        raise UserError(
            f"the position table has {pos_embed.shape[1]} entries, a {_text(old_grid)} grid and a class token "
            f"need {rows * columns + 1}"
        )
    if old_grid == new_grid:
        return pos_embed
    entry, grid = (
        (pos_embed[:, -1:], pos_embed[:, :-1]) if class_token == "last" else (pos_embed[:, :1], pos_embed[:, 1:])
    )
    image = grid.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(image.float(), size=new_grid, mode="bicubic", align_corners=False).to(pos_embed.dtype)
    grid = resized.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([grid, entry] if class_token == "last" else [entry, grid], dim=1)


def fit_tokens(
    model: nn.Module,
    weights: dict[str, Tensor],
    grid: tuple[int, int] | None = None,
    resize: Resize = "correct",
) -> dict[str, str]:
    """Fit a state dict's image channels, patch size and positions to a model of the same width, in place.

    Args:
        model: the model.
        weights: the state dict.
        grid: the (rows, columns) of its positions. If None, as many positions as the model's are taken to be on the
            same grid, and others on a square one.
        resize: ``"published"`` takes the first position for the class token's in every model.

    Returns:
        What was resized, ``patch_embed`` and ``pos_embed``, and how, in words.

    Raises:
        UserError: the positions must be resized and their grid is not square.
    """
    own = model.state_dict()
    resized: dict[str, str] = {}
    kernel, wanted = weights.get("patch_embed.proj.weight"), own.get("patch_embed.proj.weight")
    if kernel is None or wanted is None or kernel.ndim != 4 or kernel.shape[0] != wanted.shape[0]:
        return resized
    if kernel.shape[1] != wanted.shape[1]:
        kernel = adapt_input_conv(wanted.shape[1], kernel, base_chans=kernel.shape[1])
    if kernel.shape[2:] != wanted.shape[2:]:
        resized["patch_embed"] = (
            f"{_text(tuple(kernel.shape[2:]))} to {_text(tuple(wanted.shape[2:]))} pixels: "
            "pseudo-inverse of bicubic resizing with antialiasing"
        )
        kernel = resize_patch_embed(kernel, (wanted.shape[2], wanted.shape[3]))
    weights["patch_embed.proj.weight"] = kernel
    positions = weights.get("pos_embed")
    if positions is None or (grid is None and positions.shape[1] == own["pos_embed"].shape[1]):
        return resized
    if grid is None:
        side = square_side(positions.shape[1] - 1)
        grid = side, side
    patch_embed: Any = model.patch_embed
    new_grid = patch_embed.grid_size
    if grid != new_grid:
        class_token = "last" if resize == "correct" and hasattr(model, "num_suffix_tokens") else "first"
        weights["pos_embed"] = resize_pos_embed(positions, grid, new_grid, class_token)
        resized["pos_embed"] = (
            f"{_text(grid)} to {_text(new_grid)} patches: bicubic without antialiasing, {class_token} entry kept"
        )
    return resized


def square_side(patches: int) -> int:
    """The rows of a square grid of this many patches.

    Raises:
        UserError: there is none.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        raise UserError(
            f"the file's position table has {patches} patches, which make no square grid: create the model with the "
            "image size and patch size of the file, load, then call set_input_size"
        )
    return side
