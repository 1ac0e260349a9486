"""Files written whole: a reader, or the process after a killed one, sees the old content or the new, never a part."""

import os
from pathlib import Path


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
