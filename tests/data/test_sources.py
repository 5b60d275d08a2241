import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from patchscale.data.sources import Transformed, Unreadable, collate, in_mode, open_source
from patchscale.errors import UserError


@pytest.fixture
def image_folder(tmp_path):
    for split, name, index in itertools.product(("train", "val"), ("cat", "dog"), range(2)):
        path = tmp_path / split / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 12), (index * 100, 50, 200)).save(path)
    return tmp_path


def test_digits_are_sklearns_split_without_overlap():
    digits = load_digits()
    train, val = open_source("digits", "train"), open_source("digits", "val")
    assert len(train) + len(val) == len(digits.images) == 1797
    everything = np.concatenate([np.stack([np.asarray(s.dataset[i][0]) for i in range(len(s))]) for s in (train, val)])
    expected = np.round(digits.images * 255 / 16).astype(np.uint8)
    as_sets = [sorted(map(bytes, a.reshape(len(a), -1))) for a in (everything, expected)]
    assert as_sets[0] == as_sets[1]


def test_digits_carry_the_mean_and_deviation_of_their_training_images():
    source = open_source("digits", "train")
    pixels = np.stack([np.asarray(source.dataset[i][0]) for i in range(len(source))]) / 255
    assert source.mean[0] == pytest.approx(pixels.mean(), abs=2e-3)
    assert source.std[0] == pytest.approx(pixels.std(), abs=2e-3)


def test_a_sample_is_the_same_every_time_and_covers_more_than_one_class():
    first, again = open_source("digits", "train", 100), open_source("digits", "train", 100)
    labels = [first.dataset[i][1] for i in range(100)]
    assert labels == [again.dataset[i][1] for i in range(100)]
    assert len(set(labels)) == 10


def test_compact_cifar100_is_the_data_set(shared):
    source = open_source(f"cifar100:{shared / 'data' / 'cifar100'}", "val")
    images = np.stack([np.asarray(source.dataset[i][0]) for i in range(len(source))])
    labels = np.array([source.dataset[i][1] for i in range(len(source))])
    assert images.shape == (10_000, 32, 32, 3)
    assert (np.bincount(labels) == 100).all()
    assert source.classes[0] == "apple"
    assert source.classes[99] == "worm"
    # CIFAR-100's published channel means are of the training set; the test set's lie within half a percent.
    assert images.mean((0, 1, 2)) / 255 == pytest.approx([0.5071, 0.4865, 0.4409], abs=5e-3)


def test_a_limit_takes_the_first_tiles_of_compact_cifar100(shared):
    path = f"cifar100:{shared / 'data' / 'cifar100'}"
    few, more = open_source(path, "train", 10), open_source(path, "train", 1500)
    assert (len(few), len(more)) == (10, 1500)
    for i in range(10):
        assert few.dataset[i][1] == more.dataset[i][1]
        assert np.array_equal(few.dataset[i][0], more.dataset[i][0])


@pytest.fixture
def compact(tmp_path):
    """A compact copy of CIFAR-100 with 1,000 images of one colour each to evaluate on, in two sheets."""
    labels = np.arange(2000) % 100
    for sheet in range(2):
        levels = labels.reshape(2, 25, 40)[sheet]
        Image.fromarray(np.kron(levels, np.ones((32, 32))).astype(np.uint8)).convert("RGB").save(
            tmp_path / f"test_{sheet:02}.webp", lossless=True
        )
    np.savez(tmp_path / "labels.npz", test_fine=labels)
    (tmp_path / "classes.txt").write_text("\n".join(f"class{i}" for i in range(100)))
    return tmp_path


@pytest.mark.parametrize("limit", [None, 1, 1000, 1001, 5000])
def test_compact_images_have_their_labels(compact, limit):
    source = open_source(f"cifar100:{compact}", "val", limit)
    assert len(source) == min(limit or 2000, 2000)
    assert all(
        np.asarray(image)[0, 0, 0] == label for image, label in map(source.dataset.__getitem__, range(len(source)))
    )


