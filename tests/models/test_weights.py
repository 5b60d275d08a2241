"""From a weight file to a model and back: logits survive every way in and out."""

import argparse
import contextlib
import json
import logging

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import adapt_input_conv
from timm.models._hub import save_for_hf

from patchscale import UserError, convert, create_from_checkpoint, load_weights, read_checkpoint
from patchscale.models import Adventurer, ViT
from patchscale.models.tokens import resize_patch_embed, resize_pos_embed
from patchscale.models.weights import architecture_name, infer_model_args


def small(**kwargs) -> Adventurer:
    return Adventurer(
        **{"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 32, "depth": 2} | kwargs
    ).eval()


@pytest.fixture
def official(parity):
    return parity("checkpoint_official.pth")


@pytest.fixture
def expected(parity):
    return load_file(parity("checkpoint_official.expect.safetensors"))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"img_size": (32, 16), "patch_size": (8, 4)},
        {"in_chans": 1, "num_classes": 0},
        {"d_state": 16, "headdim": 8, "expand": 4},
        {"embed_dim": 96, "depth": 11},
    ],
)
def test_sizes_are_read_off_the_tensors(arguments):
    model = small(**arguments)
    inferred = infer_model_args(model.state_dict())
    twin = Adventurer(**inferred)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert twin.patch_embed.img_size == model.patch_embed.img_size
    assert [b.mixer.headdim for b in twin.layers] == [b.mixer.headdim for b in model.layers]


def test_weights_of_another_model_are_refused():
    with pytest.raises(UserError, match="neither an Adventurer's nor a vision transformer's"):
        infer_model_args(timm.create_model("resnet18").state_dict())
    with pytest.raises(UserError, match="12 patches"):
        infer_model_args(small(img_size=(12, 16)).state_dict())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"embed_dim": 768, "depth": 12, "patch_size": 16, "img_size": 224}, "adventurer_base_patch16_224"),
        ({"embed_dim": 1024, "depth": 24, "patch_size": (8, 8), "img_size": [448, 448]}, "adventurer_large_patch8_448"),
        ({"embed_dim": 32, "depth": 2, "patch_size": (8, 4), "img_size": 20}, "adventurer_tiny_patch16_224"),
    ],
)
def test_architecture_name(arguments, name):
    assert architecture_name(arguments) == name
    assert timm.is_model(name)


def test_load_weights_fills_in_place(official, expected, assert_near):
    model = small(flip="released")
    assert load_weights(model, official) is model
    assert_near(model(expected["input.image"]), expected["out.logits_model"], 1e-5)
    load_weights(model, str(official), which="ema")
    assert_near(model(expected["input.image"]), expected["out.logits_ema"], 1e-5)


@pytest.mark.parametrize(("flip", "warned"), [("released", False), ("alternate", True)])
def test_a_flip_rule_that_is_not_the_files_is_told(flip, warned, official, caplog):
    with caplog.at_level(logging.WARNING):
        load_weights(small(flip=flip), official)
    assert ("flip='released'" in caplog.text) == warned


def test_a_state_dict_alone_warns_of_nothing(tmp_path, caplog):
    save_file(small().state_dict(), tmp_path / "bare.safetensors")
    with caplog.at_level(logging.WARNING):
        load_weights(small(flip="pairs"), tmp_path / "bare.safetensors")
    assert not caplog.text


def vit(name: str = "pixel_transformer_tiny_patch4_32", **arguments) -> ViT:
    sizes = {"img_size": 16, "num_classes": 5, "embed_dim": 96, "depth": 1}
    return timm.create_model(name, **sizes | arguments).eval()


def save_run(model, path, **arguments):
    """As a training run does: the state dict, the model's name and arguments."""
    args = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 96, "depth": 1} | arguments
    name = model.pretrained_cfg["architecture"]
    torch.save({"model": model.state_dict(), "model_name": name, "model_args": args}, path)
    return path


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({}, None),
        ({"img_size": 32, "patch_size": 8}, None),
        ({"name": "deit_tiny_patch4"}, "num_heads=12 (the model has 3)"),
        ({"pos_embed": "none"}, "pos_embed='sincos' (the model has 'none')"),
    ],
)
def test_heads_and_positions_that_are_not_the_files_are_told(other, told, tmp_path, caplog):
    file = save_run(vit(pos_embed="sincos"), tmp_path / "run.pt", pos_embed="sincos")
    with caplog.at_level(logging.WARNING):
        load_weights(vit(**{"pos_embed": "sincos"} | other), file)
    assert (told or "") in caplog.text
    assert bool(caplog.text) == bool(told)


