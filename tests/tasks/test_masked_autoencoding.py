import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from patchscale.errors import UserError
from patchscale.models import Adventurer
from patchscale.models.vit import ViT
from patchscale.tasks.masked_autoencoding import (
    EPS,
    MaskedAutoencoder,
    MaskedAutoencoding,
    from_patch_values,
    patch_statistics,
    patch_values,
)


def encoder(kind, img_size=8, patch_size=2, channels=3, depth=2, **kwargs):
    torch.manual_seed(0)
    sizes = {"img_size": img_size, "patch_size": patch_size, "in_chans": channels, "num_classes": 0, "depth": depth}
    if kind == "adventurer":
        return Adventurer(**sizes, embed_dim=32, **kwargs)
    return ViT(**sizes, embed_dim=24, num_heads=2, **kwargs)


def made(kind, mask_ratio=0.75, **kwargs):
    return MaskedAutoencoder(encoder(kind, **kwargs), mask_ratio, decoder_depth=2)


both = pytest.mark.parametrize("kind", ["adventurer", "vit"])


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["adventurer", "vit"]),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 4),
    st.floats(0.05, 0.95),
)
def test_as_many_patches_are_hidden_as_asked_at_any_patch_size(kind, grid, patch_size, channels, ratio):
    img_size = grid[0] * patch_size[0], grid[1] * patch_size[1]
    patches = math.prod(grid)
    kept = round(patches * (1 - ratio))
    sizes = {"img_size": img_size, "patch_size": patch_size, "channels": channels, "depth": 1}
    if not 0 < kept < patches:
        with pytest.raises(UserError, match="--mask-ratio"):
            made(kind, ratio, **sizes)
        return
    model = made(kind, ratio, **sizes)
    images = torch.randn(2, channels, *img_size)
    seen = []
    model.backbone.trunk()[0][0].register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1]))
    painted, hidden = model(images)
    assert seen == [kept + 1]  # the class token too
    assert hidden.shape == (2, patches - kept)
    assert (hidden.diff(dim=1) > 0).all()
    assert painted.shape == (2, patches - kept, channels * math.prod(patch_size))
    task = MaskedAutoencoding(model)
    images, noise = task.augment(images, torch.zeros(2))
    assert torch.isfinite(task.loss(model, images, noise))


@settings(max_examples=25, deadline=None)
@given(st.tuples(st.integers(1, 4), st.integers(1, 4)), st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_patches_are_those_that_the_embedding_sees(grid, patch_size):
    images = torch.randn(2, 3, grid[0] * patch_size[0], grid[1] * patch_size[1])
    values = patch_values(images, patch_size)
    assert torch.equal(values, F.unfold(images, patch_size, stride=patch_size).transpose(1, 2))
    assert torch.equal(from_patch_values(values, grid, patch_size), images)


@pytest.mark.parametrize("flip", ["alternate", "pairs"])
def test_an_adventurer_that_is_shown_all_patches_is_the_whole_encoder(flip):
    whole_is_visible(encoder("adventurer", depth=3, flip=flip))


@pytest.mark.parametrize("pos_embed", ["learn", "sincos", "none"])
def test_a_vision_transformer_that_is_shown_all_patches_is_the_whole_encoder(pos_embed):
    whole_is_visible(encoder("vit", pos_embed=pos_embed))


def whole_is_visible(model):
    model = model.double().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    every = torch.arange(16).expand(2, -1)
    assert torch.equal(model.forward_features(images, visible=every), model.forward_features(images))


@both
def test_visible_patches_are_encoded_as_an_image_of_them_alone(kind):
    """In both scan directions: blocks 0 and 1 scan from either side."""
    model = encoder(kind, img_size=(6, 4)).double().eval()
    assert kind == "vit" or [layer.mixer.reverse for layer in model.layers] == [False, True]
    images = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    visible = torch.tensor([[0, 1, 4], [2, 3, 5]])
    found = model.forward_features(images, visible=visible)
    patches = patch_values(images, 2)
    for image in range(2):
        strip = encoder(kind, img_size=(2, 6)).double().eval()
        strip.load_state_dict({k: v for k, v in model.state_dict().items() if k != "pos_embed"}, strict=False)
        places = [0, *(1 + visible[image])] if kind == "vit" else [*visible[image], -1]
        strip.pos_embed.data = model.pos_embed.data[:, places]
        alone = from_patch_values(patches[None, image, visible[image]], (1, 3), (2, 2))
        torch.testing.assert_close(found[image], strip.forward_features(alone)[0], rtol=1e-10, atol=1e-12)


def direct_loss(images, painted, hidden, patch):
    """The mean over hidden patches of the squared error, in loops."""
    errors = []
    columns = images.shape[3] // patch
    for image, of_image, places in zip(images.numpy(), painted.numpy(), hidden.numpy(), strict=True):
        for values, place in zip(of_image, places, strict=True):
            row, column = divmod(int(place), columns)
            pixels = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].ravel()
            if patch > 1:
                pixels = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + EPS)
            errors.append(((values - pixels) ** 2).mean())
    return np.mean(errors)


