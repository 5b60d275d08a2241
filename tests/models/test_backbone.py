"""What holds for every family, whichever end its class token stands at; and timm's contract for a model."""

import copy

import pytest
import timm
import torch
from timm.models import get_notrace_modules
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from patchscale import UserError
from patchscale.models import Adventurer, ViT
from patchscale.models.backbone import Backbone
from patchscale.models.published import FAMILIES

FAMILY_NAMES = [family.prefix for family in FAMILIES]


@pytest.fixture(params=FAMILY_NAMES)
def make(request):
    """Makes a small model of a family; parameters moved off their initial values, so that all of them matter."""

    def build(**changes) -> Backbone:
        arguments = {"img_size": 32, "patch_size": 8, "depth": 3, "num_classes": 10, "embed_dim": 64}
        if request.param != "adventurer":
            arguments["num_heads"] = 4
        torch.manual_seed(0)
        model = timm.create_model(f"{request.param}_tiny_patch8_224", **(arguments | changes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model.eval()

    return build


def image(height: int = 32, width: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


# One model, any patch.


@pytest.mark.parametrize("patch_size", [32, 16, 4, (2, 8), 1])
@pytest.mark.parametrize("pos_grid", [None, 16, (3, 5)])
def test_a_patch_size_in_passing_is_the_one_that_the_model_is_resized_to(make, patch_size, pos_grid, assert_near):
    model = make(pos_grid=pos_grid)
    resized = copy.deepcopy(model)
    resized.set_input_size(patch_size=patch_size)
    assert resized.pos_grid == resized.patch_embed.grid_size
    x = image()
    assert_near(model(x, patch_size=patch_size), resized(x), 1e-5)
    assert_near(model.forward_features(x, patch_size), resized.forward_features(x), 1e-5)
    maps = model.forward_intermediates(x, indices=1, patch_size=patch_size, intermediates_only=True)[0]
    assert_near(maps, resized.forward_intermediates(x, indices=1, intermediates_only=True)[0], 1e-5)
    assert torch.equal(model(x, patch_size=8), model(x))
    assert model.patch_embed.patch_size == (8, 8)


def test_gradients_at_another_patch_size_reach_the_stored_weights(make):
    """Against finite differences in float64, along a random direction in each parameter."""
    model, x = make(depth=1, pos_grid=8).double(), image(batch=1).double()
    model(x, patch_size=4).square().sum().backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        values = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                parameter += step * direction
                values.append(model(x, patch_size=4).square().sum().item())
            parameter += 1e-5 * direction
        slope, expected = (parameter.grad * direction).sum().item(), (values[0] - values[1]) / 2e-5
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-6), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("positions", ["learn", "sincos"])
def test_a_position_grid_without_places_is_refused(make, positions):
    with pytest.raises(UserError, match="pos_grid is 0, expected at least 1 row"):
        make(pos_grid=0, pos_embed=positions)


def test_a_patch_that_does_not_divide_the_image_is_refused_in_passing(make):
    with pytest.raises(UserError, match=r"32x32 is not a whole number of 5x5 patches.*30x30 or 35x35"):
        make()(image(), patch_size=5)


def test_positions_on_a_finer_grid_of_their_own_tell_places_apart(make):
    model = make(patch_size=32, pos_grid=8)
    assert model.pos_embed.shape[1] == 65
    whole = model.positions_on((8, 8))
    assert torch.equal(whole, model.pos_embed)
    # From the one position of a single patch nothing finer can be had.
    single = make(patch_size=32).positions_on((8, 8))
    patches = single[:, 1:] if isinstance(model, ViT) else single[:, :-1]
    assert patches.std(1).max() < 1e-6


def test_patch_sizes_in_passing_compile_and_export(make, assert_near):
    model, x = make(pos_grid=8), image()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for patch_size in (4, 2, (2, 4)):  # at the second, torch.compile tries to let the size vary
        expected = model(x, patch_size=patch_size)
        assert_near(compiled(x, patch_size=patch_size), expected, 1e-5)
        program = torch.export.export(model, (x,), {"patch_size": patch_size})
        assert_near(program.module()(x, patch_size=patch_size), expected, 1e-5)


@pytest.mark.parametrize("positions", ["learn", "sincos"])
def test_positions_under_autocast_are_as_precise_as_the_parameters(make, positions, assert_near):
    model, x = make(pos_embed=positions), image()
    # With the patches at nought, tokens are their positions, less the convolution's bias and the class token's own.
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
    expected = model.split_tokens(model.embed(x))[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = model.split_tokens(model.embed(x))[0]
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_a_patch_size_first_met_in_inference_mode_can_be_trained_at_later(make):
    model, x = make(patch_size=16), image()
    with torch.inference_mode():
        model(x, patch_size=2)
    model(x, patch_size=2).sum().backward()
    assert model.patch_embed.proj.weight.grad is not None


# timm's contract, as its own tests of every model have it.


def test_tokens_split_at_the_end_where_the_class_token_stands(make):
    model, x = make(), image()
    tokens = model.forward_features(x)
    patches, others = model.split_tokens(tokens)
    assert (patches.shape, others.shape) == ((2, 16, 64), (2, 1, 64))
    assert torch.equal(others[:, 0], tokens[:, -1] if isinstance(model, Adventurer) else tokens[:, 0])
    assert torch.equal(model(x), model.head(others[:, 0]))
    ((maps, prefix),) = model.forward_intermediates(
        x, 1, return_prefix_tokens=True, norm=True, intermediates_only=True, output_fmt="NLC"
    )
    assert torch.equal(maps, patches)
    assert torch.equal(prefix, others)


def test_every_parameter_gets_a_gradient(make):
    model = make(num_classes=42).train()
    out = model(image())
    out.mean().backward()
    assert out.shape == (2, 42)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_first_layer_and_classifier_are_where_the_config_says(make):
    model = make()
    names = model.state_dict()
    for key in ("first_conv", "classifier"):
        assert f"{model.pretrained_cfg[key]}.weight" in names
    x = image()
    assert model.forward_features(x).shape[-1] == model.num_features
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 17, model.num_features)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize("feature_cls", ["getter", "fx"])
def test_features_only(make, feature_cls):
    features = make(features_only=True, out_indices=(0, 2), feature_cls=feature_cls)
    assert features.feature_info.channels() == [64, 64]
    assert features.feature_info.reduction() == [8, 8]
    shapes = {"getter": (2, 64, 4, 4), "fx": (2, 17, 64)}
    assert [f.shape for f in features(image())] == [shapes[feature_cls]] * 2


@pytest.mark.parametrize("output_dict", [False, True])
def test_intermediates_and_pruning(make, output_dict, assert_near):
    model, x = make(), image()
    whole = model.forward_intermediates(x, output_dict=output_dict, output_fmt="NLC")
    maps = whole["image_intermediates"] if output_dict else whole[1]
    last = whole["image_features"] if output_dict else whole[0]
    assert torch.equal(last, model.forward_features(x))
    assert len(maps) == 3
    assert_near(model.split_tokens(last)[0], model.trunk()[1](maps[-1]), 1e-5)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.trunk()[0]) == 2
    kept = model.forward_intermediates(x, [0, 1], intermediates_only=True, output_fmt="NLC")
    assert all(torch.equal(a, b) for a, b in zip(kept, maps, strict=False))


def test_a_graph_of_the_model_takes_any_batch_and_patch_size(make, assert_near):
    model = make()
    tracer = {"leaf_modules": get_notrace_modules()}
    graph = create_feature_extractor(model, {"head": "logits"}, tracer_kwargs=tracer)
    for batch in (1, 3):
        assert_near(graph(image(batch=batch))["logits"], model(image(batch=batch)), 1e-6)
    assert_near(graph(image(), patch_size=4)["logits"], model(image(), patch_size=4), 1e-5)


@pytest.mark.parametrize("keep_products", [False, True])
def test_checkpointing_gives_equal_gradients(make, keep_products, assert_near):
    model, x = make().train(), image()
    model(x).square().sum().backward()
    expected = {k: p.grad.clone() for k, p in model.named_parameters()}
    ran = []
    model.trunk()[0][1].register_forward_pre_hook(lambda *_: ran.append(1))
    model.set_grad_checkpointing(keep_products=keep_products)
    model.zero_grad()
    model(x).square().sum().backward()
    assert len(ran) == 2
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, expected[name], 1e-6, name)


