"""TensorBoard, wandb and trackio: metrics.jsonl again, where people look at it.

A tracker that is made for a run that goes on is brought to what metrics.jsonl has: what a kill kept from it,
or what came before it was asked for, is sent again, and what is trained again is not there twice.

    TensorBoard  events of the steps that are trained again are hidden (`purge_step`); the others stay
    wandb        takes a step once: steps that it has keep what was sent first. Offline, every start makes a
                 segment with the whole history, under one id
    trackio      the run is replaced by one with the whole history (on a remote server the old one stays)

wandb and trackio know a run by `tracker_id` in its folder: runs of one name are not mixed up.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from elastic_decode.errors import ConfigError, ElasticDecodeError
from elastic_decode.rl import whole_files

PROJECT = "elastic-decode"
_ID_FILE = "tracker_id"
Records = Sequence[tuple[int, Mapping[str, float]]]


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One record."""

    def close(self, *, failed: bool) -> None:
        """Send what is left; failed: the run ended by an error."""


def require(kinds: Sequence[str]) -> None:
    """Raises ConfigError where a tracker of `run.log` cannot be imported."""
    for kind in kinds:
        module = "torch.utils.tensorboard" if kind == "tensorboard" else kind
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"run.log asks for {kind}, which cannot be imported ({error}): pip install {kind}, or leave "
                "it out"
            ) from error


def start(
    kind: str, folder: Path, *, name: str, config: Mapping[str, Any], first_step: int, history: Records
) -> Tracker:
    """The tracker `kind` of the run in `folder`.

    history: what metrics.jsonl has, in its order: steps below `first_step`, the next to be trained, and
    evaluations before it. Raises ConfigError where the package cannot be imported, or refuses (wandb without
    an API key, for one).
    """
    require([kind])
    try:
        tracker: Tracker = _KINDS[kind](folder, name, dict(config), first_step, history)
    except ElasticDecodeError:
        raise
    except Exception as error:
        raise ConfigError(f"run.log: {kind} does not start: {type(error).__name__}: {error}") from error
    return tracker


class TensorBoard:
    def __init__(
        self, folder: Path, name: str, config: dict[str, Any], first_step: int, history: Records
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder / "tensorboard"
        known = any(self._folder.glob("events.*"))
        with whole_files.named(self._folder):
            self._writer: Any = SummaryWriter(str(self._folder), purge_step=first_step)
        for step, values in history:
            if step >= first_step or not known:
                self.log(step, values)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        with whole_files.named(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()  # else a kill takes up to two minutes of steps

    def close(self, *, failed: bool) -> None:
        with whole_files.named(self._folder):
            self._writer.close()


class Wandb:
    def __init__(
        self, folder: Path, name: str, config: dict[str, Any], first_step: int, history: Records
    ) -> None:
        self._run = importlib.import_module("wandb").init(
            project=PROJECT,
            name=name,
            id=run_id(folder, name),
            dir=str(folder),
            config=config,
            resume="allow",
        )
        self._next = self._run.step  # it refuses smaller ones, a line each
        for step, values in history:
            self.log(step, values)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._next:
            self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    def __init__(
        self, folder: Path, name: str, config: dict[str, Any], first_step: int, history: Records
    ) -> None:
        self._module: Any = importlib.import_module("trackio")
        name = run_id(folder, name)
        old = [run for run in self._runs() if run.name == name]
        self._module.init(project=PROJECT, name=name, config=config, resume="never")
        for step, values in history:
            self.log(step, values)
        for run in old:  # only now: a kill leaves one too many rather than none
            run.delete()

    def _runs(self) -> list[Any]:
        try:
            return list(self._module.Api().runs(PROJECT))
        except ValueError:  # the first of the project
            return []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self._module.finish()


_KINDS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def run_id(folder: Path, name: str) -> str:
    """`name` and eight random digits: the same for a run that goes on, another for another folder."""
    path = folder / _ID_FILE
    known = path.read_text(encoding="utf-8") if path.exists() else ""
    if not known:
        known = f"{name}-{secrets.token_hex(4)}"
        whole_files.write(path, known.encode())
    return known