def test_a_record_that_makes_no_model_hinders_nobody(tmp_path, caplog):
    file = save_run(vit(), tmp_path / "run.pt", nonsense=1)
    with caplog.at_level(logging.WARNING):
        load_weights(vit(), file)
    assert not caplog.text


@pytest.mark.parametrize("name", ["pixel_transformer_tiny_patch4_32", "adventurer_tiny_patch4_64"])
@pytest.mark.parametrize("sizes", [{"patch_size": 2}, {"img_size": 32}, {"img_size": 24, "patch_size": 6}])
def test_fixed_positions_are_loaded_onto_the_map_that_set_input_size_keeps(name, sizes, tmp_path, assert_near):
    trained = vit(name, pos_embed="sincos")
    file = save_run(trained, tmp_path / "run.pt", pos_embed="sincos")
    loaded = load_weights(vit(name, pos_embed="sincos", **sizes), file)
    created = create_from_checkpoint(read_checkpoint(file), **sizes).eval()
    trained.set_input_size(**sizes)
    x = torch.randn(2, 3, *trained.patch_embed.img_size)
    assert_near(loaded(x), trained(x), 1e-6)
    assert_near(created(x), trained(x), 1e-6)
    convert(file, tmp_path / "converted")
    again = create_from_checkpoint(read_checkpoint(tmp_path / "converted"), **sizes).eval()
    assert_near(again(x), trained(x), 1e-6)


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "deit_small_patch16_224", "vit_small_patch16_224"])
def test_timms_state_dicts_give_timms_values(name, tmp_path, assert_near):
    timms = timm.create_model(name, img_size=48, depth=2, num_classes=5).eval()
    save_file(timms.state_dict(), tmp_path / "bare.safetensors")
    own = create_from_checkpoint(read_checkpoint(tmp_path / "bare.safetensors")).eval()
    x = torch.randn(2, 3, 48, 48)
    assert_near(own(x), timms(x), 1e-5)


def test_heads_of_a_bare_state_dict_are_those_of_its_width(tmp_path, assert_near):
    timms = timm.create_model("vit_huge_patch14_224", img_size=28, depth=1, num_classes=5).eval()  # 16 heads of 80
    save_file(timms.state_dict(), tmp_path / "bare.safetensors")
    own = create_from_checkpoint(read_checkpoint(tmp_path / "bare.safetensors")).eval()
    x = torch.randn(1, 3, 28, 28)
    assert_near(own(x), timms(x), 1e-5)


def test_a_class_token_with_a_position_is_not_taken_for_one_without(tmp_path):
    """3 x 5 patches and a class token have as many positions as 4 x 4 patches."""
    timms = timm.create_model("vit_tiny_patch16_224", img_size=(48, 80), depth=1, num_classes=5)
    save_file(timms.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="15 patches, which make no square grid"):
        create_from_checkpoint(read_checkpoint(tmp_path / "bare.safetensors"))


def test_deit_iii_s_own_files_load(tmp_path, assert_near):
    timms = timm.create_model("deit3_small_patch16_224", img_size=48, depth=1, num_classes=5).eval()
    torch.save({"model": timms.state_dict(), "args": argparse.Namespace(model="deit_small")}, tmp_path / "deit3.pth")
    own = create_from_checkpoint(read_checkpoint(tmp_path / "deit3.pth")).eval()
    x = torch.randn(1, 3, 48, 48)
    assert_near(own(x), timms(x), 1e-5)
    again = timm.create_model("deit3_small_patch16_224", img_size=48, depth=1, num_classes=5).eval()
    assert_near(load_weights(again, tmp_path / "deit3.pth")(x), timms(x), 1e-6)


@pytest.mark.parametrize("name", ["vit_small_patch16_18x2_224", "vit_base_patch16_xp_224"])
def test_models_of_timm_with_other_blocks_load(name, tmp_path):
    model = timm.create_model(name, depth=1, img_size=32)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert load_weights(model, tmp_path / "a.pth") is model


