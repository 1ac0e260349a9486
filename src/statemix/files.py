"""Files written whole, in folders of one process.

A reader, or the process after a killed one, sees the old content or the new, never a part.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file in one operation of the file system; if that fails, the old file is as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        sync(partial)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file is on the disk: a rename must not get there first."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def make_folder(path: str | Path, owner: str) -> Path:
    """The folder at a path, made if it is not there.

    Raises:
        ValueError: the path is a file, or cannot be made or written to; in the name of `owner`.
    """
    if not str(path):
        raise ValueError(f"{owner}: `out` must be the path of a folder, got ''.")
    folder = Path(path)
    rule = f"{owner}: `out` must be a folder that can be written to, but '{path}'"
    try:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{owner}: `out` must be a folder, but '{path}' is a file.")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{rule} cannot be made: {error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{rule} cannot.")
    return folder


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """While it lasts no other process gets past here for this folder; the end of the process ends it too.

    Two processes in one run folder would delete each other's checkpoints. The lock is on the folder itself and leaves
    no file. Where the system has none (Windows, some network file systems) nothing is locked.

    Raises:
        ValueError: another process has the folder; the message begins with `what`.
    """
    descriptor = None if fcntl is None else os.open(path, os.O_RDONLY)
    try:
        if descriptor is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"{what} must be a folder of its own, but another process is at work in '{path}'. "
                    "Wait for it, or use another folder."
                ) from error
            except OSError:
                pass
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
