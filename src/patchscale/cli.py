"""The front door: ``patchscale COMMAND``, one thin function a command."""

import contextlib
import logging
import math
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from patchscale.bench.command import Kind, Options
from patchscale.errors import INTERRUPTED, Interrupted, TrainingStopped, UserError
from patchscale.train.recipe import Precision, Recipe

# Tables and results go to standard output; notes, progress and errors to standard error.
_out = Console(soft_wrap=True)
_err = Console(stderr=True, soft_wrap=True)

Which = Literal["model", "ema"]


@dataclass(frozen=True)
class Train:
    """Train a classifier, or a masked autoencoder, by flags or by a recipe of one or more stages."""

    settings: tyro.conf.OmitArgPrefixes[Recipe]
    recipe: str | None = None
    """A recipe by name (adventurer_base_patch16), or a .toml file: its stages one after another, each from the last
    one's weights. Other flags change all of its stages. The same command again goes on where this one was stopped."""
    stage: str | None = None
    """Of the recipe, only this stage, by name or number."""
    show: bool = False
    """Print the recipe as the flags leave it, and do nothing."""
    resume: Path | None = None
    """Go on with this run (its folder, or a checkpoint), by its own recipe."""
    override_recipe: bool = False
    """Go on with a run although flags or the recipe file now say otherwise than when it began."""


def train(arguments: list[str]) -> None:
    """Train a classifier, by flags or by a recipe of one or more stages."""
    from patchscale.train.device import keep_freed_memory
    from patchscale.train.loop import train as run
    from patchscale.train.stages import read_recipe_file, run_stages

    name = _flag_value(arguments, "--recipe")
    if name is None:
        given = _parse_train(arguments)
        if given.stage is not None:
            raise UserError("--stage is one of a recipe's: give --recipe too")
        if given.show:
            _print_recipe({"": given.settings}, {})
            return
        keep_freed_memory()
        with _progress_bar() as bar:
            display, command = _display(bar), ["patchscale", "train", *arguments]
            _print_result(run(given.settings, given.resume, display, given.override_recipe, command))
        return
    file = read_recipe_file(name)
    parsed = {stage: _parse_stage(arguments, name, stage, values) for stage, values in file.stages.items()}
    given = next(iter(parsed.values()))
    stages = {stage: each.settings for stage, each in parsed.items()}
    if given.resume is not None:
        raise UserError("--recipe goes on by itself, in the folder that --output names: leave out --resume")
    if given.show:
        _print_recipe(stages, file.published)
        return
    keep_freed_memory()
    folder = given.settings.output or Path("runs") / file.name
    with _progress_bar() as bar:
        for done in run_stages(
            stages,
            folder,
            given.stage,
            lambda stage: _display(bar, f"{stage}  "),
            given.override_recipe,
            ["patchscale", "train", *arguments],
        ):
            _print_result(done.result, f"{done.name}  ")


def read_train(arguments: list[str]) -> list[Recipe]:
    """What ``train`` would run with these arguments.

    Raises:
        UserError: it would refuse them.
    """
    from patchscale.train.stages import read_recipe_file

    name = _flag_value(arguments, "--recipe")
    if name is None:
        return [_parse_train(arguments).settings]
    stages = read_recipe_file(name).stages
    return [_parse_stage(arguments, name, stage, values).settings for stage, values in stages.items()]


def launch(arguments: list[str]) -> None:
    """Train as a Slurm job, or in the background here: launch slurm|local FLAGS -- what follows `train`."""
    from patchscale.train.launch import Local, Slurm, submit

    here = arguments.index("--") if "--" in arguments else len(arguments)
    flags, training = arguments[:here], arguments[here + 1 :]
    options = tyro.cli(Slurm | Local, args=flags, prog="patchscale launch", description=launch.__doc__)  # type: ignore
    if not training:
        raise UserError(f"launch {flags[0]} what? After --, write what follows `patchscale train`: -- --recipe NAME")
    job = submit(training, options)
    _out.print(f"job {job.job_id} trains in {job.folder}", highlight=False)
    _out.print(f"watch it:  tail -F {shlex.quote(str(job.log))}", highlight=False)
    slurm = isinstance(options, Slurm)
    if slurm:
        _out.print(f"its state: squeue --jobs {job.job_id}", highlight=False)
    _out.print(f"stop it:   {'scancel' if slurm else 'kill'} {job.job_id}", highlight=False)


