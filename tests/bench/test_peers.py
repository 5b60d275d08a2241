import types

import pytest
import torch
import torch.nn.functional as F

from patchscale.bench import peers
from patchscale.bench.cases import Case, ours
from patchscale.bench.cells import comparable_result, relative_error
from patchscale.models.block import Mamba2Mixer
from patchscale.ops.reference import ssd_scan_reference


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("subject", ["scan", "conv", "mixer"])
def test_transformers_computes_the_same(subject, training):
    pytest.importorskip("transformers")
    case = Case(subject, training, tokens=70, batch=2, heads=4, device="cpu", dtype="float32")
    theirs = comparable_result(case, peers.candidate("transformers", case))
    assert relative_error(theirs, comparable_result(case, ours(case))) < 1e-5


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


def test_nan_is_a_disagreement():
    nan = relative_error([torch.tensor([1.0, float("nan")])], [torch.ones(2)])
    assert not nan <= 1.0