@pytest.mark.parametrize("damage", ["first sheet", "size", "labels", "classes", "count"])
def test_a_compact_copy_that_is_not_whole_is_refused(compact, damage):
    if damage == "first sheet":  # all labels after it would be of other images
        (compact / "test_00.webp").unlink()
    elif damage == "size":
        Image.new("RGB", (1280, 832)).save(compact / "test_01.webp")
    elif damage == "labels":
        (compact / "labels.npz").write_bytes((compact / "labels.npz").read_bytes()[:200])
    elif damage == "classes":
        (compact / "classes.txt").write_text("apple")
    else:
        np.savez(compact / "labels.npz", test_fine=np.arange(3000) % 100)
    with pytest.raises(UserError, match="is not a whole compact copy of CIFAR-100"):
        open_source(f"cifar100:{compact}", "val")


def test_folder_has_its_own_splits(image_folder):
    train = open_source(f"folder:{image_folder}", "train")
    assert train.classes == ("cat", "dog")
    assert len(train) == 4
    assert not train.note


def test_a_single_split_says_that_it_is_evaluated_on_what_it_trained_on(image_folder):
    assert "same images serve as both" in open_source(f"folder:{image_folder / 'train'}", "val").note


def test_the_images_folder_of_a_data_set_is_found(shared):
    source = open_source(f"folder:{shared / 'data' / 'imagenet1k_samples'}", "val")
    assert len(source.classes) == 1000
    assert source.classes[0] == "n01440764"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "unknown data 'nonsense'"),
        ("folder:", "unknown data"),
        ("/", r"unknown data '/' \(a folder; say of what kind\); expected digits"),
        ("/no/such/folder", "unknown data '/no/such/folder'; expected digits"),
        ("folder:/no/such/place", "no such folder"),
        ("cifar100:/no/such/place", "no such folder"),
    ],
)
def test_bad_names_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        open_source(name, "train")


def test_a_folder_without_classes_is_refused(tmp_path):
    with pytest.raises(UserError, match="no class folders"):
        open_source(f"folder:{tmp_path}", "train")


def test_an_empty_class_is_refused_and_named(image_folder):
    (image_folder / "train" / "mouse").mkdir()
    with pytest.raises(UserError, match="mouse"):
        open_source(f"folder:{image_folder}", "train")


def test_a_class_has_the_number_of_training_where_another_has_no_images_to_evaluate_on(image_folder):
    for left in ("train/ant", "train/dog"):  # without images to evaluate on: no folder, and an empty one
        path = image_folder / left / "0.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    for path in (image_folder / "val" / "dog").iterdir():
        path.unlink()
    train, val = (open_source(f"folder:{image_folder}", split) for split in ("train", "val"))
    assert train.classes == val.classes == ("ant", "cat", "dog")
    assert [val.dataset[i][1] for i in range(len(val))] == [1, 1]


def test_a_class_to_evaluate_on_that_is_none_to_train_on_is_refused(image_folder):
    (image_folder / "val" / "dog").rename(image_folder / "val" / "wolf")
    with pytest.raises(UserError, match=r"val/wolf is a class that .*train lacks: remove it"):
        open_source(f"folder:{image_folder}", "val")


@pytest.mark.parametrize("pixels", [np.full((8, 8), 70_000, np.int32), np.full((8, 8), 0.5, np.float32)])
def test_pixels_of_which_nobody_says_what_is_white_are_unreadable(image_folder, pixels):
    (image_folder / "train" / "cat" / "0.png").unlink()
    Image.fromarray(pixels).save(image_folder / "train" / "cat" / "0.tif")
    item = Transformed(open_source(f"folder:{image_folder}", "train"), np.asarray)[0]
    assert isinstance(item, Unreadable)
    assert "convert it to 8 or 16 bits" in item.reason


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_of_16_bits_are_those_of_their_upper_8(image_folder, mode):
    deep = np.arange(96, dtype=np.uint16).reshape(8, 12) * 683
    Image.fromarray(deep).save(image_folder / "train" / "cat" / "0.png")
    source = replace(open_source(f"folder:{image_folder}", "train"), channels=len(mode))
    image, _ = Transformed(source, np.asarray)[0]
    assert np.array_equal(image.reshape(8, 12, -1)[..., 0], deep // 256)
    for same in (deep, deep.astype(np.int32)):  # PIL opens some files of 16 bits as of 32
        assert np.array_equal(np.asarray(in_mode(Image.fromarray(same), mode)), image)


def test_a_single_class_is_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "0.png")
    with pytest.raises(UserError, match="single class, 'cat'"):
        open_source(f"folder:{tmp_path}", "train")