def test_groups_for_layer_decay_and_weight_decay(make):
    model = make()
    groups = param_groups_layer_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    stem, last = 0.5**4, 1.0
    assert found["pos_embed"] == found["cls_token"] == (stem, 0.0)
    assert found["patch_embed.proj.weight"] == (stem, 0.1)
    assert found["head.weight"] == (last, 0.1)
    blocks = "layers" if isinstance(model, Adventurer) else "blocks"
    scales = {int(n.split(".")[1]): s for n, (s, _) in found.items() if n.startswith(blocks)}
    assert scales == {0: 0.5**3, 1: 0.5**2, 2: 0.5}


def test_any_size_with_dynamic_img_size(make, assert_near):
    dynamic = make(dynamic_img_size=True)
    fixed = make()
    assert torch.equal(dynamic(image()), fixed(image()))
    fixed.set_input_size((48, 24))
    assert_near(dynamic(image(48, 24)), fixed(image(48, 24)), 1e-5)
    with pytest.raises(UserError, match="nearest sizes"):
        dynamic(image(33, 32))


def test_copies_in_half_precision_agree(make, assert_near):
    model, x = make(pos_grid=8), image()
    expected = model(x, patch_size=4)
    assert_near(copy.deepcopy(model).double()(x.double(), patch_size=4), expected, 1e-5)
    assert_near(copy.deepcopy(model).bfloat16()(x.bfloat16(), patch_size=4), expected, 5e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert_near(model(x, patch_size=4), expected, 5e-2)
