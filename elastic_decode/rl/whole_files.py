"""Files that are there in full or as they were, whenever the process is killed and whether or not the disk is
full; and folders that one process at a time writes to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elastic_decode.errors import ConfigError, StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

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


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """`folder`, made if need be, for this process alone; its death, of whatever kind, gives it back. Raises
    ConfigError where another process has it. Where the file system knows no locks there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"another process is at the run in {folder}: wait for its end, or end it (a killed "
                    "torchrun leaves its ranks behind); for another run give another run.folder"
                ) from None
            except OSError:
                pass
        yield
    finally:
        os.close(descriptor)


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