def test_a_folder_that_is_no_cifar_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither the compact copy"):
        open_source(f"cifar100:{tmp_path}", "train")


def test_a_missing_validation_split_is_named(image_folder):
    for path in (image_folder / "val").rglob("*.png"):
        path.unlink()
    for folder in (image_folder / "val" / "cat", image_folder / "val" / "dog", image_folder / "val"):
        folder.rmdir()
    with pytest.raises(UserError, match="has train but none of val"):
        open_source(f"folder:{image_folder}", "val")


def test_timms_factory_opens_what_it_knows(image_folder):
    train, val = (open_source(f"torch/image_folder:{image_folder}", split) for split in ("train", "val"))
    assert train.classes == val.classes == ("cat", "dog")
    assert len(train) == len(val) == 4
    assert "train" in train.dataset.samples[0][0]
    assert "val" in val.dataset.samples[0][0]


def test_what_timm_cannot_open_is_refused(tmp_path):
    with pytest.raises(UserError, match="timm cannot open torch/cifar10"):
        open_source(f"torch/cifar10:{tmp_path}", "train")


def test_an_unreadable_image_is_passed_on_by_name(image_folder):
    broken = image_folder / "train" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    data = Transformed(open_source(f"folder:{image_folder}", "train"), lambda image: np.asarray(image))
    items = [data[i] for i in range(len(data))]
    assert [isinstance(item, Unreadable) for item in items] == [False, False, False, True]
    assert items[3].path == str(broken)


def test_collate_leaves_the_unreadable_out():
    import torch

    good = (torch.ones(1, 2, 2), 3)
    bad = Unreadable("a.png", "truncated")
    images, labels, unreadable = collate([good, bad, good])
    assert images.shape == (2, 1, 2, 2)
    assert labels.tolist() == [3, 3]
    assert unreadable == [bad]


def test_inaturalist_is_read_as_torchvision_lays_it_out(tmp_path):
    from torchvision.datasets import INaturalist

    ranks = "Animalia_Chordata_Aves_Passeriformes_Corvidae_Corvus"
    species = [f"0000{i}_{ranks}_{name}" for i, name in enumerate(("corax", "cornix", "corone"))]
    for split, (number, name) in itertools.product(("2021_train", "2021_valid"), enumerate(species)):
        for index in range(number + 1):
            path = tmp_path / split / name / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10, 12), (index * 50, 50, 200)).save(path)
    source = open_source(f"inat:{tmp_path}", "train")
    torchvisions = INaturalist(str(tmp_path), version="2021_train", target_type="full")
    assert source.classes == tuple(species)
    assert [source.dataset[i][1] for i in range(6)] == [torchvisions[i][1] for i in range(6)] == [0, 1, 1, 2, 2, 2]
    assert open_source(f"inat:{tmp_path}", "val").classes == source.classes
    (tmp_path / "2021_train").rename(tmp_path / "2021_train_mini")
    assert len(open_source(f"inat:{tmp_path}", "train")) == 6
    (tmp_path / "2021_valid").rename(tmp_path / "other")
    with pytest.raises(UserError, match="holds no 2021_valid"):
        open_source(f"inat:{tmp_path}", "val")


def test_cifar10_is_read_as_torchvision_lays_it_out(tmp_path, monkeypatch):
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    with pytest.raises(UserError, match="cifar-10-batches-py"):
        open_source(f"cifar10:{tmp_path}", "val")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    contents = {
        "test_batch": {"data": pixels.reshape(4, -1), "labels": [0, 9, 1, 1]},
        "batches.meta": {"label_names": list("abcdefghij")},
    }
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in contents}
    monkeypatch.setattr(CIFAR10, "train_list", [])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    source = open_source(f"cifar10:{tmp_path}", "val")
    assert source.classes == tuple("abcdefghij")
    assert [source.dataset[i][1] for i in range(4)] == [0, 9, 1, 1]
    assert np.array_equal(np.asarray(source.dataset[2][0]), pixels[2].transpose(1, 2, 0))
