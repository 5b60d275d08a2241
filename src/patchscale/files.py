"""Writing files so that none is ever half-written, and which checkout this package's own are of."""

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from patchscale.errors import UserError, first_line


def make_folder(folder: Path) -> None:
    """Make a folder and see that files can be written to it.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror}; choose another place") from e


def write_atomically(
    path: Path, write: Callable[[Path], object], before: Callable[[Path], object] | None = None
) -> None:
    """Call ``write`` with a temporary name, flush it to disk and rename it, so that ``path`` is never half-written.

    Args:
        path: the file.
        write: told the temporary name.
        before: called with the temporary name once the file is complete, before it is renamed.

    Raises:
        UserError: the file system refuses (a full disk, say); ``path`` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if before is not None:
            before(temporary)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e}") from e
    except (RuntimeError, SafetensorError) as e:  # torch's and safetensors' words for a full disk
        raise UserError(f"cannot write {path}: {first_line(e)}") from e
    finally:
        temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Make a rename last; where folders cannot be flushed (Windows) the system does it in its own time."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def checkout() -> tuple[str, bool] | None:
    """The commit of the checkout that this package is of, and whether its files differ; None elsewhere."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        # An environment within a user's own repository is not a checkout of this one: git must know the package.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no", "--", "."))
    except (OSError, subprocess.SubprocessError):
        return None