def _display(bar: Progress, stage: str = "") -> Any:
    from patchscale.train.loop import EpochReport, Observer
    from patchscale.train.loop import Progress as Step

    class Display(Observer):
        def __init__(self) -> None:
            for old in bar.task_ids:
                bar.remove_task(old)
            self.task = bar.add_task("", total=1, rate="", left="")

        def note(self, text: str) -> None:
            _note(text)

        def progress(self, step: Step) -> None:
            what = f"{stage}epoch {step.epoch}/{step.epochs}"
            what += f"  loss {step.loss:.3f}" if step.phase == "train" else "  evaluating"
            left = "" if math.isnan(step.seconds_left) else f"{_duration(step.seconds_left)} left to train"
            if step.utilisation is not None:
                left += f"  {step.utilisation:.0%} of the matrix peak, {step.waiting:.0%} waiting for images"
            if step.memory is not None:
                left += f"  {step.memory / 2**30:.1f} GiB"
            bar.update(
                self.task,
                description=what,
                completed=step.step,
                total=step.steps,
                rate=f"{step.images_per_second:,.0f} images/s",
                left=left,
            )

        def epoch(self, report: EpochReport) -> None:
            line = f"{stage}epoch {report.epoch}  train loss {report.train_loss:.4f}  {report.scores}"
            if report.ema_scores is not None:
                line += f"  (average of weights: {report.ema_scores})"
            _out.print(line + f"  {report.seconds:.0f} s", highlight=False)

    return Display()


def _print_result(result: Any, stage: str = "") -> None:
    if not result.is_first:
        return
    best = next((r for r in result.reports if r.epoch == result.best_epoch), None)
    _out.print(f"{stage}last: {result.scores}  {result.folder / 'last.pt'}", highlight=False)
    if best is not None:
        text = f"{stage}best: {best.scores} in epoch {best.epoch}  {result.folder / 'best.pt'}"
        _out.print(text, highlight=False)


def _print_recipe(stages: dict[str, Recipe], published: dict[str, Any]) -> None:
    """The fields of each stage, those that are as in every run left out."""
    defaults = Recipe("", "").to_dict()
    for number, (stage, recipe) in enumerate(stages.items(), start=1):
        if stage:
            _out.print(f"{number} {stage}", highlight=False)
        for field, value in recipe.to_dict().items():
            if value != defaults[field]:
                _out.print(f"  {field} = {value}", highlight=False, markup=False)
    for key, value in published.items():
        _out.print(f"published {key}: {value}", highlight=False, markup=False)


@dataclass(frozen=True)
class Sweep:
    """Train a study's runs, several at a time: every combination of patch sizes, seeds and whatever else is swept.

    The study is a file (studies/), or flags: those of `train`, where several values are swept
    (--model adventurer_tiny_patch1 --data digits --img-size 8 --patch-size 8 4 2 1 --seed 0 1 2). With a file, flags
    change all of its runs. The same command again goes on; what is finished stays. Rows of results are in
    OUTPUT/results.jsonl, for `fit` and `report`.
    """

    study: Path | None = None
    """A .toml file; the head of patchscale/scaling/runs.py says what it holds."""
    output: Path | None = None
    """Folder of the sweep; by default runs/NAME."""
    jobs: int | None = None
    """Runs at a time; by default one a GPU, or one a core."""
    hold: Literal["epochs", "flops"] | None = None
    """flops: cheaper runs get more epochs, until all have cost about what the dearest does."""
    show: bool = False
    """Print the runs, and do nothing."""
    slurm: str | None = None
    """Submit the runs as an array of jobs instead, with these flags of `launch slurm`: '--time 1:00:00 ...'. Once they
    are done, the same command without --slurm gathers the results."""


