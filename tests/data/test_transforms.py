import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchscale.data.transforms import PixelSwaps, Preprocessing
from patchscale.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(("size", "crop", "resized"), [(64, 0.875, 73), (224, 0.875, 256), (448, 1.0, 448)])
def test_evaluation_resizes_the_shorter_side_as_published_and_crops_the_centre(size, crop, resized):
    image = noise(500, 400)
    out = Preprocessing((size, size), 3, MEAN, STD, crop).transform()(image)
    from torchvision.transforms import functional as F

    expected = F.center_crop(F.resize(image, resized, F.InterpolationMode.BICUBIC), size)
    expected = F.normalize(F.to_tensor(expected), MEAN, STD)
    assert torch.allclose(out, expected, atol=1e-6)


def test_an_image_of_the_right_size_is_only_normalised():
    image = noise(32, 32)
    out = Preprocessing((32, 32), 3, MEAN, STD, 1.0).transform()(image)
    expected = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]) / (
        torch.tensor(STD)[:, None, None]
    )
    assert torch.allclose(out, expected, atol=1e-6)


def test_training_crops_without_flip_or_jitter_keep_a_whole_image_as_it_is():
    image = noise(16, 16)
    preprocessing = Preprocessing((16, 16), 3, MEAN, STD, 1.0)
    out = preprocessing.training_transform((1.0, 1.0), hflip=0.0, color_jitter=0.0)(image)
    assert torch.allclose(out, preprocessing.transform()(image), atol=0.1)


def test_a_certain_flip_mirrors():
    image = noise(16, 16)
    preprocessing = Preprocessing((16, 16), 3, MEAN, STD, 1.0)
    plain, flipped = (preprocessing.training_transform((1.0, 1.0), hflip=p, color_jitter=0.0) for p in (0.0, 1.0))
    torch.manual_seed(0)
    first = plain(image)
    torch.manual_seed(0)
    assert torch.allclose(flipped(image), first.flip(2))


def test_grey_images_have_one_channel_and_non_square_sizes_work():
    out = Preprocessing((8, 12), 1, (0.3,), (0.4,), 1.0).transform()(noise(40, 40).convert("L"))
    assert out.shape == (1, 8, 12)


def test_visible_is_what_the_model_sees():
    image = noise(100, 80)
    preprocessing = Preprocessing((32, 32), 3, (0.0,) * 3, (1.0,) * 3, 0.875)
    seen = np.asarray(preprocessing.visible(image), np.float32) / 255
    assert np.allclose(preprocessing.transform()(image).permute(1, 2, 0), seen, atol=1e-6)


def colours(**kwargs):
    """The colour changes alone: no crop, no flip, no normalisation."""
    preprocessing = Preprocessing((16, 16), 3, (0.0,) * 3, (1.0,) * 3, 1.0)
    return preprocessing.training_transform((1.0, 1.0), hflip=0.0, **{"color_jitter": 0.0, **kwargs})


def test_three_augment_is_one_of_grey_solarised_and_blurred_at_even_odds():
    import random

    from PIL import ImageFilter, ImageOps
    from torchvision.transforms import functional as F

    image = noise(16, 16)
    transform = colours(auto_augment="3a")
    plain = colours()(image)
    whole = F.to_pil_image(plain)
    grey = F.to_tensor(ImageOps.grayscale(whole)).expand(3, -1, -1)
    solarised = F.to_tensor(ImageOps.solarize(whole, 128))
    blurs = [F.to_tensor(whole.filter(ImageFilter.GaussianBlur(r / 20))) for r in range(2, 41)]
    counts = {"grey": 0, "solarised": 0, "blurred": 0}
    random.seed(0)
    for _ in range(300):
        found = transform(image)
        if torch.allclose(found, grey, atol=1.5 / 255):
            counts["grey"] += 1
        elif torch.allclose(found, solarised, atol=1e-6):
            counts["solarised"] += 1
        else:
            nearest = min((found - blurred).abs().mean() for blurred in blurs)
            assert nearest < 4 / 255
            counts["blurred"] += 1
    assert all(70 <= count <= 130 for count in counts.values()), counts  # 100 each; 4 standard deviations


def test_colour_jitter_comes_after_three_augment_and_not_with_randaugment():
    def names(**kwargs):
        return [type(step).__name__ for step in colours(color_jitter=0.3, **kwargs).transforms]

    assert names(auto_augment="3a")[1:3] == ["AutoAugment", "ColorJitter"]
    assert "ColorJitter" not in names(auto_augment="rand-m9-mstd0.5-inc1")
    assert names(auto_augment="rand-m9-mstd0.5-inc1")[1] == "RandAugment"


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_grayscale_takes_the_colour(probability):
    preprocessing = Preprocessing((16, 16), 3, (0.5,) * 3, (0.5,) * 3, 1.0)
    transform = preprocessing.training_transform((1.0, 1.0), hflip=0.0, color_jitter=0.0, grayscale=probability)
    red, green, blue = transform(noise(16, 16))
    assert (torch.equal(red, green) and torch.equal(green, blue)) is bool(probability)


def test_randaugment_moves_and_fills_as_published():
    preprocessing = Preprocessing((64, 64), 3, MEAN, STD, 1.0)
    transform = preprocessing.training_transform((0.08, 1.0), 0.5, 0.3, auto_augment="rand-m9-mstd0.5-inc1")
    (randaugment,) = (step for step in transform.transforms if type(step).__name__ == "RandAugment")
    operations = {operation.name: operation for operation in randaugment.ops}
    assert len(operations) == 15
    assert randaugment.num_layers == 2
    for operation in operations.values():
        assert (operation.magnitude, operation.magnitude_std) == (9, 0.5)
        assert operation.kwargs["fillcolor"] == tuple(round(255 * m) for m in MEAN)
        assert operation.hparams["translate_const"] == int(0.45 * 64)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-n9-inc1", "rand-m1", "v0", "original"])
