import re
from dataclasses import replace

import pytest

from patchscale.cli import main
from patchscale.scaling.results import write_results


def test_fit_prints_forms_verdict_predictions_and_gains(study, tmp_path, capsys):
    write_results(tmp_path / "results.jsonl", study)
    assert main(["fit", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "made up: adventurer, width 64" in out
    assert re.search(r"L_inf \+ A p\^alpha │ 1\.\d+ \(\S+ to \S+\)", out)
    assert "The law holds here as far as these runs tell" in out
    assert "predicted from patch 16, 8, 4" in out
    assert "From patch 8, going to 4 costs 4.0 times the training compute" in out
    assert "no other run is cheaper and better" in out


def test_fit_says_by_itself_when_the_law_does_not_hold(study, tmp_path, capsys):
    worse = [replace(c, val_loss=c.val_loss + 0.5 * (c.patch_size == 1)) for c in study]
    write_results(tmp_path / "results.csv", worse)
    assert main(["fit", str(tmp_path / "results.csv"), "--axis", "tokens"]) == 0
    assert "The law does not hold" in capsys.readouterr().out


def test_fit_says_what_two_patch_sizes_buy_without_a_law(study, tmp_path, capsys):
    write_results(tmp_path / "results.jsonl", [c for c in study if c.patch_size in (8, 4)])
    assert main(["fit", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "No law is fitted to 2 patch sizes" in out
    assert "From patch 8, going to 4 costs 4.0 times the training compute" in out


def test_fit_prints_the_published_figures_apart(capsys):
    assert main(["fit", "published"]) == 0
    out = capsys.readouterr().out
    assert "single runs, none of them ours" in out
    assert re.search(r"Adventurer-B 224 px +│ +0\.629", out)
    assert re.search(r"\d+ of 19 lie in their interval", out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "no such file of results: nowhere"),
        (["nowhere.jsonl"], "no such file of results"),
        (["STUDY", "--coarse", "8", "4"], "--coarse 8 4: needs 3 of"),
        (["STUDY", "--confidence", "90"], "confidence is 90"),
        (["SHORT", "--coarse", "16", "8"], "--coarse 16 8: needs 3 patch sizes"),
        (["published", "--of", "error"], "takes no --of, --axis or --coarse"),
        (["published", "--confidence", "90"], "confidence is 90"),
        (["ONE"], "has no models that differ in their patch size alone; the law needs 3 sizes or more"),
    ],
)
def test_fit_refuses_in_one_line(study, tmp_path, capsys, arguments, words):
    write_results(tmp_path / "STUDY.jsonl", study)
    write_results(tmp_path / "SHORT.jsonl", [c for c in study if c.patch_size >= 8])
    write_results(tmp_path / "ONE.jsonl", [c for c in study if c.patch_size == 8])
    places = {name: str(tmp_path / f"{name}.jsonl") for name in ("STUDY", "SHORT", "ONE")}
    assert main(["fit", *(places.get(a, a) for a in arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