def test_a_record_of_a_name_and_an_image_size_tells_the_grid(tmp_path, assert_near):
    model = timm.create_model("pixel_transformer_tiny_patch4_32", depth=1, num_classes=4, pos_embed="sincos").eval()
    record = {"depth": 1, "num_classes": 4, "pos_embed": "sincos", "img_size": (32, 32)}
    name = "pixel_transformer_tiny_patch4_32"
    torch.save({"model": model.state_dict(), "model_name": name, "model_args": record}, tmp_path / "a.pt")
    loaded = create_from_checkpoint(read_checkpoint(tmp_path / "a.pt"), patch_size=2).eval()
    model.set_input_size(patch_size=2)
    x = torch.randn(1, 3, 32, 32)
    assert_near(loaded(x), model(x), 1e-6)


@pytest.mark.parametrize(
    "record", [{"norm_layer": 3}, {"attn_layer": "nope"}, {"pos_grid": "ab", "img_size": 64, "patch_size": 16}]
)
def test_a_hostile_record_is_one_clear_error(record, tmp_path):
    state = timm.create_model("deit_tiny_patch16", depth=1).state_dict()
    torch.save({"model": state, "model_name": "deit_tiny_patch16", "model_args": record}, tmp_path / "a.pt")
    with pytest.raises(UserError):
        create_from_checkpoint(read_checkpoint(tmp_path / "a.pt"))


def test_the_record_of_a_deep_model_is_not_built(tmp_path, monkeypatch):
    made = []
    real = timm.create_model
    model = vit()
    file = save_run(model, tmp_path / "run.pt", depth=100_000)
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: made.append(k.get("depth")) or real(*a, **k))
    load_weights(model, file)
    assert made == [1]


def test_a_run_of_several_stages_names_them(tmp_path):
    for stage in ("1_pretrain", "2_finetune"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "best.pt").touch()
    with pytest.raises(UserError, match="several stages; name one of them: 1_pretrain, 2_finetune"):
        read_checkpoint(tmp_path)


def test_a_distilled_deit_is_refused_by_its_second_token(tmp_path):
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", depth=1)
    save_file(distilled.state_dict(), tmp_path / "distilled.safetensors")
    with pytest.raises(UserError, match=r"dist_token.*a distilled DeiT's"):
        create_from_checkpoint(read_checkpoint(tmp_path / "distilled.safetensors"))
    with pytest.raises(UserError, match=r"dist_token.*a distilled DeiT's"):
        load_weights(timm.create_model("deit_tiny_patch16", depth=1), tmp_path / "distilled.safetensors")
    load_weights(distilled, tmp_path / "distilled.safetensors")


@pytest.mark.parametrize("patch", [1, 2])
def test_a_state_dict_that_may_be_either_familys_says_for_which_it_is_taken(patch, tmp_path, caplog):
    pixels = timm.create_model(f"pixel_transformer_tiny_patch{patch}_32", img_size=4, depth=1, num_classes=5)
    save_file(pixels.state_dict(), tmp_path / "bare.safetensors")
    with caplog.at_level(logging.WARNING):
        model = create_from_checkpoint(read_checkpoint(tmp_path / "bare.safetensors"))
    assert model.blocks[0].attn.num_heads == 3
    assert f"pixel_transformer_tiny_patch{patch}_32" in caplog.text


@pytest.mark.parametrize(
    ("img_size", "patch_size"),
    [
        (16, 2),
        (32, 4),
        (32, 8),
        ((16, 24), 8),
        (16, (2, 8)),
    ],
)
def test_patches_and_positions_are_resized_on_load(img_size, patch_size, official, assert_near):
    model = load_weights(small(img_size=img_size, patch_size=patch_size, flip="released"), official)
    weights = read_checkpoint(official).weights
    kernel = weights["patch_embed.proj.weight"]
    assert_near(model.patch_embed.proj.weight, resize_patch_embed(kernel, patch_size), 1e-6)
    assert_near(model.pos_embed, resize_pos_embed(weights["pos_embed"], (4, 4), model.patch_embed.grid_size), 1e-6)
    # The same as resizing the model itself.
    twin = create_from_checkpoint(read_checkpoint(official))
    twin.set_input_size(img_size, patch_size)
    assert_near(model.patch_embed.proj.weight, twin.patch_embed.proj.weight, 1e-6)


