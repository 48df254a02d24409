"""Files that are there in full or as they were, whenever the process is killed and whether or not the disk is
full.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elastic_decode.errors import StorageError

_BESIDE = ".{}.writing"


def write(path: Path, data: bytes) -> None:
    """Replace what `path` holds, or make it. Raises StorageError, with the old content still there."""
    beside = path.with_name(_BESIDE.format(path.name))
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise refused(path, error) from error


@contextmanager
def named(path: Path) -> Iterator[None]:
    """What the system refuses within is raised as StorageError, which names `path`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise refused(path, error) from error


def refused(path: Path, error: OSError) -> StorageError:
    """What to tell of a file that the disk did not take."""
    return StorageError(
        error.errno,
        f"{path} could not be written: {error.strerror or error} ({room(path.parent)}). What was written "
        "before is untouched: make room and give the same command again, and the run goes on from its newest "
        "checkpoint",
    )


def room(folder: Path) -> str:
    """How much is free where `folder` is, for messages."""
    try:
        found = os.statvfs(folder)
    except OSError as error:
        return f"and {folder} cannot be looked at: {error.strerror}"
    return f"{found.f_bavail * found.f_frsize / 2**20:,.1f} MiB and {found.f_favail:,} files free"
