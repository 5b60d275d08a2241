import base64
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from PIL import Image

from patchscale.cli import main
from patchscale.errors import UserError
from patchscale.scaling.report import write_report
from patchscale.scaling.results import read_results, write_results


@pytest.fixture
def report(tmp_path):
    """Writes the report of some runs; the page's text and the files."""

    def make(cells, **keywords):
        write_results(tmp_path / "results.jsonl", cells)
        written = write_report(tmp_path / "results.jsonl", tmp_path / "page" / "report.html", **keywords)
        return written[0].read_text(encoding="utf-8"), written

    return make


@pytest.fixture(scope="module")
def made(study, tmp_path_factory):
    """The made-up study's page and files."""
    folder = tmp_path_factory.mktemp("report")
    write_results(folder / "results.jsonl", study)
    written = write_report(folder / "results.jsonl", folder / "report.html")
    return written[0].read_text(encoding="utf-8"), written


def test_the_page_needs_nothing_but_itself(made):
    page, _ = made
    for attribute in ("src", "href", "xlink:href", "srcset"):
        for target in re.findall(rf'\b{attribute}="([^"]*)"', page):
            assert target.startswith(("data:", "#")), target
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert "<script" not in page
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)


def test_the_page_says_what_was_found(made):
    page, written = made
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert "data-verdict=holds" in page
    assert "From patch 8, going to 4 costs 4.0 times the training compute and buys" in text
    for heading in ("Cost", "Accuracy for compute", "What a token sees", "Settings", "Data", "Published elsewhere"):
        assert f"<h2>{heading}</h2>" in page
    assert "crop_scale" in page
    assert "[0.5, 1.0]" in page
    assert text.count("1,024 tokens") == 3  # three images at patch 1
    assert {path.name for path in written} == {
        "report.html",
        *(f"report_{name}.{kind}" for name in ("accuracy", "loss", "law", "frontier") for kind in ("svg", "png")),
    }
    assert Image.open(next(path for path in written if path.name == "report_law.png")).width > 800


def test_the_data_inside_the_page_is_the_data(made, study, tmp_path):
    page, _ = made
    for name, encoded in re.findall(r'download="(results\.\w+)" href="data:[^;]+;base64,([^"]+)"', page):
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(base64.b64decode(encoded))
        assert read_results(tmp_path / "copy" / name) == study


def test_the_page_says_by_itself_that_the_law_does_not_hold(report, study):
    page, written = report([replace(c, val_loss=c.val_loss + 0.5 * (c.patch_size == 1)) for c in study])
    assert "data-verdict=fails" in page
    assert "The law does not hold</b>" in page
    assert "No curve is drawn, because the law does not hold." in page
    assert not any("_law" in path.name for path in written)


def test_the_page_says_that_the_limit_is_not_determined(report, cell):
    cells = [cell(p, s) for p in (16, 8, 4, 2, 1) for s in range(3)]
    page, _ = report([replace(c, val_loss=0.5 * c.patch_size**0.05) for c in cells])
    assert "data-verdict=undetermined" in page
    assert "it is drawn because the runs do not determine a limit" in page


@pytest.mark.parametrize("patches", [(8,), (8, 4)])
def test_few_runs_make_a_page_too(report, cell, patches):
    page, _ = report([cell(patch) for patch in patches])
    assert ("No law can be fitted" if len(patches) > 1 else "no models here that differ in their patch size") in page


def test_a_swept_field_of_the_recipe_leaves_the_law(report, study):
    """Runs at two learning rates are two laws."""
    page, _ = report([replace(c, control=f"scale, lr {lr}") for c in study for lr in (0.001, 0.002)])
    assert page.count(" data-verdict=holds") == 2


def test_a_confidence_that_is_no_share_is_refused(study, tmp_path):
    write_results(tmp_path / "results.jsonl", study)
    with pytest.raises(UserError, match="confidence is 2, expected between 0 and 1"):
        write_report(tmp_path / "results.jsonl", tmp_path / "report.html", 2)


def test_controls_are_set_beside_the_patch(report, study):
    page, written = report(study + [replace(c, control="extend", patch_size=16) for c in study[:9]])
    assert "Is it the patch, or the tokens?" in page
    assert ">tokens<" in next(path for path in written if path.name == "report_controls.svg").read_text()