def sweep(arguments: list[str]) -> None:
    """Train a study: every combination of patch sizes, seeds and whatever else is swept."""
    from patchscale.scaling.command import RESULTS_WIDTH, results_table
    from patchscale.scaling.runs import make_study, read_fields, read_study
    from patchscale.scaling.sweep import sweep as run

    given, others = tyro.cli(Sweep, args=arguments, prog="patchscale sweep", return_unknown_args=True)
    fields = read_fields(others)
    if given.study is not None:
        study = read_study(given.study, fields, given.hold)
    else:
        study = make_study({"all": fields, "hold": given.hold or "epochs"}, "sweep")
    if given.show:
        for each in study.runs:
            epochs = " + ".join(str(stage.epochs) for stage in each.stages.values())
            _out.print(f"{each.name}  ({each.control}, {epochs} epochs)", highlight=False)
        return
    folder = given.output or Path("runs") / study.name
    if given.slurm is not None:
        _submit_sweep(study, folder, given.slurm, given.jobs)
        return
    with _sweep_table() as watch:
        cells = run(study, folder, given.jobs, watch)
    _make_room(RESULTS_WIDTH)
    _out.print(results_table(cells))
    _out.print(f"{len(cells)} runs in {folder / 'results.jsonl'}", highlight=False)
    _out.print(f"read them: patchscale report {folder} --out {folder / 'report.html'}", highlight=False)


def _print_whole(what: Any) -> None:
    """A line of a table that the terminal wraps is better than a number cut off."""
    if isinstance(what, Table):
        _make_room(Measurement.get(_out, _out.options.update(max_width=1000), what).maximum)
    _out.print(what, highlight=False)


def _make_room(characters: int) -> None:
    _out.width = max(_out.width, characters)


def _submit_sweep(study: Any, folder: Path, flags: str, at_once: int | None) -> None:
    from patchscale.scaling.sweep import prepare, runs_to_launch
    from patchscale.train.launch import Slurm, submit_array

    options = tyro.cli(Slurm, args=shlex.split(flags), prog="--slurm")
    prepare(study, folder)
    runs = list(runs_to_launch(study, folder))
    if not runs:
        _out.print("all runs are finished", highlight=False)
        return
    jobs = submit_array(runs, options, at_once or len(runs), folder / "logs")
    _out.print(f"{len(jobs)} jobs: {jobs[0].job_id} to {jobs[-1].job_id}, logs in {folder / 'logs'}", highlight=False)


@contextlib.contextmanager
def _sweep_table() -> Any:
    """A line for each run while they train; where nobody watches, a line for each that has ended."""
    from rich.live import Live

    told: set[str] = set()

    def watch(states: list[Any], seconds_left: float | None) -> None:
        if _err.is_terminal:
            live.update(_table_of(states, seconds_left))
            return
        for state in states:
            if state.state in ("done", "failed", "stopped") and state.run.name not in told:
                told.add(state.run.name)
                top1 = "" if state.top1 is None else f"  top-1 {state.top1:.2f}%"
                left = "" if seconds_left is None else f"  ({_duration(seconds_left)} left)"
                _err.print(f"{state.run.name}  {state.state}{top1}{left}", highlight=False)

    with Live(console=_err, transient=True, refresh_per_second=4) as live:
        yield watch


def _table_of(states: list[Any], seconds_left: float | None) -> Table:
    done = sum(state.state == "done" for state in states)
    left = "" if seconds_left is None else f", {_duration(seconds_left)} left"
    table = Table("run", "", "", "loss", "top-1 %", "time", title=f"{done} of {len(states)} runs done{left}")
    for column in table.columns[3:]:
        column.justify = "right"
    for state in states:
        table.add_row(
            state.run.name,
            f"{state.share:.0%}" if state.state == "running" else state.state,
            state.where,
            "" if state.loss is None else f"{state.loss:.3f}",
            "" if state.top1 is None else f"{state.top1:.2f}",
            _duration(state.seconds) if state.seconds else "",
        )
    return table


