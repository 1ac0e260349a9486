"""Files written whole, in folders of one process, and manifests that show whether they are still as they were written.

A reader, or the process after a killed one, sees the old content or the new, never a part.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from statemix import records

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST_FILE = "manifest.json"  # written after the files that it is of
MANIFEST = {"sha256": {str: str}}


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file in one operation of the file system; if that fails, the old file is as it was."""
    partial = partial_of(path)
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def partial_of(path: Path) -> Path:
    """A name beside a path for what is not whole yet, which nobody can foresee.

    It is to be made exclusively, by mode "x" or `mkdir`: a link that was planted there is then an error, not a way to
    another file.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def delete_partials(folder: Path, names: str) -> None:
    """Delete what killed processes left in a folder of `partial_of`, for names that match a regular expression."""
    for path in list(folder.iterdir()):
        if re.fullmatch(rf"\.({names})\.[0-9a-f]{{16}}\.partial", path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file is on the disk: a rename must not get there first."""
    with path.open("r+b") as file:  # Windows syncs only what may be written to
        os.fsync(file.fileno())


def digest_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_of(digests: Mapping[str, str]) -> bytes:
    """The content of a manifest.json: the sha256 of files beside it, by their names."""
    return (json.dumps({"sha256": dict(digests)}, indent=2) + "\n").encode()


def check_manifest(folder: Path, names: Iterable[str], owner: str, *, every: bool = False) -> None:
    """Raise ValueError unless the files of a folder are, bit for bit, those of its manifest.json.

    Args:
        folder: with the manifest.
        names: the files that matter.
        every: all others that the manifest has matter, too.
        owner: begins the message, which names the first file that is not as it was written.
    """
    if not folder.is_dir():
        raise ValueError(f"{owner}: '{folder}' is missing.")
    path = folder / MANIFEST_FILE
    try:
        digests = records.read(path, MANIFEST, owner)["sha256"]
    except FileNotFoundError as error:
        raise ValueError(f"{owner}: '{folder}' has no {MANIFEST_FILE}: it is of an older version.") from error
    for name in dict.fromkeys([*names, *(digests if every else ())]):
        if name not in digests:
            raise records.damaged(owner, path, f"`sha256` has no '{name}'")
        try:
            if digest_of(folder / name) == digests[name]:
                continue
        except FileNotFoundError as error:
            raise ValueError(f"{owner}: '{folder / name}' is missing, which {MANIFEST_FILE} has.") from error
        except OSError as error:
            raise ValueError(f"{owner}: '{folder / name}' cannot be read: {error.strerror}.") from error
        raise records.damaged(owner, folder / name, f"its sha256 is not the one in {MANIFEST_FILE}")


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
