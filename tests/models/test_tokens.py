"""Images to tokens, and the resizing of patches and positions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from timm.layers import resample_patch_embed

from patchscale import UserError
from patchscale.models.adventurer import Adventurer
from patchscale.models.tokens import (
    PatchEmbed,
    fit_tokens,
    grid_size,
    resize_patch_embed,
    resize_pos_embed,
    square_side,
)
from patchscale.models.vit import ViT

property_test = settings(deadline=None, max_examples=50, database=None)


@property_test
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_grid_counts_whole_patches(rows, columns, height, width):
    assert grid_size((rows * height, columns * width), (height, width)) == (rows, columns)


@property_test
@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 40), st.integers(1, 40))
def test_sizes_named_by_the_refusal_fit_and_are_nearest(height, width, patch_height, patch_width):
    image, patch = (height, width), (patch_height, patch_width)
    if height % patch_height == 0 and width % patch_width == 0:
        return
    with pytest.raises(UserError) as error:
        grid_size(image, patch)
    message = str(error.value)
    assert f"{height}x{width}" in message
    assert f"{patch_height}x{patch_width}" in message
    named = [tuple(map(int, size.split("x"))) for size in message.split("fit: ")[1].split(" or ")]
    for size in named:
        grid_size(size, patch)
        assert all(abs(s - i) < p for s, i, p in zip(size, image, patch, strict=True))


@pytest.mark.parametrize(("image", "patch"), [(0, 4), (16, 0), ((16, -4), 4), (16, (4, -1))])
def test_sizes_that_are_not_positive_are_refused(image, patch):
    with pytest.raises(UserError, match="at least 1 pixel"):
        grid_size(image, patch)


@pytest.mark.parametrize("patch", [1, 4, (2, 8)])
def test_patch_embedding_is_a_linear_map_of_each_patch(patch, assert_near):
    embed = PatchEmbed((16, 24), patch, in_chans=3, embed_dim=7).double()
    image = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    size = embed.patch_size
    patches = F.unfold(image, size, stride=size).transpose(1, 2)  # in reading order
    expected = patches @ embed.proj.weight.flatten(1).t() + embed.proj.bias
    tokens = embed(image)
    assert tokens.shape == (2, 16 // size[0], 24 // size[1], 7)
    assert_near(tokens.flatten(1, 2), expected, 1e-12)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 16, 20), ["16x20", "16x16", "set_input_size", "dynamic_img_size"]),
        ((1, 1, 16, 16), ["1 channels", "takes 3"]),
        ((3, 16, 16), ["(3, 16, 16)", "(batch, channels, height, width)"]),
        ((1, 1, 3, 16, 16), ["(1, 1, 3, 16, 16)", "(batch, channels, height, width)"]),
    ],
)
def test_images_of_another_size_or_channels_are_refused(shape, words):
    with pytest.raises(UserError) as error:
        PatchEmbed(16, 4, in_chans=3, embed_dim=8)(torch.zeros(shape))
    assert all(word in str(error.value) for word in words)


def test_an_image_with_a_remainder_is_refused_whatever_the_size():
    with pytest.raises(UserError, match="16x16 or 20x16"):
        PatchEmbed(16, 4, in_chans=3, embed_dim=8, strict_img_size=False)(torch.zeros(1, 3, 18, 16))


def test_set_input_size_leaves_all_as_it_was_when_it_refuses():
    embed = PatchEmbed(16, 4, in_chans=3, embed_dim=8)
    weight = embed.proj.weight.clone()
    with pytest.raises(UserError, match="nearest sizes"):
        embed.set_input_size(patch_size=5)
    assert (embed.img_size, embed.patch_size, embed.grid_size) == ((16, 16), (4, 4), (4, 4))
    assert torch.equal(embed.proj.weight, weight)
    embed.set_input_size((8, 24), 8)
    assert (embed.img_size, embed.patch_size, embed.grid_size, embed.num_patches) == ((8, 24), (8, 8), (1, 3), 3)
    assert embed(torch.zeros(1, 3, 8, 24)).shape == (1, 1, 3, 8)


@pytest.mark.parametrize(("old", "new"), [(1, 2), (4, 8), (4, 7), ((2, 4), (8, 6))])
def test_an_enlarged_kernel_gives_the_same_on_enlarged_patches(old, new, assert_near):
    generator = torch.Generator().manual_seed(0)
    old, new = ((s, s) if isinstance(s, int) else s for s in (old, new))
    weight, patches = (torch.randn(n, 3, *old, generator=generator) for n in (6, 10))
    enlarged = F.interpolate(patches, size=new, mode="bicubic", antialias=True, align_corners=False)
    resized = resize_patch_embed(weight, new)
    assert resized.shape == (6, 3, *new)
    assert_near(enlarged.flatten(1) @ resized.flatten(1).t(), patches.flatten(1) @ weight.flatten(1).t(), 1e-4)


SIDES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@property_test
@given(SIDES, SIDES)
def test_a_kernel_is_resized_by_the_least_squares_solution(old, new):
    """FlexiViT's definition: the kernel of smallest norm that answers to resized patches as the old one to the old."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, *old, generator=generator, dtype=torch.float64)
    # Along the width, one axis after the other: PyTorch 2.15 resizes images that are one pixel wide wrongly.
    by_rows, by_columns = (
        F.interpolate(torch.eye(o, dtype=torch.float64)[:, None, None], size=(1, n), mode="bicubic", antialias=True)
        for o, n in zip(old, new, strict=True)
    )
    resizing = torch.kron(by_rows.flatten(1), by_columns.flatten(1))
    expected = torch.linalg.lstsq(resizing, weight.flatten(0, 1).flatten(1).t(), driver="gelsd").solution
    resized = resize_patch_embed(weight, new)
    assert torch.allclose(resized.flatten(0, 1).flatten(1).t(), expected, atol=1e-9)


