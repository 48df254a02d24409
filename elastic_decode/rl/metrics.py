"""A step's metrics, one flat dict of numbers, to wherever they are wanted: one process of a run makes this.

`metrics.jsonl` is always written, a whole line a step, each step once: what a kill has cut off, and what lies
behind the checkpoint that a run resumes from, is taken out and said. TensorBoard, wandb and trackio on
request (rl/trackers.py). A record's step is the number of updates before it: that of a training step and that
of the evaluation just before it (whose names begin with `eval/`) are of the same weights.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from elastic_decode.errors import CheckpointError
from elastic_decode.rl import trackers, whole_files

FILE = "metrics.jsonl"
EVALUATION = "eval/"  # what the names of an evaluation's metrics begin with
# What is shown of a step, where it is there: key, label, format.
SHOWN = (
    ("reward", "reward", ".3f"),
    ("think_tokens", "think", ".1f"),
    ("solve_tokens", "solve", ".1f"),
    ("think_forced", "forced", ".0%"),
    ("rollout_tokens_per_second", "tokens/s", ",.0f"),
    ("kl", "KL", ".4f"),
)


class JsonLines:
    """An append-only file of steps and evaluations.

    notes: what was taken out when it was opened. records: what was kept, (step, values) each.
    """

    def __init__(self, path: Path, *, first_step: int = 0, evaluated: int = -1) -> None:
        """first_step: the next one to be written; lines of it and later ones go (they are trained again), and
        evaluations after that of step `evaluated`.

        Raises CheckpointError where a line before the last is no record.
        """
        self.path = path
        self.notes: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[tuple[int, dict[str, float]]] = []
        self._last, self._last_evaluation = first_step - 1, evaluated
        old = path.read_bytes() if path.exists() else b""
        kept = self._kept(old, first_step, evaluated)
        if kept != old:
            whole_files.write(path, kept)
        with whole_files.named(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Raises ValueError for a step that is there already, and StorageError, with no part of the line left
        behind, where it cannot be written. A number that is not finite becomes a string: JSON has none.
        """
        if step <= self._last:
            raise ValueError(f"step {step} is not after step {self._last}, which is in {self.path} already")
        self._append(step, values)
        self._last = step

    def write_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """The same for what was found after `step` updates: names begin with `eval/`."""
        last = self._last_evaluation
        if step <= last:
            raise ValueError(f"the evaluation of step {step} is not after that of {last}, in {self.path}")
        if not values or not all(name.startswith(EVALUATION) for name in values):
            raise ValueError(f"an evaluation's metrics begin with {EVALUATION}, got {', '.join(values)}")
        self._append(step, values)
        self._last_evaluation = step

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        record = {"step": step, **{name: _number(value) for name, value in values.items()}}
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        size = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            os.ftruncate(self._descriptor, size)
            raise whole_files.refused(self.path, error) from error

    def close(self) -> None:
        os.close(self._descriptor)

    def _kept(self, old: bytes, first_step: int, evaluated: int) -> bytes:
        whole, _, cut = old.rpartition(b"\n")
        if cut:
            self.notes.append(f"{self.path}: the last line was cut off ({len(cut)} bytes) and is dropped")
        lines = whole.split(b"\n") if whole else []
        kept: list[bytes] = []
        trained = found = 0  # again
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                step = int(record.pop("step"))
                values = {name: float(value) for name, value in record.items()}
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{self.path}:{number} is no record of a step; move the file away to go on without it"
                ) from error
            if any(name.startswith(EVALUATION) for name in values):
                again = step > evaluated
                found += again
            else:
                again = step >= first_step
                trained += again
            if not again:
                kept.append(line)
                self.records.append((step, values))
        if trained or found:
            said = [f"{_counted(trained, 'step')} from {first_step} on"] * (trained > 0)
            said += [_counted(found, "evaluation")] * (found > 0)
            self.notes.append(f"{self.path}: dropped {' and '.join(said)}, to be made again")
        return b"".join(line + b"\n" for line in kept)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _number(value: float) -> float | str:
    value = float(value) if not isinstance(value, int) else value
    return value if math.isfinite(value) else str(value)