@pytest.mark.parametrize("in_chans", [1, 4, 6])
def test_image_channels_are_adapted_as_timm_does(in_chans, official, assert_near):
    model = load_weights(small(in_chans=in_chans, flip="released"), official)
    kernel = read_checkpoint(official).weights["patch_embed.proj.weight"]
    assert_near(model.patch_embed.proj.weight, adapt_input_conv(in_chans, kernel), 1e-6)


def test_a_file_of_grey_images_gives_a_model_of_colour(tmp_path):
    save_file(small(in_chans=1).state_dict(), tmp_path / "grey.safetensors")
    model = load_weights(small(), tmp_path / "grey.safetensors")
    assert model.patch_embed.proj.weight.shape == (32, 3, 4, 4)


def test_overrides_come_before_the_file(official):
    model = create_from_checkpoint(read_checkpoint(official), img_size=32, flip="pairs", global_pool="avg")
    assert (model.patch_embed.img_size, model.flip, model.global_pool) == ((32, 32), "pairs", "avg")
    assert model.pos_embed.shape == (1, 65, 32)


@pytest.mark.parametrize("into", ["folder", "file"])
@pytest.mark.parametrize("which", ["model", "ema"])
def test_converted_weights_give_equal_logits_through_timm(into, which, official, expected, tmp_path, assert_near):
    folder = tmp_path / "new" / "folder"
    written = convert(official, folder if into == "folder" else folder / "model.safetensors", which)
    assert written == [folder / "model.safetensors", folder / "config.json"]
    assert sorted(folder.iterdir()) == sorted(written)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model.flip == "released"
    assert_near(model(expected["input.image"]), expected[f"out.logits_{which}"], 1e-5)
    own = create_from_checkpoint(read_checkpoint(folder)).eval()
    assert torch.equal(own(expected["input.image"]), model(expected["input.image"]))


def test_the_config_is_of_this_model(official, tmp_path):
    convert(official, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert timm.is_model(config["architecture"])
    assert config["num_classes"] == 5
    assert config["pretrained_cfg"]["input_size"] == [3, 16, 16]
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}"))
    assert data["input_size"] == (3, 16, 16)


def test_converting_again_gives_the_same_weights(official, tmp_path):
    convert(official, tmp_path / "once")
    convert(tmp_path / "once", tmp_path / "twice")
    once, twice = (load_file(tmp_path / n / "model.safetensors") for n in ("once", "twice"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(v, twice[k]) for k, v in once.items())
    assert (tmp_path / "once" / "config.json").read_text() == (tmp_path / "twice" / "config.json").read_text()
    convert(official, tmp_path / "once", "ema")  # over its own earlier files
    assert not torch.equal(load_file(tmp_path / "once" / "model.safetensors")["pos_embed"], once["pos_embed"])


@pytest.mark.parametrize(
    "arguments", [{"img_size": 32}, {"img_size": 32, "patch_size": 8}, {"num_classes": 7}, {"num_classes": 0}]
)
def test_converted_weights_in_another_shape(arguments, official, expected, tmp_path, assert_near):
    convert(official, tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **arguments).eval()
    weights = read_checkpoint(official).weights
    grid = model.patch_embed.grid_size
    assert_near(model.pos_embed, resize_pos_embed(weights["pos_embed"], (4, 4), grid), 1e-6)
    kernel = resize_patch_embed(weights["patch_embed.proj.weight"], model.patch_embed.patch_size)
    assert_near(model.patch_embed.proj.weight, kernel, 1e-6)
    for name in ("layers.1.mixer.A_log", "layers.0.mlp.w3.weight", "norm_f.weight"):
        assert torch.equal(model.get_parameter(name), weights[name])
    image = expected["input.image"]
    if model.patch_embed.img_size == (16, 16):
        assert_near(model.forward_features(image), small_official(official).forward_features(image), 1e-5)


def small_official(official) -> Adventurer:
    return create_from_checkpoint(read_checkpoint(official)).eval()


@pytest.mark.parametrize("in_chans", [1, 4])
def test_converted_weights_for_other_channels(in_chans, official, tmp_path, assert_near):
    convert(official, tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=in_chans)
    kernel = read_checkpoint(official).weights["patch_embed.proj.weight"]
    assert_near(model.patch_embed.proj.weight, adapt_input_conv(in_chans, kernel), 1e-6)


def test_features_of_converted_weights(official, expected, tmp_path, assert_near):
    convert(official, tmp_path)
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=(1,))
    (found,) = features.eval()(expected["input.image"])
    (wanted,) = small_official(official).forward_intermediates(
        expected["input.image"], indices=[1], intermediates_only=True
    )
    assert_near(found, wanted, 1e-5)


