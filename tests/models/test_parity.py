"""The model against what the published code computed: every activation, gradient, name, order and group."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from patchscale import UserError
from patchscale.models import Adventurer
from patchscale.models.adventurer import FLIP_RULES

FIXTURES = ("p1_d64_L5_p4_i16", "p2_d128_L6_p1_i8", "p3_d64_L9_p16_i64", "p4_d64_L4_p1_i24")


@pytest.fixture(params=FIXTURES)
def fixture(request, parity) -> str:
    parity(f"{request.param}.io.safetensors")
    return request.param


def published_model(name: str, parity, flip: str = "released") -> Adventurer:
    """The fixture's model with its weights."""
    path = parity(f"{name}.weights.safetensors")
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    sizes = {k: config[k] for k in ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth")}
    model = Adventurer(**sizes, flip=flip).eval()
    model.load_state_dict(load_file(path))
    return model


def test_float32_activations_are_the_published_ones(fixture, parity, assert_near, hidden_states):
    model, data = published_model(fixture, parity), load_file(parity(f"{fixture}.io.safetensors"))
    with torch.no_grad():
        states = hidden_states(model, data["input.image"])
    assert len(states) == len(model.layers) + 3
    for name, value in states.items():
        assert_near(value, data[name], 1e-4, name)
    assert_near(states["out.logits"], data["out.logits_f64"], 1e-4, "logits in float64")


def test_float32_gradients_are_the_published_ones(fixture, parity, assert_near):
    model, data = published_model(fixture, parity), load_file(parity(f"{fixture}.io.safetensors"))
    F.cross_entropy(model(data["input.image"]), data["input.labels"]).backward()
    wanted = {k.removeprefix("grad."): v for k, v in data.items() if k.startswith("grad.")}
    assert len(wanted) > 20
    for name, value in wanted.items():
        # The gradient of dt_bias in p3 is itself 3e-4 off in float32: cancellation.
        assert_near(model.get_parameter(name).grad, value, 2e-3, name)


def test_float64_logits_and_gradients_are_the_published_ones(fixture, parity, assert_near):
    model, data = published_model(fixture, parity).double(), load_file(parity(f"{fixture}.io.safetensors"))
    tokens = model.forward_features(data["input.image"].double())
    logits = model.forward_head(tokens)
    loss = F.cross_entropy(logits, data["input.labels"])
    loss.backward()
    assert_near(logits, data["out.logits_f64"], 1e-9, "logits")
    assert_near(tokens[:, -1], data["out.features_f64"], 1e-9, "features")
    assert_near(loss, data["out.loss_f64"].squeeze(), 1e-9, "loss")
    gradients = {k: p.grad for k, p in model.named_parameters()}
    for name, value in data.items():
        if name.startswith("grad_f64."):
            assert_near(gradients[name.removeprefix("grad_f64.")], value, 1e-8, name)
    norms = json.loads(parity("manifest.json").read_text())[fixture]["grad_l2_f64"]
    assert norms.keys() == gradients.keys()
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-8), name


@pytest.mark.parametrize(
    ("flip", "rule"), [("released", "official_n//2==1"), ("pairs", "pairs_(n//2)%2==1"), ("alternate", "odd_n%2==1")]
)
def test_flip_rules(fixture, flip, rule, parity, assert_near):
    wanted = json.loads(parity("flip_rules_logits.json").read_text())["logits"][fixture]
    model = published_model(fixture, parity, flip).double()
    image = load_file(parity(f"{fixture}.io.safetensors"))["input.image"].double()
    with torch.no_grad():
        assert_near(model(image), torch.tensor(wanted[rule], dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("flip", FLIP_RULES)
def test_set_flip_is_creating_with_that_rule(flip, parity):
    fixture = "p3_d64_L9_p16_i64"
    image = load_file(parity(f"{fixture}.io.safetensors"))["input.image"]
    created = published_model(fixture, parity, flip)
    changed = published_model(fixture, parity, "alternate" if flip == "released" else "released")
    assert not torch.equal(changed(image), created(image))
    changed.set_flip(flip)
    assert changed.flip == flip
    assert torch.equal(changed(image), created(image))
    with pytest.raises(UserError, match="'odd'"):
        changed.set_flip("odd")


def test_flip_rules_differ_in_a_deep_model():
    order = {rule: [n for n in range(9) if flips(n)] for rule, flips in FLIP_RULES.items()}
    assert order == {"released": [2, 3], "pairs": [2, 3, 6, 7], "alternate": [1, 3, 5, 7]}


def state_dict_entries() -> list[dict]:
    with torch.device("meta"):
        state = timm.create_model("adventurer_tiny_patch16_224").state_dict()
    return [{"key": k, "shape": list(v.shape), "dtype": str(v.dtype)} for k, v in state.items()]


def test_state_dict_has_the_published_keys_and_shapes(parity):
    wanted = json.loads(parity("tiny_patch16_224_state_dict.json").read_text())["entries"]
    assert sorted(state_dict_entries(), key=lambda e: e["key"]) == sorted(wanted, key=lambda e: e["key"])


# Saved optimiser states number the parameters in this order.
def test_state_dict_has_the_published_order(parity):
    wanted = json.loads(parity("tiny_patch16_224_state_dict.json").read_text())["entries"]
    assert state_dict_entries() == wanted


@pytest.mark.parametrize("depth", [12, 24])
@pytest.mark.parametrize("rate", [0.1, 0.2, 0.4, 0.6])
def test_drop_path_rates(depth, rate, parity):
    rates = json.loads(parity("drop_path.json").read_text())
    model = Adventurer(16, 4, embed_dim=32, depth=depth, drop_path_rate=rate)
    own = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.layers]
    assert own == pytest.approx(rates[f"depth{depth}_rate{rate}"][:depth])


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_parameter_groups_are_the_published_ones(layer_decay, parity):
    wanted = json.loads(parity("param_groups_tiny.json").read_text())[f"layer_decay_{layer_decay}"]
    with torch.device("meta"):
        model = timm.create_model("adventurer_tiny_patch16_224")
    names = {id(p): k for k, p in model.named_parameters()}
    groups = param_groups_layer_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=layer_decay
    )
    own = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    published = {name: (g["lr_scale"], g["weight_decay"]) for g in wanted for name in g["params"]}
    assert own.keys() == published.keys() == set(names.values())
    for name, value in published.items():
        assert own[name] == pytest.approx(value), name


def test_weight_decay_skips_the_published_parameters(parity):
    wanted = json.loads(parity("param_groups_tiny.json").read_text())["layer_decay_1.0"]
    with torch.device("meta"):
        model = timm.create_model("adventurer_tiny_patch16_224")
    names = {id(p): k for k, p in model.named_parameters()}
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    skipped = {names[id(p)] for g in groups for p in g["params"] if g["weight_decay"] == 0}
    assert skipped == {name for g in wanted for name in g["params"] if g["weight_decay"] == 0}
