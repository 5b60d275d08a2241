"""The tidy file of a study: one row for each finished run, complete in itself, as JSON lines or CSV.

pandas reads either (``read_json(path, lines=True)``, ``read_csv(path)``). Published figures never go in here.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from patchscale.errors import UserError
from patchscale.files import make_folder, write_atomically

FILE = "results.jsonl"


# The control of models that differ in the size of their patches, of one image.
CONTROL = "scale"


@dataclass(frozen=True)
class Cell:
    """One finished run of a study. Sizes in pixels a side."""

    study: str
    family: str
    """adventurer, deit, ...: what may be compared over width."""
    model: str
    """The model's name as it was made."""
    width: int
    """Embedding dimension."""
    depth: int
    """Blocks."""
    img_size: int
    patch_size: int
    tokens: int
    """Patch tokens of one image, as the blocks see them (without the class token)."""
    seed: int
    epochs: int
    train_images: int
    top1: float
    """Percent of the test images, after the last epoch."""
    val_loss: float
    """Mean cross entropy of the test images, nats, after the last epoch."""
    train_loss: float
    """Of the last epoch, nats."""
    parameters: int
    flops_forward: float
    """Of one image."""
    flops_training: float
    """Of all the run's steps."""
    seconds: float
    """Wall clock of the run."""
    device: str
    """In words: the GPU, or the processor and its threads."""
    commit: str
    """Of this project; a plus at its end where files differed from it."""
    date: str
    """When the run ended: ISO 8601."""
    data: str
    """As ``patchscale train --data`` takes it."""
    recipe: str = ""
    """Its name, where it has one."""
    control: str = "scale"
    """scale: patches of this size. length: the image shrinks with the patch, at one number of tokens. Others as a
    study names them; the law is of scale alone."""
    held: str = "epochs"
    """What patch sizes are compared at: epochs, or flops (of the whole training)."""
    val_images: int | None = None
    ema_top1: float | None = None
    """Percent, of the weights' moving average."""
    ema_val_loss: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Every field of the recipe, as ``Recipe.to_dict`` gives it."""

    def __post_init__(self) -> None:
        for name, hint in _TYPES.items():
            value = getattr(self, name)
            if not _is(value, hint):
                raise UserError(f"{name} is {value!r}, expected {_described(hint)}")
        positive = ("width", "depth", "img_size", "patch_size", "tokens", "epochs", "train_images", "parameters")
        for name in (*positive, "flops_forward", "flops_training", "val_images"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name} is {value:g}, expected more than 0")
        for name in ("top1", "ema_top1"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 100:
                raise UserError(f"{name} is {value:g}, expected percent, 0 to 100")
        for name in ("val_loss", "ema_val_loss", "train_loss", "seconds"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"{name} is {value:g}, expected 0 or more")
        for name in ("study", "family"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty, expected a name")

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it this cell of its study and no other: all that was chosen before it ran."""
        return *self.group, self.seed

    @property
    def group(self) -> tuple[Any, ...]:
        """The same but for the seed."""
        return (
            self.study,
            self.control,
            self.held,
            self.recipe,
            self.data,
            self.family,
            self.model,
            self.width,
            self.depth,
            self.img_size,
            self.patch_size,
            self.tokens,
            self.epochs,
            self.train_images,
        )


_TYPES = get_type_hints(Cell)
COLUMNS = tuple(f.name for f in fields(Cell))


def _is(value: Any, hint: Any) -> bool:
    kinds = get_args(hint) if NoneType in get_args(hint) else (hint,)
    if value is None:
        return NoneType in kinds
    if isinstance(value, bool):
        return False
    if float in kinds:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, dict if dict in (hint, getattr(hint, "__origin__", None)) else kinds)


def _described(hint: Any) -> str:
    words = {int: "a whole number", float: "a finite number", str: "text"}
    kinds = [kind for kind in (get_args(hint) if NoneType in get_args(hint) else (hint,)) if kind is not NoneType]
    return words.get(kinds[0], "a table of settings") + (", or nothing" if NoneType in get_args(hint) else "")


