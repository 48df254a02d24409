"""Runs on a file system without room: a real one, of memory, filled up to a few bytes before each start."""

from __future__ import annotations

import os
import random
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from lives import Life, Wrong

SIZE = 32 << 20  # three checkpoints take 17 MB
CHECKPOINT = 5_700_000
REFUSED = (  # what a refused run was about to write, as its message names it
    ("config.yaml", "config.yaml could not be written"),
    ("metrics.jsonl", "metrics.jsonl could not be written"),
    ("tensorboard", "tensorboard could not be written"),
    ("checkpoint", " could not be written"),
)


def fill(folder: Path, end: dict[str, Any], refusals: int, chance: random.Random) -> Counter[str]:
    """Start runs with too little room until `refusals` have ended for it; what they could not write, counted.

    Each must end with exit status 1 and a message, and with every checkpoint whole that was; with room again
    the run goes on, to `end`. Raises Wrong, and PermissionError where nothing can be mounted here.
    """
    told: Counter[str] = Counter()
    while sum(told.values()) < refusals:
        life = Life(folder / f"full-{sum(told.values()):03}")
        life.run.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(life.run)]
        done = subprocess.run(mount, capture_output=True, text=True)
        if done.returncode:
            raise PermissionError(done.stderr.strip())
        try:
            told += _one_run(life, end, chance)
        finally:
            subprocess.run(["umount", "-l", str(life.run)], check=True)
    return told


def _one_run(life: Life, end: dict[str, Any], chance: random.Random) -> Counter[str]:
    ballast = life.run / "ballast"
    told: Counter[str] = Counter()
    for attempt in range(12):
        # Room for nothing, for one page of a file, for some, or for up to two checkpoints.
        room = chance.choice(
            [0, chance.randint(0, 3) * 4096, chance.randint(0, 100_000), chance.randint(0, 2 * CHECKPOINT)]
        )
        if attempt == 0:
            room = 4096  # config.yaml takes it, and metrics.jsonl gets nothing
        ballast.unlink(missing_ok=True)
        free = os.statvfs(life.run)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_bsize - room))
        child = life.start()
        child.finish()
        life.check_left_behind()
        life.check_whole()
        if child.status == 0:
            break
        child.expect_failure("make room and give the same command again")
        told[next(name for name, message in REFUSED if message in child.log())] += 1
    ballast.unlink()
    last = life.start()
    last.finish()
    last.expect_success()
    life.check_whole()
    life.expect_end(end)
    if not told:
        raise Wrong(f"{life.folder}: no run was refused")
    return told
