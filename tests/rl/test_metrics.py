"""Metrics: whole lines, each step once, whatever was killed; trackers on request; a display anywhere."""

import io
import json
import math
import os
import sys

import pytest
from rich.console import Console

from elastic_decode.errors import CheckpointError, ConfigError, StorageError
from elastic_decode.rl import trackers
from elastic_decode.rl.metrics import JsonLines, Metrics


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path, steps):
    lines = JsonLines(path)
    for step in steps:
        lines.write(step, {"reward": step / 2})
    lines.close()


def test_a_line_cut_anywhere_is_dropped_and_said(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, range(3))
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    for cut in range(start + 1, len(whole)):
        path.write_bytes(whole[:cut])
        lines = JsonLines(path, first_step=2)
        assert ["cut off" in note for note in lines.notes] == [True]
        lines.write(2, {"reward": 1.0})
        lines.close()
        assert path.read_bytes() == whole


def test_steps_behind_the_checkpoint_are_dropped_and_said(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, range(5))
    whole = path.read_bytes()
    lines = JsonLines(path, first_step=3)
    assert len(lines.notes) == 1
    assert "dropped 2 steps from 3 on, to be made again" in lines.notes[0]
    for step in (3, 4):
        lines.write(step, {"reward": step / 2})
    with pytest.raises(ValueError, match="step 4 is not after step 4"):
        lines.write(4, {})
    lines.close()
    assert path.read_bytes() == whole


def test_evaluations_after_the_one_of_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    for step in range(4):
        lines.write_evaluation(step, {"eval/a": step / 2})
        lines.write(step, {"reward": step})
    with pytest.raises(ValueError, match="the evaluation of step 3 is not after that of 3"):
        lines.write_evaluation(3, {"eval/a": 0})
    with pytest.raises(ValueError, match="begin with eval/"):
        lines.write_evaluation(4, {"a": 0})
    lines.close()
    for evaluated, kept, said in ((2, [0, 1, 2], "1 evaluation"), (1, [0, 1], "2 evaluations")):
        copy = tmp_path / f"{evaluated}.jsonl"
        copy.write_bytes(path.read_bytes())
        lines = JsonLines(copy, first_step=2, evaluated=evaluated)
        lines.close()
        assert [r["step"] for r in records(copy) if "eval/a" in r] == kept
        assert [r["step"] for r in records(copy) if "reward" in r] == [0, 1]
        assert lines.records[-1] == ((2, {"eval/a": 1.0}) if evaluated == 2 else (1, {"reward": 1.0}))
        assert len(lines.records) == len(records(copy))
        (note,) = lines.notes
        assert f"dropped 2 steps from 2 on and {said}, to be made again" in note


def test_what_is_no_record_is_not_thrown_away(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:2 is no record"):
        JsonLines(path, first_step=3)
    assert "nonsense" in path.read_text()


def test_no_part_of_a_line_stays_where_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    lines, write = JsonLines(path), os.write
    lines.write(0, {"reward": 1.0})

    def full(descriptor, data):
        if len(data) > 5:
            return write(descriptor, data[:5])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageError, match=r"metrics.jsonl could not be written: No space left .* MiB"):
            lines.write(1, {"a": 1})
    lines.write(1, {"reward": 2.0})
    lines.close()
    assert records(path) == [{"step": 0, "reward": 1.0}, {"step": 1, "reward": 2.0}]


def test_every_line_is_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write(0, {"a": math.nan, "b": math.inf, "c": 3})
    lines.close()
    assert records(path) == [{"step": 0, "a": "nan", "b": "inf", "c": 3}]


def metrics(folder, console, **values):
    return Metrics(folder, name="run", steps=10, console=console, **values)


