"""Metrics: whole lines, each step once, whatever was killed; trackers on request; a display anywhere."""

import io
import json
import math
import os
import sys
import types

import pytest
from rich.console import Console

from elastic_decode.errors import CheckpointError, ConfigError, StorageError
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
        assert lines.restored == [(2, {"eval/a": 1.0})] * (evaluated == 2)
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


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_trackers_get_every_step(tmp_path, monkeypatch, package):
    calls = []
    module = types.SimpleNamespace(
        init=lambda **values: calls.append(("init", values["name"], values["config"], values["resume"])),
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, package, module)
    with metrics(tmp_path, None, progress=False, log=[package], config={"lr": 1}) as run:
        run.step(0, {"reward": 0.5})
    assert calls == [("init", "run", {"lr": 1}, "allow"), (0, {"reward": 0.5}), "finish"]


def test_tensorboard_hides_what_is_trained_again(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("close")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "eval/a": 0.25}\n')
    with metrics(tmp_path, None, progress=False, log=["tensorboard"], first_step=4, evaluated=4) as run:
        run.step(4, {"reward": 0.5})
        run.evaluation(5, {"eval/a": 0.75}, "said")
    assert calls == [
        (str(tmp_path / "tensorboard"), 4),
        ("eval/a", 0.25, 4),
        ("reward", 0.5, 4),
        ("eval/a", 0.75, 5),
        "close",
    ]
