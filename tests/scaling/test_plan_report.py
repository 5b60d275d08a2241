"""The plan in words: which checkpointing is named, and the command."""

import itertools
from collections import defaultdict

import pytest
from rich.console import Console

from patchscale import console
from patchscale.cli import main
from patchscale.scaling.plan import Options, fit_memory, plan
from patchscale.scaling.plan_report import _bytes, _plot, _seconds, fit_lines


def test_the_cheapest_that_fits_is_named():
    size = {"img_size": 16, "embed_dim": 64, "depth": 2, "num_classes": 10, "batch_size": 4}
    options = Options("adventurer_tiny_patch16_224", patch_sizes=(2,), gpu="a100", fit_memory="x", **size)
    rows = plan(options)[:1]
    peaks = {recompute: cost.peak for recompute, cost in rows[0].costs.items()}

    def said(memory):
        return fit_lines(options, fit_memory(options, rows, memory))[1]

    assert said(round(peaks["nothing"] / 0.94)).startswith("  patch 2: 4 images: nothing recomputed;")
    assert "4 images: all but products recomputed" in said(round(peaks["all but products"] / 0.94))
    assert "4 images do not fit: --device-batch" in said(round(0.9 * peaks["blocks"]))
    assert said(2**10).startswith("  patch 2: not one image fits; at most 0")


def test_no_number_is_cut_off_in_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    command = "plan adventurer_tiny_patch16_224 --gpu a100 --depth 2 --img-size 32 --patch-sizes 16 4 --embed-dim 192"
    monkeypatch.setattr(console, "out", Console(soft_wrap=True))
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    assert "attention" in out
    assert "…" not in out


def test_a_width_of_any_number_of_heads_has_a_counterpart():
    rows = plan(
        Options("adventurer_tiny_patch16_224", img_size=32, patch_sizes=(16,), embed_dim=224, depth=1, gpu="a100")
    )
    assert {row.family for row in rows} == {"scan", "attention"}


def test_the_picture_says_its_numbers(tmp_path):
    options = Options("adventurer_tiny_patch16_224", gpu="a100", depth=1, patch_sizes=(16, 4, 1), batch_size=8)
    figure = _plot(plan(options), defaultdict(lambda: "black"))
    figure.draw_without_rendering()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            places = [tick.get_position()[axis is axes.yaxis] for tick in axis.get_majorticklabels()]
            texts = [
                t.get_text() for t, at in zip(axis.get_majorticklabels(), places, strict=True) if low <= at <= high
            ]
            assert len(texts) >= 2
            assert not any("$" in text for text in texts)
        boxes = [t.get_window_extent() for t in axes.xaxis.get_majorticklabels()]
        assert all(left.x1 <= right.x0 + right.width / 2 for left, right in itertools.pairwise(boxes))
    titles = [axes.title.get_window_extent() for axes in figure.axes if axes.title.get_text()]
    titles += [axes._left_title.get_window_extent() for axes in figure.axes]
    assert all(box.x1 <= figure.bbox.x1 for box in titles)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--patch-sizes 4 4", "--patch-sizes names 4 twice"),
        ("--fit-memory 0GiB", "--fit-memory is '0GiB'"),
        ("--device cpu", "give one of them"),
        ("--plot p.jpg", "expected a name that ends in .png"),
        ("--img-size 0", "image size 0x0"),
        ("--num-classes 0", "--num-classes is 0, expected at least 1"),
    ],
)
def test_flags_that_say_nothing_are_refused(flags, message, capsys):
    assert main(f"plan deit_tiny_patch16 --img-size 8 --patch-sizes 4 --depth 1 --gpu a100 {flags}".split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.9996, "1 s"), (0.01234, "12.3 ms"), (86400 * 1234, "1,234 d"), (59.99, "1 min"), (3e-5, "0.03 ms")],
)
def test_seconds_have_three_digits(seconds, text):
    assert _seconds(seconds) == text


def test_bytes_have_three_digits():
    assert [_bytes(n * 2**20) for n in (0.5, 1010, 1023, 1024, 1010 * 1024)] == [
        "0.5 MiB",
        "1,010 MiB",
        "1,023 MiB",
        "1 GiB",
        "1,010 GiB",
    ]


def test_the_command(tmp_path, capsys):
    picture = tmp_path / "new" / "plan.png"
    flags = "--img-size 8 --patch-sizes 4 --embed-dim 64 --depth 2 --batch-size 2 --gpu h200 --precision bf16-mixed"
    command = ["plan", "deit_tiny_patch16", *flags.split(), "--fit-memory", "64MiB", "--plot", str(picture)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "an estimate, H200 SXM 141 GB at its peaks" in said
    for line in ("time: ", "FLOPs: ", "memory: ", "in 64MiB, 5% of it left free", "patch 4: 2 images: nothing recom"):
        assert line in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--fit-memory", "lots"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
