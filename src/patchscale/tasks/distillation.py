"""Learning from a teacher as well as from labels (DeiT, arXiv 2012.12877, section 4)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchscale.errors import UserError

Kind = Literal["soft", "hard"]
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


class Teacher(nn.Module):
    """A fixed classifier that is shown the student's images, as it was trained to see them.

    Args:
        model: images to logits, or to several of them, whose first are taken.
        student: mean and standard deviation, a number a channel each, with which the images come.
        teacher: with which the model takes them.
        img_size: size to which images are resized for it, bicubic; None if it takes any.
    """

    def __init__(
        self,
        model: nn.Module,
        student: Normalisation,
        teacher: Normalisation,
        img_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.img_size = model.requires_grad_(False), img_size
        given, wanted = ([torch.tensor(v)[:, None, None] for v in pair] for pair in (student, teacher))
        # (x * std + mean - mean') / std', in one product and one sum.
        self.register_buffer("scale", given[1] / wanted[1], persistent=False)
        self.register_buffer("shift", (given[0] - wanted[0]) / wanted[1], persistent=False)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The student's images (n, channels, height, width) -> the teacher's logits (n, num_classes)."""
        images = images * self.scale + self.shift
        if self.img_size not in (None, tuple(images.shape[2:])):
            images = F.interpolate(images, size=self.img_size, mode="bicubic", align_corners=False)
        logits = self.model(images)
        return logits[0] if isinstance(logits, tuple) else logits


class Distillation:
    """Adds the teacher's word to a loss.

    Args:
        teacher: images to logits.
        kind: ``"soft"``, the divergence from the teacher's probabilities at a temperature; ``"hard"``, the cross
            entropy to the class that the teacher finds most likely.
        alpha: the teacher's share of the loss.
        tau: the temperature.

    Raises:
        UserError: an unknown kind, an ``alpha`` outside [0, 1], a ``tau`` that is not positive.
    """

    def __init__(self, teacher: nn.Module, kind: Kind, alpha: float = 0.5, tau: float = 1.0) -> None:
        if kind not in ("soft", "hard"):
            raise UserError(f"distillation is {kind!r}, expected 'soft' or 'hard'")
        if not 0 <= alpha <= 1:
            raise UserError(f"distillation's alpha is {alpha}, expected 0 to 1")
        if not tau > 0:
            raise UserError(f"distillation's tau is {tau}, expected more than 0")
        self.teacher, self.kind, self.alpha, self.tau = teacher, kind, alpha, tau

    def loss(self, labels_loss: Tensor, images: Tensor, logits: Tensor) -> Tensor:
        """The loss of the labels and the teacher's, mixed.

        The soft one is, as published, tau^2 times the Kullback-Leibler divergence, averaged over images and classes.

        Args:
            labels_loss: a number.
            images: (n, channels, height, width).
            logits: the student's, (n, num_classes).
        """
        taught = self.teacher(images).to(logits.dtype)
        if self.kind == "hard":
            teachers_loss = F.cross_entropy(logits, taught.argmax(1))
        else:
            student, teacher = ((x / self.tau).log_softmax(1) for x in (logits, taught))
            divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
            teachers_loss = divergence * self.tau**2 / logits.numel()
        return (1 - self.alpha) * labels_loss + self.alpha * teachers_loss
