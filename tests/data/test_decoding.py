import io

import numpy as np
import pytest
import torch
from PIL import Image

from patchscale.data.decoding import Decoder, EncodedFiles, collate_encoded
from patchscale.data.sampling import Draw
from patchscale.data.sources import Unreadable, open_source
from patchscale.data.transforms import Preprocessing
from patchscale.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSING = Preprocessing((32, 32), 3, MEAN, STD, 0.875)
AUGMENTATION = {"crop_scale": (0.3, 1.0), "hflip": 0.5, "color_jitter": 0.3, "random_erasing": 0.5}
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """Two classes of smooth pictures, 60 x 48, and among them a PNG, half a JPEG and an empty file."""
    y, x = np.mgrid[:48, :60]
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for n in range(3):
            picture = np.stack([127 + 100 * np.sin(x / (5 + n)), 127 + 100 * np.cos(y / 7), x * 4 % 256], -1)
            Image.fromarray(picture.astype(np.uint8)).save(tmp_path / label / f"{n}.jpg", quality=95)
    whole = (tmp_path / "a" / "0.jpg").read_bytes()
    (tmp_path / "b" / "half.jpg").write_bytes(whole[:40])
    (tmp_path / "b" / "none.jpg").write_bytes(b"")
    png = io.BytesIO()
    Image.new("RGB", (9, 9)).save(png, "png")
    (tmp_path / "b" / "other.png").write_bytes(png.getvalue())
    return f"folder:{tmp_path}"


def batch(source, items):
    files = EncodedFiles(source)
    return collate_encoded([files[i] for i in items])


def test_evaluation_sees_what_workers_would_show_it(folder):
    source = open_source(folder, "val")
    files, labels, unreadable = batch(source, range(3))
    images, labels, bad = Decoder(PREPROCESSING, None, CPU)(files, labels)
    assert labels.tolist() == [0, 0, 0]
    assert not unreadable
    assert not bad
    expected = torch.stack([PREPROCESSING.transform()(source.dataset[i][0]) for i in range(3)])
    # Decoders differ by a few of 255 levels.
    assert (images - expected).abs().mean() < 0.02
    assert (images - expected).abs().max() < 0.2


def test_what_is_no_jpeg_is_left_out_by_name(folder):
    source = open_source(folder, "train")
    files, labels, unreadable = batch(source, range(len(source)))
    images, kept, broken = Decoder(PREPROCESSING, None, CPU)(files, labels)
    assert images.shape == (6, 3, 32, 32)
    assert kept.tolist() == [0, 0, 0, 1, 1, 1]
    named = {u.path.rsplit("/")[-1]: u.reason for u in [*unreadable, *broken]}
    assert named.keys() == {"half.jpg", "none.jpg", "other.png"}
    assert all(isinstance(u, Unreadable) for u in broken)
    assert "not a JPEG file" in named["other.png"]


def test_an_augmentation_follows_from_its_seed_alone(folder):
    source = open_source(folder, "train")
    decoder = Decoder(PREPROCESSING, AUGMENTATION, CPU)
    first, _, _ = decoder(*batch(source, [Draw(0, 5), Draw(1, 6)])[:2])
    torch.manual_seed(99)
    second, labels, _ = decoder(*batch(source, [Draw(1, 6, counts=False), Draw(0, 7), Draw(0, 5)])[:2])
    assert torch.equal(first[0], second[2])
    assert torch.equal(first[1], second[0])
    assert not torch.equal(second[1], second[2])
    assert labels.tolist() == [-1, 0, 0]


def test_no_augmentation_at_all_is_the_whole_picture(folder):
    source = open_source(folder, "train")
    still = {"crop_scale": (1.0, 1.0), "hflip": 0.0, "color_jitter": 0.0, "random_erasing": 0.0}
    square = Preprocessing((32, 32), 3, (0.5,) * 3, (0.5,) * 3, 1.0)
    images, _, _ = Decoder(square, still, CPU)(*batch(source, [Draw(0, 1)])[:2])
    flipped, _, _ = Decoder(square, still | {"hflip": 1.0}, CPU)(*batch(source, [Draw(0, 1)])[:2])
    assert torch.allclose(images.flip(-1), flipped, atol=1e-5)


def test_data_without_files_and_oblong_images_are_refused():
    with pytest.raises(UserError, match="files of their own"):
        EncodedFiles(open_source("digits", "train"))
    with pytest.raises(UserError, match="square images, not 32 x 64"):
        Decoder(Preprocessing((32, 64), 3, MEAN, STD, 1.0), None, CPU)


def test_a_run_decodes_on_its_device(folder, tmp_path_factory):
    from patchscale.train.loop import train
    from patchscale.train.recipe import Recipe

    recipe = Recipe(
        model="adventurer_tiny_patch16", data=folder, img_size=32, embed_dim=32, depth=1, epochs=2, global_batch=3,
        decode="device", skip_unreadable=True, output=tmp_path_factory.mktemp("run"), device="cpu", workers=0,
    )  # fmt: skip
    result = train(recipe)
    assert result.scores.images == 6


@pytest.mark.parametrize("limit", [None, 10])
def test_data_in_no_files_of_their_own_is_refused(limit):
    with pytest.raises(UserError, match="--decode device needs data in files of their own"):
        EncodedFiles(open_source("digits", "train", limit))
