"""In a run that is to be killed: says over a pipe where it is, and stops there if it is told to.

It stands around functions of the library, in this process alone: nothing in the library knows of it. Every
message is one line of JSON, and one write, so that none is ever half there.
"""

from __future__ import annotations

import builtins
import functools
import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from elastic_decode.engine.runner import Runner
from elastic_decode.rl import checkpoint, whole_files
from elastic_decode.rl.evaluation import Evaluator
from elastic_decode.rl.metrics import JsonLines
from elastic_decode.rl.optim import MasterAdamW
from elastic_decode.rl.rewards import Rewards
from elastic_decode.rl.trainer import GRPOTrainer

# A name for each place that is watched, and the function whose calls it is.
POINTS: dict[str, tuple[Any, str]] = {
    "decode": (Runner, "advance"),
    "score": (Rewards, "_work"),  # in a worker's process
    "backward": (torch.Tensor, "backward"),
    "optimizer": (MasterAdamW, "step"),
    "save": (checkpoint, "save"),
    "resume": (GRPOTrainer, "resume"),
    "evaluate": (Evaluator, "__call__"),
    "metrics": (JsonLines, "_append"),
    "reopen": (JsonLines, "__init__"),
    "config": (whole_files, "write"),
}
FILE_CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "ftruncate")
SCORING_SECONDS = (
    0.03  # what a watched call of a reward function takes at least: it is to be killed meanwhile
)


@dataclass(frozen=True, kw_only=True)
class Aim:
    """The `occurrence`-th time at `point`: go on, saying so, if `call` is None; else stop, for ever, before
    the `number`-th call of that kind on a file ("any", "write", "create", or one of FILE_CALLS). Half of what
    a write was to write is written.
    """

    point: str
    occurrence: int = 1
    call: str | None = None
    number: int = 1


class Spy:
    """aim: where to stop or speak. count: speak of every point that is passed, with how long it took."""

    def __init__(self, pipe: int, aim: Aim | None, *, count: bool = False) -> None:
        self._pipe, self._aim, self._count = pipe, aim, count
        self._times: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._inside = False
        self._write, self._open = os.write, io.open

    def install(self) -> None:
        for point, (owner, name) in POINTS.items():
            setattr(owner, name, self._watched(point, getattr(owner, name)))
        for name in FILE_CALLS:
            setattr(os, name, self._stopping(name, getattr(os, name)))
        os.write = self._half_written  # type: ignore[assignment]
        builtins.open = io.open = self._created  # type: ignore[assignment]

    def say(self, what: str, **more: Any) -> None:
        line = json.dumps({"what": what, "pid": os.getpid(), "parent": os.getppid(), **more})
        self._write(self._pipe, line.encode() + b"\n")

    def _watched(self, point: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._times[point] += 1
            aim, started = self._aim, time.perf_counter()
            aimed = aim is not None and (point, self._times[point]) == (aim.point, aim.occurrence)
            counted = self._count and not self._inside
            if aimed and aim is not None:
                self._inside = True
                if aim.call is None:
                    self.say("at")
                if point == "score":
                    time.sleep(SCORING_SECONDS)
            elif counted:
                self._calls.clear()
                self._inside = True
            try:
                return function(*args, **kwargs)
            finally:
                if aimed or counted:
                    self._inside = False
                    seconds = time.perf_counter() - started
                    self.say("past", point=point, seconds=seconds, calls=dict(self._calls))

        return watched

    def _here(self, name: str) -> bool:
        """Whether to stop before this call."""
        if not self._inside:
            return False
        self._calls["any"] += 1
        self._calls[name] += 1
        aim = self._aim
        return aim is not None and aim.call is not None and self._calls[aim.call] == aim.number

    def _stop(self, name: str) -> None:
        self._inside = False
        self.say("at", call=name)
        time.sleep(600)

    def _stopping(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def stopping(*args: Any, **kwargs: Any) -> Any:
            if self._here(name):
                self._stop(name)
            return function(*args, **kwargs)

        return stopping

    def _half_written(self, descriptor: int, data: Any) -> int:
        if self._here("write"):
            self._write(descriptor, data[: len(data) // 2])
            self._stop("write")
        return self._write(descriptor, data)

    def _created(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        made = self._open(file, mode, *args, **kwargs)
        if mode[0] in "wxa" and self._here("create"):
            self._stop("create")
        return made
