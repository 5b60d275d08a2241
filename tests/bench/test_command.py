import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from patchscale.bench import cells, peers
from patchscale.bench.__main__ import main
from patchscale.bench.cases import ours
from patchscale.bench.command import Options, bench
from patchscale.bench.report import display, percentile, slope
from patchscale.errors import UserError


@pytest.fixture
def peer(monkeypatch):
    """Puts a peer in, by what it makes of a case."""

    def put(makes, name="other", **change):
        made = peers.Peer("torch", "pip install torch", False, dict.fromkeys(("scan", "mixer"), makes), "its remark")
        monkeypatch.setitem(peers.PEERS, name, made._replace(**change))

    return put


def test_the_report_holds_what_was_asked(tiny, peer):
    peer(ours)
    _, found, printed = tiny("ops", peers="other", tokens="16,64", heads="2", batch="2")
    cells = found["cells"]
    assert {(c["case"]["subject"], c["case"]["training"], c["case"]["tokens"], c["name"]) for c in cells} == {
        (subject, training, tokens, name)
        for subject in ("scan", "conv")
        for training in (False, True)
        for tokens in (16, 64)
        for name in (("patchscale", "other") if subject == "scan" else ("patchscale",))
    }
    for cell in cells:
        assert cell["error"] is None
        assert len(cell["seconds"]) == len(cell["ratios"]) >= 2
        assert cell["spread"][0] <= cell["median"] <= cell["spread"][1]
    scan = next(c for c in cells if c["case"]["subject"] == "scan" and c["case"]["tokens"] == 64)
    # The ceilings of these tests are 1e9: 2 samples of 64 tokens, 2 heads.
    assert scan["flops"] == 2 * 64 * (8192 + 2 * 24576)
    assert scan["share_of_peak"] == pytest.approx(scan["flops"] / scan["median"] / 1e9)
    assert scan["share_of_bandwidth"] == pytest.approx(scan["moved"] / scan["median"] / 1e9)
    theirs = next(c for c in cells if c["name"] == "other")
    assert theirs["agreement"] == 0.0
    assert theirs["ratios"][0] == pytest.approx(theirs["seconds"][0] / cells[0]["seconds"][0])

    assert {row["name"] for row in found["growth"]} == {"patchscale", "other"}
    machine = found["machine"]
    assert machine["threads"] == 1
    assert machine["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"processor", "cores", "commit", "date", "command", "load_average"} <= set(machine)
    assert found["options"]["tokens"] == "16,64"
    series = "scan, 2 heads, fresh decay, forward + backward"
    for words in (series, "other", "16", "GFLOP/s", "its remark", "keeps freed memory"):
        assert words in printed


def test_the_picture_is_written(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    tiny("ops", peers="none", tokens="16,64", heads="2")
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")


def test_whole_models_and_training_steps(tiny):
    _, found, printed = tiny("train", peers="vit", model="adventurer_tiny_patch32_64", repeats=1)
    rows = {(c["name"], c["case"]["checkpointing"]): c for c in found["cells"]}
    assert set(rows) == {(name, c) for name in ("patchscale", "vit") for c in (False, True)}
    assert all(c["error"] is None for c in found["cells"])
    assert rows["vit", True]["flops"] == rows["vit", False]["flops"] != rows["patchscale", False]["flops"]
    assert "step, adventurer_tiny_64, training step, checkpointed" in printed
    _, found, _ = tiny("model", peers="none", model="adventurer_tiny_patch32_64", repeats=1)
    assert [c["case"]["training"] for c in found["cells"]] == [False, True]
    assert [c["case"]["checkpointing"] for c in found["cells"]] == [False, True]


def test_absent_peers_are_left_out_with_a_line(tiny):
    _, found, printed = tiny("ops", peers="fla,vit,mamba-ssm", tokens="16", heads="2")
    assert {c["name"] for c in found["cells"]} == {"patchscale"}
    assert "without fla: runs on an NVIDIA GPU alone" in printed
    assert "without vit: it has nothing to set beside conv, scan" in printed


def test_a_peer_that_is_not_installed_is_left_out_with_a_line(tiny, peer):
    peer(ours, module="no_such_module", install="pip install nothing")
    _, found, printed = tiny("ops", peers="other", tokens="16", heads="2")
    assert {c["name"] for c in found["cells"]} == {"patchscale"}
    assert "without other: no_such_module is not installed (pip install nothing)" in printed


def test_a_peer_that_disagrees_is_refused(tiny, peer):
    def scaled(case):
        made = ours(case)
        return made._replace(comparable=lambda *inputs: 1.01 * made.function(*inputs))

    peer(scaled)
    _, found, printed = tiny("model", peers="other", tokens="16", width="64")
    theirs = [c for c in found["cells"] if c["name"] == "other"]
    assert theirs
    for cell in theirs:
        assert cell["seconds"] == []
        assert cell["agreement"] == pytest.approx(0.01, rel=0.01)
        assert cell["error"] == "disagrees with patchscale: relative error 1.0e-02"
    assert "other, mixer, width 64, forward, 16 tokens: disagrees" in printed
    assert all(c["seconds"] for c in found["cells"] if c["name"] == "patchscale")


def test_another_function_is_not_compared(tiny, peer):
    def other(case):
        made = ours(case)
        return made._replace(function=lambda *inputs: 2 * made.function(*inputs), comparable=None)

    peer(other)
    _, found, _ = tiny("model", peers="other", tokens="16", width="64")
    assert all(c["seconds"] and c["agreement"] is None for c in found["cells"])


def test_running_out_of_memory_is_said_in_its_cell_alone(tiny, peer):
    def hungry(case):
        made = ours(case)

        def function(*inputs):
            if case.tokens > 16:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return made.function(*inputs)

        return made._replace(function=function)

    peer(hungry)
    _, found, printed = tiny("ops", peers="other", tokens="16,64", heads="2")
    errors = {(c["name"], c["case"]["tokens"]): c["error"] for c in found["cells"]}
    assert errors["other", 64] == "out of memory"
    assert errors["other", 16] is None
    assert errors["patchscale", 64] is None
    assert "out of memory" in printed


def test_nothing_measured_is_an_error_with_its_reason(tiny, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(cells, "measure_memory", fail)
    with pytest.raises(UserError, match=r"nothing could be measured: patchscale, scan, 2 heads.*: no such luck; "):
        tiny("ops", peers="none", tokens="16", heads="2")
    assert (tmp_path / "out" / "results.json").exists()


def test_an_interrupted_run_shows_and_keeps_what_it_has(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.png").write_text("of another run")
    measured = cells.measure_times

    def interrupt(case, *arguments):
        if case.subject == "conv":
            raise KeyboardInterrupt
        return measured(case, *arguments)

    monkeypatch.setattr(cells, "measure_times", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny("ops", peers="none", tokens="16", heads="2")
    printed = capsys.readouterr().out
    assert "scan, 2 heads, fresh decay, forward + backward" in printed
    assert f"wrote {tmp_path / 'out' / 'results.json'}" in printed.replace("\n", "")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {c["case"]["subject"] for c in found["cells"]} == {"scan"}
    picture = tmp_path / "out" / "results.png"
    assert not picture.exists() or picture.read_bytes().startswith(b"\x89PNG")


def test_which_operators_ran_is_recorded(tiny, monkeypatch):
    monkeypatch.setenv("PATCHSCALE_OPS", "reference")
    _, found, printed = tiny("ops", peers="none", tokens="16", heads="2")
    assert found["machine"]["operators"] == "reference"
    assert "its operators in 'reference', set by PATCHSCALE_OPS" in printed


def test_an_unknown_implementation_is_said_before_anything_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATCHSCALE_OPS", "fast")
    assert main(["ops", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "unknown operator implementation 'fast' (set by PATCHSCALE_OPS)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_number_is_cut_off_on_a_narrow_terminal(monkeypatch, capsys):
    pytest.importorskip("rich")
    from patchscale import console

    monkeypatch.setattr(console.out, "width", 60)
    with display() as shown:
        shown.table(
            "a table", ["what", "median"] + 9 * ["a number"], [["a case of some length", "1.23 ms"] + 9 * ["4.567"]]
        )
    printed = capsys.readouterr().out
    assert printed.count("4.567") == 9
    assert "1.23 ms" in printed


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("speed", {}, "unknown benchmark 'speed'; choose one of ops, model, train"),
        ("ops", {"peers": "flash"}, "unknown peer 'flash'; known are transformers, vit, mamba-ssm, fla"),
        ("ops", {"tokens": "196,many"}, "--tokens is '196,many', expected whole numbers"),
        ("ops", {"tokens": "0"}, "--tokens is '0'"),
        ("ops", {"decay": "mild,none"}, "--decay is 'mild,none', expected fresh or mild"),
        ("ops", {"heads": ""}, "--heads is ''"),
        ("model", {"width": "100"}, "--width is 100, expected a multiple of 64"),
        ("model", {"heads": "8"}, "--heads has no use"),
        ("ops", {"device": "tpu"}, "device 'tpu' cannot be used"),
        ("ops", {"device": "meta"}, "cpu and cuda alone"),
        ("ops", {"dtype": "float16"}, "--dtype is 'float16', expected one of float32, bfloat16"),
        ("ops", {"batch": "0"}, "--batch is '0'"),
        ("ops", {"batch": "4,2"}, "--batch is '4,2', expected one number, or one for each model"),
        ("ops", {"threads": 0}, "--threads is 0"),
        ("ops", {"min_seconds": float("nan")}, "--min-seconds is nan"),
        ("train", {"model": "adventurer_tny_patch1_224"}, "unknown model 'adventurer_tny_patch1_224'; did you mean"),
        ("train", {"model": "resnet50"}, "--model is 'resnet50', expected an Adventurer's"),
        ("train", {"model": "adventurer_tiny_patch16_224", "tokens": "196"}, "--tokens has no use"),
    ],
)
def test_bad_input_is_said_before_anything_runs(kind, options, message, tmp_path):
    with pytest.raises(UserError) as caught:
        bench(kind, replace(Options(device="cpu", out=tmp_path / "out"), **options))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_said(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["ops", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot write to" in capsys.readouterr().err


def test_percentiles_and_slopes():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([0.0, 10.0], 0.9) == pytest.approx(9.0)
    assert slope([(1, 5.0), (10, 500.0), (100, 50000.0)]) == pytest.approx(2.0)


BARE = """
import sys
for name in ('rich', 'tyro', 'matplotlib', 'transformers', 'torchmetrics', 'datasets'): sys.modules[name] = None
from patchscale.bench.__main__ import main
if __name__ == '__main__': sys.exit(main())
"""


def bare(tmp_path, *options: str) -> subprocess.CompletedProcess:
    """The command on a machine that has PyTorch, torchvision, timm and Triton alone."""
    (tmp_path / "run.py").write_text(BARE)
    common = ["--repeats", "1", "--min-seconds", "0", "--device", "cpu", "--out", str(tmp_path / "out")]
    return subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), *options, *common],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_it_runs_in_processes_of_its_own_without_the_command_line_s_packages(tmp_path):
    done = bare(tmp_path, "ops", "--tokens", "16", "--heads", "1")
    assert done.returncode == 0, done.stderr
    assert "scan, 1 heads, fresh decay, forward" in done.stdout
    assert "without transformers: transformers is not installed" in done.stdout
    assert "no picture: matplotlib is not installed" in done.stdout
    assert "time: conv" in done.stderr
    assert (tmp_path / "out" / "results.json").exists()


def test_training_steps_without_the_command_line_s_packages(tmp_path):
    done = bare(tmp_path, "train", "--model", "adventurer_tiny_patch32_64", "--peers", "vit")
    assert done.returncode == 0, done.stderr
    assert "training step, checkpointed" in done.stdout
    assert "failed" not in done.stdout


def test_an_unknown_model_without_the_command_line_s_packages(tmp_path):
    done = bare(tmp_path, "train", "--model", "adventurer_tiny_patch7_64")
    assert done.returncode == 2
    assert "unknown model 'adventurer_tiny_patch7_64'" in done.stderr
