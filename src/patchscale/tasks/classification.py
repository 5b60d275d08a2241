"""Image classification: its loss, with mixup and cutmix, and its metrics."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from patchscale.errors import UserError
from patchscale.tasks import Loss
from patchscale.tasks.distillation import Distillation


@dataclass(frozen=True)
class Scores:
    """Accuracies in percent and mean cross entropy in nats over a number of images."""

    top1: float
    top5: float
    loss: float
    images: int

    @property
    def quality(self) -> float:
        return self.top1

    def to_row(self) -> dict[str, float]:
        return {"top1": self.top1, "top5": self.top5, "val_loss": self.loss}

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2f}%, top-5 {self.top5:.2f}%, loss {self.loss:.4f} over {self.images:,} images"


class Classification:
    """The training loss and the evaluation of a classifier.

    Args:
        num_classes: how many.
        smoothing: share of the target spread over all classes.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none. With both, each batch gets one of them at even odds, as published.
        mixup_batch: images that are mixed among themselves with one draw; all that come together if None. Published:
            each GPU's batch.
        loss: ``"cross-entropy"``, or ``"bce"``, binary cross entropy for each class, where every class that is in a
            mixed image counts in full (as published).
        distillation: a teacher's part in the loss.

    Raises:
        UserError: a smoothing outside [0, 1), a negative alpha, an odd ``mixup_batch``, an unknown loss.
    """

    scores_type = Scores

    def __init__(
        self,
        num_classes: int,
        smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_batch: int | None = None,
        loss: Loss = "cross-entropy",
        distillation: Distillation | None = None,
    ) -> None:
        if not 0 <= smoothing < 1:
            raise UserError(f"smoothing is {smoothing}, expected 0 up to but not including 1")
        if mixup < 0 or cutmix < 0:
            raise UserError(f"mixup and cutmix are {mixup} and {cutmix}, expected 0 (off) or more")
        if mixup_batch is not None and (mixup_batch < 2 or mixup_batch % 2):
            raise UserError(f"mixup_batch is {mixup_batch}, expected an even number: images are mixed in pairs")
        if loss not in ("cross-entropy", "bce"):
            raise UserError(f"loss is {loss!r}, expected 'cross-entropy' or 'bce'")
        self.num_classes, self.smoothing, self.kind = num_classes, smoothing, loss
        self.mixup_batch, self.distillation = mixup_batch, distillation
        # Cross entropy takes its smoothing with the mixed targets; for "bce" they tell which classes are there at all.
        mixed_smoothing = smoothing if loss == "cross-entropy" else 0.0
        self.mixup = (
            Mixup(mixup, cutmix, label_smoothing=mixed_smoothing, num_classes=num_classes) if mixup or cutmix else None
        )

    def augment(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch: images (n, channels, height, width), labels (n,) or, mixed, (n, num_classes).

        Images are mixed in pairs; the last of an odd number stays as it is.
        """
        if self.mixup is None:
            return images, labels
        even, size = len(images) // 2 * 2, self.mixup_batch or len(images)
        groups = [slice(start, min(start + size, even)) for start in range(0, even, size)]
        parts = [self.mixup(images[group], labels[group]) for group in groups]
        if even < len(images):
            parts.append((images[even:], mixup_target(labels[even:], self.num_classes, 1, self.mixup.label_smoothing)))
        mixed, targets = zip(*parts, strict=True)
        return torch.cat(mixed), torch.cat(targets)

    def loss(self, model: Callable[[Tensor], Any], images: Tensor, targets: Tensor) -> Tensor:
        """The mean loss, in nats. A model may answer twice, for the labels and for the teacher."""
        answer = model(images)
        logits, to_teacher = map(_float, answer if isinstance(answer, tuple) else (answer, answer))
        targets = targets.to(logits.dtype) if targets.is_floating_point() else targets
        if self.kind == "bce":
            loss = self._binary_cross_entropy(logits, targets)
        else:
            smoothing = 0.0 if self.mixup else self.smoothing
            loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        return loss if self.distillation is None else self.distillation.loss(loss, images, to_teacher)

    def _binary_cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Smoothed after it is settled which classes are there; the published code smooths first: then all are."""
        if targets.ndim == 1:
            targets = F.one_hot(targets, self.num_classes)
        present = (targets > 0).to(logits.dtype)
        smoothed = present * (1 - self.smoothing) + self.smoothing / self.num_classes
        return F.binary_cross_entropy_with_logits(logits, smoothed)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Scores:
        """Score a model, in evaluation mode, on (images, labels) batches; an image of label -1 does not count.

        With several processes, each gives its share of the images, in as many batches as the others; all get the scores
        over all images.

        Raises:
            UserError: there is no image.
        """
        training = model.training
        model.eval()
        # A NaN is part of the mean: torchmetrics would leave it out. Told not to, it passes over weights too, so it is
        # given a value for each image.
        best, among_best, mean_loss = (MeanMetric(nan_strategy="disable").set_dtype(torch.float64) for _ in range(3))
        seen = SumMetric().set_dtype(torch.float64)
        metrics = [best, among_best, mean_loss, seen]
        for images, labels in batches:
            logits = _float(model(images))
            counted = labels >= 0
            logits, labels = logits[counted], labels[counted]
            for metric in metrics:
                metric.to(logits.device)
            if len(labels):
                # A NaN is torch's largest number: logits with one are wrong whatever the label.
                numbers = ~logits.isnan().any(1)
                first = logits.topk(min(5, self.num_classes), dim=1).indices
                best.update((logits.argmax(1) == labels) & numbers)
                among_best.update((first == labels[:, None]).any(1) & numbers)
                mean_loss.update(F.cross_entropy(logits, labels, reduction="none"))
            seen.update(float(len(labels)))
        model.train(training)
        for metric in metrics:
            metric._update_count = max(metric._update_count, 1)  # a share without images is no reason to warn
        images_seen = int(seen.compute())
        if not images_seen:
            raise UserError("there is no readable image to evaluate on")
        top1, top5 = (100 * accuracy.compute().item() for accuracy in (best, among_best))
        return Scores(top1, top5, mean_loss.compute().item(), images_seen)

    def picture(self, model: nn.Module, images: Tensor, mean: Any, std: Any) -> None:
        """There is nothing to see."""


def _float(logits: Tensor) -> Tensor:
    """In float32, or more where they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