def test_a_flip_rule_set_later_is_exported(tmp_path):
    x = torch.randn(2, 3, 32, 32)
    model = timm.create_model("adventurer_tiny_patch8_224", img_size=32, embed_dim=64, depth=3).eval()
    model.set_flip("pairs")
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.flip == "pairs"
    assert torch.equal(loaded(x), model(x))


def test_what_no_shape_tells_survives_conversion(tmp_path, assert_near):
    """An image that is not square, a flip rule and a pooling, from a checkpoint that records them."""
    arguments = {"img_size": (12, 32), "flip": "pairs", "global_pool": "avg", "depth": 4}
    model, image = small(**arguments), torch.randn(2, 3, 12, 32)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match="24 patches"):
        convert(tmp_path / "bare.pth", tmp_path / "out")
    recorded = {"patch_size": 4, "num_classes": 5, "embed_dim": 32} | arguments
    torch.save({"model": model.state_dict(), "model_args": recorded}, tmp_path / "recorded.pth")
    convert(tmp_path / "recorded.pth", tmp_path / "out")
    for made in (
        create_from_checkpoint(read_checkpoint(tmp_path / "recorded.pth")),
        create_from_checkpoint(read_checkpoint(tmp_path / "out")),
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True),
    ):
        assert (made.flip, made.global_pool) == ("pairs", "avg")
        assert_near(made.eval()(image), model(image), 1e-6)


@pytest.mark.parametrize(
    "record",
    [
        {"model_name": "hf-hub:someone/else"},
        {"model_name": "adventurer_tiny_patch3_224"},
        {"model_name": 3},
        {"model_args": [1]},
        {"model_args": {"colour": 1, "patch_size": 4, "img_size": 16}},
        {"model_args": {"embed_dim": 32}},
    ],
)
def test_a_record_that_makes_no_model_is_refused_in_words(record, tmp_path, monkeypatch):
    def ask(*args, **kwargs):
        raise AssertionError(f"asked the Hub for {args}")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", ask)
    recorded = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 32, "depth": 2}
    torch.save({"model": small().state_dict(), "model_args": recorded} | record, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"odd.pth"):
        create_from_checkpoint(read_checkpoint(tmp_path / "odd.pth"))


@pytest.mark.parametrize("extra", [{"pretrained": True}, {"checkpoint_path": "elsewhere.pth"}])
def test_a_record_fetches_nothing(extra, tmp_path, hub, monkeypatch):
    """A stranger's file says what its model is, not what else to read."""
    monkeypatch.chdir(tmp_path)
    recorded = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 32, "depth": 2}
    content = {"model": small().state_dict(), "model_name": "adventurer_tiny_patch16_224"}
    torch.save(content | {"model_args": recorded | extra}, tmp_path / "odd.pth")
    with contextlib.suppress(UserError):
        create_from_checkpoint(read_checkpoint(tmp_path / "odd.pth"))
    assert not hub


@pytest.mark.parametrize("metadata", ["{", "[1]"])
def test_damaged_metadata_is_refused_in_words(metadata, official, tmp_path):
    path, _ = convert(official, tmp_path)
    with safe_open(path, "pt") as file:
        keys = file.metadata().keys() - {"format"}
    assert keys
    save_file(load_file(path), path, metadata=dict.fromkeys(keys, metadata))
    with pytest.raises(UserError, match=r"model.safetensors"):
        read_checkpoint(path)


