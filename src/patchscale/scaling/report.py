"""``patchscale report``: one page of a study that opens anywhere, without a network."""

import base64
import html
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from patchscale.data.sources import open_source
from patchscale.errors import UserError
from patchscale.files import make_folder, write_atomically
from patchscale.scaling import figures
from patchscale.scaling.law import FORMULAS, LawFit, Scored
from patchscale.scaling.published import published
from patchscale.scaling.results import Cell, read_results, to_csv
from patchscale.scaling.study import (
    Group,
    Mean,
    Series,
    find_series,
    fit_series,
    group_cells,
    is_of_patch_sizes,
    outlook,
    pareto,
    score_series,
    steps,
)

_SAMPLES = 3
# Most patches a side that are drawn of an image; of a larger one, its middle.
_DRAWN = 32


def write_report(results: Path, out: Path, confidence: float = 0.9, data: str | None = None) -> list[Path]:
    """Write the page, and its figures beside it as SVG and PNG.

    Args:
        results: a file of results or a study's folder.
        out: the page, ending in .html.
        confidence: of all intervals.
        data: where to take sample images from, if not the data set that the results name.

    Returns:
        The files written, the page first.

    Raises:
        UserError: the results cannot be read, or the page not be written; the confidence is no share.
    """
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}, expected between 0 and 1, such as 0.9")
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"cannot write the report to {out}: expected a name that ends in .html")
    cells = read_results(results)
    groups = group_cells(cells)
    every = find_series(groups)
    pictures: list[figures.Picture] = []
    sections = [_samples(every[0], data)]
    laws = [series for series in every if is_of_patch_sizes(series)]
    body = [_head(cells)]
    for number, series in enumerate(laws):
        body.append(_series_section(series, laws, groups, number, confidence, pictures))
    if not laws:
        body.append(_section("Patch sizes", "<p>There are no models here that differ in their patch size alone.</p>"))
    body += [_cost_section(groups, confidence), _frontier_section(groups, confidence, pictures)]
    body += [_controls_section(every, confidence, pictures), *sections]
    body += [_settings_section(cells), _data_section(cells, results), _published_section(cells)]
    style = f"{figures.VARIABLES}\n{files('patchscale.scaling').joinpath('report.css').read_text(encoding='utf-8')}"
    page = _PAGE.format(title=html.escape(_title(cells)), style=style, body="\n".join(body))
    make_folder(out.resolve().parent)
    write_atomically(out, lambda path: path.write_text(page, encoding="utf-8"))
    written = [out]
    for picture in pictures:
        for suffix, content in ((".svg", picture.svg.encode()), (".png", picture.png)):
            path = out.with_name(f"{out.stem}_{picture.name}{suffix}")
            write_atomically(path, lambda temporary, content=content: temporary.write_bytes(content))  # type: ignore
            written.append(path)
    return written


def _title(cells: Sequence[Cell]) -> str:
    return ", ".join(dict.fromkeys(cell.study for cell in cells))


def _head(cells: Sequence[Cell]) -> str:
    def distinct(name: str) -> str:
        return ", ".join(dict.fromkeys(str(getattr(cell, name)) for cell in cells))

    seeds = len({cell.seed for cell in cells})
    days = sorted({cell.date[:10] for cell in cells})
    facts = [
        f"{len(cells)} runs, {seeds} seed{'s' if seeds > 1 else ''}",
        f"data: {distinct('data')}",
        f"on {distinct('device')}",
        f"commit {distinct('commit')}",
        days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
    ]
    items = "".join(f"<li>{html.escape(fact)}</li>" for fact in facts)
    title = f"<p class=kicker>What does a smaller patch buy?</p><h1>{html.escape(_title(cells))}</h1>"
    return f"<header>{title}<ul class=facts>{items}</ul></header>"


def _section(title: str, content: str, kind: str = "") -> str:
    return f"<section{kind and f' class={kind}'}><h2>{html.escape(title)}</h2>{content}</section>"