@pytest.mark.parametrize(("patch", "channels"), [(4, 3), (2, 1), (1, 3), (1, 1)])
def test_the_loss_is_the_squared_error_of_normalised_hidden_patches(patch, channels):
    model = made("vit", patch_size=patch, channels=channels).double()
    task = MaskedAutoencoding(model)
    images, noise = task.augment(torch.randn(3, channels, 8, 8, dtype=torch.float64), torch.zeros(3))
    painted, hidden = model(images, noise)
    expected = direct_loss(images, painted.detach(), hidden, patch)
    assert task.loss(model, images, noise).item() == pytest.approx(expected, rel=1e-12)


def test_a_patch_without_contrast_has_a_finite_target():
    mean, std = patch_statistics(torch.full((1, 1, 12), 3.0), (2, 2))
    assert mean.item() == 3
    assert std.item() == pytest.approx(math.sqrt(EPS))


@both
@pytest.mark.parametrize("patch", [2, 1])
def test_what_is_painted_depends_on_visible_pixels_alone(kind, patch):
    model = made(kind, patch_size=patch)
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    painted, hidden = model(images, torch.rand(2, model.patches))
    painted.square().sum().backward()
    felt = patch_values(images.grad, patch).abs().sum(2) > 0
    assert torch.equal(felt, torch.ones_like(felt).scatter(1, hidden, False))


@both
def test_gradients_reach_every_weight(kind):
    model = made(kind)
    task = MaskedAutoencoding(model)
    task.loss(model, *task.augment(torch.randn(4, 3, 8, 8), torch.zeros(4))).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@both
def test_layer_decay_leaves_the_encoders_last_norm_and_the_decoder_their_rate(kind):
    from timm.optim import param_groups_layer_decay

    model = made(kind)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    last_norm = {"vit": "backbone.norm.", "adventurer": "backbone.norm_f."}[kind]
    full = {name for name, scale in scales.items() if scale == 1}
    assert full == {name for name in scales if name.startswith((last_norm, "decoder."))}
    assert min(scales.values()) == scales["backbone.patch_embed.proj.weight"] == 0.5**3


@both
def test_patches_are_painted_where_they_belong(kind):
    """Two hidden patches that trade places in the noise trade nothing: what is painted goes with the place."""
    model = made(kind).eval()
    images, noise = torch.randn(1, 3, 8, 8), torch.rand(1, 16)
    painted, hidden = model(images, noise)
    other = noise.clone()
    first, second = hidden[0, :2]
    other[0, [first, second]] = noise[0, [second, first]]
    again, same = model(images, other)
    assert torch.equal(hidden, same)
    assert torch.equal(painted, again)


class Perfect(nn.Module):
    """Paints what is there."""

    def __init__(self, model, off=0.0):
        super().__init__()
        self.patch_size, self.kept, self.off = model.backbone.patch_embed.patch_size, model.kept, off

    def forward(self, images, noise):
        hidden = noise.argsort(1)[:, self.kept :].sort(1)[0]
        values = patch_values(images, self.patch_size)
        mean, std = patch_statistics(values, self.patch_size)
        return ((values - mean) / std).gather(1, hidden[..., None].expand(-1, -1, values.shape[2])) + self.off, hidden


def test_scores_are_the_mean_over_images_that_count():
    model = made("vit")
    task = MaskedAutoencoding(model)
    images = torch.rand(7, 3, 8, 8)
    labels = torch.tensor([0, 0, 0, -1, 0, 0, -1])
    half = task.evaluate(Perfect(model, 0.5), [(images, labels)])
    assert (half.loss, half.images) == (pytest.approx(0.25, rel=1e-5), 5)
    assert half.quality < task.evaluate(Perfect(model), [(images, labels)]).quality


