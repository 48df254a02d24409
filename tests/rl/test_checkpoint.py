"""Checkpoints: whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_decode.assets import tiny_model_path
from elastic_decode.errors import CheckpointError, ConfigError
from elastic_decode.rl import checkpoint


@pytest.fixture(scope="module")
def parts():
    folder = tiny_model_path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def save(folder: Path, step: int, parts, keep: int = 2, **state) -> Path:
    model, tokenizer = parts
    return checkpoint.save(folder, step, model=model, tokenizer=tokenizer, state=state, keep=keep)


def test_saved_is_loaded_and_old_ones_go(tmp_path, parts):
    assert checkpoint.latest(tmp_path / "none") is None
    for step in (1, 2, 10):
        path = save(tmp_path, step, parts, momentum=torch.full((3,), float(step)), count=step)
    assert checkpoint.latest(tmp_path) == path
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-000002", "step-000010"]
    state = checkpoint.load_state(path)
    assert state["count"] == checkpoint.step_of(path) == 10
    assert torch.equal(state["momentum"], torch.full((3,), 10.0))
    again = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for mine, theirs in zip(parts[0].parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert AutoTokenizer.from_pretrained(path).encode("9 1 6 = 3") == parts[1].encode("9 1 6 = 3")


def test_what_is_not_whole_is_passed_over(tmp_path, parts):
    first = save(tmp_path, 1, parts, keep=9)
    for step, damage in enumerate(("marker", "state", "weights", "truncated", "garbage"), start=2):
        path = save(tmp_path, step, parts, keep=9)
        weights = path / "model.safetensors"
        if damage == "marker":
            (path / "complete.json").unlink()
        elif damage == "state":
            (path / "trainer.pt").unlink()
        elif damage == "weights":
            weights.unlink()
        elif damage == "truncated":
            os.truncate(weights, weights.stat().st_size // 2)
        else:
            (path / "complete.json").write_text("{")
        assert checkpoint.latest(tmp_path) == first
        with pytest.raises(CheckpointError, match="not a whole checkpoint"):
            checkpoint.load_state(path)


def test_a_full_disk_leaves_the_last_one(tmp_path, parts, monkeypatch):
    first = save(tmp_path, 1, parts)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, parts)
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path) == first
    second = save(tmp_path, 2, parts)
    assert checkpoint.latest(tmp_path) == second
    assert not list(tmp_path.glob(".writing-*"))


def test_a_step_saved_again_replaces_the_first(tmp_path, parts):
    save(tmp_path, 3, parts, run=1)
    path = save(tmp_path, 3, parts, run=2)
    assert checkpoint.load_state(path) == {"run": 2}
    # Killed between the two renames: the one that was there is there again.
    path.rename(tmp_path / f".replaced-{path.name}")
    assert checkpoint.latest(tmp_path) == path
    assert checkpoint.load_state(path) == {"run": 2}


def test_bad_input(tmp_path, parts):
    with pytest.raises(ConfigError, match="keep must be at least 1"):
        save(tmp_path, 1, parts, keep=0)
    with pytest.raises(CheckpointError, match="not the name of a checkpoint"):
        checkpoint.step_of(tmp_path / "best")


WRITER = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from elastic_decode.assets import tiny_model_path
from elastic_decode.rl import checkpoint
model = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
print("ready", flush=True)
for step in range(1, 10**6):
    state = {"step": step, "noise": torch.randn(100_000)}
    checkpoint.save(Path(sys.argv[1]), step, model=model, tokenizer=tokenizer, state=state, keep=2)
"""


def test_killed_at_any_moment(tmp_path):
    """kill -9 in the middle of writing, several times: what is newest is whole, and it only moves on."""
    last = 0
    for attempt in range(2):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        if attempt == 0:
            while checkpoint.latest(tmp_path) is None:
                time.sleep(0.01)
        time.sleep(0.05 + 0.07 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        found = checkpoint.latest(tmp_path)
        assert found is not None
        state = checkpoint.load_state(found)
        assert state["step"] == checkpoint.step_of(found)
        assert state["noise"].shape == (100_000,)
        AutoModelForCausalLM.from_pretrained(found)
        last = max(last, state["step"])
    assert last >= 1
    shutil.rmtree(tmp_path)