def _figure(picture: figures.Picture, caption: str, pictures: list[figures.Picture]) -> str:
    pictures.append(picture)
    alt = html.escape(picture.alt, quote=True)
    return (
        f'<figure><div role="img" aria-label="{alt}">{picture.inline}</div><figcaption>{caption}</figcaption></figure>'
    )


def _series_section(
    series: Series,
    laws: Sequence[Series],
    groups: Sequence[Group],
    number: int,
    confidence: float,
    pictures: list[figures.Picture],
) -> str:
    """One series: the answer in sentences, accuracy and loss, the law."""
    share, tag = f"{100 * confidence:g}%", f"_{number + 1}" if number else ""
    said = "".join(f"<li>{html.escape(str(step))}</li>" for step in steps(series, groups, confidence))
    if "±" in said:
        said += f"<li>± in these sentences: {share} intervals.</li>"
    if series.patches[-1] > 1 and len(series.patches) >= 3:
        said += f"<li>{html.escape(outlook(series, confidence))}</li>"
    try:
        fit = fit_series(series, "loss", "patch", confidence)
        gist, mark, why = re.split(r"(:| \()", html.escape(fit.words).replace("L_inf", "L<sub>∞</sub>"), maxsplit=1)
        verdict = f"<p class=verdict data-verdict={fit.verdict}><b>{gist}</b>{mark}{why}</p>"
    except UserError as e:
        fit = None
        verdict = f"<p class=verdict data-verdict=none><b>No law can be fitted</b>: {html.escape(str(e))}.</p>"
    shown = (
        [series, *(other for other in laws if other is not series and len(other.patches) > 2)]
        if not number
        else [series]
    )
    shown = shown[: figures.SERIES_COLOURS]
    bars = f"Dots are runs; bars are {share} intervals of the mean over seeds."
    if all(len(group.cells) == 1 for group in series.groups):
        bars = "Single runs: how far they scatter is not known."
    drawn = "" if fit is None else "The line is the law, the band its interval. "
    if fit is not None and fit.verdict == "fails":
        drawn = "No curve is drawn, because the law does not hold. "
    content = f"{verdict}<ul class=answers>{said}</ul><div class=pair>"
    for of, caption in (("top1", bars), ("loss", drawn + bars)):
        alt = f"{'Top-1 accuracy' if of == 'top1' else 'Test loss'} by patch size: " + "; ".join(
            f"patch {group.first.patch_size}: {getattr(group, of).value:.4g}" for group in series.groups
        )
        plot = figures.by_patch(shown, of, fit if of == "loss" else None, confidence)
        name = "accuracy" if of == "top1" else "loss"
        content += _figure(figures.draw(f"{name}{tag}", alt, plot), caption, pictures)
    content += "</div>"
    if fit is not None:
        content += _law_part(series, fit, confidence, tag, pictures)
    name = series.name.removeprefix(f"{series.first.study}: ")
    return _section(name[0].upper() + name[1:], content)


def _law_part(series: Series, fit: LawFit, confidence: float, tag: str, pictures: list[figures.Picture]) -> str:
    content = "<h3>The law, L = L<sub>∞</sub> + A p<sup>α</sup>, and its rivals</h3><div class=pair>"
    if fit.verdict != "fails":
        caption = "Where the law is a straight line."
        if fit.verdict == "undetermined":
            caption = "Where a power law is a straight line: it is drawn because the runs do not determine a limit."
        picture = figures.draw(f"law{tag}", f"{caption} {fit.words}", figures.straight(series, fit, confidence))
        content += _figure(picture, caption, pictures)
    content += f"<div>{_scores_table(series, confidence)}</div></div>{_forms_table(fit)}"
    if fit.drawn_in:
        content += f"<p class=note>Runs far from their fellows, drawn in to them for the fit: {len(fit.drawn_in)}.</p>"
    return content


