"""Every benchmark for a GPU runs here from end to end, over tiny sizes on the CPU."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from elastic_decode import EngineConfig, budgets

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def rows_in(out: Path) -> list[dict]:
    return [json.loads(line) for path in out.glob("*.jsonl") for line in path.read_text().splitlines()]


def run(program: str, *arguments: str, out: Path) -> tuple[list[dict], str]:
    """The rows that a program appends, and what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS), "OUT": str(out), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / program), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return rows_in(out), done.stdout


def test_ops(tmp_path):
    arguments = ("--device", "cpu", "--seconds", "0.002", "--batch", "2")
    rows, output = run("bench_ops.py", *arguments, out=tmp_path)
    assert "0 failures" in output
    ceilings, *measured = rows
    assert ceilings["copy_bytes_per_s"] > 1e8
    assert {row["op"] for row in measured} == {
        "draw",
        "linear",
        "rms_norm",
        "silu_mul",
        "rope",
        "paged_attention",
    }
    for row in measured:
        assert row["us_low"] <= row["us"] <= row["us_high"]
        assert row["floor_us"] > 0
        assert {"device", "torch", "commit"} <= set(row)
    backends = {row["backend"] for row in measured if row["op"] == "draw"}
    assert {"cpu", "cpu sample", "cpu budget alone", "torch softmax"} <= backends


def test_decode(tmp_path, monkeypatch, capsys):
    import decode_window

    monkeypatch.setenv("OUT", str(tmp_path))
    sizes = ("--batch", "2", "--prompt", "9", "--new", "40", "--horizon", "1", "4", "--seconds", "0.01")
    decode_window.main(["--device", "cpu", *sizes])
    rows = rows_in(tmp_path)
    assert [row["bench"] for row in rows] == ["ceilings", "step", *["decode"] * 4]
    step, *windows = rows[1:]
    assert step["us"] > step["budget_us"]
    assert step["floor_us"] > 0
    assert [row["variant"] for row in windows] == [
        "horizon 1",
        "horizon 4",
        "not batch-invariant",
        "no budget",
    ]
    for row in windows:
        assert row["engine_tokens_per_s"] > 0
        assert row["of_floor"] == pytest.approx(row["floor_us"] / row["step_us"], rel=0.1, abs=0.002)
        assert row["waits"] > 0
        assert row["recorded_meanwhile"] == 0
        assert row["graph_share"] is None  # nothing is recorded on the CPU
    assert "copy" in capsys.readouterr().out


def test_decode_beside_generate(tmp_path, monkeypatch):
    import bench_decode

    monkeypatch.setenv("OUT", str(tmp_path))
    bench_decode.main(["--shapes", "tiny", "--batch", "2", "--new", "12", "--rounds", "1"])
    (row,) = rows_in(tmp_path)
    assert row["engine_tokens_per_s"] > 0
    assert row["hf_tokens_per_s"] > 0
    assert 0 < row["budget_us"] < row["step_us"]


def test_rollouts_beside_generate(tmp_path, monkeypatch):
    import bench_rollout

    monkeypatch.setenv("OUT", str(tmp_path))
    bench_rollout.main(["--budgets", "4/3", "--rows", "16", "--rounds", "2"])
    (row,) = rows_in(tmp_path)
    assert row["ratio"] > 0
    for side in ("engine", "hf"):
        assert 4 <= row[f"{side}_tokens"] <= 4 + 1 + 3
        assert row[f"{side}_ms"] > 0
    assert abs(row["tokens_apart"]) < 6


def test_budgets_by_two_calls(monkeypatch):
    """The rules of Budget(3, 2): a close that was sampled, one that was put there, an EOS that became one."""
    from peers import hf_budgets

    ids = hf_budgets.Ids(close=9, eos=2, pad=0)
    thoughts = [[5, 9], [5, 6, 7], [5, 2], [2]]
    calls = []

    def scripted(model, rows, new, ends, pad, temperature):
        calls.append((rows, new, ends))
        return thoughts if len(calls) == 1 else [[8, 2]] * len(rows)

    monkeypatch.setattr(hf_budgets, "_call", scripted)
    outputs = hf_budgets.generate(None, [[1]] * 4, think=3, solve=2, ids=ids)
    assert outputs == [
        ([5, 9, 8, 2], None),
        ([5, 6, 7, 9, 8, 2], 3),
        ([5, 9, 8, 2], 1),
        ([9, 8, 2], 0),
    ]
    assert calls[0][1:] == (3, [9, 2])
    assert calls[1] == ([[1, 5, 9], [1, 5, 6, 7, 9], [1, 5, 9], [1, 9]], 2, [2])


