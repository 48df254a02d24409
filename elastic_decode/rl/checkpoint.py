"""Checkpoints that are whole or not there: a Hugging Face folder plus what a run needs to go on.

    checkpoints/step-000040/
        config.json, model.safetensors, tokenizer files      save_pretrained: any stack loads the folder;
                                                             of LoRA the adapters, as peft has them
        trainer.pt                                           optimizer, counters, whatever the trainer gives
        complete.json                                        every file's size; written last

A checkpoint is written beside its place, flushed to the disk, and then renamed into it; a folder whose
`complete.json` is missing or does not agree with its files is never resumed from. So a process killed at any
moment leaves the newest whole checkpoint as the newest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from elastic_decode.errors import CheckpointError, ConfigError

_NAME = re.compile(r"step-(\d{6,})")
_MARKER = "complete.json"
_STATE = "trainer.pt"
_REPLACED = ".replaced-"


def save(folder: Path, step: int, *, model: Any, tokenizer: Any, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` under `folder` and remove all but the newest `keep`; its path.

    model: whatever has `save_pretrained`. state: tensors, numbers, strings and containers of them (it is
    loaded with `weights_only`). Raises OSError (a full disk, for one) with nothing but a hidden folder left
    behind, which the next save removes.
    """
    if keep < 1:
        raise ConfigError(f"keep must be at least 1, got {keep}: a run resumes from the newest checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".writing-*"):
        shutil.rmtree(stale)
    target = folder / f"step-{step:06d}"
    writing = folder / f".writing-{target.name}"
    writing.mkdir()
    model.save_pretrained(writing)
    tokenizer.save_pretrained(writing)
    torch.save(state, writing / _STATE)
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
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint under `folder`."""
    _put_in_order(folder)
    return next((path for path in reversed(_steps(folder)) if _is_whole(path)), None)


def load_state(path: Path) -> dict[str, Any]:
    """What `save` was given. Raises CheckpointError where the folder is not a whole checkpoint."""
    if not _is_whole(path):
        raise CheckpointError(
            f"{path} is not a whole checkpoint: {_MARKER} is missing or names files that are not there in "
            "full; resume from another one"
        )
    state: dict[str, Any] = torch.load(path / _STATE, map_location="cpu", weights_only=True)
    return state


def load_weights(path: Path, model: Any) -> None:
    """The checkpoint's weights into `model`'s own parameters, in place: what shares their storage sees them.

    Raises CheckpointError where names or shapes differ, with nothing changed.
    """
    saved = type(model).from_pretrained(path, dtype=model.dtype).state_dict()
    own = model.state_dict()
    wrong = sorted(saved.keys() ^ own.keys()) or [n for n in own if own[n].shape != saved[n].shape]
    if wrong:
        raise CheckpointError(f"{path} holds another model: {', '.join(wrong[:3])} differ; it was not loaded")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path.name} is not the name of a checkpoint (step-000040, for one)")
    return int(match.group(1))


def _steps(folder: Path) -> list[Path]:
    """Checkpoint folders by step, whole or not."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def _put_in_order(folder: Path) -> None:
    """A checkpoint that was about to be replaced goes, or comes back where its successor did not arrive."""
    for replaced in folder.glob(f"{_REPLACED}*"):
        target = folder / replaced.name.removeprefix(_REPLACED)
        if target.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(target)


def _is_whole(path: Path) -> bool:
    try:
        files = json.loads((path / _MARKER).read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _flush(path: Path) -> None:
    """To the disk: a rename may reach it before what was written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