def _forms_table(fit: LawFit) -> str:
    rows = []
    for name, form in fit.forms.items():
        constants = []
        for constant in ("L_inf", "A", "alpha"):
            low, high = form.intervals[constant]
            absent = (name == "power" and constant == "L_inf") or (name == "constant" and constant != "L_inf")
            interval = "" if math.isnan(low) else f"<small>{low:.3g} to {high:.3g}</small>"
            constants.append("" if absent else f"{getattr(form, constant):.3g}{interval}")
        weight = "too few runs" if math.isnan(form.weight) else f"{form.weight:.2f}"
        held_out = "" if form.held_out is None else f"{form.held_out:+.3f}".replace("-", "−")
        formula = FORMULAS[name].replace("L_inf", "L<sub>∞</sub>").replace("x^alpha", "p<sup>α</sup>")
        rows.append([f"<i>{formula}</i>", *constants, weight, held_out])
    note = (
        f"Test loss in nats, p in pixels; below the constants, {100 * fit.confidence:g}% intervals. Held out: the "
        "finest patch predicted from the others, less what was found."
    )
    return _table(["form", "L<sub>∞</sub>", "A", "α", "AICc weight", "held out"], rows, note)


def _scores_table(series: Series, confidence: float) -> str:
    try:
        coarse, scores = score_series(series, "loss", None, confidence)
    except UserError:
        return ""
    if not scores:
        return ""

    def interval(score: Scored) -> str:
        return "none: too few runs" if math.isnan(score.low) else f"{score.low:.3f} to {score.high:.3f}"

    rows = [
        [f"{s.x:g}", f"{s.predicted:.3f}", interval(s), f"{s.found:.3f}", "" if math.isnan(s.low) else _inside(s)]
        for s in scores
    ]
    note = f"Fine patches as the law of patch {', '.join(map(str, coarse))} alone predicts their loss."
    return _table(["patch", "predicted", f"{100 * confidence:g}% interval", "found", ""], rows, note)


def _inside(score: Scored) -> str:
    return "inside" if score.inside else "<b>outside</b>"


def _plus_minus(mean: Mean, confidence: float, digits: int) -> str:
    half = mean.half_width(confidence)
    return f"{mean.value:.{digits}f}" + ("" if math.isnan(half) else f"<small>± {half:.{digits}f}</small>")


def _cost_section(groups: Sequence[Group], confidence: float) -> str:
    rows = []
    best = _best(groups)
    ordered = sorted(groups, key=_order)
    for group in ordered:
        cell = group.first
        rows.append(
            [
                html.escape(figures.group_label(group, groups)) + " <b title=frontier>◆</b>" * best[id(group)],
                f"{cell.tokens:,}",
                figures.amount(cell.parameters),
                figures.amount(cell.flops_forward),
                figures.amount(group.flops),
                f"{group.flops / ordered[0].flops:.3g}×",
                _duration(group.seconds),
                _plus_minus(group.top1, confidence, 1),
                _plus_minus(group.loss, confidence, 3),
            ]
        )
    columns = ["", "tokens", "parameters", "FLOPs an image", "FLOPs of training", "times the first", "time", "top-1 %"]
    note = (
        "FLOPs of an image are of the forward pass. Times are medians of wall clocks on the device named above. "
        f"± is the {100 * confidence:g}% interval of the mean over seeds. ◆ no other run is both cheaper and better."
    )
    return _section("Cost", _table([*columns, "loss"], rows, note), "wide")


def _order(group: Group) -> tuple[Any, ...]:
    cell = group.first
    return cell.study, cell.data, cell.control, cell.family, cell.width, cell.depth, cell.img_size, -cell.patch_size


def _best(groups: Sequence[Group]) -> dict[int, bool]:
    """Whether each group (by identity) is on the frontier of its data set."""
    found: dict[int, bool] = {}
    for data in {group.first.data for group in groups}:
        same = [group for group in groups if group.first.data == data]
        marks = pareto([group.flops for group in same], [group.top1.value for group in same])
        found |= {id(group): bool(mark) for group, mark in zip(same, marks, strict=True)}
    return found


