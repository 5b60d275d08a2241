"""timm's own test suite of models, on one model of every family."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

# The smallest of each family, and one with more tokens than a chunk of the scan.
NAMES = ["adventurer_tiny_patch16_64", "adventurer_tiny_patch4_64", "deit_tiny_patch16_64"]
NAMES += ["pixel_transformer_tiny_patch4_32"]


def timms_tests(folder: Path) -> Path:
    """The folder of tests in timm's source distribution of the installed version, told that our families exist."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm"]
    got = subprocess.run([*download, f"timm=={timm.__version__}"], cwd=folder, capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"no source distribution of timm {timm.__version__}: {got.stderr[-200:]}")
    with tarfile.open(next(folder.glob("timm-*.tar.gz"))) as archive:
        archive.extractall(folder, [each for each in archive if "/tests/" in each.name], filter="data")
    tests = next(folder.glob("timm-*/tests"))
    suite = tests / "test_models.py"
    text = suite.read_text()
    # Which modules give features of every block, and which names are no convolutional networks, stand in two lists.
    for name, ours in (("FEAT_INTER_FILTERS", ["adventurer", "vit"]), ("NON_STD_FILTERS", ["adventurer_*", "pixel_*"])):
        text, found = re.subn(rf"^{name} = \[", f"{name} = [{', '.join(map(repr, ours))}, ", text, flags=re.MULTILINE)
        assert found == 1, f"timm's test_models.py has no list {name} any more"
    suite.write_text(text)
    return tests


@pytest.mark.slow
def test_timms_own_suite_passes_on_every_family(tmp_path):
    tests = timms_tests(tmp_path)
    # TorchScript is not supported. On GitHub, timm leaves out what would download weights.
    chosen = ["-k", " or ".join(NAMES), "-m", "not torchscript", "-p", "patchscale", "-p", "no:cacheprovider"]
    report = tmp_path / "report.txt"
    with report.open("w") as out:
        rc = subprocess.call(
            [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-rA", "--tb=short", *chosen, "test_models.py"],
            cwd=tests,
            env=os.environ | {"GITHUB_ACTIONS": "true"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    text = report.read_text()
    assert rc == 0, text[-4000:]
    passed = re.findall(r"^PASSED .*::(\w+)\[.*?(\w+)\]$", text, flags=re.MULTILINE)
    for name in NAMES:
        own = {test for test, model in passed if model == name}
        missing = {
            "test_model_forward",
            "test_model_backward",
            "test_model_default_cfgs_non_std",
            "test_model_forward_intermediates",
            "test_model_forward_intermediates_features",
            "test_prune_intermediate_layers_contract",
            "test_model_forward_fx",
            "test_model_backward_fx",
        } - own
        assert not missing, f"{name} did not pass {missing}"
