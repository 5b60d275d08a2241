"""What was published: the family's names and sizes, its checkpoints and how they are evaluated."""

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
    """Published ImageNet-1k top-1 in percent of a model by name, None where no weights are published."""
    return next((table[name] for table in PUBLISHED.values() if name in table), None)


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