def evaluate(
    weights: str,
    data: str | None = None,
    which: Which = "model",
    flip: Literal["auto", "alternate", "pairs", "released"] | None = None,
    limit_val: int | None = None,
    batch_size: int | None = None,
    precision: Precision | None = None,
    device: str | None = None,
    workers: int | None = None,
    skip_unreadable: bool = False,
    patch_size: tuple[int, ...] = (),
) -> None:
    """Score weights on labelled images. What is not given comes from the run that made them.

    Args:
        weights: A run's folder (its best checkpoint), a file, a URL or a Hub id.
        data: digits, cifar100:PATH, folder:PATH, or a name timm knows.
        which: The trained weights, or their moving average.
        flip: Which blocks scan from the right; auto tries all three rules on 500 images and keeps the best.
        limit_val: Score this many images, a fixed random sample; 0 for all.
        batch_size: Images at a time.
        precision: bf16-mixed computes matrix products in bfloat16.
        device: cpu, cuda, cuda:1, mps; by default the GPU where there is one.
        workers: Processes that read images.
        skip_unreadable: Leave out images that cannot be read, instead of stopping.
        patch_size: Score the same weights at each of these, and what each costs; weights of a run that drew its patch
            sizes (train --patch-sizes) know them all.
    """
    from patchscale.train.device import keep_freed_memory
    from patchscale.train.evaluate import evaluate as run

    keep_freed_memory()
    with _progress_bar() as bar:
        task = bar.add_task("evaluating", total=1, rate="", left="")
        found = run(
            weights,
            data,
            which,
            flip,
            limit_val,
            batch_size,
            precision,
            device,
            workers,
            skip_unreadable,
            patch_size,
            note=_note,
            progress=lambda done, total: bar.update(task, completed=done, total=total, rate=f"{done:,} images"),
        )
    if found.flip_trials:
        table = Table("flip", "top-1 %", "loss", title="flip rules on a sample of the images")
        for rule, scores in found.flip_trials.items():
            table.add_row(rule + (" *" if rule == found.flip else ""), f"{scores.top1:.2f}", f"{scores.loss:.4f}")
        _out.print(table)
    if found.by_patch:
        table = Table("patch", "patches", "GFLOP", "ms an image", "top-1 %", "top-5 %", "loss")
        for column in table.columns:
            column.justify = "right"
        for at in found.by_patch:
            gflop = "" if at.flops is None else f"{at.flops / 1e9:.3g}"
            scores = at.scores
            figures = f"{scores.top1:.2f}", f"{scores.top5:.2f}", f"{scores.loss:.4f}"
            table.add_row(str(at.patch_size), f"{at.patches:,}", gflop, f"{1e3 * at.seconds:.3g}", *figures)
        _out.print(table)
        return
    _out.print(str(found.scores) + (f"  (flip {found.flip})" if found.flip else ""), highlight=False)
    if found.recorded is not None:
        _out.print(f"training recorded: {found.recorded}", highlight=False)


def predict(
    image: tyro.conf.Positional[Path],
    weights: str,
    which: Which = "model",
    flip: Literal["alternate", "pairs", "released"] | None = None,
    top: int = 5,
    features: Path | None = None,
    device: str | None = None,
) -> None:
    """Print the most likely classes of an image, and picture what its tokens have in common.

    Args:
        image: The image file.
        weights: A run's folder (its best checkpoint), a file, a URL or a Hub id.
        which: The trained weights, or their moving average.
        flip: Which blocks scan from the right, instead of the file's rule.
        top: How many classes.
        features: Write the last block's tokens as a picture here: their principal components over the image.
        device: cpu, cuda, cuda:1, mps; by default the GPU where there is one.
    """
    import torch

    from patchscale.files import make_folder, write_atomically
    from patchscale.tasks.token_picture import token_picture
    from patchscale.train.checkpoint import load_model
    from patchscale.train.device import resolve_device

    place = resolve_device(device)
    loaded = load_model(weights, which, flip)
    picture = _open_image(image, "L" if loaded.preprocessing.channels == 1 else "RGB")
    tensor = loaded.preprocessing.transform()(picture)[None].to(place)
    model = loaded.model.to(place)
    with torch.inference_mode():
        tokens, (last,) = model.forward_intermediates(tensor, 1, norm=True)
        logits = model.forward_head(tokens).float()
    if not model.num_classes and features is None:
        raise UserError(f"{weights} has no classifier: give --features FILE for its tokens, or train one from it")
    if model.num_classes:
        names = loaded.classes or _imagenet_names(logits.shape[1])
        for share, index in zip(*logits.softmax(1)[0].topk(min(top, logits.shape[1])), strict=True):
            _out.print(f"{100 * share:6.2f}%  {names[index]}", highlight=False)
    if features is not None:
        make_folder(features.resolve().parent)
        shown = loaded.preprocessing.visible(picture)
        written = token_picture(shown, last[0].float().cpu())
        write_atomically(features, lambda path: written.save(path, format=features.suffix[1:] or "png"))
        _out.print(f"wrote {features}", highlight=False)