def _frontier_section(groups: Sequence[Group], confidence: float, pictures: list[figures.Picture]) -> str:
    """A figure and its frontier in a table, for each data set."""
    content = ""
    for number, data in enumerate(dict.fromkeys(group.first.data for group in groups)):
        same = [group for group in groups if group.first.data == data]
        marks = _best(same)
        best = sorted((group for group in same if marks[id(group)]), key=lambda group: group.flops)
        labels = [figures.group_label(group, same) for group in best]
        alt = f"Top-1 accuracy against training FLOPs on {data}; on the frontier: {'; '.join(labels)}"
        name = f"frontier_{number + 1}" if number else "frontier"
        caption = "Filled: no other run is both cheaper and better, by their means. Patch, and what else differs."
        content += _figure(figures.draw(name, alt, figures.frontier(same, confidence)), caption, pictures)
        rows = [
            [html.escape(label), figures.amount(group.flops), _plus_minus(group.top1, confidence, 1)]
            for label, group in zip(labels, best, strict=True)
        ]
        title = f"On {html.escape(data)}, the" if number else "The"
        note = f"{title} most accurate for its compute."
        content += f"<div>{_table(['on the frontier', 'FLOPs of training', 'top-1 %'], rows, note)}</div>"
    return _section("Accuracy for compute", f"<div class=pair>{content}</div>")


def _controls_section(every: Sequence[Series], confidence: float, pictures: list[figures.Picture]) -> str:
    controls = [series for series in every if not is_of_patch_sizes(series)]
    if not any(len(series.groups) > 1 for series in controls):
        return ""  # single points are on the frontier's figure
    first_of = {series.first.family: series for series in reversed(every) if is_of_patch_sizes(series)}
    base = [first_of[family] for family in dict.fromkeys(c.first.family for c in controls) if family in first_of]
    alt = "Top-1 accuracy of finer patches of the same image, and of the study's controls"
    picture = figures.draw("controls", alt, figures.controls((base + controls)[: figures.SERIES_COLOURS], confidence))
    caption = "scale: finer patches of the same image; the others are the study's controls." if base else ""
    return _section("Is it the patch, or the tokens?", _figure(picture, caption, pictures))


def _samples(series: Series, data: str | None) -> str:
    """Images of the data set, cut as the patches cut them."""
    cell = series.first
    name = data or cell.data
    try:
        source = open_source(name, "val", 64)
        images = [source.dataset[i][0] for i in range(_SAMPLES)]
    except (UserError, OSError, IndexError) as e:
        if data is not None:
            raise UserError(f"no sample images: {e}") from e
        words = f"No images are shown: {e}. Give their place with --data."
        return _section("What a token sees", f"<p>{html.escape(words)}</p>")
    drawn = "".join(
        _cut(image.convert("L" if source.channels == 1 else "RGB"), group)
        for image in images
        for group in series.groups
    )
    columns = len(series.groups)
    sizes = " and ".join(str(size) for size in dict.fromkeys(group.first.img_size for group in series.groups))
    note = f"Each square is one patch. Images of {html.escape(name)}, at {sizes} px."
    return _section(
        "What a token sees", f'<div class=samples style="--columns: {columns}">{drawn}</div><p class=note>{note}</p>'
    )


