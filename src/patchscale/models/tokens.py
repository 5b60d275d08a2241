"""From an image to a sequence of tokens: patch embedding, and the resizing of patches and positions.

Image sizes, patch sizes and grids are (height, width).
"""

import functools
import math
import operator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed as TimmPatchEmbed
from timm.layers import to_2tuple
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
    ``strict_img_size``, an image of another size than it was made for, each as a UserError that names the way out. And
    it can cut an image into patches of another size than its kernel's, which is then resized in that pass.

    With ``extend``, tokens are interpolated bilinearly to so many times the rows and columns: as many tokens as smaller
    patches would give, and nothing more to see (*Scaling Laws in Patchification*, Table 5). The grid is then theirs.
    """

    def __init__(self, img_size: Size, patch_size: Size, extend: int = 1, **kwargs) -> None:
        grid_size(img_size, patch_size)
        if extend < 1:
            raise UserError(f"extend is {extend}, expected 1 (as many tokens as patches) or more on each side")
        self.extend = extend
        super().__init__(img_size, to_2tuple(patch_size), **(kwargs | {"output_fmt": "NHWC"}))

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Change the image size and the patch size; the kernel is resized by pseudo-inverse.

        Raises:
            UserError: the patch does not divide the image.
        """
        img_size = self.img_size if img_size is None else to_2tuple(img_size)
        patch_size = self.patch_size if patch_size is None else to_2tuple(patch_size)
        grid_size(img_size, patch_size)
        kernel = resize_patch_embed(self.proj.weight.data, patch_size)
        super().set_input_size(img_size, patch_size)
        self.proj.weight.data.copy_(kernel)  # timm resizes it too, in float32 alone

    def _init_img_size(self, img_size: Any) -> Any:
        size, grid, patches = super()._init_img_size(img_size)
        return size, (grid[0] * self.extend, grid[1] * self.extend), patches * self.extend**2

    def grid_of(self, img_size: Size, patch_size: Size | None = None) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image.

        Raises:
            UserError: the patch does not divide the image.
        """
        rows, columns = grid_size(img_size, patch_size or self.patch_size)
        return rows * self.extend, columns * self.extend

    def forward(self, x: Tensor, patch_size: Size | None = None, rows: slice | None = None) -> Tensor:
        """Cut an image into patches and embed them.

        Args:
            x: (batch, channels, height, width).
            patch_size: of the patches, where not the kernel's own; gradients reach the kernel as it is stored.
            rows: embed these rows of patches alone.

        Returns:
            (batch, rows, columns, embed_dim).

        Raises:
            UserError: another number of channels or another size than the model takes, no batch of images, or patches
                that do not divide them.
        """
        if x.ndim != 4:
            raise UserError(
                f"the images are of shape {tuple(x.shape)}, expected (batch, channels, height, width): a single image "
                "is a batch as image[None]"
            )
        channels, height, width = x.shape[1:]
        size = (height, width)
        patch = self.patch_size if patch_size is None else to_2tuple(patch_size)
        if channels != self.proj.in_channels:
            raise UserError(f"the image has {channels} channels, the model takes {self.proj.in_channels}")
        if self.strict_img_size and size != self.img_size:
            raise UserError(
                f"the image is {_text(size)}, the model was made for {_text(self.img_size)}: resize the image, "
                "call set_input_size, or create the model with dynamic_img_size=True"
            )
        grid_size(size, patch)
        if rows is not None:
            x = x[:, :, rows.start * patch[0] : rows.stop * patch[0]]
        if patch == self.patch_size:
            x = self.proj(x)
        else:
            x = F.conv2d(x, resize_patch_embed(self.proj.weight, patch), self.proj.bias, stride=patch)
        x = self.norm(x.permute(0, 2, 3, 1))
        if self.extend == 1:
            return x
        return F.interpolate(x.permute(0, 3, 1, 2), scale_factor=self.extend, mode="bilinear").permute(0, 2, 3, 1)


def resize_patch_embed(weight: Tensor, patch_size: Size) -> Tensor:
    """Resize a patch-embedding kernel by pseudo-inverse (FlexiViT, arXiv 2212.08013, section 3.4); differentiable.

    Enlarged, it gives on bicubically enlarged patches exactly what the original gave on the originals. Shrinking loses
    information, and is not undone by enlarging again. timm's rule: bicubic with antialiasing.

    Such a resizing goes by columns, then by rows: it is the Kronecker product of two small matrices, and so is its
    pseudo-inverse, which therefore costs next to nothing.

    Args:
        weight: (embed_dim, channels, height, width).
        patch_size: the new height and width.

    Returns:
        (embed_dim, channels, new height, new width).
    """
    old = tuple(weight.shape[2:])
    # As an index: given a second size, torch.compile would let it vary, and no matrix is made for that.
    new = tuple(operator.index(n) for n in to_2tuple(patch_size))
    if old == new:
        return weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    by_rows, by_columns = (_kernel_matrix(o, n).to(weight.device, dtype) for o, n in zip(old, new, strict=True))
    # The meta device has no autocast to turn off, and takes no notice of another's.
    known = torch.amp.is_autocast_available(weight.device.type)
    with torch.autocast(weight.device.type if known else "cpu", enabled=False):
        return (by_rows @ weight.to(dtype) @ by_columns.t()).to(weight.dtype)


# For torch.compile and torch.export a constant: they need not see how it comes about.
@torch.compiler.assume_constant_result
def _kernel_matrix(old: int, new: int) -> Tensor:
    """(new, old): what takes a kernel's column of ``old`` values to ``new``, in float64."""
    return torch.from_numpy(_pseudo_inverse(old, new).copy())