def test_a_config_of_other_weights_is_not_overwritten(official, tmp_path):
    convert(official, tmp_path / "a.safetensors")
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match=r"config.json describes a.safetensors"):
        convert(official, tmp_path / "b.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "config.json"]
    assert (tmp_path / "config.json").read_text() == before


def test_a_config_that_is_not_a_models_is_not_overwritten(official, tmp_path):
    (tmp_path / "config.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"config.json"):
        convert(official, tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"mine": 1}'


def test_converting_to_where_nothing_can_be_written(official, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        convert(official, tmp_path / "file" / "folder")


def test_converting_what_is_no_checkpoint_writes_nothing(tmp_path):
    torch.save({"lr": 0.1}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other.pth"):
        convert(tmp_path / "other.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def offline(monkeypatch):
    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("adventurer_tiny_patch16_224", "Wangf3014/Adventurer/resolve/main/adventurer_tiny_patch16_224.pth"),
        ("adventurer_tiny_patch16", "Wangf3014/Adventurer/resolve/main/adventurer_tiny_patch16_224.pth"),
        ("adventurer_tiny_patch1_64", "Wangf3014/Patch_Scaling/resolve/main/adventurer_tiny_patch1_64.pth"),
    ],
)
def test_pretrained_without_a_network_names_the_address(name, file, offline):
    with pytest.raises(UserError, match=f"https://huggingface.co/{file}"):
        timm.create_model(name, pretrained=True)


def test_pretrained_where_nothing_was_published_names_what_was(offline):
    with pytest.raises(UserError, match=r"adventurer_tiny_patch4_224.*Published: .*adventurer_base_patch16_224"):
        timm.create_model("adventurer_tiny_patch4_224", pretrained=True)


@pytest.fixture(scope="module")
def published_file(tmp_path_factory):
    """A file as published, of a model with a published name."""
    path = tmp_path_factory.mktemp("hub") / "adventurer_tiny_patch16_224.pth"
    torch.save({"model": timm.create_model("adventurer_tiny_patch16_224").state_dict(), "epoch": 1}, path)
    return path


@pytest.fixture
def hub(published_file, monkeypatch):
    asked = []

    def download(repository, filename, **kwargs):
        asked.append((repository, filename, kwargs.get("cache_dir")))
        return str(published_file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_pretrained_loads_the_file_and_its_flip_rule(hub, published_file, tmp_path):
    model = timm.create_model("adventurer_tiny_patch16_224", pretrained=True, cache_dir=str(tmp_path))
    assert hub == [("Wangf3014/Adventurer", "adventurer_tiny_patch16_224.pth", str(tmp_path))]
    weights = read_checkpoint(published_file).weights
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert model.flip == "released"
    assert [b.mixer.reverse for b in model.layers[:5]] == [False, False, True, True, False]


def test_pretrained_with_a_flip_rule_of_ones_own(hub):
    assert timm.create_model("adventurer_tiny_patch16_224", pretrained=True, flip="pairs").flip == "pairs"


def test_not_pretrained_asks_no_one_and_flips_as_drawn(hub):
    assert timm.create_model("adventurer_tiny_patch16_224", depth=1).flip == "alternate"
    assert not hub


def test_pretrained_for_other_channels_classes_and_images(hub, published_file, assert_near):
    model = timm.create_model(
        "adventurer_tiny_patch16_224", pretrained=True, in_chans=1, num_classes=5, img_size=64, patch_size=8
    )
    weights = read_checkpoint(published_file).weights
    kernel = adapt_input_conv(1, weights["patch_embed.proj.weight"])
    assert_near(model.patch_embed.proj.weight, resize_patch_embed(kernel, 8), 1e-6)
    assert_near(model.pos_embed, resize_pos_embed(weights["pos_embed"], (14, 14), (8, 8)), 1e-6)
    assert torch.equal(model.layers[7].mixer.D, weights["layers.7.mixer.D"])
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 5)


def test_pretrained_features(hub, published_file):
    features = timm.create_model("adventurer_tiny_patch16_224", pretrained=True, features_only=True, out_indices=(5,))
    weights = read_checkpoint(published_file).weights
    assert torch.equal(features.model.layers[5].mlp.w1.weight, weights["layers.5.mlp.w1.weight"])