def test_no_policy_fails_at_its_strongest(policy, mode):
    """Nor at its weakest; Pillow 13 refuses to keep no bits of a colour."""
    random.seed(0)
    preprocessing = Preprocessing((8, 8), len(mode), MEAN[: len(mode)], STD[: len(mode)], 1.0)
    transform = preprocessing.training_transform((1.0, 1.0), 0.0, 0.0, auto_augment=policy)
    image = noise(8, 8).convert(mode)
    for _ in range(300):
        assert transform(image).isfinite().all()


def test_a_colour_of_no_bits_is_black():
    transform = Preprocessing((8, 8), 3, MEAN, STD, 1.0).training_transform(
        (1.0, 1.0), 0.0, 0.0, auto_augment="rand-m10-n1-inc1"
    )
    (op,) = (op for op in transform.transforms[1].ops if op.name == "PosterizeIncreasing")
    op.prob = 1.0
    assert not np.array(op(noise(8, 8))).any()
    op.magnitude = 5  # two of four
    assert set(np.unique(np.array(op(noise(64, 64))))) == {0, 64, 128, 192}


def test_a_simple_crop_is_a_shifted_copy_with_reflected_borders():
    image = noise(16, 16)
    transform = colours(simple_random_crop=True)
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    padded = torch.nn.functional.pad(whole, (4, 4, 4, 4), mode="reflect")
    windows = {(y, x): padded[:, y : y + 16, x : x + 16] for y in range(9) for x in range(9)}
    seen = set()
    torch.manual_seed(0)
    for _ in range(60):
        found = transform(image)
        seen |= {place for place, window in windows.items() if torch.allclose(found, window, atol=1e-6)}
    assert len(seen) > 30
    assert transform(noise(40, 20)).shape == (3, 16, 16)


def test_erasing_fills_a_rectangle_with_noise():
    erased = colours(random_erasing=1.0)(Image.new("RGB", (16, 16), "white"))
    changed = (erased != 1).any(0)
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    assert changed.sum() == len(rows) * len(columns) > 0
    assert erased[:, changed].unique().numel() > changed.sum()


def test_grey_images_take_every_policy():
    preprocessing = Preprocessing((8, 8), 1, (0.3,), (0.4,), 1.0)
    for policy in ("3a", "rand-m9-mstd0.5-inc1"):
        transform = preprocessing.training_transform((0.5, 1.0), 0.5, 0.3, auto_augment=policy)
        for _ in range(60):
            assert transform(noise(8, 8).convert("L")).shape == (1, 8, 8)


@pytest.mark.parametrize("policy", ["nonsense", "rand-z9", "3b"])
def test_an_unknown_policy_is_refused(policy):
    with pytest.raises(UserError, match=f"--auto-augment '{policy}'"):
        colours(auto_augment=policy)


def test_a_simple_crop_of_tiny_images_is_refused():
    with pytest.raises(UserError, match="--simple-random-crop needs"):
        Preprocessing((4, 4), 1, (0.3,), (0.4,), 1.0).training_transform((1.0, 1.0), 0.0, 0.0, simple_random_crop=True)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 40),
    st.one_of(st.none(), st.integers(1, 10)),
)
def test_so_many_pairs_of_near_pixels_change_places(size, swaps, distance):
    try:
        swap = PixelSwaps(size, swaps, distance)
    except UserError as e:
        found = int(re.search(r"has (\d+) pairs", str(e))[1])
        assert found < swaps
        assert found <= math.prod(size) // 2
        if distance is None:
            assert found == math.prod(size) // 2
        PixelSwaps(size, found, distance)
        return
    index = swap.index
    moved = index != torch.arange(len(index))
    assert moved.sum() == 2 * swaps
    assert torch.equal(index[index], torch.arange(len(index)))  # pairs: twice is as before
    rows, columns = index // size[1], index % size[1]
    own_rows, own_columns = torch.arange(len(index)) // size[1], torch.arange(len(index)) % size[1]
    far = torch.maximum((rows - own_rows).abs(), (columns - own_columns).abs())
    assert distance is None or far.max() <= distance
    image = torch.rand(2, 3, *size)
    assert torch.equal(swap(swap(image)), image)
    assert torch.equal(swap(image)[0, 0].flatten(), image[0, 0].flatten()[index])


def test_pixels_change_places_last_in_training_and_evaluation_and_the_same_every_time():
    image = noise(16, 16)
    plain = Preprocessing((16, 16), 3, MEAN, STD, 1.0)
    swapped = replace(plain, pixel_swaps=100, swap_distance=4)
    swap = PixelSwaps((16, 16), 100, 4)
    assert torch.equal(swapped.transform()(image), swap(plain.transform()(image)))
    assert not torch.equal(swapped.transform()(image), plain.transform()(image))
    fixed = {"crop_scale": (1.0, 1.0), "hflip": 0.0, "color_jitter": 0.0}
    expected = swap(plain.training_transform(**fixed)(image))
    assert torch.equal(swapped.training_transform(**fixed)(image), expected)
    assert np.array_equal(np.asarray(swapped.visible(image)), np.asarray(plain.visible(image)))


def test_the_pixels_that_change_places_are_the_same_on_every_machine():
    assert PixelSwaps((4, 4), 3).index.tolist() == [0, 6, 2, 3, 13, 5, 1, 7, 9, 8, 10, 11, 12, 4, 14, 15]
    assert PixelSwaps((4, 4), 3, 1).index.tolist() == [0, 2, 1, 6, 4, 8, 3, 7, 5, 9, 10, 11, 12, 13, 14, 15]
