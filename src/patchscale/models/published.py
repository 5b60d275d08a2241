"""What was published: the families' names and sizes, their checkpoints and how they are evaluated."""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import timm

from patchscale.errors import UserError

# The names: adventurer_{size}_patch{P}_{image size}. The name without an image size is the published code's, at 224.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 256, "depth": 12},
    "small": {"embed_dim": 512, "depth": 12},
    "base": {"embed_dim": 768, "depth": 12},
    "large": {"embed_dim": 1024, "depth": 24},
    "huge": {"embed_dim": 1280, "depth": 32},
}
PATCH_SIZES = (32, 16, 8, 4, 2, 1)
IMG_SIZES = (64, 128, 224, 384, 448)
DEFAULT_IMG_SIZE = 224

# Published checkpoints and their ImageNet-1k top-1 in percent, from the two repositories' tables of models; each file
# is NAME.pth in the Hugging Face repository of the same name.
PUBLISHED: dict[str, dict[str, float]] = {
    "Wangf3014/Adventurer": {
        "adventurer_tiny_patch16_224": 78.2,
        "adventurer_small_patch16_224": 81.8,
        "adventurer_base_patch16_224": 82.6,
        "adventurer_large_patch16_224": 83.4,
        "adventurer_base_patch8_224": 83.9,
        "adventurer_base_patch16_384": 84.2,
        "adventurer_base_patch16_448": 84.3,
        "adventurer_base_patch8_448": 84.8,
    },
    "Wangf3014/Patch_Scaling": {
        "adventurer_base_patch1_224": 84.6,
        "adventurer_small_patch1_224": 83.8,
        "adventurer_tiny_patch1_224": 81.9,
        "adventurer_base_patch1_128": 82.4,
        "adventurer_small_patch1_128": 81.4,
        "adventurer_tiny_patch1_128": 80.7,
        "adventurer_base_patch1_64": 80.9,
        "adventurer_small_patch1_64": 80.5,
        "adventurer_tiny_patch1_64": 77.4,
    },
}


def evaluation_crop(patch_size: int, img_size: int) -> float:
    """The published centre-crop ratio: 0.875 for patches of 16 up to 224 px and at 64 px, else 1 (up to 32 px too)."""
    if img_size <= 32:
        return 1.0
    return 0.875 if img_size <= 64 or (patch_size >= 16 and img_size <= 224) else 1.0


def published_top1(name: str) -> float | None:
    """Published ImageNet-1k top-1 in percent of a model by name; None where none was published."""
    tables = [*PUBLISHED.values(), PUBLISHED_VIT]
    return next((table[name] for table in tables if name in table), None)


# Top-1 of vision transformers; weights were published of DeiT's at patch 16 and 224 or 384 px alone.
PUBLISHED_VIT: dict[str, float] = {
    # DeiT's own table of models, github.com/facebookresearch/deit.
    "deit_tiny_patch16_224": 72.2,
    "deit_small_patch16_224": 79.9,
    "deit_base_patch16_384": 82.9,
    # arXiv 2502.03738, tables 1 and 4.
    "deit_base_patch16_224": 81.8,
    "deit_base_patch8_224": 83.5,
    "deit_base_patch16_64": 68.2,
    "deit_base_patch8_64": 76.9,
    "deit_base_patch4_64": 80.1,
    "deit_base_patch2_64": 80.8,
    "deit_base_patch1_64": 81.3,
    "deit_base_patch16_128": 78.1,
    "deit_base_patch8_128": 81.0,
    "deit_base_patch4_128": 82.3,
    "deit_base_patch2_128": 82.9,
    # arXiv 2406.09415, as its reviewers quote it: ImageNet at 28 px.
    "pixel_transformer_small_patch2_28": 72.9,
    "pixel_transformer_small_patch1_28": 74.1,
    "pixel_transformer_base_patch2_28": 75.7,
    "pixel_transformer_base_patch1_28": 76.1,
    "pixel_transformer_large_patch2_28": 75.6,
    "pixel_transformer_large_patch1_28": 76.9,
}


