"""Trackers, the real ones where they are installed: read back after kills and resumes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from elastic_decode.errors import ConfigError
from elastic_decode.rl import trackers

# Each start in a process of its own, which ends as said. argv: kind, then "folder first last end" each. Steps
# that are trained again are told apart by their reward.
RUNS = """
import os, signal, sys, time
from pathlib import Path
from elastic_decode.rl import trackers
kind = sys.argv[1]
trackers.require([kind])

def start(folder, first, last, end):
    history = [(step, {"reward": step / 2, "reward/right": float("nan")}) for step in range(first)]
    config = {"optim": {"lr": 1e-4, "betas": [0.9, 0.999]}, "none": None}
    tracker = trackers.start(kind, folder, name="toy", config=config, first_step=first, history=history)
    for step in range(first, last):
        tracker.log(step, {"reward": step / 2 + 100 * first, "reward/right": float("inf")})
    if end == "kill":
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    tracker.close(failed=False)

for said in sys.argv[2:]:
    folder, first, last, end = said.split()
    child = os.fork()
    if child == 0:
        start(Path(folder), int(first), int(last), end)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if end == "kill" else 0)
"""


def start_each(kind: str, *starts: str, then: str = "", **environment: str) -> str:
    """Their standard output; then: what to run behind them."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-c", RUNS + then, kind, *starts]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_after_a_kill_and_a_resume(tmp_path):
    """Killed behind step 4 with a checkpoint of 3 steps: no step is lost, none is there twice."""
    pytest.importorskip("tensorboard")
    values = [{"reward": step / 2, "reward/right": math.inf} for step in range(6)]
    arguments = {"name": "toy", "config": {"lr": 1}, "first_step": 0, "history": []}
    killed = trackers.start("tensorboard", tmp_path, **arguments)
    for step in range(5):
        killed.log(step, values[step])
    assert events(tmp_path)["reward"] == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]  # not closed
    arguments |= {"first_step": 3, "history": list(enumerate(values))[:3]}
    resumed = trackers.start("tensorboard", tmp_path, **arguments)
    for step in range(3, 6):
        resumed.log(step, {**values[step], "reward": 100.0 + step})
    resumed.close(failed=False)
    found = events(tmp_path)
    assert found["reward"] == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 103.0), (4, 104.0), (5, 105.0)]
    assert [math.isinf(value) for _, value in found["reward/right"]] == [True] * 6


def test_tensorboard_asked_for_later_has_the_whole_history(tmp_path):
    pytest.importorskip("tensorboard")
    history = [(0, {"reward": 0.5}), (1, {"reward": math.nan}), (2, {"eval/accuracy": 0.25})]
    arguments = {"name": "toy", "config": {}, "first_step": 2, "history": history}
    for _ in range(2):  # the evaluation of step 2 is behind what the second start hides, and sent again
        tracker = trackers.start("tensorboard", tmp_path, **arguments)
        tracker.log(2, {"reward": 1.5})
        tracker.close(failed=False)
    found = events(tmp_path)
    assert found["eval/accuracy"] == [(2, 0.25)]
    assert [step for step, _ in found["reward"]] == [0, 1, 2]
    assert found["reward"][2] == (2, 1.5)
    assert math.isnan(found["reward"][1][1])


READ_TRACKIO = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
runs = list(trackio.Api().runs("elastic-decode"))
logs = {r.name: SQLiteStorage.get_logs("elastic-decode", r.name, run_id=r.id) for r in runs}
assert len(logs) == len(runs)
print(json.dumps({n: [(row["step"], row["reward"]) for row in rows] for n, rows in logs.items()}))
print(json.dumps([r.config["optim"] for r in runs]))
"""


def test_trackio_after_a_kill_and_a_resume(tmp_path):
    pytest.importorskip("trackio")
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    starts = (f"{one} 0 5 kill", f"{other} 0 2 close", f"{one} 3 6 close")  # both of one name
    said = start_each("trackio", *starts, then=READ_TRACKIO, TRACKIO_DIR=str(tmp_path / "trackio"))
    found, configs = map(json.loads, said.splitlines()[-2:])
    assert found == {
        trackers.run_id(one, "toy"): [[0, 0.0], [1, 0.5], [2, 1.0], [3, 301.5], [4, 302.0], [5, 302.5]],
        trackers.run_id(other, "toy"): [[0, 0.0], [1, 0.5]],
    }
    assert configs == [{"lr": 1e-4, "betas": [0.9, 0.999]}] * 2


class FakeWandb:
    """What of wandb is used. step: the next one, as it knows it of a run that goes on."""

    def __init__(self, step: int) -> None:
        self.step, self.sent, self.ended = step, [], None

    def init(self, **arguments):
        self.arguments = arguments
        return self

    def log(self, values, step):
        assert step >= self.step, "wandb drops it"
        self.sent.append((step, values["reward"]))

    def finish(self, exit_code):
        self.ended = exit_code


@pytest.mark.parametrize(("known", "sent"), [(0, [0, 1, 2, 3]), (3, [3]), (4, [])])
def test_wandb_gets_what_it_has_not(tmp_path, monkeypatch, known, sent):
    wandb = FakeWandb(known)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    history = [(step, {"reward": step}) for step in range(3)]
    tracker = trackers.start("wandb", tmp_path, name="toy", config={"lr": 1}, first_step=3, history=history)
    tracker.log(3, {"reward": 3})
    tracker.close(failed=True)
    assert [step for step, _ in wandb.sent] == sent
    assert wandb.ended == 1
    assert wandb.arguments["id"] == trackers.run_id(tmp_path, "toy")
    assert (wandb.arguments["name"], wandb.arguments["config"]) == ("toy", {"lr": 1})


def test_a_tracker_that_refuses(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: {}["no key"]))
    with pytest.raises(ConfigError, match=r"run\.log: wandb does not start: KeyError: 'no key'"):
        trackers.start("wandb", tmp_path, name="toy", config={}, first_step=0, history=[])


def test_wandb_itself_offline(tmp_path):
    pytest.importorskip("wandb.proto.wandb_internal_pb2")
    starts = (f"{tmp_path} 0 5 kill", f"{tmp_path} 3 6 close")
    start_each("wandb", *starts, WANDB_MODE="offline", WANDB_SILENT="true")
    files = sorted(tmp_path.glob(f"wandb/offline-run-*-{trackers.run_id(tmp_path, 'toy')}/*.wandb"))
    assert len(files) == 2
    assert wandb_rewards(files[-1]) == {0: "0", 1: "0.5", 2: "1", 3: "301.5", 4: "302", 5: "302.5"}


def wandb_rewards(path: Path) -> dict[int, str]:
    """Its file is a LevelDB log: blocks of 32 KiB; checksum, length, kind before each piece of a record."""
    from wandb.proto import wandb_internal_pb2

    data, place, piece, found = path.read_bytes(), 7, b"", {}
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        piece += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(piece)
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            if "reward" in items:
                found[int(record.history.step.num)] = items["reward"]
            piece = b""
    return found


def test_a_runs_id(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    one = trackers.run_id(tmp_path / "a", "toy")
    assert one.startswith("toy-")
    assert trackers.run_id(tmp_path / "a", "renamed") == one
    assert trackers.run_id(tmp_path / "b", "toy") != one


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "trackio"])
def test_what_is_not_installed(monkeypatch, package):
    for name in (package, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        trackers.require([package])
