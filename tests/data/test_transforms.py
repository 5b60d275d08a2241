import numpy as np
import pytest
import torch
from PIL import Image

from patchscale.data.transforms import Preprocessing

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