def test_controls_that_keep_the_number_of_tokens_are_drawn_by_patch_beside_their_own_family(report, cell):
    of_one_size = [cell(p, s, family=f) for f in ("adventurer", "deit") for p in (8, 4, 2) for s in range(2)]
    shrinking = [cell(p, s, img_size=8 * p, control="length", family="deit") for p in (4, 2, 1) for s in range(2)]
    _, written = report(of_one_size + shrinking)
    drawn = next(path for path in written if path.name == "report_controls.svg").read_text()
    assert ">patch side (pixels)<" in drawn
    assert ">scale<" in drawn
    assert ">length<" in drawn
    assert drawn.count('<g id="LineCollection') == 2  # error bars of a series


def test_names_cannot_break_the_page(report, study):
    page, _ = report(
        [replace(c, study="<script>alert(1)</script> & co", family="$<i>{", settings={"<b>": "<i>"}) for c in study]
    )
    assert "<script>" not in page
    assert "<code><b></code>" not in page
    assert "&lt;b&gt;</code>" in page
    assert "&lt;script&gt;" in page


def test_images_that_are_not_here_are_no_obstacle_unless_asked_for(report, study):
    page, _ = report([replace(c, data="cifar100:/nowhere") for c in study])
    assert "No images are shown: no such folder: /nowhere" in page
    with pytest.raises(UserError, match="no sample images: no such folder: /elsewhere"):
        report(study, data="cifar100:/elsewhere")


def test_the_command_names_what_it_wrote_and_refuses_in_one_line(study, tmp_path, capsys):
    write_results(tmp_path / "results.csv", study[:6])
    assert main(["report", str(tmp_path / "results.csv"), "--out", str(tmp_path / "a.html")]) == 0
    assert f"wrote {tmp_path / 'a.html'}" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "results.csv"), "--out", str(tmp_path / "a.pdf")]) == 2
    assert "expected a name that ends in .html" in capsys.readouterr().err


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

# Measures the page inside a frame of a phone's and of a desktop's width, and leaves what it found as text.
MEASURE = """<!doctype html><pre id="found"></pre><script>
const page = PAGE, found = {};
let left = 2;
for (const width of [390, 1280]) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.onload = () => {
    const d = frame.contentDocument, root = d.documentElement;
    const boxes = [...d.querySelectorAll("figure svg")].map((svg) => svg.getBoundingClientRect());
    const texts = [...d.querySelectorAll("figure svg text")].map((t) => t.getBoundingClientRect().height);
    found[width] = {
      overflow: root.scrollWidth - root.clientWidth,
      figures: boxes.length,
      widest: Math.max(...boxes.map((b) => b.width)),
      flattest: Math.min(...boxes.map((b) => b.height)),
      smallest: Math.min(...texts),
      paper: frame.contentWindow.getComputedStyle(d.body).backgroundColor,
      ink: frame.contentWindow.getComputedStyle(d.body).color,
      loaded: frame.contentWindow.performance.getEntriesByType("resource")
        .map((e) => e.name).filter((n) => !n.startsWith("data:")),
    };
    if (--left === 0) document.getElementById("found").textContent = JSON.stringify(found);
  };
  frame.srcdoc = page;
  document.body.append(frame);
}
</script>"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it_on_a_phone_and_on_a_desktop(made, tmp_path, dark):
    browser = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if browser is None:
        pytest.skip(f"no browser to open the report with: install one of {', '.join(BROWSERS)}")
    page, _ = made
    frame = tmp_path / "measure.html"
    frame.write_text(MEASURE.replace("PAGE", json.dumps(page).replace("</", "<\\/")), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [
        "--virtual-time-budget=10000",
        "--dump-dom",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    run = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    match = re.search(r'<pre id="found">(\{.*?\})</pre>', run.stdout)
    assert match, run.stderr[-2000:]
    found = json.loads(html.unescape(match[1]))
    for width, seen in found.items():
        assert seen["overflow"] == 0, width  # tables scroll inside themselves
        assert seen["figures"] == 4 + 3 * 5  # plots, and images at five patch sizes
        assert seen["widest"] <= int(width)
        assert seen["flattest"] > 20
        assert seen["smallest"] > 8  # pixels of a line of the smallest text
        assert seen["loaded"] == []
        channel = int(re.search(r"\d+", seen["paper"])[0])
        assert (channel < 64) == dark
        assert (int(re.search(r"\d+", seen["ink"])[0]) > 128) == dark
