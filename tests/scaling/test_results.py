import json
from dataclasses import asdict, replace

import pytest

from patchscale.errors import UserError
from patchscale.scaling.results import COLUMNS, append_result, read_results, write_results


@pytest.mark.parametrize("name", ["results.jsonl", "results.csv"])
def test_what_is_written_is_read_again(study, tmp_path, name):
    study = [replace(study[0], ema_top1=12.5, recipe='of "two", words'), *study[1:]]
    write_results(tmp_path / "new" / name, study)
    assert read_results(tmp_path / "new" / name) == study


def test_runs_are_added_one_by_one(study, tmp_path):
    for cell in study:
        append_result(tmp_path / "results.jsonl", cell)
    assert read_results(tmp_path) == study  # a folder, too


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_line_cut_short_by_a_kill_counts_as_not_run(study, tmp_path, cut):
    path = tmp_path / "results.jsonl"
    write_results(path, study[:3])
    path.write_bytes(path.read_bytes()[:-cut])
    kept = 3 if cut == 1 else 2  # without its line end alone, the last row is whole
    assert read_results(path) == study[:kept]
    append_result(path, study[3])
    assert read_results(path) == [*study[:2], study[3]]


@pytest.mark.parametrize("name", ["results.jsonl", "results.csv"])
def test_pandas_reads_it(study, tmp_path, name):
    pandas = pytest.importorskip("pandas")
    write_results(tmp_path / name, study)
    table = pandas.read_csv(tmp_path / name) if name.endswith("csv") else pandas.read_json(tmp_path / name, lines=True)
    assert list(table.columns) == list(COLUMNS)
    assert table.top1.tolist() == pytest.approx([cell.top1 for cell in study])
    assert table.groupby("patch_size").seed.count()[16] == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top1": 101.0}, "top1 is 101, expected percent, 0 to 100"),
        ({"val_loss": float("nan")}, "val_loss is nan, expected a finite number"),
        ({"patch_size": 0}, "patch_size is 0, expected more than 0"),
        ({"seed": 1.5}, "seed is 1.5, expected a whole number"),
        ({"seed": True}, "seed is True, expected a whole number"),
        ({"flops_training": None}, "flops_training is None, expected a finite number"),
        ({"ema_top1": "high"}, "ema_top1 is 'high', expected a finite number, or nothing"),
        ({"seconds": -1.0}, "seconds is -1, expected 0 or more"),
        ({"family": ""}, "family is empty"),
        ({"settings": []}, r"settings is \[\], expected a table of settings"),
    ],
)
def test_a_row_that_cannot_be_is_refused(cell, change, words):
    with pytest.raises(UserError, match=words):
        replace(cell(), **change)


def test_a_bad_line_is_named(study, tmp_path):
    path = tmp_path / "results.jsonl"
    write_results(path, study[:2])
    good = path.read_text()
    lacking = {k: v for k, v in asdict(study[2]).items() if k != "top1"}
    for text, words in [
        ("{broken\n", "line 3 is not JSON"),
        ("[1, 2]\n", "line 3: expected a row of named values"),
        (json.dumps(lacking) + "\n", "line 3: the row lacks top1; expected study"),
        (json.dumps(asdict(study[2]) | {"top_1": 1}) + "\n", "line 3: the row has unknown columns: top_1"),
        (json.dumps(asdict(study[2]) | {"top1": "x"}) + "\n", "line 3: top1 is 'x'"),
        (good.splitlines()[0] + "\n", "line 3 is the same run as line 1"),
    ]:
        path.write_text(good + text)
        with pytest.raises(UserError, match=words):
            read_results(path)


def test_a_bad_csv_is_named(study, tmp_path):
    path = tmp_path / "results.csv"
    write_results(path, study[:2])
    good = path.read_text()
    for text, words in [
        (good + "made up,short\n", "line 4 has not as many columns"),
        (good.replace("made up,adventurer", ",adventurer", 1), "line 2: study is empty"),
        (good.replace(",64,4,", ",wide,4,", 1), "line 2: width is 'wide'"),
        (good.replace("study", "name", 1), "the row lacks study"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_results(path)


def test_a_spreadsheet_s_mark_at_the_beginning_is_no_part_of_the_file(tmp_path, study):
    write_results(tmp_path / "results.csv", study)
    text = (tmp_path / "results.csv").read_text()
    (tmp_path / "marked.csv").write_text(text, encoding="utf-8-sig")
    assert read_results(tmp_path / "marked.csv") == study


def test_files_that_are_none_are_refused(tmp_path, study):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "results.xlsx").touch()
    (tmp_path / "picture.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, words in [
        ("none.jsonl", "no such file"),
        ("empty.jsonl", "holds no finished run"),
        ("picture.jsonl", "is not text"),
        ("results.xlsx", "expected .jsonl or .csv"),
        ("", "no such file of results: .*results.jsonl"),
    ]:
        with pytest.raises(UserError, match=words):
            read_results(tmp_path / name)
    with pytest.raises(UserError, match="ends in"):
        write_results(tmp_path / "results.txt", study)
    with pytest.raises(UserError, match="runs are added to"):
        append_result(tmp_path / "results.csv", study[0])
