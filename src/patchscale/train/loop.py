"""The training loop, for one process or many, that goes on exactly where it was stopped or killed."""

import contextlib
import functools
import math
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from patchscale.data.sampling import EpochSampler, ShareSampler, draw_patch_size, seed_words
from patchscale.data.sources import Unreadable
from patchscale.errors import Interrupted, TrainingStopped, UserError, first_line
from patchscale.files import locked, make_folder, write_atomically
from patchscale.train.build import (
    create_model,
    make_decoder,
    make_loader,
    make_task,
    make_teacher,
    model_arguments,
    open_sources,
    position_arguments,
    prepare_folder,
    preprocessing_for,
    recompute_blocks,
    refuse_or_note,
    run_folder,
    start_from,
    stop_signals,
    trained_module,
    training_transform,
)
from patchscale.train.checkpoint import BEST, LAST, join_weights, save_checkpoint, split_weights
from patchscale.train.describe import describe_run, plot_curves
from patchscale.train.device import emulates_bfloat16
from patchscale.train.logs import Logs
from patchscale.train.memory import images_that_fit, memory_here, tight
from patchscale.train.observer import EpochReport, Observer, Progress, Result
from patchscale.train.optimiser import Updates, freeze
from patchscale.train.processes import (
    Processes,
    gathered,
    images_per_process,
    load_optimizer_whole,
    load_weights_whole,
    make_fabric,
)
from patchscale.train.recipe import Recipe
from patchscale.train.resume import check_place, source_to_go_on_from, state_to_go_on_from
from patchscale.train.speed import Speed

# Between pictures of the curves, which take a quarter of a second.
_DRAW_SECONDS = 10.0
PICTURES = "reconstructions"
_SHOWN_IMAGES = 8


def train(
    recipe: Recipe,
    resume: Path | None = None,
    observer: Observer | None = None,
    override: bool = False,
    command: list[str] | None = None,
) -> Result:
    """Train as the recipe says.

    The run's folder gets ``recipe.json``, ``run.json``, ``metrics.jsonl``, ``curves.png``, what the trackers write, and
    the checkpoints ``last.pt``, ``previous.pt`` and ``best.pt``. Where the folder holds this run already, it goes on.
    One process at a time trains in a folder, or one group of processes.

    Random numbers follow from the seed and the place in the run alone. So a run that was killed, at any moment, ends
    with the weights of one that was not, to the last bit, on the same machine with as many processes.

    Args:
        recipe: the run.
        resume: a run's folder or checkpoint to go on from, instead of the recipe's ``output``.
        observer: told what happens, in the first process.
        override: go on with a recipe that differs from the one that the run began with.
        command: the command line, for the record.

    Raises:
        UserError: something in the recipe is wrong, it differs from the run's, or another process trains in the folder.
        TrainingStopped: the loss is not finite, or another process is gone.
        Interrupted: SIGTERM, SIGINT, SIGUSR1 or SIGHUP came; all is saved, and the same call goes on.
    """
    fabric = make_fabric(recipe)
    fabric.launch()
    processes = Processes(fabric)
    observer = observer if observer is not None and processes.is_first else Observer()
    try:
        with contextlib.ExitStack() as held:
            run = _Run(recipe, resume, observer, processes, override, held)
            with _stop_signals(run):
                return run.run(command)
    except Interrupted:
        raise
    except RuntimeError as e:
        error = _as_stop(e, processes)
        processes.fail(error, 1)
        raise error from e
    except UserError as e:
        processes.fail(e, 2)
        raise
    except Exception as e:
        processes.fail(e, 1)
        raise
    finally:
        processes.close()


def _as_stop(error: RuntimeError, processes: Processes) -> RuntimeError:
    """The error, or one in plain words where it comes of another process's end."""
    text = str(error)
    if isinstance(error, TrainingStopped):
        return error
    if "DataLoader worker" in text:
        return TrainingStopped(
            f"a process that reads images has died ({first_line(error)}): too little memory, perhaps; try fewer "
            "--workers. The same command goes on from the last checkpoint"
        )
    if processes.together and any(word in text for word in ("gloo", "NCCL", "Connection closed", "Connection reset")):
        return TrainingStopped(
            f"another process of the run has gone ({first_line(error)}). The same command goes on from the last "
            "checkpoint"
        )
    return error