def num_parameters(
    embed_dim: int, depth: int, patch_size: int, img_size: int, num_classes: int = 1000, in_chans: int = 3
) -> int:
    """Parameters of an Adventurer with d_state 64, headdim 64 and expand 2 (square patches and images)."""
    d, heads, hidden = embed_dim, embed_dim // 32, int(2.5 * embed_dim)
    conv = 2 * d + 2 * 64
    mixer = d * (2 * d + conv + heads) + 5 * conv + 3 * heads + 2 * d + 2 * d * d
    mlp = 3 * hidden * d + 2 * hidden + d
    tokens = (img_size // patch_size) ** 2 + 1
    return (
        depth * (mixer + mlp + 2 * d)  # two norms a block
        + (tokens + 1) * d  # positions and the class token
        + in_chans * patch_size**2 * d  # patch embedding
        + d
        + d  # the final norm
        + (d + 1) * num_classes
    )


def num_vit_parameters(
    embed_dim: int,
    depth: int,
    patch_size: int,
    img_size: int,
    num_classes: int = 1000,
    in_chans: int = 3,
    num_heads: int | None = None,
) -> int:
    """Parameters of a vision transformer with MLPs of four times its width; the number of heads makes no difference."""
    d = embed_dim
    attention, mlp = 4 * d * d + 4 * d, 8 * d * d + 5 * d
    tokens = (img_size // patch_size) ** 2 + 1
    return (
        depth * (attention + mlp + 4 * d)  # two norms a block, with biases
        + (tokens + 1) * d  # positions and the class token
        + in_chans * patch_size**2 * d  # patch embedding
        + d
        + 2 * d  # the final norm
        + (d + 1) * num_classes
    )


@dataclass(frozen=True)
class Family:
    """Models of one kind, by name: ``{prefix}_{size}_patch{P}_{image size}``.

    Attributes:
        prefix: what their names begin with.
        title: the kind.
        sizes: constructor arguments by size.
        img_sizes: in pixels; those that a patch does not divide have no name.
        default_img_size: what the name without an image size has; None if there is no such name.
        count: parameters of a size, by the arguments of :func:`num_parameters`.
        paper: its source.
    """

    prefix: str
    title: str
    sizes: dict[str, dict[str, int]]
    img_sizes: tuple[int, ...]
    default_img_size: int | None
    count: Callable[..., int]
    paper: str

    def names(self) -> Iterator[tuple[str, int, int, str]]:
        """(size, patch size, image size, name) of every model."""
        for size in self.sizes:
            for patch_size in PATCH_SIZES:
                for img_size in self.img_sizes:
                    if img_size % patch_size:
                        continue
                    name = f"{self.prefix}_{size}_patch{patch_size}"
                    yield size, patch_size, img_size, f"{name}_{img_size}"
                    if img_size == self.default_img_size:
                        yield size, patch_size, img_size, name


ADVENTURER = Family("adventurer", "Adventurer", SIZES, IMG_SIZES, DEFAULT_IMG_SIZE, num_parameters, "arXiv:2410.07599")
# arXiv 2502.03738, table 7, which names no heads: DeiT's 64 channels each, and ViT's 16 of them for the two largest.
_DEIT_SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}
DEIT = Family("deit", "DeiT", _DEIT_SIZES, IMG_SIZES, DEFAULT_IMG_SIZE, num_vit_parameters, "arXiv:2012.12877")
# Only the tiny one's sizes are known; the others are taken to be ViT's. CIFAR is 32 px, the paper's ImageNet 28 px.
PIXEL_TRANSFORMER = Family(
    "pixel_transformer",
    "Pixel transformer",
    {k: _DEIT_SIZES[k] for k in ("tiny", "small", "base", "large")} | {"tiny": _DEIT_SIZES["tiny"] | {"num_heads": 12}},
    (28, 32, 64, 224),
    None,
    num_vit_parameters,
    "arXiv:2406.09415",
)
FAMILIES = (ADVENTURER, DEIT, PIXEL_TRANSFORMER)


def check_model_name(name: str) -> None:
    """Refuse an unknown model name, naming near ones.

    Raises:
        UserError: there is no such model.
    """
    if name.startswith(("hf-hub:", "local-dir:")) or timm.is_model(name):
        return
    own = [known for family in FAMILIES for *_, known in family.names()]
    near = difflib.get_close_matches(name, own + timm.list_models(), n=4, cutoff=0.6)
    near = list(dict.fromkeys(near))
    hint = f"; did you mean {', '.join(near)}?" if near else "; `patchscale models` lists them"
    raise UserError(f"unknown model {name!r}{hint}")
