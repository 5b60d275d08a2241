"""What one optimiser step does to a model: groups, schedule, accumulation, clipping, AdamW, moving average."""

import contextlib
import fnmatch
import math
from collections.abc import Callable, Iterable

import torch
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from patchscale.errors import UserError
from patchscale.train.processes import Processes
from patchscale.train.recipe import Recipe

LR_BATCH = 512
"""Images a step that a scaled learning rate is stated for (published code, main.py)."""


def peak_lr(recipe: Recipe) -> float:
    """The highest learning rate of a run; the published linear rule, lr * global_batch / 512, unless unscaled."""
    return recipe.lr if recipe.unscale_lr else recipe.lr * recipe.global_batch / LR_BATCH


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Take parameters out of training by name, with shell wildcards: ``patch_embed.*``, ``layers.[0-3].*``.

    Raises:
        UserError: a pattern that no parameter has, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        found = fnmatch.filter(parameters, pattern)
        if not found:
            tops = sorted({name.split(".")[0] for name in parameters})
            raise UserError(f"--freeze {pattern!r} is no parameter's name; names begin with {', '.join(tops)}")
        for name in found:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError(f"--freeze {' '.join(patterns)} leaves nothing to train")


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with the published groups.

    A group is a depth (patches and tables first, then each block, then the last norm and the head) and whether it
    decays: parameters of one dimension, positions and the class token do not. Depth i of n learns at
    ``layer_decay ** (n - i)`` times the rate, warm-up and lowest rate included.
    """
    skipped = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_layer_decay(
        model, recipe.weight_decay, no_weight_decay_list=skipped, layer_decay=recipe.layer_decay
    )
    return torch.optim.AdamW(groups, lr=peak_lr(recipe), betas=recipe.betas, fused=True)


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> Callable[[int], None]:
    """Linear warm-up, then half a cosine over the whole run, counted from the start of the warm-up.

    Args:
        optimizer: its groups' rates are set, times their ``lr_scale``.
        recipe: ``schedule="step"`` sets the rate before every step. ``"published"`` does what the published code does:
            one rate an epoch, that of the epoch before; the first two epochs both run at the start of the warm-up, the
            last value is never used, nor is there a cooldown.
        steps_per_epoch: optimiser steps.

    Returns:
        A function that sets the rates for a step, numbered from 0 over the run.
    """
    warmup = min(5, recipe.epochs / 10) if recipe.warmup_epochs is None else recipe.warmup_epochs
    by_epoch = recipe.schedule == "published"
    unit = 1 if by_epoch else steps_per_epoch
    cosine = CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs * unit,
        lr_min=recipe.min_lr,
        warmup_t=warmup if by_epoch else int(warmup * unit),  # type: ignore[arg-type]  # a length, whole or not
        warmup_lr_init=recipe.warmup_lr,
        t_in_epochs=by_epoch,
    )
    if by_epoch:
        return lambda step: cosine.step(max(step // steps_per_epoch - 1, 0))
    return cosine.step_update


class Updates:
    """A model's optimiser, schedule and moving average, and the step that moves them on.

    Args:
        model: on its device; frozen parameters are left out. It may be divided over the processes.
        recipe: the run.
        steps_per_epoch: optimiser steps.
        processes: of the run.
        parts: in how many parts a step's images are done.

    Attributes:
        model: to be called in training, so that gradients are those of all processes.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, steps_per_epoch: int, processes: Processes, parts: int = 1
    ) -> None:
        self.processes, self.clip_grad, self.parts = processes, recipe.clip_grad, parts
        self.plain = model
        # As published: no warm-up of the decay, starting from the weights that the run starts from.
        self.ema = None if recipe.ema_decay is None else ModelEmaV3(model, recipe.ema_decay)
        if self.ema is not None:
            processes.divide(self.ema.module)
        self.model = processes.fabric.setup_module(model)
        self.optimizer = make_optimizer(model, recipe)
        self.set_rates = make_schedule(self.optimizer, recipe, steps_per_epoch)
        self._stepper = processes.fabric.setup_optimizers(self.optimizer)
        # A gradient is made where a freed activation has left room, which then cannot be used whole again: on a CPU the
        # next part took 1.4 times the memory. So gradients get a place of their own, before there are activations: 1.3
        # times (Adventurer-Tiny, 784 tokens, glibc; both vary by 0.05 with where the heap begins).
        scattered = parts > 1 and processes.fabric.device.type == "cpu" and not processes.together
        trained = [p for p in model.parameters() if p.requires_grad] if scattered else []
        self._places = [(parameter, torch.empty_like(parameter, requires_grad=False)) for parameter in trained]

    @property
    def lr(self) -> float:
        """The highest rate of any group."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def step(self, step: int, images: Tensor, targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
        """One optimiser step.

        Args:
            step: its number from 0 over the run, for the schedule.
            images: this process's, (n, channels, height, width).
            targets: (n, ...).
            loss: the mean loss of some of them, by ``self.model``.

        Returns:
            The mean loss over the images of all processes; where that is not finite, nothing was updated.
        """
        self.set_rates(step)
        fabric, total = self.processes.fabric, 0.0
        divided = list(zip(images.chunk(self.parts), targets.chunk(self.parts), strict=True))
        for number, (part, part_targets) in enumerate(divided, start=1):
            # Gradients are summed over processes once, with the last part.
            early = self.processes.together and number < len(divided)
            with fabric.no_backward_sync(self.model) if early else contextlib.nullcontext():
                share = loss(part, part_targets) * (len(part) / len(images))
                fabric.backward(share)
            self._put_gradients_in_place()
            total += share.item()
        mean = self.processes.total(total)[0] / self.processes.count
        if math.isfinite(mean):
            if self.clip_grad is not None:
                fabric.clip_gradients(self.model, self.optimizer, max_norm=self.clip_grad, error_if_nonfinite=False)
            self._stepper.step()
            if self.ema is not None:
                self.ema.update(self.plain)
        self.optimizer.zero_grad()
        return mean

    def _put_gradients_in_place(self) -> None:
        for parameter, place in self._places:
            if parameter.grad is not None and parameter.grad is not place:
                parameter.grad = place.copy_(parameter.grad)