@functools.lru_cache(maxsize=256)
def _pseudo_inverse(old: int, new: int) -> np.ndarray:
    # In NumPy, so that it can be made, and kept, inside any of PyTorch's modes (inference, tracing, a meta device).
    return np.linalg.pinv(_bicubic_matrix(old, new)).T


def _bicubic_matrix(old: int, new: int) -> np.ndarray:
    """(new, old): bicubic resizing of a line of pixels with antialiasing, as PyTorch and Pillow do it (a = -0.5)."""
    ratio = old / new
    blur = max(ratio, 1.0)  # shrinking, a pixel takes in all that falls on it
    centres = (np.arange(new) + 0.5) * ratio
    x = np.abs((np.arange(old)[None] + 0.5 - centres[:, None]) / blur)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))
    return weights / weights.sum(1, keepdims=True)


def resize_pos_embed(
    pos_embed: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    prefix_tokens: int = 0,
    suffix_tokens: int = 1,
) -> Tensor:
    """Resample learned positions to another grid: bicubic, without antialiasing; entries of other tokens are kept.

    Args:
        pos_embed: (1, prefix_tokens + rows * columns + suffix_tokens, channels).
        old_grid: its (rows, columns).
        new_grid: the (rows, columns) wanted.
        prefix_tokens: entries before the patches': 1 in a ViT, whose class token comes first.
        suffix_tokens: entries after them: 1 in Adventurer, whose class token comes last. (The published code takes the
            first entry for the class token's all the same, which shifts the grid.)

    Returns:
        (1, prefix_tokens + new rows * new columns + suffix_tokens, channels).

    Raises:
        UserError: the table does not fit ``old_grid``.
    """
    rows, columns = old_grid
    others = prefix_tokens + suffix_tokens
    if pos_embed.shape[1] != rows * columns + others:
        raise UserError(
            f"the position table has {pos_embed.shape[1]} entries, a {_text(old_grid)} grid and {others} class "
            f"token{'' if others == 1 else 's'} need {rows * columns + others}"
        )
    if old_grid == new_grid:
        return pos_embed
    prefix, grid, suffix = pos_embed.split([prefix_tokens, rows * columns, suffix_tokens], dim=1)
    image = grid.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    exact = image.to(torch.promote_types(image.dtype, torch.float32))
    resized = F.interpolate(exact, size=new_grid, mode="bicubic", align_corners=False).to(pos_embed.dtype)
    return torch.cat([prefix, resized.permute(0, 2, 3, 1).flatten(1, 2), suffix], dim=1)


