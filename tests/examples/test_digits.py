import importlib.util
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console


@pytest.fixture(scope="module")
def digits():
    path = Path(__file__).resolve().parents[2] / "examples" / "digits.py"
    specification = importlib.util.spec_from_file_location("digits", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def results(digits):
    return [
        {
            "patch_size": patch,
            "seed": seed,
            "tokens": (8 // patch) ** 2,
            "top1": 90.0 + seed,
            "loss": 0.1 * patch,
            "seconds": 80 / patch,
            "forward_mflops": 1.0,
        }
        for patch in digits.PATCH_SIZES
        for seed in digits.SEEDS
    ]


def test_the_table_has_means_ranges_and_cost_by_patch(digits, results):
    table, rows = digits.table_of(results)
    assert [row["patch_size"] for row in rows] == [8, 4, 2, 1]
    assert all((row["top1"], row["top1_spread"]) == (90.5, 0.5) for row in rows)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table)
    assert "90.5 +- 0.5" in captured.get()
    assert "8.0x" in captured.get()


def test_the_plot_is_a_picture(digits, results, tmp_path):
    digits.plot(digits.table_of(results)[1], tmp_path / "digits.png")
    assert Image.open(tmp_path / "digits.png").width > 1000


def test_a_cell_trains_and_reports(digits, tmp_path):
    import queue

    steps = queue.Queue()
    result = digits.train_cell(8, 0, 1, str(tmp_path), steps)
    assert result["tokens"] == 1
    assert 10 < result["top1"] <= 100
    reported = [steps.get_nowait() for _ in range(steps.qsize())]
    assert reported[-1] == (8, 0, 22, 22)