def models(pattern: tyro.conf.Positional[str] = "*_224") -> None:
    """List the models, with published accuracies.

    Args:
        pattern: Names to list, such as '*' (all), '*tiny*', 'deit_base_patch1_*'.
    """
    import fnmatch

    from patchscale.models.published import FAMILIES, published_top1

    table = Table("model", "tokens", "parameters (M)", "published top-1 %")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for family in FAMILIES:
        for size, patch, img, name in family.names():
            short = not name.endswith(f"_{img}")  # shown where it is asked for, and not beside the whole name
            if fnmatch.fnmatch(name, pattern) and not (short and fnmatch.fnmatch(f"{name}_{img}", pattern)):
                top1 = published_top1(name)
                parameters = family.count(**family.sizes[size], patch_size=patch, img_size=img) / 1e6
                tokens = (img // patch) ** 2 + 1
                table.add_row(name, f"{tokens:,}", f"{parameters:.1f}", "" if top1 is None else f"{top1:.1f}")
    if not table.rows:
        raise UserError(
            f"no model matches {pattern!r}; names look like adventurer_base_patch16_224, deit_base_patch4_64 or "
            "pixel_transformer_tiny_patch1_32"
        )
    _out.print(table)


def convert(source: tyro.conf.Positional[str], destination: tyro.conf.Positional[Path], which: Which = "model") -> None:
    """Write weights as safetensors, with the config.json that timm and the Hugging Face Hub read.

    Args:
        source: A file, URL or Hub id.
        destination: A folder, ready for the Hub (model.safetensors), or a .safetensors file of another name.
        which: The trained weights, or their moving average.
    """
    from patchscale.models.weights import convert as run

    for path in run(source, destination, which):
        _out.print(f"wrote {path}", highlight=False)


def bench(kind: tyro.conf.Positional[Kind], options: tyro.conf.OmitArgPrefixes[Options]) -> None:
    """Measure time and memory beside peers, in one run.

    Args:
        kind: Operators (ops), mixers and blocks or whole models (model), training steps (train).
        options: How.
    """
    from patchscale.bench.command import bench as run

    run(kind, options)


def fit(
    results: tyro.conf.Positional[str],
    of: Literal["loss", "error"] = "loss",
    axis: Literal["patch", "tokens", "flops"] = "patch",
    confidence: float = 0.9,
    coarse: tuple[int, ...] = (),
) -> None:
    """Fit the law of patch size to a study's results, and say how sure it is.

    Args:
        results: A file of results (.jsonl or .csv), or a study's folder; published for the papers' figures.
        of: Test loss in nats, or top-1 error in percent.
        axis: Over the patch's side in pixels, tokens, or the forward FLOPs of an image.
        confidence: Of all intervals.
        coarse: Patch sizes from which the finer ones are predicted; by default the three coarsest.
    """
    from patchscale.scaling.command import fit as run

    run(results, of, axis, confidence, coarse, _out)


def report(
    results: tyro.conf.Positional[Path],
    out: Path = Path("report.html"),
    confidence: float = 0.9,
    data: str | None = None,
) -> None:
    """Write one page about a study that opens anywhere: law, cost, frontier, samples, settings and the data.

    Args:
        results: A file of results (.jsonl or .csv), or a study's folder.
        out: The page; its figures are written beside it as SVG and PNG.
        confidence: Of all intervals.
        data: Where to take sample images from, if not where the results say, such as cifar100:PATH.
    """
    from patchscale.scaling.report import write_report

    for path in write_report(results, out, confidence, data):
        _out.print(f"wrote {path}", highlight=False)


def plan(arguments: list[str]) -> None:
    """Say what training costs at every patch size, in FLOPs, memory and time, before it is paid."""
    from patchscale.scaling.plan import Options
    from patchscale.scaling.plan_report import show_plan
    from patchscale.train.device import keep_freed_memory

    options = tyro.cli(Options, args=arguments, prog="patchscale plan", description=plan.__doc__)
    keep_freed_memory()
    with _err.status("") as status:
        show_plan(options, _print_whole, status.update)


def env() -> None:
    """Print versions, devices, and the implementation that each operator will use and why."""
    from importlib.metadata import version

    import torch

    from patchscale import ops
    from patchscale.ops.dispatch import choose_implementation
    from patchscale.train.device import resolve_device

    device = resolve_device(None)
    table = Table.grid(padding=(0, 2))
    table.add_row("python", platform.python_version())
    table.add_row("platform", platform.platform())
    for package in ("patchscale", "torch", "torchvision", "timm"):
        table.add_row(package, version(package))
    table.add_row("threads", str(torch.get_num_threads()))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        table.add_row(f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    table.add_row("default device", str(device))
    choice = choose_implementation(None, device)
    for name in ops.DISPATCHED:
        table.add_row(name, f"{choice.implementation} ({choice.reason})")
    table.add_row("gated_rms_norm", "torch (the only one)")
    _out.print(table)


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "launch": launch,
    "sweep": sweep,
    "eval": evaluate,
    "predict": predict,
    "models": models,
    "convert": convert,
    "bench": bench,
    "plan": plan,
    "fit": fit,
    "report": report,
    "env": env,
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0, 1 when training cannot go on, 2 for bad input, 75 when training was told to stop and has saved, 130 when
    interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if not arguments or arguments[0] in ("-h", "--help"):
        _out.print(_usage(), highlight=False)
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    try:
        if command not in COMMANDS:
            raise UserError(f"unknown command {command!r}; the commands are {', '.join(COMMANDS)}")
        if command in ("train", "launch", "sweep", "plan"):
            COMMANDS[command](rest)
        else:
            tyro.cli(COMMANDS[command], args=rest, prog=f"patchscale {command}")
        return 0
    except UserError as e:
        return _fail(str(e), 2)
    except TrainingStopped as e:
        return _fail(str(e), 1)
    except Interrupted as e:
        return _fail(str(e), INTERRUPTED)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _parse_train(arguments: list[str]) -> Train:
    """The recipe comes from the flags or, with --resume, from the run, changed by the flags."""
    resume = _flag_value(arguments, "--resume")
    keywords: dict[str, Any] = {} if resume is None else {"default": _train_defaults(Path(resume))}
    return tyro.cli(Train, args=arguments, prog="patchscale train", **keywords)


def _parse_stage(arguments: list[str], recipe: str, stage: str, values: dict[str, Any]) -> Train:
    """A stage of a recipe file, changed by the flags."""
    needed = {"model": "a model", "data": "data (published recipes are for ImageNet-1k: folder:PATH)"}
    for field, what in needed.items():
        given = values.get(field) or _flag_value(arguments, f"--{field}")
        if given is None and not {"-h", "--help", "--show"} & set(arguments):
            raise UserError(f"the recipe {recipe} names no {what}: give --{field}")
        values = values | {field: given or ""}
    try:
        default = Train(Recipe.from_dict(values), recipe)
    except UserError as e:
        raise UserError(f"{recipe}, stage {stage}: {e}") from e
    return tyro.cli(Train, args=arguments, prog="patchscale train", default=default)


def _flag_value(arguments: list[str], flag: str) -> str | None:
    """What follows a flag, before the flags are parsed: it says what the others' defaults are."""
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def _train_defaults(resume: Path) -> Train:
    from patchscale.train.checkpoint import read_training_state

    return Train(Recipe.from_dict(read_training_state(resume)["recipe"]), resume=resume)


def _usage() -> str:
    lines = [f"  {name:<9}{(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join(
        [
            "Vision models at any patch size, down to a single pixel.",
            "",
            "patchscale COMMAND ...",
            *lines,
            "",
            "patchscale COMMAND --help",
        ]
    )


def _fail(message: str, status: int) -> int:
    _err.print(f"patchscale: {message}", highlight=False, markup=False)
    return status


def _note(text: str) -> None:
    _err.print(f"note: {text}", highlight=False, markup=False)


def _progress_bar() -> Progress:
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[left]}"),
    ]
    return Progress(*columns, console=_err, transient=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _open_image(path: Path, mode: str):
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except FileNotFoundError as e:
        raise UserError(f"no such image: {path}") from e
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(f"cannot read {path} as an image: {e}") from e


def _imagenet_names(num_classes: int) -> list[str]:
    from timm.data import ImageNetInfo

    if num_classes != 1000:
        return [f"class {i}" for i in range(num_classes)]
    info = ImageNetInfo()
    return [info.index_to_description(i) for i in range(1000)]


if __name__ == "__main__":
    sys.exit(main())
