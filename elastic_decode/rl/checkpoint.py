"""Checkpoints that are whole or not there: a Hugging Face folder plus what a run needs to go on.

    checkpoints/step-000040/
        config.json, model.safetensors, tokenizer files      save_pretrained: any stack loads the folder;
                                                             of LoRA the adapters, as peft has them
        trainer.pt                                           optimizer, counters, whatever the trainer gives
        complete.json                                        every file's size; written last

A checkpoint is written beside its place, flushed to the disk, and then renamed into it; a folder whose
`complete.json` is missing or does not agree with its files is never resumed from. So a process killed at any
moment leaves the newest whole checkpoint as the newest, and one that is to go is renamed first.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError

from elastic_decode.errors import CheckpointError, ConfigError
from elastic_decode.rl import whole_files
from elastic_decode.rl.distributed import part_of

_NAME = re.compile(r"step-(\d{6,})")
_MARKER = "complete.json"
_STATE = "trainer.pt"
_WRITING, _REPLACED, _REMOVING = ".writing-", ".replaced-", ".removing-"
_ASIDE = "superseded-"
_log = logging.getLogger(__name__)


def save(
    folder: Path,
    step: int,
    *,
    model: Any,
    tokenizer: Any,
    state: dict[str, Any],
    keep: int,
    weights: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write the checkpoint of `step` under `folder` and remove all but the newest `keep`; its path.

    model: whatever has `save_pretrained`. weights: its state dict, where that is not whole in this process.
    state: tensors, numbers, strings and containers of them (it is loaded with `weights_only`). Raises
    StorageError (a full disk, for one) with all checkpoints as they were.
    """
    if keep < 1:
        raise ConfigError(f"keep must be at least 1, got {keep}: a run resumes from the newest checkpoint")
    writing = folder / f"{_WRITING}step-{step:06d}"
    try:
        target = _write(folder, writing, step, model, tokenizer, state, weights)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            shutil.rmtree(writing)
        raise whole_files.refused(path_of(folder, step), _as_os_error(error)) from error
    prune(folder, step, keep)
    return target


def prune(folder: Path, step: int, keep: int) -> None:
    """Leave the newest `keep` whole checkpoints up to `step`, and whatever is of later steps."""
    older = [path for path in _steps(folder) if step_of(path) <= step]
    kept = [path for path in older if _is_whole(path)][-keep:]
    for path in older:
        if path not in kept:
            hidden = folder / f"{_REMOVING}{path.name}"  # so that it is never there in part
            path.rename(hidden)
            shutil.rmtree(hidden)


