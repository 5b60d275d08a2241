import multiprocessing
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image

from patchscale.data.sources import open_source
from patchscale.data.transforms import Preprocessing
from patchscale.errors import UserError
from patchscale.train.build import create_model, make_loader, make_task, make_teacher, open_sources, prepare_folder
from patchscale.train.loop import train
from patchscale.train.recipe import Recipe


def test_arguments_that_a_model_does_not_take_are_refused():
    with pytest.raises(UserError, match="resnet18 cannot be made"):
        create_model("resnet18", {"flip": "alternate"})


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        prepare_folder(tmp_path / "file" / "run")


def preprocessing(channels=3):
    return Preprocessing((32, 32), channels, (0.5,) * channels, (0.25,) * channels, 1.0)


def distilled(**changes) -> Recipe:
    return Recipe("m", "d", distillation="hard", **changes)


def test_a_timm_model_with_weights_of_ones_own_teaches(tmp_path):
    model = timm.create_model("test_vit", num_classes=4).eval()  # 160 px alone
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    recipe = distilled(teacher="test_vit", teacher_weights=str(tmp_path / "teacher.pth"))
    teacher = make_teacher(recipe, tuple("abcd"), preprocessing())
    image = torch.rand(2, 3, 1, 1).expand(2, 3, 32, 32)
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[k])[:, None, None] for k in ("mean", "std"))
    expected = model(((image - mean) / std)[..., :1, :1].expand(2, 3, *cfg["input_size"][1:]))
    assert torch.allclose(teacher((image - 0.5) / 0.25), expected, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_distilled_deit_learns_labels_with_one_head_and_from_the_teacher_with_the_other(alpha):
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=4)
    teacher = timm.create_model("test_vit", img_size=32, num_classes=4)
    recipe = distilled(teacher="test_vit", distillation_alpha=alpha)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    make_task(recipe, model, 4, teacher).loss(model, images, labels).backward()
    assert bool(model.head.weight.grad.any()) == (alpha == 0)
    assert bool(model.head_dist.weight.grad.any()) == (alpha == 1)
    assert model.eval()(images).shape == (2, 4)


def test_other_classes_to_evaluate_on_are_refused(tmp_path, recipe):
    for split, names in (("train", "ab"), ("val", "ac")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    with pytest.raises(UserError, match="2 classes to train on and 2 to evaluate on, which are not the same: 'b'"):
        open_sources(recipe(data=f"torch/image_folder:{tmp_path}"))


def test_a_teacher_of_other_classes_is_refused(tmp_path, recipe):
    model = timm.create_model("test_vit", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    with pytest.raises(UserError, match=r"head.weight is \(7, 64\) in the file and \(4, 64\)"):
        make_teacher(
            distilled(teacher="test_vit", teacher_weights=str(tmp_path / "teacher.pth")), tuple("abcd"), preprocessing()
        )
    run = train(recipe(epochs=1, limit_train=64)).folder
    with pytest.raises(UserError, match=r"tells 10 classes apart, the data has 4: take one"):
        make_teacher(distilled(teacher=str(run)), tuple("abcd"), preprocessing(1))
    with pytest.raises(UserError, match="learned other classes"):
        make_teacher(distilled(teacher=str(run)), tuple("abcdefghij"), preprocessing(1))
    with pytest.raises(UserError, match="takes 1 channels, the data has 3"):
        make_teacher(distilled(teacher=str(run)), tuple("0123456789"), preprocessing())


def test_a_teacher_of_timms_published_classes_is_refused_for_other_data(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **kw: create(name, **kw))  # without a network
    with pytest.raises(UserError, match="tells 1000 classes apart, the data has 4"):
        make_teacher(distilled(teacher="test_vit"), tuple("abcd"), preprocessing())
    assert make_teacher(distilled(teacher="test_vit"), tuple(map(str, range(1000))), preprocessing()) is not None


def test_an_unknown_teacher_is_refused_with_near_names():
    with pytest.raises(UserError, match="unknown model 'resnet81'; did you mean"):
        make_teacher(distilled(teacher="resnet81"), tuple("abcd"), preprocessing())


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_student_learns_from_a_run(recipe, tmp_path, kind):
    teacher = train(recipe(epochs=6, output=tmp_path / "teacher"))
    # The labels have no say: what the student learns it has from its teacher.
    settings = {"distillation": kind, "distillation_alpha": 1.0, "epochs": 6, "lr": 2e-2 if kind == "soft" else 4e-3}
    student = train(recipe(teacher=str(teacher.folder), output=tmp_path / "student", **settings))
    assert teacher.scores.top1 > 60
    assert student.scores.top1 > 40  # chance is 10


def test_an_error_in_a_worker_that_nobody_foresaw_ends_the_process(tmp_path):
    """It did not: at exit the process waited for its worker, which ignores the signal to end."""
    script = tmp_path / "script.py"
    script.write_text(
        """
from patchscale.data.sources import Transformed
from patchscale.train.loop import train
from patchscale.train.recipe import Recipe

def broken(self, item):
    raise ArithmeticError("nobody foresaw this")

Transformed.__getitem__ = broken
train(Recipe("adventurer_tiny_patch4", "digits", img_size=8, embed_dim=32, depth=1, workers=1, device="cpu"))
"""
    )
    ended = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 1
    assert "nobody foresaw this" in ended.stderr
    assert "killed by signal" not in ended.stderr


def _stopped_in_the_middle(data):
    loader = make_loader(
        open_source(data, "val"), Preprocessing((8, 8), 1, (0.5,), (0.5,), 1.0).transform(), 8, 1, torch.device("cpu")
    )
    batches = iter(loader)
    next(batches)
    sys.exit(75)


def test_a_process_of_multiprocessing_ends_though_its_workers_ignore_signals():
    """Each run of a sweep is one: a sweep that was told to stop waited for ever."""
    process = multiprocessing.get_context("forkserver").Process(target=_stopped_in_the_middle, args=("digits",))
    process.start()
    process.join(60)
    try:
        assert process.exitcode == 75
    finally:
        process.kill()
