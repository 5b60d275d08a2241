"""Image classification: its loss, with mixup and cutmix, and its metrics."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from patchscale.errors import UserError


@dataclass(frozen=True)
class Scores:
    """Accuracies in percent and mean cross entropy in nats over a number of images."""

    top1: float
    top5: float
    loss: float
    images: int

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2f}%, top-5 {self.top5:.2f}%, loss {self.loss:.4f} over {self.images:,} images"


class Classification:
    """The training loss and the evaluation of a classifier.

    Args:
        num_classes: how many.
        smoothing: share of the target spread over all classes.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none. With both, each batch gets one of them at even odds, as published.

    Raises:
        UserError: a smoothing outside [0, 1), a negative alpha.
    """

    def __init__(self, num_classes: int, smoothing: float = 0.0, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        if not 0 <= smoothing < 1:
            raise UserError(f"smoothing is {smoothing}, expected 0 up to but not including 1")
        if mixup < 0 or cutmix < 0:
            raise UserError(f"mixup and cutmix are {mixup} and {cutmix}, expected 0 (off) or more")
        self.mixup = (
            Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes) if mixup or cutmix else None
        )
        self.smoothing = 0.0 if self.mixup else smoothing  # mixup puts it into its soft targets

    def augment(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch: images (n, channels, height, width), labels (n,) or, mixed, (n, num_classes)."""
        if self.mixup is None:
            return images, labels
        even = len(images) // 2 * 2  # images are mixed in pairs
        return self.mixup(images[:even], labels[:even])

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy, in nats."""
        return F.cross_entropy(_float(model(images)), targets, label_smoothing=self.smoothing)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Scores:
        """Score a model, in evaluation mode, on (images, labels) batches; each image counts once.

        Raises:
            UserError: there is no image.
        """
        training = model.training
        model.eval()
        top1 = top5 = loss = images_seen = 0.0
        for images, labels in batches:
            logits = _float(model(images))
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            top1 += best[:, 0].sum().item()
            top5 += best.sum().item()
            images_seen += len(labels)
        model.train(training)
        if not images_seen:
            raise UserError("there is no readable image to evaluate on")
        share = 100 / images_seen
        return Scores(top1 * share, top5 * share, loss / images_seen, int(images_seen))


def _float(logits: Tensor) -> Tensor:
    """In float32, or more where they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
