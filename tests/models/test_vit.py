"""DeiT and the pixel transformer: timm's network, parameter for parameter, at any patch size."""

import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from timm.models import VisionTransformer
from torch import Tensor

from patchscale import UserError, convert, create_from_checkpoint, load_weights, read_checkpoint
from patchscale.models import ViT
from patchscale.models import vit as vit_module
from patchscale.models.published import DEIT, FAMILIES, PIXEL_TRANSFORMER, published_top1
from patchscale.models.tokens import resize_patch_embed, resize_pos_embed, sincos_positions

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}


def shuffled(model: torch.nn.Module) -> torch.nn.Module:
    """Parameters moved off their initial values, so that all of them matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def small(**changes) -> ViT:
    return shuffled(ViT(**(SMALL | changes)))


def image(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_size": 1, "img_size": 8},
        {"img_size": (16, 40), "patch_size": (4, 8)},
        {"pos_embed": "none"},
        {"global_pool": "avg", "num_heads": 1},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 2, "no_embed_class": True, "qkv_bias": False, "init_values": 0.1},
        {"num_classes": 0, "mlp_ratio": 2.5},
    ],
    ids=str,
)
def test_it_is_timms_model_with_the_same_weights(changes, assert_near):
    ours, theirs = small(**changes), VisionTransformer(**(SMALL | changes)).eval()
    theirs.load_state_dict(ours.state_dict())
    x = image(*ours.patch_embed.img_size)
    assert_near(ours(x), theirs(x), 1e-5)
    assert_near(ours.forward_features(x), theirs.forward_features(x), 1e-5)
    for norm in (False, True):
        options = {"indices": 2, "norm": norm, "intermediates_only": True, "return_prefix_tokens": True}
        for mine, wanted in zip(
            ours.forward_intermediates(x, **options), theirs.forward_intermediates(x, **options), strict=True
        ):
            pairs = zip(mine, wanted, strict=True) if isinstance(wanted, tuple) else [(mine, wanted)]
            for actual, expected in pairs:
                assert_near(actual, expected, 1e-5)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for (name, mine), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_near(mine.grad, wanted.grad, 1e-5, name)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_name_without_a_size_is_timms_deit(size, assert_near):
    ours, theirs = (shuffled(timm.create_model(f"deit_{size}_patch16{s}", depth=1)) for s in ("", "_224"))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 224, 224)
    assert_near(ours(x), theirs(x), 1e-5)
    config = [timm.data.resolve_model_data_config(m) for m in (ours, theirs)]
    assert [config[0][k] for k in ("mean", "std", "input_size")] == [
        config[1][k] for k in ("mean", "std", "input_size")
    ]


def test_names_that_are_timms_stay_timms():
    for name in ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "deit_base_patch16_384"):
        with torch.device("meta"):
            model = timm.create_model(name, depth=1)
        assert type(model) is VisionTransformer, name
        assert name in timm.list_models(module="deit")


@pytest.mark.parametrize("family", [DEIT, PIXEL_TRANSFORMER], ids=lambda f: f.prefix)
def test_every_name_makes_a_model_of_its_sizes(family):
    named = list(family.names())
    assert len({name for *_, name in named}) == len(named)
    for size, patch, img, name in named:
        with torch.device("meta"):
            model = timm.create_model(name, depth=1)
        assert model.patch_embed.patch_size == (patch, patch)
        assert model.patch_embed.img_size == (img, img)
        assert model.embed_dim == family.sizes[size]["embed_dim"]
        assert model.blocks[0].attn.num_heads == family.sizes[size]["num_heads"]
        assert model.pretrained_cfg["input_size"] == (3, img, img)
    assert set(timm.list_models(f"{family.prefix}_*", module="vit")) <= {name for *_, name in named}


def test_parameters_of_the_published_summary():
    with torch.device("meta"):
        model = timm.create_model("pixel_transformer_tiny_patch1_32", num_classes=100)
    assert sum(p.numel() for p in model.parameters()) == 5_555_812
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (192, 12, 12)
    assert model.blocks[0].mlp.fc1.out_features == 768
    assert model.pos_embed.shape == (1, 1025, 192)


# Millions, arXiv 2502.03738, table 7.
@pytest.mark.parametrize(
    ("name", "published"), [("tiny", 5), ("small", 22), ("base", 86), ("large", 304), ("huge", 631)]
)
def test_parameters_of_deit(name, published):
    with torch.device("meta"):
        model = timm.create_model(f"deit_{name}_patch8_128" if name == "tiny" else f"deit_{name}_patch16")
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(published, rel=0.15 if name == "tiny" else 0.01)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.prefix)
@pytest.mark.parametrize(("patch", "img"), [(2, 64), (32, 224)])
def test_counted_parameters_are_those_of_the_models(family, patch, img):
    for size, sizes in family.sizes.items():
        arguments = sizes | {"depth": 2}
        with torch.device("meta"):
            model = timm.create_model(f"{family.prefix}_{size}_patch{patch}_{img}", num_classes=7, depth=2)
        expected = family.count(**arguments, patch_size=patch, img_size=img, num_classes=7)
        assert sum(p.numel() for p in model.parameters()) == expected, size


def test_published_accuracies_are_found_by_name():
    assert published_top1("deit_base_patch16_224") == 81.8
    assert published_top1("deit_base_patch1_64") == 81.3
    assert published_top1("deit_base_patch1_224") is None


def test_attention_is_fused():
    model = small()
    with torch.profiler.profile() as profile:
        model(image())
    assert any("scaled_dot_product" in event.name for event in profile.events())


@pytest.mark.parametrize(("img_size", "patch_size"), [((24, 40), None), (None, 4), (64, 16), ((16, 48), (8, 4))])
def test_set_input_size_keeps_the_class_entry_first(img_size, patch_size, assert_near):
    model = small()
    old = {k: v.clone() for k, v in model.state_dict().items()}
    model.set_input_size(img_size, patch_size)
    grid = model.patch_embed.grid_size
    assert model.pos_embed.shape == (1, math.prod(grid) + 1, 64)
    assert torch.equal(model.pos_embed[:, :1], old["pos_embed"][:, :1])
    assert_near(model.pos_embed[:, 1:], resize_pos_embed(old["pos_embed"][:, 1:], (4, 4), grid, 0, 0), 1e-6)
    expected = resize_patch_embed(old["patch_embed.proj.weight"], model.patch_embed.patch_size)
    assert torch.equal(model.patch_embed.proj.weight, expected)
    for name, value in model.state_dict().items():
        if name not in ("pos_embed", "patch_embed.proj.weight"):
            assert torch.equal(value, old[name]), name
    assert model(image(*model.patch_embed.img_size)).shape == (2, 10)


def test_without_positions_the_order_of_patches_makes_no_difference(assert_near):
    x = image(8, 8).double()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    mixed = x.flatten(2)[:, :, order].unflatten(2, (8, 8))
    for positions, same in (("none", True), ("learn", False), ("sincos", False)):
        model = small(img_size=8, patch_size=1, pos_embed=positions).double()
        difference = (model(x) - model(mixed)).norm() / model(x).norm()
        assert difference < 1e-12 if same else difference > 1e-3, positions
        assert (model.pos_embed is None) is (positions != "learn")


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 7)])
@pytest.mark.parametrize("dim", [4, 64])
def test_sincos_positions_are_timms(grid, dim, assert_near):
    assert_near(sincos_positions(grid, dim)[0], build_sincos2d_pos_embed(list(grid), dim=dim), 1e-5)


def test_sincos_positions_stay_on_the_map_they_were_on(assert_near):
    coarse, fine = sincos_positions((4, 6), 32), sincos_positions((12, 18), 32, reference=(4, 6))
    centres = fine.unflatten(1, (12, 18))[:, 1::3, 1::3].flatten(1, 2)  # of threes of patches
    assert_near(centres, coarse, 1e-6)
    model = small(pos_embed="sincos", img_size=(16, 24))
    map_of_4 = model.positions_on((2, 3))
    model.set_input_size(patch_size=4)
    assert model.pos_grid == (2, 3)
    assert torch.equal(model.positions_on((2, 3)), map_of_4)
    assert (map_of_4[:, 0] == 0).all()  # the class token stands nowhere


def test_weights_of_timm_load_at_another_patch_size(tmp_path, assert_near):
    theirs = shuffled(VisionTransformer(**SMALL))
    torch.save({"model": theirs.state_dict()}, tmp_path / "deit.pth")  # as DeiT's files are
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")  # as timm's are
    for name in ("deit.pth", "timm.safetensors"):
        model = ViT(**(SMALL | {"patch_size": 4})).eval()
        load_weights(model, tmp_path / name)
        twin = small()
        twin.load_state_dict(theirs.state_dict())
        twin.set_input_size(patch_size=4)
        assert_near(model(image()), twin(image()), 1e-6)
        other = ViT(**(SMALL | {"num_classes": 3}))
        with pytest.raises(UserError, match=r"head.weight is \(10, 64\) in the file and \(3, 64\)"):
            load_weights(other, tmp_path / name)
        load_weights(other, tmp_path / name, strict=False)
        assert torch.equal(other.pos_embed, theirs.pos_embed)


def test_a_file_without_a_record_makes_its_model(tmp_path, assert_near):
    theirs = shuffled(timm.create_model("deit_tiny_patch16_224", depth=2, img_size=64, num_classes=5))
    torch.save({"model": theirs.state_dict()}, tmp_path / "deit.pth")
    model = create_from_checkpoint(read_checkpoint(tmp_path / "deit.pth")).eval()
    assert isinstance(model, ViT)
    assert_near(model(image(64, 64)), theirs(image(64, 64)), 1e-5)
    pooled = shuffled(VisionTransformer(**(SMALL | {"global_pool": "avg", "num_heads": 1, "mlp_ratio": 2})))
    torch.save(pooled.state_dict(), tmp_path / "pooled.pth")
    assert_near(create_from_checkpoint(read_checkpoint(tmp_path / "pooled.pth")).eval()(image()), pooled(image()), 1e-6)


@pytest.mark.parametrize(
    "changes", [{}, {"pos_embed": "sincos"}, {"pos_embed": "none"}, {"pos_grid": 8}, {"patch_size": (4, 8)}], ids=str
)
def test_a_model_survives_conversion_and_timms_loader(changes, tmp_path, assert_near):
    name = "pixel_transformer_tiny_patch4_32"
    model = shuffled(timm.create_model(name, depth=1, num_classes=4, **changes))
    expected = model(image())
    torch.save({"model": model.state_dict(), "model_name": name, "model_args": model._model_args}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "out")
    own = create_from_checkpoint(read_checkpoint(tmp_path / "out")).eval()
    assert_near(own(image()), expected, 1e-6)
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert_near(by_timm(image()), expected, 1e-6)
    # And at another patch size by way of either.
    own.set_input_size(patch_size=2)
    resized = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, patch_size=2).eval()
    if changes.get("pos_embed") != "sincos":  # a new model starts a new map
        assert_near(resized(image()), own(image()), 1e-5)


def test_published_weights_come_from_timms_repository(tmp_path, monkeypatch, assert_near):
    theirs = shuffled(timm.create_model("deit_tiny_patch16_224"))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def download(repository, filename, cache_dir=None):
        asked.append((repository, filename))
        return tmp_path / "model.safetensors"

    monkeypatch.setattr(vit_module, "download", download)
    model = timm.create_model("deit_tiny_patch16", pretrained=True).eval()
    assert asked == [("timm/deit_tiny_patch16_224.fb_in1k", "model.safetensors")]
    x = torch.randn(1, 3, 224, 224)
    assert_near(model(x), theirs(x), 1e-6)
    grey = timm.create_model("deit_tiny_patch16", pretrained=True, in_chans=1, num_classes=3, patch_size=32).eval()
    assert grey(x[:, :1]).shape == (1, 3)
    with pytest.raises(UserError, match=r"no weights were published for deit_tiny_patch8_64.*deit_base_patch16"):
        timm.create_model("deit_tiny_patch8_64", pretrained=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"img_size": 30}, ["30x30", "8x8", "24x24", "32x32"]),
        ({"img_size": (32, 20), "patch_size": (8, 8)}, ["32x20", "32x16", "32x24"]),
        ({"embed_dim": 66}, ["66", "4 heads"]),
        ({"embed_dim": 66, "num_heads": 1, "pos_embed": "sincos"}, ["66", "multiple of 4"]),
        ({"depth": 0}, ["depth is 0"]),
        ({"in_chans": 0}, ["in_chans is 0"]),
        ({"drop_path_rate": -1}, ["drop_path_rate is -1", "0 to 1"]),
        ({"drop_path_rate": 2}, ["drop_path_rate is 2", "0 to 1"]),
        ({"pos_grid": (4,)}, ["pos_grid is (4,)", "1 row and 1 column"]),
        ({"pos_embed": "rope"}, ["'rope'", "'learn'", "'sincos'", "'none'"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(UserError) as error:
        ViT(**(SMALL | arguments))
    assert all(word in str(error.value) for word in words)


def test_padding_is_refused_rather_than_passed_over():
    with pytest.raises(UserError, match="dynamic_img_pad is not for this model"):
        timm.create_model("deit_tiny_patch16", depth=1, dynamic_img_size=True, dynamic_img_pad=True)
