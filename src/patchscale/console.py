"""What commands print on: results on standard output; notes, progress and errors on standard error."""

from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

# Names of files and classes stay what they are: [a=1] is no markup, :cat: no picture.
_PLAIN: dict[str, bool] = {"soft_wrap": True, "highlight": False, "markup": False, "emoji": False}
out = Console(**_PLAIN)  # type: ignore[arg-type]
err = Console(stderr=True, **_PLAIN)  # type: ignore[arg-type]


def note(text: str) -> None:
    """A remark beside the results."""
    err.print(f"note: {text}")


def print_whole(what: Any) -> None:
    """A line of a table that the terminal wraps is better than a number cut off."""
    if isinstance(what, Table):
        make_room(Measurement.get(out, out.options.update(max_width=1000), what).maximum)
    out.print(what)


def make_room(characters: int) -> None:
    """Lines of at least so many characters, whatever the terminal's width."""
    out.width = max(out.width, characters)


def progress_bar() -> Progress:
    """A line that is gone when it is left; its tasks have the fields ``rate`` and ``left``."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[left]}"),
    ]
    return Progress(*columns, console=err, transient=True)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03, or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