def test_grpo(tmp_path, monkeypatch, capsys):
    import bench_grpo

    monkeypatch.setenv("OUT", str(tmp_path))
    sizes = ("rollout.prompts_per_step=2", "rollout.group_size=4", "grading.workers=0")
    arms = ("--arms", "ours", "trl_budgets")
    length = ("--steps", "11", "--seeds", "3", "--threads", "1")
    assert bench_grpo.main([*arms, *length, "--set", *sizes]) == 0
    ours, *theirs = rows_in(tmp_path)
    output = capsys.readouterr().out
    assert ("trl_budgets: not here" in output) == (theirs == [])
    assert (ours["arm"], ours["steps"], ours["times_ours"], len(ours["rewards"])) == ("ours", 11, 1, 2)
    for row in (ours, *theirs):
        assert all(0 <= reward <= 1 for reward in row["rewards"])
        assert row["seconds_ms"] == pytest.approx(row["rollout_ms"] + row["update_ms"], rel=0.3)
        assert row["seconds_ms"] > row["rewards_ms"] >= 0
        assert row["cpu_ms"] > row["rollout_cpu_ms"] > 0
    assert "| ours | 0." in output


def test_the_window_counts_every_token_behind_its_begin():
    """All rows end by their budgets, so the whole output is known: what is left out is before the window."""
    import decode_window

    weights = decode_window.random_weights("tiny", torch.float32, "cpu", 64)
    config = EngineConfig(
        dtype="float32", max_batch=3, max_model_len=64, kv_memory="1MiB", horizon=5, prefill_tokens=64
    )
    with decode_window.make_engine("tiny", weights, config) as engine:
        prompts = [[300 + row] * 8 for row in range(3)]
        window = decode_window.decode_window(engine, prompts, 30, budgets.truncate(30))
        assert engine.stats()["sampled_tokens"] == 90
        # the prompts' own draws and the first flight of 5 steps are before it
        assert window.tokens == 3 * (30 - 1 - 5)
        assert window.tokens_per_s == pytest.approx(window.tokens / window.seconds)


def test_the_clock_around_replays():
    import decode_window

    device = SimpleNamespace(device=torch.device("cpu"), replay=lambda recorded: recorded())
    replay = device.replay
    with decode_window.ReplayClock(device) as clock:
        assert clock.share() is None
        for _ in range(3):
            device.replay(lambda: time.sleep(0.02))
            time.sleep(0.02)
    assert device.replay is replay
    assert 0.4 < clock.share() < 0.75  # 3 of 5 pieces


@pytest.mark.parametrize("peer", ["ours", "hf_static", "hf_continuous", "vllm_offline", "sglang_offline"])
def test_peers(peer, tmp_path, monkeypatch, capsys):
    import bench_peers

    monkeypatch.setenv("OUT", str(tmp_path))
    sizes = ("--batch", "2", "--prompt", "6", "--new", "20")
    assert bench_peers.main(["--device", "cpu", *sizes, "--one", peer]) == 0
    output, rows = capsys.readouterr().out, rows_in(tmp_path)
    if peer.endswith("_offline"):
        assert "not here" in output
        assert rows == []
    else:
        assert [(row["batch"], row["new"]) for row in rows] == [(2, 20)]
        assert rows[0]["tokens_per_s"] > 0


def test_a_peer_that_fails_or_hangs_costs_no_other(monkeypatch, capfd):
    import bench_peers

    codes = iter([7, None, 0])
    monkeypatch.setattr(bench_peers, "run_for", lambda command, seconds: next(codes))
    monkeypatch.setattr(bench_peers, "stop_when_asked", lambda: None)
    peers = ("ours", "hf_static", "hf_continuous")
    assert bench_peers.main(["--device", "cpu", "--minutes", "3", "--peers", *peers]) == 1
    output = capfd.readouterr().out
    assert "hf_static: stopped after 180 s" in output
    assert "failed: ours\n" in output