class Metrics:
    """Close it, or use it in a `with`.

    folder: the run's. log: of "tensorboard", "wandb", "trackio". config: what a tracker should know of the
    run. first_step: where a resumed run goes on; evaluated: the last step that had been evaluated there.
    progress: show steps; a display on a terminal, else a line a step. Raises ConfigError where a tracker is
    not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        steps: int,
        first_step: int = 0,
        evaluated: int = -1,
        log: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        progress: bool = True,
        console: Console | None = None,
    ) -> None:
        trackers.require(log)
        self._lines = JsonLines(folder / FILE, first_step=first_step, evaluated=evaluated)
        self._trackers: list[trackers.Tracker] = []
        self._display: Display | None = None
        try:
            for kind in log:
                self._trackers.append(
                    trackers.start(
                        kind,
                        folder,
                        name=name,
                        config=config or {},
                        first_step=first_step,
                        history=self._lines.records,
                    )
                )
        except BaseException:
            self.close(failed=True)
            raise
        self._lines.records = []
        if progress:
            self._display = Display(steps, first_step, console or Console(stderr=True))
        for note in self._lines.notes:
            self.say(note)

    @property
    def notes(self) -> Sequence[str]:
        """What was taken out of metrics.jsonl to resume."""
        return self._lines.notes

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """One step's metrics, everywhere. Steps rise."""
        self._lines.write(step, values)
        for tracker in self._trackers:
            tracker.log(step, values)
        if self._display is not None:
            self._display.show(step, values)

    def evaluation(self, step: int, values: Mapping[str, float], said: str) -> None:
        """What was found after `step` updates, everywhere; `said` is one line of it for the display."""
        self._lines.write_evaluation(step, values)
        for tracker in self._trackers:
            tracker.log(step, values)
        if self._display is not None:
            self._display.evaluated(step, values.get(f"{EVALUATION}seconds", 0.0), said)

    def busy(self, doing: str) -> None:
        """What takes a while, until the next step or evaluation is shown."""
        if self._display is not None:
            self._display.busy(doing)

    def say(self, message: str) -> None:
        """A remark, without breaking the display."""
        if self._display is not None:
            self._display.say(message)

    def close(self, *, failed: bool = False) -> None:
        """failed: the run ended by an error, for trackers that tell."""
        self._lines.close()
        if self._display is not None:
            self._display.close()
        for tracker in self._trackers:
            tracker.close(failed=failed)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        self.close(failed=kind is not None)


class Display:
    """A bar with the last step's figures on a terminal; elsewhere a plain line a step."""

    def __init__(self, steps: int, first_step: int, console: Console) -> None:
        self._steps, self._first, self._console = steps, first_step, console
        self._started = time.monotonic()
        self._bar: Progress | None = None
        self._said = "ETA after the first step"
        if console.is_terminal:
            # Where there is little room the bar goes and the text is cut, but the count stays.
            columns = (
                BarColumn(bar_width=12),
                MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=len(f"{steps}/{steps}"))),
                TextColumn("{task.fields[said]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("training", total=steps, completed=first_step, said=self._said)
            self._bar.start()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        done = step + 1
        each = (time.monotonic() - self._started) / max(1, done - self._first)
        parts = [f"{label} {format(values[key], how)}" for key, label, how in SHOWN if key in values]
        left = f"ETA {_duration(each * max(0, self._steps - done))}"
        if self._bar is not None:
            self._said = "  ".join([left, *parts])
            self._bar.update(self._task, completed=done, said=self._said)
        else:
            self.say("  ".join([f"step {done}/{self._steps}", *parts, left]))

    def evaluated(self, step: int, seconds: float, said: str) -> None:
        if step == self._first:  # says nothing of how long the steps take
            self._started += seconds
        self.say(said)
        self.busy("")

    def busy(self, doing: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, said="  ".join(filter(None, (doing, self._said))))

    def say(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