def read_results(path: Path) -> list[Cell]:
    """The runs in a file, in its order.

    A last line that a killed process left unfinished is passed over: its run counts as not finished.

    Args:
        path: a .jsonl or .csv file, or a folder that holds ``results.jsonl``.

    Raises:
        UserError: no such file, none of its kind, or a row that is not whole, naming its line.
    """
    if path.is_dir():
        path = path / FILE
    if not path.exists():
        raise UserError(f"no such file of results: {path}")
    if path.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{path} is no file of results: expected .jsonl or .csv, as `patchscale sweep` writes them")
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin a file with a mark
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not text: {e}") from e
    rows = _csv_rows(path, text) if path.suffix == ".csv" else _json_rows(path, text)
    cells: list[Cell] = []
    seen: dict[tuple[Any, ...], int] = {}
    for line, row in rows:
        try:
            cell = _from_dict(row)
        except UserError as e:
            raise UserError(f"{path}, line {line}: {e}") from e
        first = seen.setdefault(cell.key, line)
        if first != line:
            raise UserError(f"{path}, line {line} is the same run as line {first}: remove one of them")
        cells.append(cell)
    if not cells:
        raise UserError(f"{path} holds no finished run yet")
    return cells


def write_results(path: Path, cells: Iterable[Cell]) -> None:
    """Write a file of results anew, JSON lines or CSV by its name.

    Raises:
        UserError: another kind of name, or the file system refuses.
    """
    if path.suffix not in (".jsonl", ".csv"):
        raise UserError(f"cannot write results to {path}: expected a name that ends in .jsonl or .csv")
    make_folder(path.resolve().parent)
    text = to_csv(cells) if path.suffix == ".csv" else "".join(_json_line(cell) for cell in cells)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))


def append_result(path: Path, cell: Cell) -> None:
    """Add a finished run to a .jsonl file, on disk when this returns; what a killed process left unfinished goes.

    For one writing process at a time.

    Raises:
        UserError: another kind of name, or the file system refuses.
    """
    if path.suffix != ".jsonl":
        raise UserError(f"cannot add to {path}: runs are added to a .jsonl file; write_results writes CSV")
    make_folder(path.resolve().parent)
    try:
        with open(path, "a+b") as file:
            file.seek(0)
            held = file.read()
            file.truncate(held.rfind(b"\n") + 1)
            file.write(_json_line(cell).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e


def to_csv(cells: Iterable[Cell]) -> str:
    """The rows as CSV with a line of names; settings as JSON in one column."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for cell in cells:
        writer.writerow(asdict(cell) | {"settings": json.dumps(cell.settings)})
    return buffer.getvalue()


def _json_line(cell: Cell) -> str:
    return json.dumps(asdict(cell)) + "\n"


def _json_rows(path: Path, text: str) -> list[tuple[int, Any]]:
    rows = []
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except ValueError as e:
            if number == len(lines):  # no line end follows: a write was cut short
                break
            raise UserError(f"{path}, line {number} is not JSON ({e}): remove or repair it") from e
    return rows


def _csv_rows(path: Path, text: str) -> list[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text))
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}, line {reader.line_num} has not as many columns as the first line")
            rows.append((reader.line_num, {name: _from_text(name, value) for name, value in row.items()}))
    except csv.Error as e:
        raise UserError(f"{path}, line {reader.line_num}: {e}") from e
    return rows


def _from_text(name: str, value: str) -> Any:
    """A CSV field as its column's type, as it is where that fails: the check of the row names it then."""
    hint = _TYPES.get(name)
    kinds = get_args(hint) if NoneType in get_args(hint) else (hint,)
    if value == "" and NoneType in kinds:
        return None
    try:
        if hint not in (str, None) and int not in kinds and float not in kinds:
            return json.loads(value or "{}")
        if int in kinds:
            return int(value)
        return float(value) if float in kinds else value
    except ValueError:
        return value


def _from_dict(row: Any) -> Cell:
    if not isinstance(row, dict):
        raise UserError(f"expected a row of named values, not {str(row)[:40]!r}")
    unknown = sorted(set(row) - set(COLUMNS))
    missing = [name for name in COLUMNS if name not in row and name in _REQUIRED]
    if unknown or missing:
        what = f"lacks {', '.join(missing)}" if missing else f"has unknown columns: {', '.join(unknown)}"
        raise UserError(f"the row {what}; expected {', '.join(COLUMNS)}")
    return Cell(**row)


_REQUIRED = COLUMNS[: COLUMNS.index("recipe")]
