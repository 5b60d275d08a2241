"""What a run tells while it trains, and what it came to."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


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
    waiting: float = 0.0
    """Share of the time that goes by waiting for images."""
    memory: int | None = None
    """Most bytes in use on a GPU so far."""
    utilisation: float | None = None
    """Of the device's measured matrix peak, the share that the model's own FLOPs take."""


@dataclass(frozen=True)
class EpochReport:
    """One row of ``metrics.jsonl``."""

    epoch: int
    step: int
    train_loss: float
    lr: float
    seconds: float
    images_per_second: float
    scores: Any
    """Of its task: see :class:`patchscale.tasks.Scores`."""
    ema_scores: Any

    def to_dict(self) -> dict[str, Any]:
        """Flat and plain, for JSON."""
        row = {k: v for k, v in asdict(self).items() if not isinstance(v, dict) and v is not None}
        for prefix, scores in (("", self.scores), ("ema_", self.ema_scores)):
            if scores is not None:
                row |= {prefix + name: value for name, value in scores.to_row().items()}
        return row


class Observer:
    """Told what happens in a run, in its first process; every method does nothing unless overridden."""

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
    """Of the epochs that ran now; none if the run was finished before."""
    scores: Any
    """Of the last epoch."""
    folder: Path
    best_epoch: int
    parameters: int
    is_first: bool
    """Whether this is the run's first process, the one to print."""