@contextlib.contextmanager
def _stop_signals(run: "_Run") -> Iterator[None]:
    """While inside, a stop signal asks the run to end after its step; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if run.asked_to_stop:
            raise KeyboardInterrupt
        run.asked_to_stop = number

    before = {number: signal.signal(number, ask) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        resume: Path | None,
        observer: Observer,
        processes: Processes,
        override: bool,
        held: contextlib.ExitStack,
    ) -> None:
        self.recipe, self.observer, self.processes, self.held = recipe, observer, processes, held
        self.device, self.asked_to_stop = processes.device, 0
        self.folder: Path = processes.tell(run_folder(recipe, resume) if processes.is_first else None)
        # Before anything in it is read; a new run makes its folder only once nothing can be refused any more.
        self.is_new = not self.folder.is_dir()
        if processes.is_first and not self.is_new:
            held.enter_context(locked(self.folder))
        if recipe.precision == "bf16-mixed" and emulates_bfloat16(self.device):
            observer.note("this processor has no instructions for bfloat16: --precision 32-true is faster here")
        if (recipe.warmup_epochs or 0) >= recipe.epochs:
            observer.note(
                f"the learning rate never reaches its peak: it warms up for {recipe.warmup_epochs:g} epochs, and the "
                f"run has {recipe.epochs}; --warmup-epochs 0 starts at the peak"
            )
        source = processes.tell(source_to_go_on_from(self.folder, resume) if processes.is_first else None)
        state = None if source is None else state_to_go_on_from(source, recipe, override, observer.note)
        train_source, val_source = open_sources(recipe)
        if val_source.note:
            observer.note(val_source.note)
        share = processes.count, processes.rank
        self.sampler = EpochSampler(len(train_source), recipe.seed, recipe.repeated_aug, *share)
        self.batch = images_per_process(recipe.global_batch, processes.count)
        if self.batch == 1 and (recipe.mixup or recipe.cutmix):
            raise UserError(
                f"--mixup and --cutmix mix pairs of images: give --global-batch {2 * processes.count} or more"
            )
        if self.batch > len(self.sampler):
            raise UserError(
                f"--global-batch is {recipe.global_batch}, more than the {len(self.sampler) * processes.count} images "
                "to train on in an epoch"
            )

        _seed(recipe.seed, 0, 0)
        self.model_args = model_arguments(recipe, train_source)
        if state is not None and "pos_grid" in state["model_args"]:
            self.model_args["pos_grid"] = state["model_args"]["pos_grid"]
        model = create_model(recipe.model, self.model_args)
        self.resized = {} if state is None else state["resized"]
        if recipe.weights is not None and state is None:
            self.resized = start_from(model, recipe, observer.note)
            self.model_args |= position_arguments(model)
        if recipe.grad_checkpointing:
            recompute_blocks(model, recipe.keep_products)
        self.classes = train_source.classes
        self.preprocessing = preprocessing_for(recipe, model, train_source)
        module = trained_module(recipe, model)
        freeze(module, recipe.freeze)
        self.dtype = torch.float64 if recipe.precision == "64-true" else torch.float32
        self.model = module.to(self.device, self.dtype)
        self.parameters = sum(p.numel() for p in module.parameters())
        teacher = make_teacher(recipe, self.classes, self.preprocessing)
        self.task = make_task(recipe, module, len(self.classes), teacher and teacher.to(self.device, self.dtype))
        on_device = recipe.decode == "device"
        augmented = None if on_device else training_transform(recipe, self.preprocessing)
        evaluated = None if on_device else self.preprocessing.transform()
        self.decoders = [make_decoder(recipe, self.preprocessing, self.device, training) for training in (True, False)]
        self.train_loader = make_loader(train_source, augmented, self.batch, recipe.workers, self.device, self.sampler)
        at_once = self._images_at_once(model)
        self.val_loader = make_loader(
            val_source, evaluated, at_once, recipe.workers, self.device, ShareSampler(len(val_source), *share)
        )
        self.unreadable: set[Unreadable] = set()

        self.steps_per_epoch = len(self.train_loader)
        if state is not None:
            check_place(state, self.steps_per_epoch)
        self.speed = Speed(module, self.preprocessing, recipe.precision, processes, recipe.patch_sizes)
        self.updates = Updates(self.model, recipe, self.steps_per_epoch, processes, math.ceil(self.batch / at_once))
        self.ema = self.updates.ema
        self.step = self.epochs_done = 0  # optimiser steps; epochs that were evaluated too
        self.best_quality, self.best_epoch = -math.inf, 0
        self.loss_sum, self.seen, self.seconds = 0.0, 0, 0.0  # of the epoch up to now, over all processes
        self.scores: Any = None
        self.ema_scores: Any = None
        self.reports: list[EpochReport] = []
        self.log_state: dict[str, Any] | None = None
        if state is not None:
            self._restore(state)
        self.saved_at, self.saved_step = time.monotonic(), self.step
        self.drawn_at = -math.inf
        self.first_images: Tensor | None = None

    def _images_at_once(self, model: nn.Module) -> int:
        recipe, processes = self.recipe, self.processes
        if recipe.device_batch is not None or self.device.type != "cpu":
            return min(self.batch, recipe.images_at_once)
        memory = memory_here() // processes.count
        fit = images_that_fit(
            model, self.preprocessing.img_size, self.batch, recipe.precision, recipe.patch_sizes, memory
        )
        if not fit:
            self.observer.note(tight(memory))
        elif fit < self.batch:
            self.observer.note(
                f"{self.batch:,} images at a time may need more than half of the {memory / 2**30:.3g} GiB of memory: "
                f"a step takes {fit} at a time, with the same result (--device-batch says otherwise)"
            )
        return max(1, fit)

    def run(self, command: list[str] | None) -> Result:
        recipe = self.recipe
        if self.processes.is_first:
            make_folder(self.folder)
            if self.is_new:
                self.held.enter_context(locked(self.folder))
            prepare_folder(self.folder)
            describe_run(self.folder, recipe.to_dict(), command, recipe.trackers, self.processes.count)
        if self.epochs_done >= recipe.epochs:
            self.observer.note(f"{self.folder} is finished: it has run its {recipe.epochs} epochs")
            return self._result()
        if self.step:
            self.observer.note(f"going on in {self.folder} after step {self.step:,} of {self._steps:,}")
        self.logs = Logs(
            self.folder,
            trackers=recipe.trackers,
            config=recipe.to_dict(),
            name=self.folder.name,
            state=self.log_state,
            step=self.step,
            active=self.processes.is_first,
            note=self.observer.note,
        )
        finished = False
        try:
            for epoch in range(self.epochs_done + 1, recipe.epochs + 1):
                self._train_epoch(epoch)
                self._finish_epoch(epoch)
            finished = True
        finally:
            self.logs.close(finished)
        self.processes.wait()
        return self._result()

    @property
    def _steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    def _result(self) -> Result:
        assert self.scores is not None
        is_first = self.processes.is_first
        return Result(tuple(self.reports), self.scores, self.folder, self.best_epoch, self.parameters, is_first)

    def _train_epoch(self, epoch: int) -> None:
        """The steps of an epoch that are still to do."""
        done = self.step - (epoch - 1) * self.steps_per_epoch
        self.sampler.go_to(epoch - 1, done * self.batch)
        self.model.train()
        self.speed.start()
        batches = self._batches(self.train_loader) if done < self.steps_per_epoch else iter(())
        for index, (images, labels) in enumerate(batches, start=done + 1):
            if self.recipe.skip_unreadable and self.processes.total(not len(labels))[0]:
                self.step += 1  # all processes pass over it: they learn together
                self.observer.note(f"passed over step {self.step:,}: none of its {self.batch} images can be read")
                continue
            self.speed.has_images()
            _seed(self.recipe.seed, epoch, index, self.processes.rank)
            self.patch_size = draw_patch_size(self.recipe.patch_sizes, self.recipe.seed, epoch, index)
            loss = self._step(images, labels)
            count = len(labels) * self.processes.count
            self.loss_sum += loss * count
            self.seen += count
            self.seconds += self.speed.did(count)
            self._show(epoch, index, loss)
            self._stop_or_save()

    def _step(self, images: Tensor, labels: Tensor) -> float:
        """One optimiser step on this process's part of a batch; returns the mean loss over all processes'."""
        images, targets = self.task.augment(images, labels)
        try:
            loss = self.updates.step(self.step, images, targets, self._loss)
        except torch.OutOfMemoryError as e:
            at_a_time = -(-len(images) // self.updates.parts)
            raise UserError(
                f"{self.device} has too little memory for {at_a_time} images at a time: try --device-batch "
                f"{max(1, at_a_time // 2)} (the same result in less memory), --grad-checkpointing or "
                "--precision bf16-mixed"
            ) from e
        self.step += 1
        if not math.isfinite(loss):
            last = self.folder / LAST
            kept = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written yet"
            raise TrainingStopped(
                f"the loss is {loss} at step {self.step} with learning rate {self.updates.lr:.3g}; {kept}"
            )
        return loss

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        model: Any = self.updates.model
        if self.patch_size is not None:
            model = functools.partial(model, patch_size=self.patch_size)
        with self.processes.fabric.autocast():
            return self.task.loss(model, images, targets)

    def _show(self, epoch: int, index: int, loss: float) -> None:
        left = (self._steps - self.step) * self.recipe.global_batch / self.speed.images_per_second
        speed = self.speed
        progress = Progress(
            "train",
            epoch,
            self.recipe.epochs,
            index,
            self.steps_per_epoch,
            loss,
            speed.images_per_second,
            left,
            speed.waiting,
            speed.memory,
            speed.utilisation,
        )
        self.observer.progress(progress)
        self.logs.step(
            self.step,
            {"loss": loss, "lr": self.updates.lr, "images_per_second": self.speed.images_per_second},
        )
        if self.speed.loader_is_slow():
            self.observer.note(
                f"{self.speed.waiting:.0%} of the time goes by waiting for images: more --workers may help"
            )

    def _stop_or_save(self) -> None:
        """What all processes agree to do between two steps."""
        old = time.monotonic() - self.saved_at >= 60 * self.recipe.save_minutes
        due = self.processes.is_first and old and self.step > self.saved_step
        stop, save = self.processes.total(self.asked_to_stop > 0, due)
        if stop or save:
            self._save()
        if stop:
            name = signal.Signals(self.asked_to_stop).name if self.asked_to_stop else "a signal to another process"
            raise Interrupted(
                f"stopped by {name} after step {self.step:,}, saved in {self.folder}; the same command goes on"
            )

    def _finish_epoch(self, epoch: int) -> None:
        if not self.seen:
            raise UserError(f"none of the images of epoch {epoch} can be read")
        if not self.saved_step:  # before results are written, so that they never lie beside no state to go on from
            self._save()
        scores = self._evaluate(self.model, epoch)
        ema_scores = None if self.ema is None else self._evaluate(self.ema.module, epoch)
        report = EpochReport(
            epoch, self.step, self.loss_sum / self.seen, self.updates.lr, self.seconds, self.seen / self.seconds,
            scores, ema_scores,
        )  # fmt: skip
        self.scores, self.ema_scores, self.epochs_done = scores, ema_scores, epoch
        self.loss_sum, self.seen, self.seconds = 0.0, 0, 0.0
        self.reports.append(report)
        self.logs.epoch(self.step, report.to_dict())
        now = time.monotonic()
        if self.processes.is_first and (epoch == self.recipe.epochs or now - self.drawn_at > _DRAW_SECONDS):
            self.drawn_at = now
            plot_curves(self.folder)
        self._draw(epoch)
        better = scores.quality > self.best_quality
        if better:
            self.best_quality, self.best_epoch = scores.quality, epoch
        keep = self.recipe.keep_epochs is not None and epoch % self.recipe.keep_epochs == 0
        self._save(*([BEST] * better), *([f"epoch_{epoch:04}.pt"] * keep))
        self.observer.epoch(report)

    def _evaluate(self, model: nn.Module, epoch: int) -> Any:
        steps = len(self.val_loader)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            start, seen = time.perf_counter(), 0
            for index, (images, labels) in enumerate(self._batches(self.val_loader), start=1):
                if len(labels):
                    if self.first_images is None:
                        self.first_images = images[:_SHOWN_IMAGES]
                    yield images, labels
                else:  # processes that share weights have to call the model equally often
                    blank = self.preprocessing.channels, *self.preprocessing.img_size
                    yield images.new_zeros(1, *blank), labels.new_full((1,), -1)
                seen += len(labels) * self.processes.count
                rate = seen / (time.perf_counter() - start)
                self.observer.progress(
                    Progress("evaluate", epoch, self.recipe.epochs, index, steps, math.nan, rate, math.nan)
                )
                self._stop_or_save()

        with self.processes.fabric.autocast():
            return self.task.evaluate(model, batches())

    def _draw(self, epoch: int) -> None:
        """Show what the model makes of the first validation images, ten times in a run, if the task has a picture."""
        if self.first_images is None or (epoch % max(1, self.recipe.epochs // 10) and epoch != self.recipe.epochs):
            return
        with self.processes.fabric.autocast():  # by all processes: they may share the weights
            mean, std = self.preprocessing.mean, self.preprocessing.std
            picture = self.task.picture(self.model, self.first_images, mean, std)
        if picture is not None and self.processes.is_first:
            make_folder(self.folder / PICTURES)
            path = self.folder / PICTURES / f"epoch_{epoch:04}.png"
            write_atomically(path, lambda temporary: picture.save(temporary, format="png"))

    def _batches(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
        decoder = self.decoders[loader is self.val_loader]
        for images, labels, unreadable in loader:
            if decoder is not None:
                images, labels, broken = decoder(images, labels)
                unreadable += broken
            for item in set(unreadable) - self.unreadable:
                refuse_or_note(item, self.recipe.skip_unreadable, self.observer.note)
                self.unreadable.add(item)
            yield images.to(self.device, self.dtype, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _save(self, *others: str) -> None:
        """Write the last checkpoint, and the same under other names, less what is for going on alone."""
        weights, added = split_weights(self.model, gathered(self.model.state_dict()))
        average, added_to_average = None, None
        if self.ema is not None:
            average, added_to_average = split_weights(self.ema.module, gathered(self.ema.module.state_dict()))
        state = {
            "model": weights,
            "model_ema": average,
            "task": {"model": added, "ema": added_to_average},
            "optimizer": gathered(self.updates.optimizer.state_dict()),
            "scaler": self.processes.fabric.strategy.precision.state_dict(),
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "epoch": self.epochs_done,
            "loss_sum": self.loss_sum,
            "seen": self.seen,
            "seconds": self.seconds,
            "best_quality": self.best_quality,
            "best_epoch": self.best_epoch,
            "scores": None if self.scores is None else asdict(self.scores),
            "ema_scores": None if self.ema_scores is None else asdict(self.ema_scores),
            "logs": self.logs.state(),
            "recipe": self.recipe.to_dict(),
            "model_name": self.recipe.model,
            "model_args": self.model_args,
            "resized": self.resized,
            "preprocessing": asdict(self.preprocessing),
            "classes": list(self.classes),
        }
        if self.processes.is_first:
            for name in others:
                save_checkpoint(self.folder / name, {k: v for k, v in state.items() if k != "optimizer"})
            save_checkpoint(self.folder / LAST, state)
        self.saved_at, self.saved_step = time.monotonic(), self.step

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            added = state.get("task", {})
            load_weights_whole(self.model, join_weights(self.model, state["model"], added.get("model")))
            load_optimizer_whole(self.updates.optimizer, state["optimizer"])
            if self.ema is not None:
                # A run that kept no average until now begins it with the weights that it has come to.
                kind, kind_added = ("model", "model") if state["model_ema"] is None else ("model_ema", "ema")
                average = join_weights(self.ema.module, state[kind], added.get(kind_added))
                load_weights_whole(self.ema.module, average)
        except (RuntimeError, ValueError, KeyError) as e:
            raise UserError(f"cannot resume: the checkpoint is of another model: {str(e).splitlines()[-1]}") from e
        if state["scaler"]:
            self.processes.fabric.strategy.precision.load_state_dict(state["scaler"])
        self.step, self.epochs_done = state["step"], state["epoch"]
        self.loss_sum, self.seen, self.seconds = state["loss_sum"], state["seen"], state["seconds"]
        self.best_epoch = state["best_epoch"]
        # Runs that began when classification was the only task say best_top1.
        self.best_quality = state["best_quality"] if "best_quality" in state else state["best_top1"]
        scores_type = self.task.scores_type
        self.scores = None if state["scores"] is None else scores_type(**state["scores"])
        self.ema_scores = None if state["ema_scores"] is None else scores_type(**state["ema_scores"])
        self.log_state = state["logs"]


def _seed(seed: int, epoch: int, step: int, rank: int = 0) -> None:
    """Seed mixing, drop path and whatever else is drawn here: a step's random numbers follow from its place alone."""
    number = int(seed_words(seed, epoch, step, rank)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
