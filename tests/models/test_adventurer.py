"""The model against timm's contract."""

import copy
import io
import math
import pickle

import pytest
import timm
import torch
from timm.layers import create_feature_extractor
from timm.models import get_notrace_modules
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_feature_extractor

from patchscale import UserError, convert, create_from_checkpoint, read_checkpoint
from patchscale.models import Adventurer
from patchscale.models.published import SIZES
from patchscale.models.tokens import sincos_positions


def small(**kwargs) -> Adventurer:
    """A tiny registered model; parameters moved off their initial values, so that all of them matter."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_classes": 10}
    torch.manual_seed(0)
    model = timm.create_model("adventurer_tiny_patch8_224", **sizes | kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def image(height: int = 32, width: int = 32, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))


def test_forward_is_features_then_head():
    model, x = small(), image()
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 17, 64)
    assert torch.equal(model(x), model.forward_head(tokens))
    assert torch.equal(model(x), model.head(tokens[:, -1]))
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, -1])


def test_samples_of_a_batch_do_not_mix(assert_near):
    model, x = small().double(), image(batch=3).double()
    assert_near(model(x), torch.cat([model(sample[None]) for sample in x]), 1e-12)


@pytest.mark.parametrize("pool", ["token", "avg", ""])
def test_pooling(pool, assert_near):
    model, x = small(global_pool=pool), image()
    tokens = model.forward_features(x)
    expected = {"token": tokens[:, -1], "avg": tokens[:, :16].mean(1), "": tokens}[pool]
    assert_near(model.forward_head(tokens, pre_logits=True), expected, 1e-6)
    assert_near(model(x), model.head(expected), 1e-6)


def test_no_classes_gives_features():
    model, x = small(num_classes=0), image()
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, model.num_features)
    assert torch.equal(model(x), model.forward_features(x)[:, -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reset_classifier(dtype):
    model, x = small().to(dtype), image().to(dtype)
    features = model.forward_features(x)
    old_head = model.get_classifier()
    model.reset_classifier(7, "avg")
    assert model.get_classifier() is not old_head
    assert (model.num_classes, model.global_pool, model(x).shape) == (7, "avg", (2, 7))
    assert torch.equal(model.forward_features(x), features)
    model.reset_classifier(0)
    assert model.global_pool == "avg"
    assert torch.equal(model(x), features[:, :-1].mean(1))
    model.reset_classifier(3, "")
    assert model(x).shape == (2, 17, 3)
    with pytest.raises(UserError, match="'max'"):
        model.reset_classifier(3, "max")
    assert model.num_classes == 3


def test_dropout_before_the_head():
    torch.manual_seed(0)
    model, x = small(drop_rate=0.5), image()
    tokens = model.forward_features(x)
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, -1])
    dropped = model.train().forward_head(tokens, pre_logits=True)
    assert 10 < (dropped == 0).sum() < 118
    kept = dropped != 0
    assert torch.allclose(dropped[kept], 2 * tokens[:, -1][kept])


@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("norm", [False, True])
def test_intermediates_are_the_blocks_outputs(norm, output_fmt, assert_near, hidden_states):
    model, x = small(img_size=(32, 48)), image(32, 48)
    states = hidden_states(model, x)
    final, intermediates = model.forward_intermediates(x, norm=norm, output_fmt=output_fmt)
    assert torch.equal(final, model.forward_features(x))
    assert len(intermediates) == 3
    for i, actual in enumerate(intermediates):
        expected = model.norm_f(states[f"hidden.{i}"]) if norm else states[f"hidden.{i}"]
        expected = expected[:, :-1]
        if output_fmt == "NCHW":
            expected = torch.stack(
                [torch.stack([expected[:, 6 * row + column] for column in range(6)], -1) for row in range(4)], -2
            )
        assert_near(actual, expected, 1e-6, f"block {i}")


@pytest.mark.parametrize(
    ("indices", "blocks"), [(None, [0, 1, 2]), (1, [2]), (2, [1, 2]), ([0, 2], [0, 2]), ([-3], [0])]
)
def test_intermediates_by_index(indices, blocks):
    model, x = small(), image()
    every = model.forward_intermediates(x, intermediates_only=True)
    chosen = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    assert len(chosen) == len(blocks)
    assert all(torch.equal(c, every[i]) for c, i in zip(chosen, blocks, strict=True))


def test_intermediates_with_class_tokens_and_as_a_dict(hidden_states):
    model, x = small(), image()
    states = hidden_states(model, x)
    pairs = model.forward_intermediates(x, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC")
    for i, (patches, class_token) in enumerate(pairs):
        assert torch.equal(torch.cat([patches, class_token], dim=1), states[f"hidden.{i}"])
    result = model.forward_intermediates(x, return_prefix_tokens=True, output_dict=True, output_fmt="NLC")
    assert set(result) == {"image_features", "image_intermediates", "image_intermediates_prefix"}
    assert torch.equal(result["image_features"], model.forward_features(x))
    for i, (patches, class_token) in enumerate(pairs):
        assert torch.equal(result["image_intermediates"][i], patches)
        assert torch.equal(result["image_intermediates_prefix"][i], class_token)
    only = model.forward_intermediates(x, output_dict=True, intermediates_only=True)
    assert set(only) == {"image_intermediates"}


def test_stop_early_runs_no_further_block():
    model, x = small(), image()
    ran = []
    for i, block in enumerate(model.layers):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    full = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert ran == [0, 1, 2]
    ran.clear()
    early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert ran == [0, 1]
    assert torch.equal(early[0], full[0])


@pytest.mark.parametrize(("positions", "patch_size"), [("none", 8), ("sincos", 8), ("sincos", 4)])
def test_positions_not_learned_are_a_table_of_their_values(positions, patch_size, assert_near):
    model, learned = small(pos_embed=positions), small()
    assert "pos_embed" not in model.state_dict()
    learned.load_state_dict(model.state_dict(), strict=False)
    for each in (model, learned):
        each.set_input_size(patch_size=patch_size)
    rows = 32 // patch_size
    table = torch.zeros(1, rows * rows + 1, 64)
    if positions == "sincos":
        table[:, :-1] = sincos_positions((rows, rows), 64, reference=(4, 4))
    learned.pos_embed.data = table
    assert_near(model(image()), learned(image()), 1e-5)


@pytest.mark.parametrize("positions", ["sincos", "none"])
def test_positions_not_learned_survive_conversion_and_timms_loader(positions, tmp_path, assert_near):
    model = small(pos_embed=positions)
    expected = model(image())
    content = {"model": model.state_dict(), "model_name": "adventurer_tiny_patch8_224", "model_args": model._model_args}
    torch.save(content, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "out")
    assert_near(create_from_checkpoint(read_checkpoint(tmp_path / "out")).eval()(image()), expected, 1e-6)
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert_near(by_timm(image()), expected, 1e-6)


def test_unknown_output_format_is_refused():
    with pytest.raises(UserError, match="'NHWC'"):
        small().forward_intermediates(image(), output_fmt="NHWC")


def test_intermediate_layers_as_dino_asks_for_them():
    model, x = small(), image()
    nlc = model.get_intermediate_layers(x, n=2, norm=True)
    expected = model.forward_intermediates(x, indices=2, norm=True, output_fmt="NLC", intermediates_only=True)
    assert all(torch.equal(a, e) for a, e in zip(nlc, expected, strict=True))
    ((patches, class_token),) = model.get_intermediate_layers(x, n=(0,), reshape=True, return_prefix_tokens=True)
    assert patches.shape == (2, 64, 4, 4)
    assert class_token.shape == (2, 1, 64)


def test_features_only_gives_maps(assert_near):
    x = image(32, 48)
    features = small(img_size=(32, 48), features_only=True, out_indices=(0, 2))
    assert features.feature_info.channels() == [64, 64]
    assert features.feature_info.reduction() == [8, 8]
    assert features.feature_info.module_name() == ["layers.0", "layers.2"]
    maps = features(x)
    assert [m.shape for m in maps] == [(2, 64, 4, 6)] * 2
    whole = small(img_size=(32, 48))
    whole.load_state_dict(features.model.state_dict(), strict=False)
    expected = whole.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    for actual, wanted in zip(maps, expected, strict=True):
        assert_near(actual, wanted, 1e-6)


def test_prune_intermediate_layers_keeps_what_is_asked_for():
    model, x = small(), image()
    expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert len(model.layers) == 2
    assert isinstance(model.head, nn.Identity)
    actual = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("extractor", "options"),
    [
        (create_feature_extractor, {}),
        (torchvision_feature_extractor, {"tracer_kwargs": {"leaf_modules": get_notrace_modules()}}),
    ],
)
def test_feature_extraction_by_graph(extractor, options, assert_near, hidden_states):
    model, x = small(), image()
    traced = extractor(model, {"layers.1": "middle", "head": "logits"}, **options)
    out = traced(x)
    assert_near(out["middle"], hidden_states(model, x)["hidden.1"], 1e-6)
    assert_near(out["logits"], model(x), 1e-6)
    # Nothing of the first image is baked into the graph.
    assert_near(traced(x[:1] * 2)["logits"], model(x[:1] * 2), 1e-6)


def test_graph_features_of_timm(assert_near):
    features = small(features_only=True, feature_cls="fx", out_indices=(1,))
    (tokens,) = features(image())
    assert tokens.shape == (2, 17, 64)


def gradients(model: Adventurer, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {k: p.grad.clone() for k, p in model.named_parameters()}


def test_checkpointing_recomputes_and_gives_equal_gradients(assert_near):
    model, x = small().train(), image()
    expected = gradients(model, x)
    ran = []
    # Before, not after: the recomputation stops as soon as it has what the backward needs.
    model.layers[1].register_forward_pre_hook(lambda *_: ran.append(1))
    gradients(model, x)
    assert len(ran) == 1
    model.set_grad_checkpointing()
    actual = gradients(model, x)
    assert len(ran) == 3
    for name, value in expected.items():
        assert_near(actual[name], value, 1e-6, name)
    loss = model.forward_intermediates(x, intermediates_only=True)[-1].sum()
    loss.backward()
    assert len(ran) == 5
    model.set_grad_checkpointing(False)
    gradients(model, x)
    assert len(ran) == 6


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_that_keeps_products_repeats_none_of_them(autocast, assert_near):
    model, x = small().train(), image()

    def run():
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(x).square().sum()
            loss.backward()
        counts = counter.get_flop_counts()["Global"]
        linear = {k: v for k, v in counts.items() if "mm" in str(k) or "linear" in str(k)}
        return sum(linear.values()), {k: p.grad.clone() for k, p in model.named_parameters()}

    products, expected = run()
    model.set_grad_checkpointing()
    assert run()[0] > products
    model.set_grad_checkpointing(keep_products=True)
    again, actual = run()
    assert again == products
    for name, value in expected.items():
        assert_near(actual[name], value, 1e-6, name)


@pytest.mark.parametrize(("img_size", "patch_size"), [((24, 40), None), (None, 4), (64, 16), ((16, 48), (8, 4))])
def test_set_input_size(img_size, patch_size, assert_near):
    model = small()
    model.pos_embed.requires_grad_(False)
    old = {k: v.clone() for k, v in model.state_dict().items()}
    model.set_input_size(img_size, patch_size)
    height, width = (32, 32) if img_size is None else (img_size, img_size) if isinstance(img_size, int) else img_size
    rows_columns = model.patch_embed.grid_size
    patch = model.patch_embed.patch_size
    assert (rows_columns[0] * patch[0], rows_columns[1] * patch[1]) == (height, width)
    assert model(image(height, width)).shape == (2, 10)
    assert model.forward_intermediates(image(height, width))[1][0].shape == (2, 64, *rows_columns)
    assert model.feature_info[0]["reduction"] == max(patch)
    assert not model.pos_embed.requires_grad
    expected = Adventurer((height, width), patch, embed_dim=64, depth=3, num_classes=10)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}
    for name, value in model.state_dict().items():
        if name not in ("pos_embed", "patch_embed.proj.weight"):
            assert torch.equal(value, old[name]), name
    assert torch.equal(model.pos_embed[:, -1], old["pos_embed"][:, -1])


def test_set_input_size_to_the_same_size_changes_nothing():
    model, x = small(), image()
    before = model(x)
    model.set_input_size(32, 8)
    assert torch.equal(model(x), before)


def test_set_input_size_that_does_not_fit_changes_nothing():
    model, x = small(), image()
    before = model(x)
    with pytest.raises(UserError, match="32x32 or 40x40"):
        model.set_input_size(36)
    assert torch.equal(model(x), before)


def test_any_size_with_dynamic_img_size(assert_near):
    dynamic, x = small(dynamic_img_size=True), image(48, 24)
    fixed = small()
    fixed.load_state_dict(dynamic.state_dict())
    assert torch.equal(dynamic(image()), fixed(image()))
    fixed.set_input_size((48, 24))
    assert_near(dynamic(x), fixed(x), 1e-5)
    assert dynamic.forward_intermediates(x)[1][0].shape == (2, 64, 6, 3)
    dynamic(x).sum().backward()
    assert dynamic.pos_embed.grad.abs().sum() > 0
    with pytest.raises(UserError, match="nearest sizes"):
        dynamic(image(33, 32))


def test_images_of_another_size_are_refused_without_it():
    with pytest.raises(UserError, match=r"40x40.*32x32"):
        small()(image(40, 40))


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_image_channels(in_chans):
    model = small(in_chans=in_chans)
    assert model(image(channels=in_chans)).shape == (2, 10)
    with pytest.raises(UserError, match="3 channels"):
        model(image())


@pytest.mark.parametrize(("img_size", "patch_size"), [((16, 40), 8), (32, (4, 8)), ((24, 10), (12, 2)), (8, 1)])
def test_images_and_patches_that_are_not_square(img_size, patch_size):
    model = small(img_size=img_size, patch_size=patch_size)
    x = image(*model.patch_embed.img_size)
    assert model.forward_features(x).shape == (2, math.prod(model.patch_embed.grid_size) + 1, 64)
    assert all(g.abs().sum() > 0 for g in gradients(model, x).values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"img_size": 30, "patch_size": 8}, ["30x30", "8x8", "24x24", "32x32"]),
        ({"img_size": 4, "patch_size": 8}, ["4x4", "8x8"]),
        ({"embed_dim": 100}, ["100", "multiple of 32"]),
        ({"embed_dim": 0}, ["embed_dim is 0"]),
        ({"depth": 0}, ["depth is 0"]),
        ({"in_chans": 0}, ["in_chans is 0"]),
        ({"d_state": 0}, ["d_state is 0"]),
        ({"headdim": 0}, ["headdim is 0"]),
        ({"expand": 0}, ["expand is 0"]),
        ({"drop_path_rate": -1}, ["drop_path_rate is -1", "0 to 1"]),
        ({"drop_path_rate": 2}, ["drop_path_rate is 2", "0 to 1"]),
        ({"drop_rate": 2}, ["drop_rate is 2", "0 to 1"]),
        ({"pos_grid": (4,)}, ["pos_grid is (4,)", "1 row and 1 column"]),
        ({"flip": "odd"}, ["'odd'", "'alternate'", "'pairs'", "'released'"]),
        ({"global_pool": "max"}, ["'max'", "'token'", "'avg'"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(UserError) as error:
        small(**arguments)
    assert all(word in str(error.value) for word in words)


def test_export(assert_near):
    model, x = small(), image()
    program = torch.export.export(model, (x,))
    assert_near(program.module()(x), model(x), 1e-6)
    names = {str(node.target) for node in program.graph.nodes}
    assert "patchscale.mix_tokens.default" in names


def test_export_for_any_batch(assert_near):
    model, x = small(), image(batch=3)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    assert_near(program.module()(image(batch=5)), model(image(batch=5)), 1e-6)


def test_compiled_without_a_graph_break(assert_near):
    model, x = small().train(), image()
    expected, logits = gradients(model, x), model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    out = compiled(x)
    assert_near(out, logits, 1e-5)
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, expected[name], 1e-4, name)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stand_alone(copied):
    model, x = small(drop_path_rate=0.1), image()
    before = model(x)
    twin = copied(model)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(x), before)


def test_state_dict_round_trip():
    model, other, x = small(), Adventurer(32, 8, embed_dim=64, depth=3, num_classes=10).eval(), image()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), model(x))


def test_bfloat16_autocast_keeps_the_stream_in_float32(assert_near, hidden_states):
    model, x = small(), image()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        states = hidden_states(model, x)
    logits = states.pop("out.logits")
    assert {s.dtype for s in states.values()} == {torch.float32}
    assert logits.dtype == torch.bfloat16
    assert_near(logits, expected, 3e-2)  # bfloat16 keeps 3 digits at each of three blocks
    logits.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_whole_model_in_another_precision(dtype, assert_near):
    model, x = small(), image()
    expected = copy.deepcopy(model).double()(x.double())
    out = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert_near(out, expected, 5e-2 if dtype == torch.bfloat16 else 1e-12)


def test_initial_values_are_the_published_ones():
    """As measured on a freshly built published model."""
    torch.manual_seed(0)
    model = timm.create_model("adventurer_tiny_patch16_224", depth=4)
    weights = model.state_dict()
    assert weights["patch_embed.proj.weight"].std().item() == pytest.approx(1.137 / math.sqrt(768), rel=0.02)
    for name in ("pos_embed", "cls_token", "head.weight"):
        assert weights[name].std().item() == pytest.approx(0.02, rel=0.15), name
        assert abs(weights[name].mean().item()) < 0.004, name
    uniform = {"in_proj.weight": 256, "w1.weight": 256, "w2.weight": 256, "w3.weight": 640, "out_proj.weight": 512}
    for name, value in weights.items():
        if name.endswith(("proj.bias", "head.bias", "w1.bias", "w2.bias", "w3.bias")):
            assert not value.any(), name
        if name.endswith(("norm.weight", "norm_mlp.weight", "norm_f.weight", "mixer.D")):
            assert (value == 1).all(), name
        for ending, fan_in in uniform.items():
            if name.endswith(ending) and name.startswith("layers"):
                bound = 1 / math.sqrt(fan_in) / (math.sqrt(4) if ending == "out_proj.weight" else 1)
                assert value.abs().max() <= bound * 1.0001, name
                assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), name


def test_init_weights_draws_a_model_made_without_memory():
    with torch.device("meta"):
        model = timm.create_model("adventurer_tiny_patch16_224", embed_dim=64, depth=3)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    torch.manual_seed(0)
    model.init_weights(needs_reset=True)
    assert all(p.isfinite().all() for p in model.parameters())
    bound = 1 / math.sqrt(128 * 3)
    out_proj = model.layers[1].mixer.out_proj.weight
    assert out_proj.abs().max() <= bound * 1.0001
    assert out_proj.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert (model.layers[0].norm.weight == 1).all()


def test_training_with_drop_path_and_dropout_reaches_every_parameter():
    torch.manual_seed(0)
    model = small(drop_path_rate=0.3, drop_rate=0.1).train()
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients(model, image(batch=16)).values())


def test_data_config_is_the_evaluations():
    with torch.device("meta"):
        config = timm.data.resolve_model_data_config(timm.create_model("adventurer_base_patch16_224"))
    assert config["input_size"] == (3, 224, 224)
    assert config["crop_pct"] == 0.875
    assert config["interpolation"] == "bicubic"
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["std"] == (0.229, 0.224, 0.225)


def test_the_name_without_a_size_is_the_224_model():
    with torch.device("meta"):
        plain, sized = (timm.create_model(f"adventurer_small_patch16{s}") for s in ("", "_224"))
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in sized.state_dict().items()}
    assert plain.pretrained_cfg["hf_hub_filename"] == sized.pretrained_cfg["hf_hub_filename"]


@pytest.mark.parametrize("size", SIZES)
def test_every_name_makes_a_model_of_its_sizes(size):
    names = timm.list_models(f"adventurer_{size}_*", module="adventurer")
    assert len(names) == 6 * (5 + 1)  # patch sizes; image sizes, or none
    for name in names:
        _, _, patch, *image_size = name.split("_")
        short = {} if name.endswith("_224") else {"depth": 1}
        with torch.device("meta"):
            model = timm.create_model(name, **short)
        assert model.patch_embed.patch_size == (int(patch.removeprefix("patch")),) * 2
        assert model.patch_embed.img_size == (int(image_size[0]) if image_size else 224,) * 2
        assert {"embed_dim": model.embed_dim, "depth": len(model.layers)} == SIZES[size] | short


def test_every_name_is_of_a_known_size():
    assert len(timm.list_models(module="adventurer")) == 36 * len(SIZES)
