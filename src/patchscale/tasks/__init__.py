"""What a backbone is trained to do: a task owns its head, loss, metrics and data contract."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

from PIL import Image
from torch import Tensor, nn

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Literal["cross-entropy", "bce"]


class Scores(Protocol):
    """What an evaluation found; as a text, what a user is told."""

    @property
    def images(self) -> int:
        """On how many."""

    @property
    def quality(self) -> float:
        """The more, the better: a run keeps the checkpoint that has most."""

    def to_row(self) -> dict[str, float]:
        """What is logged, by the names of ``metrics.jsonl``."""


class Task(Protocol):
    """What the training loop asks of a task."""

    @property
    def scores_type(self) -> Callable[..., Any]:
        """Makes scores of the fields that a checkpoint holds."""

    def augment(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A step's images (n, channels, height, width) and labels (n,), as the loss takes them: (n, ...) each.

        Whatever is drawn at random is drawn here, for all images of a step, by the global generators.
        """

    def loss(self, model: Callable[..., Any], images: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of some of what :meth:`augment` gave."""

    def evaluate(self, model: nn.Module, batches: Batches) -> Any:
        """The scores of (images, labels) batches, over all processes; an image of label -1 does not count."""

    def picture(self, model: nn.Module, images: Tensor, mean: Any, std: Any) -> Image.Image | None:
        """What the model makes of images, each channel normalised by mean and std; None if there is nothing to see."""