def sincos_positions(
    grid: tuple[int, int],
    embed_dim: int,
    reference: tuple[int, int] | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Fixed sine and cosine positions of a grid of patches, in the order of timm's ``build_sincos2d_pos_embed``.

    Row and column each get half of the channels, at wavelengths from 2 pi to 20,000 pi patches.

    Args:
        grid: (rows, columns).
        embed_dim: channels, a multiple of 4.
        reference: the grid in whose patches distances are counted, laid over the same image; ``grid`` itself if None.
            A model that is given smaller patches than it was trained with stays on the same map so.
        device: of the result.
        dtype: of the result, float32 if None.

    Returns:
        (1, rows * columns, embed_dim).

    Raises:
        UserError: an ``embed_dim`` that is no multiple of 4.
    """
    if embed_dim % 4:
        raise UserError(f"sin-cos positions need an embed_dim that is a multiple of 4, not {embed_dim}")
    frequencies = 10000.0 ** -(torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))
    scales = [own / n for n, own in zip(grid, reference or grid, strict=True)]
    axes = [(torch.arange(n, dtype=torch.float64) + 0.5) * s - 0.5 for n, s in zip(grid, scales, strict=True)]
    angles = torch.stack(torch.meshgrid(axes, indexing="ij"), dim=-1)[..., None] * frequencies
    table = torch.cat([angles.sin().flatten(2), angles.cos().flatten(2)], dim=2)
    return table.flatten(0, 1)[None].to(device, dtype or torch.float32)


def position_entries(model: nn.Module) -> tuple[int, int]:
    """How many entries of a model's position table stand before the patches', and how many after them.

    A model says so by timm's ``num_prefix_tokens`` and ``no_embed_class``, and by ``num_suffix_tokens`` (Adventurer's).
    """
    before: Any = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 1)
    after: Any = getattr(model, "num_suffix_tokens", 0)
    return before, after


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
    # What cannot be resized is left to be refused with its shape, as any other tensor that does not fit.
    if kernel is None or wanted is None or kernel.ndim != 4 or kernel.shape[0] != wanted.shape[0] or 0 in kernel.shape:
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
    positions, table = weights.get("pos_embed"), own.get("pos_embed")
    if positions is None or table is None or positions.ndim != 3 or positions.shape[::2] != table.shape[::2]:
        return resized
    if grid is None and positions.shape[1] == table.shape[1]:
        return resized
    before, after = position_entries(model)
    if grid is None:
        side = square_side(positions.shape[1] - before - after)
        grid = side, side
    patch_embed: Any = model.patch_embed
    new_grid = getattr(model, "pos_grid", patch_embed.grid_size)
    if grid != new_grid:
        if resize == "published":
            before, after = before + after, 0
        weights["pos_embed"] = resize_pos_embed(positions, grid, new_grid, before, after)
        kept = "first entry" if before == 1 else "last entry" if after == 1 else f"{before + after} entries"
        resized["pos_embed"] = f"{_text(grid)} to {_text(new_grid)} patches: bicubic without antialiasing, {kept} kept"
    return resized


def square_side(patches: int) -> int:
    """The rows of a square grid of this many patches.

    Raises:
        UserError: there is none.
    """
    side = math.isqrt(max(patches, 0))
    if side < 1 or side * side != patches:
        raise UserError(
            f"the file's position table has {max(patches, 0)} patches, which make no square grid: create the model "
            "with the image size and patch size of the file, load, then call set_input_size"
        )
    return side