def test_groups_have_the_same_beginning_and_the_same_results():
    from attention_cases import Size, make

    size = Size(4, 48, 4, 2, 16, group=2, own=16)
    found = make(size, torch.float32, torch.device("cpu"))
    assert set(found) == {"cpu", "cpu, told of groups"}
    for plain, told in zip(*found.values(), strict=True):
        assert torch.equal(plain().clone(), told())
    table = found["cpu"][0].args[3]  # [4, 3] pages: two of each group's are the same
    assert torch.equal(table[0::2, :2], table[1::2, :2])
    assert len(table.unique()) == 2 * 2 + 4


def test_a_case_that_fails_is_a_row_and_costs_no_other(tmp_path, monkeypatch, capsys):
    import bench_ops
    import op_cases

    def broken() -> op_cases.Contestants:
        raise ValueError("no such size")

    def raises() -> None:
        raise TypeError("no such dtype")

    def half_broken() -> op_cases.Contestants:
        return {"theirs": [raises], "ours": [lambda: None]}

    made = op_cases.draws
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(
        op_cases,
        "draws",
        lambda *arguments: [
            op_cases.Case("draw", {"batch": 0}, op_cases.floors.draw(1, 1), broken),
            op_cases.Case("draw", {"batch": 1}, op_cases.floors.draw(1, 1), half_broken),
            *list(made([1], 64, torch.device("cpu"), ["greedy"])),
        ],
    )
    assert bench_ops.main(["--device", "cpu", "--only", "draw", "--seconds", "0.001"]) == 1
    rows = rows_in(tmp_path)
    errors = [(row.get("backend"), row["error"]) for row in rows if "error" in row]
    assert errors == [(None, "ValueError: no such size"), ("theirs", "TypeError: no such dtype")]
    assert any(row.get("backend") == "ours" for row in rows)
    assert any(row.get("backend") == "cpu" for row in rows)
    assert "2 failures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"), [(["--batch", "1"], "for which of"), (["ops", "decode", "-x"], "-x")]
)
def test_arguments_are_for_one_program(words, said):
    command = [sys.executable, str(BENCHMARKS / "bench_gpu.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert said in done.stderr


def test_what_runs_out_of_time_leaves_nothing_behind(tmp_path):
    """A program that starts another in a session of its own, both stopped from outside."""
    from processes import run_for

    pid = tmp_path / "pid"
    inner = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    outer = f"""
import sys
sys.path.append({str(BENCHMARKS)!r})
from processes import run_for, stop_when_asked
stop_when_asked()
run_for([sys.executable, "-c", {inner!r}], 60)
"""
    assert run_for([sys.executable, "-c", "raise SystemExit(3)"], 60) == 3
    began = time.monotonic()
    assert run_for([sys.executable, "-c", outer], 2) is None
    assert time.monotonic() - began < 20
    for _ in range(50):
        try:
            os.kill(int(pid.read_text()), 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the inner process lives on")


class PretendedCuda:
    """Enough of torch.cuda to capture and replay: a call takes 5 microseconds."""

    now = 0.0

    def __init__(self) -> None:
        self.captured = 0
        self.synchronize = lambda: None
        cuda = self

        class Graph:
            calls = 0

            def replay(self) -> None:
                cuda.now += 0.005 * self.calls

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = -1.0

            def record(self) -> None:
                self.at = cuda.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: "Event") -> float:
                return other.at - self.at

        self.CUDAGraph, self.Event = Graph, Event

    @contextmanager
    def graph(self, graph):
        before = self.captured
        yield
        graph.calls = self.captured - before


def test_a_replay_is_long_enough_to_time(monkeypatch):
    import timing

    cuda = PretendedCuda()
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=cuda))

    def call() -> None:
        cuda.captured += 1

    one = timing.Replayable([call] * 4, SimpleNamespace(type="cuda"))
    assert one.us() == pytest.approx(5.0)
    assert 200 <= one._graph.calls <= 208  # a millisecond
    assert timing.Replayable([call] * 400, SimpleNamespace(type="cuda"))._graph.calls == 400
    assert timing.measure([call], SimpleNamespace(type="cuda"), seconds=0.01).us == pytest.approx(5.0)
