"""The training loop, for one device."""

import contextlib
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from patchscale.data.sampling import EpochSampler, seed_words
from patchscale.data.sources import Unreadable
from patchscale.errors import TrainingStopped, UserError
from patchscale.files import write_atomically
from patchscale.tasks.classification import Scores
from patchscale.train.build import (
    create_model,
    make_loader,
    make_task,
    make_teacher,
    model_arguments,
    open_sources,
    preprocessing_for,
    refuse_or_note,
    run_folder,
    start_from,
    training_transform,
)
from patchscale.train.checkpoint import BEST, LAST, read_training_state, save_checkpoint
from patchscale.train.device import autocast, resolve_device
from patchscale.train.optimiser import Updates, freeze, split_batch
from patchscale.train.recipe import Recipe


@dataclass(frozen=True)
class Progress:
    """Where a run is; given to the observer after every step."""

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class EpochReport:
    """One row of ``metrics.jsonl``."""

    epoch: int
    step: int
    train_loss: float
    lr: float
    seconds: float
    images_per_second: float
    scores: Scores
    ema_scores: Scores | None

    def to_dict(self) -> dict[str, Any]:
        """Flat and plain, for JSON."""
        row = {k: v for k, v in asdict(self).items() if not isinstance(v, dict) and v is not None}
        for prefix, scores in (("", self.scores), ("ema_", self.ema_scores)):
            if scores is not None:
                row |= {f"{prefix}top1": scores.top1, f"{prefix}top5": scores.top5, f"{prefix}val_loss": scores.loss}
        return row


