"""Files that exist whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.errors import UserError


@contextmanager
def readable_errors(path: Path) -> Iterator[None]:
    """Turns an OSError inside (no room, no permission, a file in the way, ...) into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes | str) -> None:
    """Writes `content` under a temporary name and renames it: a reader sees the old file or the new one.

    Raises:
        UserError: it could not be written; the old file, if any, is untouched and nothing else is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with readable_errors(path):
        try:
            write_synced(temporary, content.encode() if isinstance(content, str) else content)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
