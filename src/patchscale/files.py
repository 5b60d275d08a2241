"""Writing files so that none is ever half-written, nor by two processes at once."""

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from patchscale.errors import UserError, first_line

LOCK = ".lock"


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


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder, which exists, to this process while inside. The system lets go of it at the process's end.

    Where there are no such locks (Windows, some shared file systems) nothing is kept and nothing refused.

    Raises:
        UserError: another process has it.
    """
    path = folder / LOCK
    try:
        import fcntl

        file = open(path, "a+")  # noqa: SIM115
    except (ImportError, OSError):
        yield
        return
    with file:
        try:
            # Not flock: that would pass to the workers that this process forks, which outlive it by seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by {file.read() or 'another process'}: wait for it, stop it, or choose another "
                f"--output; if it is gone all the same, remove {path}"
            ) from e
        except OSError:  # a file system without locks
            pass
        with contextlib.suppress(OSError):  # a full disk: the lock is held without a name
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


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