class Observer:
    """Told what happens in a run; every method does nothing unless overridden."""

    def note(self, text: str) -> None:
        """Something a user should know."""

    def progress(self, progress: Progress) -> None:
        """After every training step and every evaluated batch."""

    def epoch(self, report: EpochReport) -> None:
        """After every epoch."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    reports: tuple[EpochReport, ...]
    folder: Path
    best_epoch: int
    parameters: int

    @property
    def scores(self) -> Scores:
        """Of the last epoch."""
        return self.reports[-1].scores


def train(recipe: Recipe, resume: Path | None = None, observer: Observer | None = None) -> Result:
    """Train a classifier as the recipe says.

    The run's folder gets ``recipe.json``, ``metrics.jsonl``, TensorBoard's files, and the checkpoints ``last.pt`` and
    ``best.pt``. Random numbers depend on the seed, the epoch and the step alone, so that a run that is resumed after
    any epoch ends with the weights it would have had.

    Args:
        recipe: the run.
        resume: a run's folder or checkpoint to go on from.
        observer: told what happens.

    Raises:
        UserError: something in the recipe is wrong.
        TrainingStopped: the loss is not finite.
    """
    return _Run(recipe, resume, observer or Observer()).run()


class _Run:
    def __init__(self, recipe: Recipe, resume: Path | None, observer: Observer) -> None:
        self.recipe, self.observer = recipe, observer
        state = None if resume is None else read_training_state(resume)
        self.device = resolve_device(recipe.device)
        self.folder = run_folder(recipe, resume)
        train_source, val_source = open_sources(recipe)
        if val_source.note:
            observer.note(val_source.note)
        sampler = EpochSampler(len(train_source), recipe.seed, recipe.repeated_aug)
        batch, parts = split_batch(recipe.global_batch, recipe.device_batch)
        if batch > len(sampler):
            raise UserError(
                f"--global-batch is {recipe.global_batch}, more than the {len(sampler)} images to train on in an epoch"
            )

        _seed(recipe.seed, 0, 0)
        self.model_args = model_arguments(recipe, train_source)
        model = create_model(recipe.model, self.model_args)
        self.resized = {} if state is None else state["resized"]
        if recipe.weights is not None and state is None:
            self.resized = start_from(model, recipe, observer.note)
        if recipe.grad_checkpointing:
            model.set_grad_checkpointing()
        freeze(model, recipe.freeze)
        self.dtype = torch.float64 if recipe.precision == "64-true" else torch.float32
        self.model = model.to(self.device, self.dtype)
        self.classes = train_source.classes
        self.preprocessing = preprocessing_for(recipe, model, train_source)
        teacher = make_teacher(recipe, self.classes, self.preprocessing)
        self.task = make_task(recipe, len(self.classes), teacher and teacher.to(self.device, self.dtype))
        augmented = training_transform(recipe, self.preprocessing)
        evaluated = self.preprocessing.transform()
        self.sampler = sampler
        self.train_loader = make_loader(train_source, augmented, batch, recipe.workers, self.device, sampler)
        self.val_loader = make_loader(
            val_source, evaluated, min(batch, recipe.images_at_once), recipe.workers, self.device
        )
        self.unreadable: set[Unreadable] = set()

        self.steps_per_epoch = len(self.train_loader)
        self.updates = Updates(self.model, recipe, self.steps_per_epoch, parts)
        self.ema = self.updates.ema
        self.start_epoch, self.best_top1, self.best_epoch = 0, -1.0, 0
        self.reports: list[EpochReport] = []

        if state is not None:
            self._restore(state)
        self.metrics_file = self.folder / "metrics.jsonl"
        self._begin_folder()

    def run(self) -> Result:
        from torch.utils.tensorboard import SummaryWriter

        first_step = self.start_epoch * self.steps_per_epoch
        with contextlib.closing(SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step)) as board:
            for epoch in range(self.start_epoch + 1, self.recipe.epochs + 1):
                report = self._epoch(epoch)
                self.reports.append(report)
                self._record(report, board)
                self._save(epoch, report)
                self.observer.epoch(report)
        if not self.reports:
            raise UserError(
                f"{self.folder} has already run its {self.recipe.epochs} epochs; give a larger --epochs to go on"
            )
        return Result(
            tuple(self.reports), self.folder, self.best_epoch, sum(p.numel() for p in self.model.parameters())
        )

    def _epoch(self, epoch: int) -> EpochReport:
        self.sampler.set_epoch(epoch - 1)
        self.model.train()
        start, total_loss, seen, loss = time.perf_counter(), 0.0, 0, math.nan
        first_step = (epoch - 1) * self.steps_per_epoch
        for index, (images, labels) in enumerate(self._batches(self.train_loader), start=1):
            step = first_step + index
            _seed(self.recipe.seed, epoch, index)
            loss = self._step(images, labels, step)
            total_loss += loss * len(labels)
            seen += len(labels)
            rate = seen / (time.perf_counter() - start)
            left = (self.recipe.epochs * self.steps_per_epoch - step) * self.recipe.global_batch / rate
            self.observer.progress(
                Progress("train", epoch, self.recipe.epochs, index, self.steps_per_epoch, loss, rate, left)
            )
        seconds = time.perf_counter() - start
        if not seen:
            raise UserError("there is no readable image to train on")
        scores = self._evaluate(self.model, epoch)
        ema_scores = None if self.ema is None else self._evaluate(self.ema.module, epoch)
        step, loss, rate = epoch * self.steps_per_epoch, total_loss / seen, seen / seconds
        return EpochReport(epoch, step, loss, self.updates.lr, seconds, rate, scores, ema_scores)

    def _step(self, images: Tensor, labels: Tensor, step: int) -> float:
        """One optimiser step on one batch; returns the mean loss."""
        images, targets = self.task.augment(images, labels)
        try:
            loss = self.updates.step(step - 1, images, targets, self._loss)
        except torch.OutOfMemoryError as e:
            at_a_time = -(-len(images) // self.updates.parts)
            raise UserError(
                f"{self.device} has too little memory for {at_a_time} images at a time: try --device-batch "
                f"{max(1, at_a_time // 2)} (the same result in less memory), --grad-checkpointing or "
                "--precision bf16-mixed"
            ) from e
        if not math.isfinite(loss):
            last = self.folder / LAST
            kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written yet"
            raise TrainingStopped(f"the loss is {loss} at step {step} with learning rate {self.updates.lr:.3g}; {kept}")
        return loss

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        with autocast(self.device, self.recipe.precision):
            return self.task.loss(self.model, images, targets)

    def _evaluate(self, model: nn.Module, epoch: int) -> Scores:
        steps = len(self.val_loader)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            start, seen = time.perf_counter(), 0
            for index, (images, labels) in enumerate(self._batches(self.val_loader), start=1):
                yield images, labels
                seen += len(labels)
                rate = seen / (time.perf_counter() - start)
                self.observer.progress(
                    Progress("evaluate", epoch, self.recipe.epochs, index, steps, math.nan, rate, math.nan)
                )

        with autocast(self.device, self.recipe.precision):
            return self.task.evaluate(model, batches())

    def _batches(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, unreadable in loader:
            for item in set(unreadable) - self.unreadable:
                refuse_or_note(item, self.recipe.skip_unreadable, self.observer.note)
                self.unreadable.add(item)
            if len(labels):
                yield images.to(self.device, self.dtype, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _begin_folder(self) -> None:
        write_atomically(
            self.folder / "recipe.json",
            lambda path: path.write_text(json.dumps(self.recipe.to_dict(), indent=2) + "\n"),
        )
        # Epochs after the checkpoint that the run goes on from are run again.
        rows = self.metrics_file.read_text().splitlines() if self.metrics_file.exists() else []
        kept = [row for row in rows if json.loads(row)["epoch"] <= self.start_epoch]
        write_atomically(self.metrics_file, lambda path: path.write_text("".join(row + "\n" for row in kept)))

    def _record(self, report: EpochReport, board: Any) -> None:
        row = report.to_dict()
        with open(self.metrics_file, "a") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name not in ("epoch", "step"):
                board.add_scalar(name, value, report.step)

    def _save(self, epoch: int, report: EpochReport) -> None:
        better = report.scores.top1 > self.best_top1
        if better:
            self.best_top1, self.best_epoch = report.scores.top1, epoch
        state = {
            "model": self.model.state_dict(),
            "model_ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.updates.optimizer.state_dict(),
            "epoch": epoch,
            "best_top1": self.best_top1,
            "best_epoch": self.best_epoch,
            "scores": asdict(report.scores),
            "ema_scores": None if report.ema_scores is None else asdict(report.ema_scores),
            "recipe": self.recipe.to_dict(),
            "model_name": self.recipe.model,
            "model_args": self.model_args,
            "resized": self.resized,
            "preprocessing": asdict(self.preprocessing),
            "classes": list(self.classes),
        }
        if better:
            save_checkpoint(self.folder / BEST, {k: v for k, v in state.items() if k != "optimizer"})
        save_checkpoint(self.folder / LAST, state)

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(state["model"])
            self.updates.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None and state["model_ema"] is not None:
                self.ema.module.load_state_dict(state["model_ema"])
        except (RuntimeError, ValueError) as e:
            raise UserError(f"cannot resume: the checkpoint is of another model: {str(e).splitlines()[-1]}") from e
        self.start_epoch = state["epoch"]
        self.best_top1, self.best_epoch = state["best_top1"], state["best_epoch"]


def _seed(seed: int, epoch: int, step: int) -> None:
    """Seed mixing, drop path and whatever else is drawn here: a step's random numbers follow from its place alone."""
    number = int(seed_words(seed, epoch, step)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