def test_lines_where_there_is_no_terminal(tmp_path):
    screen = io.StringIO()
    with metrics(tmp_path, Console(file=screen, width=40)) as run:
        run.step(
            0,
            {"reward": 0.25, "think_forced": 0.5, "kl": 0.001, "rollout_tokens_per_second": 12345.6, "x": 1},
        )
        run.say("a [remark]")
        run.evaluation(1, {"eval/a": 0.5}, "evaluation after 1 step")
    first, second, third = screen.getvalue().splitlines()
    assert first.startswith("step 1/10  reward 0.250  forced 50%  tokens/s 12,346  KL 0.0010  ETA ")
    assert (second, third) == ("a [remark]", "evaluation after 1 step")
    assert records(tmp_path / "metrics.jsonl")[0]["x"] == 1


def test_a_bar_on_a_terminal(tmp_path):
    screen = io.StringIO()
    with metrics(tmp_path, Console(file=screen, force_terminal=True, width=120)) as run:
        run.step(0, {"reward": 0.25, "think_tokens": 14.5})
    assert "1/10" in screen.getvalue()
    assert "reward 0.250" in screen.getvalue()
    assert "think 14.5" in screen.getvalue()


def test_the_step_is_shown_where_there_is_little_room(tmp_path):
    screen = io.StringIO()
    with metrics(tmp_path, Console(file=screen, force_terminal=True, width=48)) as run:
        run.step(0, {"reward": 0.25, "think_tokens": 14.5, "solve_tokens": 3, "kl": 0.5})
        run.busy("evaluating")
    last = screen.getvalue().rpartition("1/10")[2]
    assert "evaluating  ETA 0:00  reward 0.250" in last
    assert "KL" not in last


def test_what_was_dropped_is_shown(tmp_path):
    written(tmp_path / "metrics.jsonl", range(3))
    screen = io.StringIO()
    with metrics(tmp_path, Console(file=screen), first_step=1) as run:
        assert len(run.notes) == 1
    assert "dropped 2 steps from 1 on" in screen.getvalue()


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch, package):
    for name in (package, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        metrics(tmp_path, Console(file=io.StringIO()), log=[package])


class Told:
    """A tracker that notes what it is told."""

    def __init__(self, kind, folder, **arguments):
        self.told = [("start", kind, arguments)]

    def log(self, step, values):
        self.told.append((step, values))

    def close(self, *, failed):
        self.told.append("failed" if failed else "closed")


def test_trackers_are_told_what_is_kept_and_every_record(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(trackers, "start", lambda *a, **k: made.append(Told(*a, **k)) or made[-1])
    monkeypatch.setattr(trackers, "require", lambda kinds: None)
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(4):
        lines.write_evaluation(step, {"eval/a": step / 4})
        lines.write(step, {"reward": math.nan if step == 1 else step})
    lines.close()
    with metrics(tmp_path, None, progress=False, log=["wandb"], first_step=2, evaluated=2) as run:
        (start,) = made[0].told
        kept = start[2].pop("history")
        run.step(2, {"reward": 0.5})
        run.evaluation(3, {"eval/a": 0.75}, "said")
    assert start == ("start", "wandb", {"name": "run", "config": {}, "first_step": 2})
    assert repr(kept) == repr(
        [
            (0, {"eval/a": 0.0}),
            (0, {"reward": 0.0}),
            (1, {"eval/a": 0.25}),
            (1, {"reward": math.nan}),
            (2, {"eval/a": 0.5}),
        ]
    )
    assert made[0].told[1:] == [(2, {"reward": 0.5}), (3, {"eval/a": 0.75}), "closed"]
    with pytest.raises(ZeroDivisionError), metrics(tmp_path, None, progress=False, log=["wandb"]):
        raise ZeroDivisionError
    assert made[1].told[-1] == "failed"


def test_a_tracker_that_does_not_start(tmp_path, monkeypatch):
    """The ones before it are closed, and the error is its own."""
    made = []

    def start(kind, *arguments, **options):
        if kind == "trackio":
            raise OSError("no server")
        made.append(Told(kind, *arguments, **options))
        return made[-1]

    monkeypatch.setattr(trackers, "start", start)
    monkeypatch.setattr(trackers, "require", lambda kinds: None)
    with pytest.raises(OSError, match="no server"):
        metrics(tmp_path, None, progress=False, log=["wandb", "trackio"])
    assert made[0].told[-1] == "failed"
