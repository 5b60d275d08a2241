import pytest

from patchscale.errors import UserError
from patchscale.train.build import check_model_name, create_model, run_folder
from patchscale.train.checkpoint import LAST
from patchscale.train.recipe import Recipe


def test_an_unknown_model_is_refused_with_near_names():
    with pytest.raises(UserError, match="adventurer_base_patch16_224"):
        check_model_name("adventurer_base_patch16_242")


def test_any_timm_model_is_known():
    check_model_name("resnet18")


def test_arguments_that_a_model_does_not_take_are_refused():
    with pytest.raises(UserError, match="resnet18 cannot be made"):
        create_model("resnet18", {"flip": "alternate"})


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    (tmp_path / LAST).write_bytes(b"")
    with pytest.raises(UserError, match="--resume"):
        run_folder(Recipe("m", "d", output=tmp_path), None)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        run_folder(Recipe("m", "d", output=tmp_path / "file" / "run"), None)