@both
def test_evaluation_hides_the_same_patches_whenever_and_in_whatever_batches(kind):
    model = made(kind).train()
    task = MaskedAutoencoding(model)
    images, labels = torch.randn(6, 3, 8, 8), torch.zeros(6)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = task.evaluate(model, [(images, labels)])
    assert torch.equal(torch.get_rng_state(), state)
    several = task.evaluate(model, [(images[:1], labels[:1]), (images[1:], labels[1:])])
    assert several.loss == pytest.approx(one.loss, rel=1e-5)
    assert model.training


def test_an_image_that_is_no_numbers_makes_the_loss_none():
    model = made("vit")
    images = torch.randn(4, 3, 8, 8)
    images[1] = math.nan
    scores = MaskedAutoencoding(model).evaluate(model, [(images[:1], torch.zeros(1)), (images[1:], torch.zeros(3))])
    assert math.isnan(scores.loss)
    assert scores.images == 4


def test_nothing_to_evaluate_is_an_error():
    model = made("vit")
    with pytest.raises(UserError, match="no readable image"):
        MaskedAutoencoding(model).evaluate(model, [])


@pytest.mark.parametrize(("patch", "channels"), [(2, 3), (4, 1), (1, 3)])
def test_a_picture_shows_the_image_what_is_visible_and_what_was_painted(patch, channels):
    model = made("vit", patch_size=patch, channels=channels)
    task = MaskedAutoencoding(model)
    mean, std = (0.4,) * channels, (0.2,) * channels
    pixels = torch.rand(2, channels, 8, 8).mul(200).round() / 255
    picture = task.picture(Perfect(model), (pixels - 0.4) / 0.2, mean, std)
    sheet = np.asarray(picture).reshape(2, 132, 3, 132, -1)[:, 10:-2:16, :, 10:-2:16]  # the middle of each pixel
    image, seen, painted = (sheet[:, :, i].transpose(0, 3, 1, 2) / 255 for i in range(3))
    assert image.shape == pixels.shape
    assert np.abs(image - pixels.numpy()).max() < 0.003
    assert np.abs(painted - pixels.numpy()).max() < 0.003
    hidden = (seen != image).any(1).reshape(2, 8 // patch, patch, 8 // patch, patch).any((2, 4))
    assert (hidden.sum((1, 2)) == model.patches - model.kept).all()
    assert (hidden[0] == hidden[1]).all()


def test_under_autocast_the_loss_is_in_float32():
    model = made("adventurer")
    task = MaskedAutoencoding(model)
    images, noise = task.augment(torch.randn(2, 3, 8, 8), torch.zeros(2))
    with torch.autocast("cpu", torch.bfloat16):
        painted, hidden = model(images, noise)
        loss = task.loss(model, images, noise)
    assert painted.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(direct_loss(images, painted.detach().float(), hidden, 2), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_ratio": 0.0}, "--mask-ratio is 0.0, expected between 0 and 1"),
        ({"mask_ratio": 1.0}, "--mask-ratio is 1.0, expected between 0 and 1"),
        ({"mask_ratio": 0.99}, "leaves 0 of the image's 4x4 patches visible"),
        ({"mask_ratio": 0.01}, "leaves 16 of the image's 4x4 patches visible"),
        ({"decoder_dim": 50}, "--decoder-dim is 50, expected a multiple of 32"),
        ({"decoder_depth": 0}, "--decoder-depth is 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        MaskedAutoencoder(encoder("vit"), **arguments)


@both
@pytest.mark.parametrize("sizes", [{"patch_size": 1}, {"img_size": 16}, {"img_size": 16, "patch_size": 4}])
def test_an_encoder_that_is_resized_afterwards_is_refused(kind, sizes):
    model = made(kind)
    model.backbone.set_input_size(**sizes)
    with pytest.raises(UserError, match=r"made for images of \(8, 8\) in patches of \(2, 2\).*set_input_size"):
        model(torch.randn(2, 3, *model.backbone.patch_embed.img_size))


@pytest.mark.parametrize("arguments", [{"extend": 2}, {"dynamic_img_size": True}, {"patch_drop_rate": 0.5}])
def test_models_that_choose_their_patches_are_refused(arguments):
    with pytest.raises(UserError, match="leave out"):
        MaskedAutoencoder(encoder("vit", **arguments))


def test_models_of_timm_are_refused():
    with pytest.raises(UserError, match="models of this library, not timm's VisionTransformer"):
        MaskedAutoencoder(timm.create_model("test_vit"))
