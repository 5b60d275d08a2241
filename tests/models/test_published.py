"""What is recorded of the published models, against what was counted from the published code."""

import json

import pytest
import timm
import torch

from patchscale.errors import UserError
from patchscale.models.published import (
    PUBLISHED,
    SIZES,
    check_model_name,
    evaluation_crop,
    num_parameters,
    published_top1,
)


@pytest.fixture(scope="module")
def counts(parity) -> list[dict]:
    return json.loads(parity("param_counts.json").read_text())


def test_all_44_counts_follow_from_the_formula(counts):
    assert len(counts) == 44
    for c in counts:
        assert num_parameters(c["dim"], c["depth"], c["patch"], c["img"]) == c["params"], c


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_models_of_each_name_have_the_published_count(size, counts):
    mine = [c for c in counts if c["name"] == size]
    assert len(mine) == 11
    for c in mine:
        with torch.device("meta"):
            model = timm.create_model(f"adventurer_{size}_patch{c['patch']}_{c['img']}")
        assert sum(p.numel() for p in model.parameters()) == c["params"], c
        assert not list(model.buffers())
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.pos_embed.shape[1] == c["tokens"]


@pytest.mark.parametrize(("num_classes", "in_chans"), [(10, 3), (1000, 1), (1, 13)])
def test_count_with_other_classes_and_channels(num_classes, in_chans):
    model = timm.create_model(
        "adventurer_tiny_patch4_64", num_classes=num_classes, in_chans=in_chans, embed_dim=64, depth=2
    )
    expected = num_parameters(64, 2, 4, 64, num_classes, in_chans)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("name", [name for models in PUBLISHED.values() for name in models])
def test_published_names_are_registered_and_carry_their_repository(name):
    assert timm.is_model(name)
    cfg = timm.get_pretrained_cfg(name)
    repository = next(r for r, models in PUBLISHED.items() if name in models)
    assert (cfg.hf_hub_id, cfg.hf_hub_filename) == (repository, f"{name}.pth")


# From the papers' tables.
@pytest.mark.parametrize(
    ("name", "top1"),
    [
        ("adventurer_tiny_patch16_224", 78.2),
        ("adventurer_base_patch16_224", 82.6),
        ("adventurer_base_patch8_448", 84.8),
        ("adventurer_base_patch1_224", 84.6),
        ("adventurer_tiny_patch1_64", 77.4),
        ("adventurer_huge_patch16_224", None),
        ("adventurer_base_patch2_224", None),
    ],
)
def test_published_accuracy(name, top1):
    assert published_top1(name) == top1


# Resize to int(image / crop), then centre crop: 64 to 73, 128 to 146, 224 to 256; no margin for small patches or
# large images.
@pytest.mark.parametrize(
    ("patch", "image", "resized"),
    [
        (16, 224, 256),
        (16, 128, 146),
        (16, 384, 384),
        (16, 448, 448),
        (8, 224, 224),
        (8, 448, 448),
        (1, 224, 224),
        (1, 64, 73),
    ],
)
def test_evaluation_crop(patch, image, resized):
    assert int(image / evaluation_crop(patch, image)) == resized
    assert timm.get_pretrained_cfg(f"adventurer_base_patch{patch}_{image}").crop_pct == evaluation_crop(patch, image)


def test_widths_are_whole_heads():
    assert all(2 * size["embed_dim"] % 64 == 0 for size in SIZES.values())


def test_an_unknown_model_is_refused_with_near_names():
    with pytest.raises(UserError, match="adventurer_base_patch16_224"):
        check_model_name("adventurer_base_patch16_242")


def test_any_timm_model_is_known():
    check_model_name("resnet18")
