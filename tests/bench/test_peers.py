import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from patchscale.bench import peers
from patchscale.bench.cases import Case, ours
from patchscale.bench.cells import comparable_result, relative_error
from patchscale.bench.measure import Failed
from patchscale.models.block import Block, Mamba2Mixer
from patchscale.ops import linear, native
from patchscale.ops.native import calls
from patchscale.ops.reference import ssd_scan_reference


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("subject", ["scan", "conv", "mixer"])
def test_transformers_computes_the_same(subject, training):
    pytest.importorskip("transformers")
    case = Case(subject, training, tokens=70, batch=2, heads=4, device="cpu", dtype="float32")
    theirs = comparable_result(case, peers.candidate("transformers", case))
    assert relative_error(theirs, comparable_result(case, ours(case))) < 1e-5


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("subject", ["scan", "mixer", "block"])
def test_native_computes_the_same_in_its_kernels(subject, training, monkeypatch):
    if obstacle := native.available(torch.device("cpu")):
        pytest.skip(obstacle)
    monkeypatch.delenv("PATCHSCALE_OPS", raising=False)
    ran = []
    run = calls.run
    monkeypatch.setattr(calls, "run", lambda *args: (ran.append(1), run(*args)))
    case = Case(subject, training, tokens=70, batch=2, heads=4, device="cpu", dtype="float32")
    found = comparable_result(case, peers.candidate("native", case))
    assert len(ran) == 1 + training
    assert relative_error(found, comparable_result(case, ours(case))) < 1e-5
    assert len(ran) == 1 + training  # ours is plain again


def test_native_is_not_measured_where_it_cannot_run():
    case = Case("scan", True, tokens=70, batch=2, heads=4, device="cpu", dtype="bfloat16")
    with pytest.raises(Failed, match="float32 here, not bfloat16"):
        peers.candidate("native", case)
    with pytest.raises(Failed, match="recomputed"):
        peers.candidate("native", replace(case, subject="model", checkpointing=True))


@pytest.mark.skipif(not linear.PRODUCTS, reason="this PyTorch has no oneDNN")
def test_default_linear_is_this_project_without_onednn(monkeypatch):
    for where in (linear, peers):
        monkeypatch.setattr(where, "mkl_is_slow", lambda: True)
    case = Case("block", True, tokens=70, batch=2, heads=4, device="cpu", dtype="float32")

    def measured(candidate):
        with FlopCounterMode(display=False) as counter:
            result = comparable_result(case, candidate)
        return result, any("mkldnn" in str(operator) for operator in counter.get_flop_counts()["Global"])

    found, found_in_onednn = measured(peers.candidate("default-linear", case))
    expected, expected_in_onednn = measured(ours(case))
    assert relative_error(found, expected) < 1e-5
    assert (found_in_onednn, expected_in_onednn) == (False, True)


def test_default_linear_is_left_out_where_it_is_ours(monkeypatch):
    monkeypatch.setattr(peers, "mkl_is_slow", lambda: False)
    case = Case("block", True, tokens=70, batch=2, heads=4, device="cpu", dtype="float32")
    with pytest.raises(Failed, match="takes here"):
        peers.candidate("default-linear", case)


def _kernels():
    """mamba-ssm's functions by their definitions: its own run on a GPU alone."""

    def scan(x, dt, A, B, C, chunk_size, D, dt_bias, dt_softplus):
        assert dt_softplus
        return ssd_scan_reference(x, F.softplus(dt + dt_bias), A, B[:, :, 0], C[:, :, 0], D)[0]

    def norm(x, weight, bias, z, eps, norm_before_gate):
        assert not norm_before_gate
        return F.rms_norm(x * F.silu(z), weight.shape, weight, eps)

    return types.SimpleNamespace(mamba_chunk_scan_combined=scan, rmsnorm_fn=norm)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_published_order_is_the_same_function(reverse, monkeypatch):
    monkeypatch.setattr(peers, "_mamba_ssm", _kernels)
    mixer = Mamba2Mixer(64, reverse=reverse)
    u = torch.randn(2, 18, 64)
    with torch.no_grad():
        torch.testing.assert_close(peers.PublishedOrder(mixer)(u), mixer(u), rtol=1e-4, atol=1e-5)


def test_gpu_peers_are_missing_on_a_cpu_and_others_where_not_installed(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert "GPU" in peers.missing("mamba-ssm", cpu)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert "fla is not installed (pip install fla-core)" in peers.missing("fla", cuda)


def test_float8_takes_the_layers_that_the_hardware_can():
    pytest.importorskip("torchao")
    block = Block(256, 64, 64, 2, False, 0.0)
    peers.to_float8(block)
    assert {name for name, m in block.named_modules() if type(m).__name__ == "Float8Linear"} == {
        "mixer.out_proj",
        "mlp.w1",
        "mlp.w2",
        "mlp.w3",
    }  # fmt: skip; in_proj is 1,160 wide


@pytest.mark.parametrize("name", ["graphed", "float8"])
def test_other_forms_for_a_gpu_alone_are_not_measured_on_a_cpu(name):
    assert name not in peers.DEFAULT_PEERS
    assert "GPU" in peers.missing(name, torch.device("cpu"))


def test_nan_is_a_disagreement():
    nan = relative_error([torch.tensor([1.0, float("nan")])], [torch.ones(2)])
    assert not nan <= 1.0
