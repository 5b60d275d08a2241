"""Which implementation runs: the argument, else the environment variable, else the default."""

import warnings

import pytest
import torch

from patchscale import UserError
from patchscale.ops import causal_conv1d, dispatch, ssd_scan
from patchscale.ops.dispatch import ENVIRONMENT_VARIABLE, IMPLEMENTATIONS, choose_implementation

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_environment_variable(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def test_the_default_names_the_device():
    choice = choose_implementation(None, CPU)
    assert choice.implementation == "torch"
    assert "cpu" in choice.reason


def test_the_environment_variable_is_read_at_every_call(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    choice = choose_implementation(None, CPU)
    assert choice.implementation == "reference"
    assert ENVIRONMENT_VARIABLE in choice.reason


def test_the_argument_comes_before_the_environment_variable(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert choose_implementation("torch", CPU).implementation == "torch"


def test_an_empty_environment_variable_is_none(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert choose_implementation(None, CPU).implementation == "torch"


@pytest.mark.parametrize("from_environment", [False, True])
def test_unknown_names_say_where_they_came_from(from_environment, monkeypatch):
    if from_environment:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(UserError) as error:
        choose_implementation(None if from_environment else "fast", CPU)
    assert "'fast'" in str(error.value)
    assert (ENVIRONMENT_VARIABLE if from_environment else "caller") in str(error.value)
    assert all(name in str(error.value) for name in IMPLEMENTATIONS)


@pytest.mark.parametrize("chosen_by", ["argument", "environment"])
def test_operators_run_what_was_chosen(chosen_by, monkeypatch):
    ran = []
    for module, name in (("scan", "ssd_scan_reference"), ("conv", "causal_conv1d_reference")):
        original = getattr(__import__("patchscale.ops.reference", fromlist=["x"]), name)
        monkeypatch.setattr(
            f"patchscale.ops.{module}.{name}",
            lambda *arguments, original=original, name=name: (ran.append(name), original(*arguments))[1],
        )
    options = {"implementation": "reference"} if chosen_by == "argument" else {}
    if chosen_by == "environment":
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    x, dt, A, B = torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1), -torch.ones(1), torch.ones(1, 2, 4)
    ssd_scan(x, dt, A, B, B, **options)
    causal_conv1d(x[:, :, 0], torch.ones(3, 4), torch.ones(3), **options)
    assert ran == ["ssd_scan_reference", "causal_conv1d_reference"]
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    ssd_scan(x, dt, A, B, B)
    causal_conv1d(x[:, :, 0], torch.ones(3, 4), torch.ones(3))
    assert len(ran) == 2


@pytest.fixture
def gpu(monkeypatch):
    """A device of which nothing but the name is asked, and what stands in the way of Triton there."""
    obstacle = []
    monkeypatch.setattr("patchscale.ops.triton.available", lambda device: obstacle[0] if obstacle else None)
    dispatch._choose_on_gpu.cache_clear()
    yield torch.device("cuda"), obstacle
    dispatch._choose_on_gpu.cache_clear()


def test_triton_is_the_default_on_a_gpu(gpu):
    assert choose_implementation(None, gpu[0], headdim=64, d_state=64).implementation == "triton"


@pytest.mark.parametrize(
    ("dtype", "sizes", "words"),
    [(torch.float64, {}, "float64"), (torch.float32, {"headdim": 24}, "24"), (torch.float32, {"d_state": 8}, "8")],
)
def test_what_triton_does_not_take_falls_back_aloud_once(gpu, dtype, sizes, words):
    with pytest.warns(UserWarning, match=words):
        choice = choose_implementation(None, gpu[0], dtype, **sizes)
    assert choice.implementation == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_implementation(None, gpu[0], dtype, **sizes) == choice
    with pytest.raises(UserError, match=words):
        choose_implementation("triton", gpu[0], dtype, **sizes)


def test_a_gpu_without_triton_falls_back_aloud(gpu):
    gpu[1].append("Triton is not installed")
    with pytest.warns(UserWarning, match="not installed"):
        assert choose_implementation(None, gpu[0]).implementation == "torch"
    with pytest.raises(UserError, match="not installed"):
        choose_implementation("triton", gpu[0])


def test_triton_asked_for_on_a_cpu_says_why_not(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="NVIDIA GPUs, not cpu"):
        ssd_scan(
            *[torch.zeros(s) for s in ((1, 2, 1, 16), (1, 2, 1), (1,), (1, 2, 16), (1, 2, 16))], implementation="triton"
        )
