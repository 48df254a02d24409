"""A short `make chaos`: runs that are killed at their tightest places, and taken up again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[1] / "chaos" / "run.py"
STAGES = (
    "reward",
    "reward worker",
    "optimizer",
    "save: any call",
    "save: rename",
    "save: prune",
    "metrics",
    "reopen",
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="uses prctl and /proc")
def test_killed_and_taken_up_again():
    done = subprocess.run(
        [sys.executable, str(CHAOS), "--kills", "1", "--only", ",".join(STAGES)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
