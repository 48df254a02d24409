"""Checkpoints: whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_decode.assets import tiny_model_path
from elastic_decode.errors import CheckpointError, ConfigError, StorageError
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


def contents(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@contextmanager
def file_size_limit(size: int):
    """No file of this process can grow past `size` bytes: the system says so, to C++ and Rust, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_leaves_the_last_one(tmp_path, parts):
    first = save(tmp_path, 1, parts)
    before = contents(tmp_path)
    state = {"moments": torch.zeros(900_000)}
    # Less than config.json, than the weights, than the state; Python, Rust and C++ write them.
    for size in (100, 20_000, 3_000_000):
        with file_size_limit(size), pytest.raises(StorageError) as raised:
            save(tmp_path, 2, parts, **state)
        assert raised.value.errno == errno.EFBIG
        for said in (f"{tmp_path}/step-000002 could not be written", "File too large", "MiB", "make room"):
            assert said in str(raised.value)
        assert contents(tmp_path) == before
        assert checkpoint.latest(tmp_path) == first
    assert checkpoint.latest(tmp_path) == first
    assert checkpoint.latest(tmp_path.parent / "none") is None
    second = save(tmp_path, 2, parts, **state)
    assert checkpoint.latest(tmp_path) == second


CALLS = ("mkdir", "open", "fsync", "rename", "rmdir", "unlink")


def test_a_disk_that_is_full_at_any_call(tmp_path, parts, monkeypatch):
    """Each call on a file in turn is refused once: what was whole stays whole, and the next save works."""
    save(tmp_path, 1, parts)
    last = save(tmp_path, 2, parts, mine=True)
    for at in range(100):
        calls = 0

        def refusing(function, at=at):
            def call(*args, **kwargs):
                nonlocal calls
                writes = function is not os.open or args[1] & (os.O_WRONLY | os.O_RDWR)
                calls += writes
                if writes and calls == at + 1:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, refusing(getattr(os, name)))
            with suppress(StorageError):
                save(tmp_path, 3, parts, at=at)
        if calls <= at:
            break
        newest = checkpoint.latest(tmp_path)
        assert newest in (last, tmp_path / "step-000003")
        assert checkpoint.load_state(newest) == ({"mine": True} if newest == last else {"at": at})
        assert checkpoint.load_state(last) == {"mine": True}
        shutil.rmtree(tmp_path / "step-000003", ignore_errors=True)
    assert at > 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_what_is_damaged_is_no_reason_to_remove_or_to_start_anew(tmp_path, parts, caplog, monkeypatch):
    first = save(tmp_path, 1, parts)
    damaged = save(tmp_path, 9, parts)
    (damaged / "trainer.pt").unlink()
    assert checkpoint.latest(tmp_path) == first
    assert "step-000009 is not whole and is passed over for step-000001" in caplog.text
    second = save(tmp_path, 2, parts, keep=1)
    assert checkpoint.latest(tmp_path) == second, "a newer one that is not whole takes nobody's place"
    garbage = second / "trainer.pt"
    garbage.write_bytes(b"x" * garbage.stat().st_size)
    with pytest.raises(CheckpointError, match=r"trainer.pt cannot be read"):
        checkpoint.load_state(second)
    weights = second / "model.safetensors"
    weights.write_bytes(b"x" * weights.stat().st_size)
    with pytest.raises(CheckpointError, match="holds no weights that can be loaded"):
        checkpoint.load_weights(second, parts[0])
    garbage.unlink()
    with pytest.raises(CheckpointError, match="step-000002, step-000009, and none is whole"):
        checkpoint.latest(tmp_path)

    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)
        with pytest.raises(CheckpointError, match="step-000009 cannot be read: Permission denied"):
            checkpoint.latest(tmp_path)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        checkpoint.latest(tmp_path)


def test_later_ones_are_set_aside(tmp_path, parts):
    for step in (1, 2, 3):
        save(tmp_path, step, parts, keep=9)
    assert checkpoint.set_aside(tmp_path, 3) == []
    moved = checkpoint.set_aside(tmp_path, 1)
    assert [path.name for path in moved] == ["superseded-step-000003", "superseded-step-000002"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000001"
    save(tmp_path, 2, parts, mine=True)
    checkpoint.set_aside(tmp_path, 1)
    assert checkpoint.load_state(moved[1]) == {"mine": True}


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
