"""``patchscale train``, ``launch`` and ``eval``: from flags to recipes, and what is shown of a run."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.progress import Progress
from rich.table import Table

from patchscale import console
from patchscale.errors import UserError
from patchscale.train.observer import EpochReport, Observer, Result
from patchscale.train.observer import Progress as Step
from patchscale.train.recipe import Precision, Recipe

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
        with console.progress_bar() as bar:
            display, command = _Display(bar), ["patchscale", "train", *arguments]
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
    with console.progress_bar() as bar:
        for done in run_stages(
            stages,
            folder,
            given.stage,
            lambda stage: _Display(bar, f"{stage}  "),
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


def launch(arguments: list[str]) -> None:
    """Train as a Slurm job, or in the background here: launch slurm|local FLAGS -- what follows `train`."""
    from patchscale.train.launch import Local, Slurm, submit

    here = arguments.index("--") if "--" in arguments else len(arguments)
    flags, training = arguments[:here], arguments[here + 1 :]
    either: Any = Slurm | Local  # which tyro takes for a choice of commands, and its types do not say
    options = tyro.cli(either, args=flags, prog="patchscale launch", description=launch.__doc__)
    if not training:
        raise UserError(f"launch {flags[0]} what? After --, write what follows `patchscale train`: -- --recipe NAME")
    job = submit(training, options)
    console.out.print(f"job {job.job_id} trains in {job.folder}")
    console.out.print(f"watch it:  tail -F {shlex.quote(str(job.log))}")
    slurm = isinstance(options, Slurm)
    if slurm:
        console.out.print(f"its state: squeue --jobs {job.job_id}")
    console.out.print(f"stop it:   {'scancel' if slurm else 'kill'} {job.job_id}")


class _Display(Observer):
    """Notes, a line an epoch, and a progress bar."""

    def __init__(self, bar: Progress, stage: str = "") -> None:
        for old in bar.task_ids:
            bar.remove_task(old)
        self.bar, self.stage = bar, stage
        self.task = bar.add_task("", total=1, rate="", left="")

    def note(self, text: str) -> None:
        console.note(text)

    def progress(self, progress: Step) -> None:
        what = f"{self.stage}epoch {progress.epoch}/{progress.epochs}"
        what += f"  loss {progress.loss:.3f}" if progress.phase == "train" else "  evaluating"
        left = "" if math.isnan(progress.seconds_left) else f"{console.duration(progress.seconds_left)} left to train"
        if progress.utilisation is not None:
            left += f"  {progress.utilisation:.0%} of the matrix peak, {progress.waiting:.0%} waiting for images"
        if progress.memory is not None:
            left += f"  {progress.memory / 2**30:.1f} GiB"
        rate = f"{progress.images_per_second:,.0f} images/s"
        self.bar.update(
            self.task, description=what, completed=progress.step, total=progress.steps, rate=rate, left=left
        )

    def epoch(self, report: EpochReport) -> None:
        line = f"{self.stage}epoch {report.epoch}  train loss {report.train_loss:.4f}  {report.scores}"
        if report.ema_scores is not None:
            line += f"  (average of weights: {report.ema_scores})"
        console.out.print(line + f"  {report.seconds:.0f} s")


def _print_result(result: Result, stage: str = "") -> None:
    if not result.is_first:
        return
    best = next((r for r in result.reports if r.epoch == result.best_epoch), None)
    console.out.print(f"{stage}last: {result.scores}  {result.folder / 'last.pt'}")
    if best is not None:
        text = f"{stage}best: {best.scores} in epoch {best.epoch}  {result.folder / 'best.pt'}"
        console.out.print(text)


def _print_recipe(stages: dict[str, Recipe], published: dict[str, Any]) -> None:
    """The fields of each stage, those that are as in every run left out."""
    defaults = Recipe("", "").to_dict()
    for number, (stage, recipe) in enumerate(stages.items(), start=1):
        if stage:
            console.out.print(f"{number} {stage}")
        for field, value in recipe.to_dict().items():
            if value != defaults[field]:
                console.out.print(f"  {field} = {value}")
    for key, value in published.items():
        console.out.print(f"published {key}: {value}")


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
    with console.progress_bar() as bar:
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
            note=console.note,
            progress=lambda done, total: bar.update(task, completed=done, total=total, rate=f"{done:,} images"),
        )
    if found.flip_trials:
        table = Table("flip", "top-1 %", "loss", title="flip rules on a sample of the images")
        for rule, scores in found.flip_trials.items():
            table.add_row(rule + (" *" if rule == found.flip else ""), f"{scores.top1:.2f}", f"{scores.loss:.4f}")
        console.out.print(table)
    if found.by_patch:
        table = Table("patch", "patches", "GFLOP", "ms an image", "top-1 %", "top-5 %", "loss")
        for column in table.columns:
            column.justify = "right"
        for at in found.by_patch:
            gflop = "" if at.flops is None else f"{at.flops / 1e9:.3g}"
            scores = at.scores
            figures = f"{scores.top1:.2f}", f"{scores.top5:.2f}", f"{scores.loss:.4f}"
            table.add_row(str(at.patch_size), f"{at.patches:,}", gflop, f"{1e3 * at.seconds:.3g}", *figures)
        console.out.print(table)
        return
    console.out.print(str(found.scores) + (f"  (flip {found.flip})" if found.flip else ""))
    if found.recorded is not None:
        console.out.print(f"training recorded: {found.recorded}")