def _cut(image: Image.Image, group: Group) -> str:
    side, img_size = min(image.size), group.first.img_size
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((img_size, img_size), Image.Resampling.BICUBIC)
    patch = group.first.patch_size
    kept = min(img_size // patch, _DRAWN) * patch
    start = (img_size - kept) // 2 // patch * patch
    buffer = io.BytesIO()
    image.crop((start, start, start + kept, start + kept)).save(buffer, "PNG", optimize=True)
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    lines = "".join(f"M{i} 0V{kept}M0 {i}H{kept}" for i in range(patch, kept, patch))
    width = min(0.03 * kept, 0.22 * patch)
    tokens = f"{group.first.tokens:,} token{'s' if group.first.tokens > 1 else ''}"
    if group.first.tokens > (img_size // patch) ** 2:
        tokens += ", interpolated"
    words = f"patch {patch}{'' if kept == img_size else ', the middle'}<small>{tokens}</small>"
    alt = f"an image cut into patches of {patch} pixels a side"
    return (
        f'<figure><svg viewBox="0 0 {kept} {kept}" role="img" aria-label="{alt}">'
        f'<image href="{uri}" width="{kept}" height="{kept}" style="image-rendering: pixelated"/>'
        f'<path d="{lines}" fill="none" stroke="var(--paper)" stroke-width="{width:g}"/></svg>'
        f"<figcaption>{words}</figcaption></figure>"
    )


def _settings_section(cells: Sequence[Cell]) -> str:
    names = sorted({name for cell in cells for name in cell.settings})
    if not names:
        return _section("Settings", "<p>The results hold no settings.</p>")

    def distinct(name: str) -> str:
        values = dict.fromkeys(json.dumps(cell.settings.get(name)) for cell in cells)
        return ", ".join(html.escape(value) for value in values)

    varied = [name for name in names if len({json.dumps(cell.settings.get(name)) for cell in cells}) > 1]
    rows = [
        [f"<code>{html.escape(name)}</code>{' <small>varies</small>' if name in varied else ''}", distinct(name)]
        for name in names
    ]
    rows.sort(key=lambda row: "varies" not in row[0])
    summary = f"All {len(names)} settings of the runs; {len(varied)} vary"
    table = _table(["setting", "value"], rows, "", "settings")
    return _section("Settings", f"<details><summary>{summary}</summary>{table}</details>")


def _data_section(cells: Sequence[Cell], results: Path) -> str:
    def link(name: str, kind: str, text: str) -> str:
        encoded = base64.b64encode(text.encode()).decode()
        return f'<a download="{name}" href="data:{kind};base64,{encoded}">{name}</a>'

    lines = "".join(json.dumps(asdict(cell)) + "\n" for cell in cells)
    links = f"{link('results.csv', 'text/csv', to_csv(cells))} or {link('results.jsonl', 'application/jsonl', lines)}"
    command = f"<code>patchscale fit {html.escape(results.name)}</code>"
    return _section(
        "Data", f"<p>Every run, a row each: {links}, inside this page. {command} repeats the fits on either.</p>"
    )


def _published_section(cells: Sequence[Cell]) -> str:
    rows = [row for row in published() if row.place == "Tables 1 and 4"]
    patches = sorted({row.patch_size or 0 for row in rows}, reverse=True)
    series: dict[str, dict[int | None, float]] = {}
    for row in rows:
        series.setdefault(f"{row.model}, {row.img_size} px", {})[row.patch_size] = row.value
    table = [[name, *(f"{values[p]:.1f}" if p in values else "" for p in patches)] for name, values in series.items()]
    note = f"{html.escape(rows[0].paper)}, {rows[0].place.lower()}: ImageNet-1k top-1 in percent, single runs."
    content = _table(["", *(f"patch {p}" for p in patches)], table, note)
    return _section(
        "Published elsewhere",
        f"<p>Not ours, on other data, and nowhere mixed with the above.</p><details><summary>Accuracy by patch size on "
        f"ImageNet</summary>{content}</details>",
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], note: str, kind: str = "") -> str:
    head = "".join(f"<th scope=col>{column}</th>" for column in columns)
    lines = "".join(
        f"<tr><th scope=row>{row[0]}</th>{''.join(f'<td>{value}</td>' for value in row[1:])}</tr>" for row in rows
    )
    after = f"<p class=note>{note}</p>" if note else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return f'<div class="scroll {kind}" tabindex=0>{table}</div>{after}'


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}: what does a smaller patch buy?</title>
<style>
{style}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