@pytest.mark.parametrize(("old", "new"), [(16, 8), (4, 1), (1, 16), (14, 16), ((8, 2), (3, 5))])
def test_a_kernel_is_resized_as_timm_does(old, new, assert_near):
    old, new = ((s, s) if isinstance(s, int) else s for s in (old, new))
    weight = torch.randn(4, 3, *old, generator=torch.Generator().manual_seed(0))
    assert_near(resize_patch_embed(weight, new), resample_patch_embed(weight, list(new)), 1e-5)


def test_gradients_of_a_resized_kernel_reach_the_stored_one():
    weight = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: resize_patch_embed(w, (5, 2)), weight)
    embed = PatchEmbed(12, 4, in_chans=1, embed_dim=2).double()
    image = torch.randn(1, 1, 12, 12, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: embed(x, 3), image.requires_grad_())


def test_gradients_of_resampled_positions_reach_the_stored_ones():
    table = torch.randn(1, 7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: resize_pos_embed(t, (2, 3), (4, 1)), table)


def test_a_kernel_without_memory_is_resized():
    assert resize_patch_embed(torch.empty(8, 3, 4, 4, device="meta"), 2).shape == (8, 3, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_is_resized_under_autocast_as_without(dtype):
    kernel = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = resize_patch_embed(kernel, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize_patch_embed(kernel, 3), expected)


def test_a_kernel_of_the_same_size_is_unchanged():
    weight = torch.randn(2, 3, 4, 4)
    assert torch.equal(resize_patch_embed(weight, 4), weight)


@pytest.mark.parametrize(
    ("case", "old", "new"),
    [("8to14", 8, 14), ("14to24", 14, 24), ("14to8", 14, 8), ("7to28", 7, 28), ("smooth8to14", 8, 14)],
)
def test_positions_are_resized_as_corrected(case, old, new, parity, assert_near):
    tables = load_file(parity("pos_embed_resize.safetensors"))
    resized = resize_pos_embed(tables[f"{case}.in"], (old, old), (new, new))
    assert_near(resized, tables[f"{case}.corrected"], 1e-5)
    # The published code's resizing, which treats the first entry as the class token, is something else.
    assert (resized - tables[f"{case}.official"]).norm() > 1e-2 * resized.norm()


@pytest.mark.parametrize("class_token", ["last", "first"])
def test_the_class_entry_is_kept(class_token, assert_near):
    grid, entry = torch.randn(1, 12, 5), torch.randn(1, 1, 5)
    image = grid.transpose(1, 2).reshape(1, 5, 3, 4)
    expected = F.interpolate(image, size=(6, 5), mode="bicubic").flatten(2).transpose(1, 2)
    if class_token == "last":
        resized = resize_pos_embed(torch.cat([grid, entry], dim=1), (3, 4), (6, 5))
        patches, kept = resized[:, :-1], resized[:, -1:]
    else:
        resized = resize_pos_embed(torch.cat([entry, grid], dim=1), (3, 4), (6, 5), 1, 0)
        patches, kept = resized[:, 1:], resized[:, :1]
    assert torch.equal(kept, entry)
    assert_near(patches, expected, 1e-6)


def test_positions_of_the_same_grid_are_unchanged_to_the_bit():
    table = torch.randn(1, 13, 5)
    assert torch.equal(resize_pos_embed(table, (3, 4), (3, 4)), table)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_positions_keep_their_dtype(dtype):
    assert resize_pos_embed(torch.zeros(1, 5, 3, dtype=dtype), (2, 2), (3, 3)).dtype == dtype


def test_a_table_of_another_grid_is_refused():
    with pytest.raises(UserError) as error:
        resize_pos_embed(torch.zeros(1, 17, 3), (3, 4), (5, 5))
    assert all(word in str(error.value) for word in ("17", "3x4", "13"))


@property_test
@given(st.integers(1, 60))
def test_square_side_knows_squares_from_others(side):
    assert square_side(side * side) == side
    with pytest.raises(UserError, match=str(side * side + 1)):
        square_side(side * side + 1)


def small_model(img_size=16, patch_size=4, in_chans=3) -> Adventurer:
    return Adventurer(img_size, patch_size, in_chans, num_classes=2, embed_dim=32, depth=1)


def test_fit_tokens_resizes_to_what_the_model_has(assert_near):
    source, model = small_model(), small_model(32, 2)
    weights = dict(source.state_dict())
    fit_tokens(model, weights)
    assert_near(weights["patch_embed.proj.weight"], resize_patch_embed(source.patch_embed.proj.weight, 2), 1e-6)
    assert_near(weights["pos_embed"], resize_pos_embed(source.pos_embed, (4, 4), (16, 16)), 1e-6)
    model.load_state_dict(weights)


def test_fit_tokens_to_a_grid_that_is_not_square(assert_near):
    source, model = small_model(), small_model((8, 24))
    weights = dict(source.state_dict())
    fit_tokens(model, weights)
    assert_near(weights["pos_embed"], resize_pos_embed(source.pos_embed, (4, 4), (2, 6)), 1e-6)


def test_fit_tokens_to_another_grid_of_as_many_patches(assert_near):
    source, model = small_model(16), small_model((8, 32))
    weights = dict(source.state_dict())
    fit_tokens(model, weights, grid=(4, 4))
    assert_near(weights["pos_embed"], resize_pos_embed(source.pos_embed, (4, 4), (2, 8)), 1e-6)


@pytest.mark.parametrize("in_chans", [1, 6])
def test_fit_tokens_to_other_image_channels(in_chans, assert_near):
    source, model = small_model(), small_model(in_chans=in_chans)
    weights = dict(source.state_dict())
    fit_tokens(model, weights)
    kernel = weights["patch_embed.proj.weight"]
    assert kernel.shape == model.patch_embed.proj.weight.shape
    # A grey image, its value in every channel, gives the same tokens as before.
    assert_near(kernel.sum(1), source.patch_embed.proj.weight.sum(1), 1e-5)


def test_positions_of_no_square_grid_are_not_guessed_at():
    weights = dict(small_model((8, 24)).state_dict())
    with pytest.raises(UserError, match="12 patches"):
        fit_tokens(small_model(32), weights)


@pytest.mark.parametrize("case", ["14to24", "14to8", "7to28", "8to14"])
def test_weights_are_fitted_by_either_rule_and_say_which(case, parity):
    tables = load_file(parity("pos_embed_resize.safetensors"))
    old, new = map(int, case.split("to"))
    model = Adventurer(img_size=new * 2, patch_size=2, embed_dim=32, depth=1)
    for resize, kind, entry in (("correct", "corrected", "last"), ("published", "official", "first")):
        # The fixture's eight channels, four times over, to make the model's width.
        weights = model.state_dict() | {"pos_embed": tables[f"{case}.in"].repeat(1, 1, 4)}
        said = fit_tokens(model, weights, (old, old), resize)
        assert torch.allclose(weights["pos_embed"], tables[f"{case}.{kind}"].repeat(1, 1, 4), atol=1e-6), resize
        assert said == {
            "pos_embed": f"{old}x{old} to {new}x{new} patches: bicubic without antialiasing, {entry} entry kept"
        }


def test_a_class_token_that_comes_first_stays_first():
    import timm

    model = timm.create_model("test_vit", img_size=32, patch_size=4, num_classes=3)
    entries = torch.cat([torch.full((1, 1, 64), 9.0), torch.ones(1, 16, 64)], dim=1)
    weights = model.state_dict() | {"pos_embed": entries}
    fit_tokens(model, weights, (4, 4))
    assert weights["pos_embed"].shape == (1, 65, 64)
    assert (weights["pos_embed"][:, 0] == 9).all()
    assert torch.allclose(weights["pos_embed"][:, 1:], torch.ones(1, 64, 64))


@pytest.mark.parametrize("family", [Adventurer, ViT])
def test_extended_tokens_are_the_patches_interpolated(family):
    sizes = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 64, "depth": 1, "num_classes": 5}
    heads = {"num_heads": 2} if family is ViT else {}
    model = family(**sizes, **heads, extend=3).eval()
    x = torch.randn(2, 3, 16, 24)
    assert model.patch_embed.grid_size == (6, 9)
    assert model.pos_embed.shape[1] == 6 * 9 + 1
    patches = F.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8)
    expected = F.interpolate(patches, size=(6, 9), mode="bilinear").permute(0, 2, 3, 1)
    assert torch.equal(model.patch_embed(x), expected)
    (last,) = model.forward_intermediates(x, 1, intermediates_only=True)
    assert last.shape == (2, 64, 6, 9)
    assert model(x).shape == (2, 5)
    model.set_input_size(img_size=(16, 16))
    assert model.pos_embed.shape[1] == 6 * 6 + 1
    assert model(x[..., :16]).shape == (2, 5)
    with pytest.raises(UserError, match="extend is 0"):
        family(**sizes, **heads, extend=0)
