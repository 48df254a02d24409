"""Programs run for a limited time, with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def run_for(command: list[str], seconds: float) -> int | None:
    """The exit status; None where it took longer and was stopped, with whatever it had started."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask its whole group to end, then insist."""
    for sent, grace in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:  # none is left
            return
        try:
            process.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            continue


def stop_when_asked() -> None:
    """End on SIGTERM as on Ctrl-C, so that what this process runs is stopped as well."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