def path_of(folder: Path, step: int) -> Path:
    """Where `save` puts the checkpoint of `step`."""
    return folder / f"step-{step:06d}"


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint under `folder`; None where there is no checkpoint at all.

    Raises CheckpointError where there are some and none is whole, or one cannot be read: to start anew then
    would be to lose them.
    """
    _put_in_order(folder)
    found = _steps(folder)
    for path in reversed(found):
        if _is_whole(path):
            if path != found[-1]:
                _log.warning("%s is not whole and is passed over for %s", found[-1], path.name)
            return path
    if found:
        raise CheckpointError(
            f"{folder} holds {', '.join(path.name for path in found[-3:])}, and none is whole: {_MARKER} is "
            "missing or names files that are not there in full; resume from another path, or move the folder "
            "away to start anew"
        )
    return None


def set_aside(folder: Path, step: int) -> list[Path]:
    """Take the whole checkpoints of steps after `step` out of the way: their new paths.

    A run that is taken up at `step` trains those steps again, and must not be taken up from what it did
    before when it is stopped on the way. Nothing is deleted, except what was set aside from the same step
    before.
    """
    moved = []
    for path in reversed(_steps(folder)):  # at any moment the rest has no gap
        if step_of(path) > step and _is_whole(path):
            aside = folder / f"{_ASIDE}{path.name}"
            if aside.exists():
                shutil.rmtree(aside)
            moved.append(path.rename(aside))
    return moved


def load_state(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """What `save` was given. mapped: tensors stay in the file until they are read, so that the processes of a
    machine share one copy. Raises CheckpointError where the folder is not a whole checkpoint."""
    if not _is_whole(path):
        raise CheckpointError(
            f"{path} is not a whole checkpoint: {_MARKER} is missing or names files that are not there in "
            "full; resume from another one"
        )
    try:
        state: dict[str, Any] = torch.load(path / _STATE, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever its unpickler meets in damaged bytes
        raise CheckpointError(
            f"{path / _STATE} cannot be read: {error}; resume from another checkpoint"
        ) from error
    return state


def load_weights(path: Path, model: Any) -> None:
    """The checkpoint's weights into `model`'s own parameters, in place: what shares their storage sees them.

    Raises CheckpointError where names or shapes differ, with nothing changed.
    """
    try:
        saved = type(model).from_pretrained(path, dtype=model.dtype).state_dict()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} holds no weights that can be loaded: {error}; resume from another checkpoint"
        ) from error
    own = model.state_dict()
    wrong = sorted(saved.keys() ^ own.keys()) or [n for n in own if own[n].shape != saved[n].shape]
    if wrong:
        raise CheckpointError(f"{path} holds another model: {', '.join(wrong[:3])} differ; it was not loaded")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(part_of(saved[name], tensor))


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path.name} is not the name of a checkpoint (step-000040, for one)")
    return int(match.group(1))


def _write(
    folder: Path,
    writing: Path,
    step: int,
    model: Any,
    tokenizer: Any,
    state: dict[str, Any],
    weights: dict[str, torch.Tensor] | None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [path for kind in (_WRITING, _REMOVING) for path in folder.glob(f"{kind}*")]:
        shutil.rmtree(stale)
    target = path_of(folder, step)
    writing.mkdir()
    model.save_pretrained(writing, **({} if weights is None else {"state_dict": weights}))
    tokenizer.save_pretrained(writing)
    _save_state(state, writing / _STATE)
    files = sorted(path for path in writing.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(writing)): path.stat().st_size for path in files}
    marker = writing / _MARKER
    marker.write_text(json.dumps({"step": step, "files": sizes}, indent=1))
    for path in [*files, marker]:
        _flush(path)
    _flush(writing)
    if target.exists():  # a step trained again, after an older checkpoint was resumed
        target.rename(folder / f"{_REPLACED}{target.name}")
    writing.rename(target)
    _flush(folder)
    _put_in_order(folder)
    return target


class _Noting:
    """A file that knows why a write failed: torch.save raises something about positions instead."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _save_state(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        noting: Any = _Noting(file)
        try:
            torch.save(state, noting)
        except RuntimeError:
            if noting.error is not None:
                raise noting.error from None
            raise


def _as_os_error(error: Exception) -> OSError:
    """safetensors says errors of the system in words: `… No space left on device (os error 28)`."""
    if isinstance(error, OSError):
        return error
    code = re.search(r"os error (\d+)|code: (\d+)", str(error))
    return OSError(int(code[1] or code[2]) if code else 0, str(error))


def _steps(folder: Path) -> list[Path]:
    """Checkpoint folders by step, whole or not. Raises CheckpointError where `folder` cannot be read."""
    if not folder.exists():
        return []
    try:
        found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error
    return sorted(found, key=step_of)


def _put_in_order(folder: Path) -> None:
    """A checkpoint that was about to be replaced goes, or comes back where its successor did not arrive;
    removals go on.
    """
    for replaced in folder.glob(f"{_REPLACED}*"):
        target = folder / replaced.name.removeprefix(_REPLACED)
        if target.exists():
            _clear(replaced)
        else:
            replaced.rename(target)
    for removed in folder.glob(f"{_REMOVING}*"):
        _clear(removed)


def _clear(folder: Path) -> None:
    with suppress(FileNotFoundError):  # another process of the run is at it as well
        shutil.rmtree(folder)


def _is_whole(path: Path) -> bool:
    """Raises CheckpointError where that cannot be told: the disk fails, or reading is not allowed."""
    try:
        files = json.loads((path / _MARKER).read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return False
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _flush(path: Path) -> None:
    """To the disk: a rename may reach it before what was written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
