"""Where configurations come from, and where the kernels say that they can run."""

import dataclasses
import json

import pytest
import torch

from patchscale import UserError
from patchscale.ops.triton import available, tuning
from patchscale.ops.triton.tuning import Config

KEY = (torch.bfloat16, 64, 64, torch.device("cuda", 0))


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU by name, an empty cache folder and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "_known", {})


def test_available_says_why_not(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "not cpu" in available(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "7.5" in available(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert available(torch.device("cuda")) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available(torch.device("cpu")) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in available(torch.device("cuda"))


def test_without_a_cache_what_is_shipped(gpu):
    assert tuning.config(*KEY) == tuning._SHIPPED[KEY[:3]]
    assert tuning.config(torch.float32, 128, 16, torch.device("cpu")).chunk < 64


def test_tune_keeps_the_fastest_and_is_read_next_time(gpu, monkeypatch):
    def milliseconds(shape, *key):
        c = tuning.config(*key)
        if c.backward_warps == 8:
            raise RuntimeError("out of shared memory")
        return abs(c.chunk - 128) + abs(c.pass_stages - 2)

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    with pytest.warns(UserWarning, match="out of shared memory"):
        best = tuning.tune()
    assert best == dataclasses.replace(tuning._SHIPPED[KEY[:3]], chunk=128, pass_stages=2)
    tuning._known.clear()
    assert tuning.config(*KEY) == best
    assert tuning.default_chunk_size(*KEY) == 128
    assert list(tuning.cache_file().parent.iterdir()) == [tuning.cache_file()]
    assert list(json.loads(tuning.cache_file().read_text())) == ["Some GPU, torch.bfloat16, headdim 64, d_state 64"]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": {"chunk": "64"}}', '{"a": {"chonk": 64}}'])
def test_a_broken_cache_is_not_used(gpu, text):
    tuning.cache_file().parent.mkdir(parents=True)
    tuning.cache_file().write_text(text)
    with pytest.warns(UserWarning, match=r"triton\.json"):
        assert tuning.config(*KEY) == tuning._SHIPPED[KEY[:3]]


def test_tuning_needs_a_gpu():
    with pytest.raises(UserError, match="'cpu'"):
        tuning.tune(device="cpu")


@pytest.mark.parametrize("chunks", [1, 10, 100, 1000])
@pytest.mark.parametrize("heads", [1, 5, 24])
def test_groups_of_heads_leave_no_head_out_and_no_group_empty(chunks, heads):
    groups = tuning.head_groups(chunks, heads)
    each = -(-heads // groups)
    assert 1 <= groups <= heads
    assert (groups - 1) * each < heads <= groups * each


@pytest.mark.parametrize("headdim", [16, 32, 64, 128])
def test_a_block_of_headdim_divides_it(headdim):
    for programs in (1, 24, 1000):
        assert headdim % tuning.headdim_block(Config(), programs, headdim) == 0
