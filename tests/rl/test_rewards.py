"""Reward functions in worker processes and in the caller's thread: what they get, what may go wrong."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from elastic_decode.errors import ConfigError, RewardError
from elastic_decode.rl.batch import Sample
from elastic_decode.rl.rewards import Rewards


def sample(text: str = "a", **changes) -> Sample:
    fields = {
        "prompt_ids": (1,),
        "token_ids": (5, 6),
        "logprobs": (-1.0, -2.0),
        "sampling_logprobs": (-1.0, 0.0),
        "forced": (False, True),
        "loss_mask": (True, False),
        "text": text,
        "thinking": f"think {text}",
        "solution": f"solve {text}",
        "think_tokens": 1,
        "solve_tokens": 0,
        "think_end": "forced",
        "finish_reason": "budget",
        "think_budget": 1,
        "solve_budget": None,
        "seed": 0,
        "weight_epoch": 0,
    }
    return Sample(**{**fields, **changes})


GROUP = [sample("a"), sample("bb"), sample("ccc")]


def score(rewards: Rewards, samples=GROUP, prompt="p", columns=None) -> list[Sample]:
    return list(rewards.submit(prompt, samples, columns or {}, step=12, index=7).result())


def lengths(completions, **_):
    return [len(text) for text in completions]


@pytest.fixture(params=[0, 1], ids=["caller", "worker"])
def workers(request) -> int:
    return request.param


def test_what_a_function_gets(workers):
    def check(**arguments):
        wanted = {
            "prompts": ["p"] * 2,
            "completions": ["a", "bb"],
            "completion_ids": [[5, 6]] * 2,
            "answer": [{"x": 1}] * 2,
            "solution": ["gold"] * 2,
            "completion_solution": ["solve a", "solve bb"],
            "thinking": ["think a", "think bb"],
            "think_end": ["forced"] * 2,
            "finish_reason": ["budget"] * 2,
            "think_tokens": [1, 1],
            "solve_tokens": [0, 0],
            "think_budget": [1, 1],
            "solve_budget": [None, None],
            "forced_share": [0.5, 0.5],
        }
        wrong = {k for k in {*wanted, *arguments} if wanted.get(k) != arguments.get(k)}
        assert not wrong, wrong
        return [1, 0]

    with Rewards(check, workers=workers) as rewards:
        done = score(rewards, GROUP[:2], columns={"answer": {"x": 1}, "solution": "gold"})
    assert [s.reward for s in done] == [1.0, 0.0]
    assert done[0].rewards == {"check": 1.0}


def test_chats_get_chats(workers):
    chat = [{"role": "user", "content": "q"}]

    def check(prompts, completions):  # and no other argument: none is forced on it
        assert prompts == [chat]
        return [float(completions == [[{"role": "assistant", "content": "a"}]])]

    with Rewards(check, workers=workers) as rewards:
        assert score(rewards, GROUP[:1], prompt=chat)[0].reward == 1.0


def test_closures_lambdas_arrays_and_async_functions(workers):
    offset = 10  # cannot be pickled with its function

    async def later(completions, **_):
        return [offset + len(text) for text in completions]

    functions = {
        "closure": later,
        "lambda": lambda completions, **_: np.array([len(c) for c in completions], dtype=np.float32),
        "numbers": lambda completions, **_: tuple(np.int64(1) for _ in completions),
    }
    with Rewards(functions, weights=(1, 0.5, 0), workers=workers) as rewards:
        done = score(rewards)
    assert [s.reward for s in done] == [11.5, 13.0, 14.5]
    assert done[1].rewards == {"closure": 12.0, "lambda": 2.0, "numbers": 1.0}
    assert all(type(value) is float for value in done[1].rewards.values())


def test_none_is_left_out_and_never_zero(workers):
    functions = {
        "one": lambda completions, **_: [None, None, -1.0],
        "two": lambda completions, **_: [None, 2.0, 2.0],
        "zero": lambda completions, **_: [5.0, 5.0, 5.0],
    }
    with Rewards(functions, weights=(1, 1, 0), workers=workers) as rewards:
        assert [s.reward for s in score(rewards)] == [None, 2.0, 1.0]
        assert not rewards.failures


def test_a_function_that_is_only_recorded_makes_no_sample_unscorable(workers):
    def away(**_):
        raise ConnectionError

    functions = {"right": lambda completions, **_: [1.0] * len(completions), "looked at": away}
    with Rewards(functions, weights=(1, 0), workers=workers) as rewards:
        done = score(rewards)
    assert [sample.reward for sample in done] == [1.0, 1.0, 1.0]
    assert [sample.rewards["looked at"] for sample in done] == [None, None, None]
    assert rewards.failures == {("looked at", "unreachable"): 1}


BAD = {
    "length": (lambda **_: [1.0], "returned 1 rewards, expected 3"),
    "one number": (lambda **_: 1.0, "returned 1.0 \\(a float\\), expected a list of 3"),
    "type": (lambda **_: [1.0, "yes", 0.0], "sample 1: returned 'yes' \\(a str\\)"),
    "nan": (lambda **_: [0.0, 1.0, float("nan")], "sample 2: returned nan, expected a finite number"),
    "inf": (lambda **_: [0.0, -float("inf"), 1.0], "sample 1: returned -inf"),
    "raises": (lambda **_: [1 / 0], "ZeroDivisionError"),
    "exits": (lambda **_: sys.exit(3), "SystemExit\\(3\\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_function_step_and_row(workers, case):
    function, said = BAD[case]
    message = f"(?s)'mine', step 12, dataset row 7.*{said}"
    with Rewards({"mine": function}, workers=workers) as rewards, pytest.raises(RewardError, match=message):
        score(rewards)


@pytest.mark.parametrize("case", BAD)
def test_on_error_none(workers, case, caplog):
    function, said = BAD[case]
    with Rewards({"mine": function, "ok": lengths}, workers=workers, on_error="none") as rewards:
        if case in ("length", "one number", "type"):  # bugs, whatever the policy
            with pytest.raises(RewardError, match=said):
                score(rewards)
            return
        done = score(rewards)
    expected = {"nan": [1, 3, None], "inf": [1, None, 4]}.get(case, [None] * 3)
    assert [s.reward for s in done] == expected
    assert [s.rewards["ok"] for s in done] == [1, 2, 3]
    assert sum(rewards.failures.values()) == 1
    assert "step 12, dataset row 7" in caplog.text


def test_unreachable_services_give_none(workers):
    def asks(**_):
        raise ConnectionRefusedError("the sandbox is down")

    with Rewards([asks, lengths], workers=workers) as rewards:
        done = score(rewards)
    assert [s.reward for s in done] == [None] * 3
    assert rewards.failures == {("asks", "unreachable"): 1}


def test_a_hanging_function_is_killed_with_what_it_started(tmp_path, caplog):
    note = tmp_path / "pids"

    def hangs(completions, **_):
        if completions[0] == "stuck":
            child = subprocess.Popen(["sleep", "60"])
            note.write_text(f"{os.getpid()} {child.pid}")
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
        return [1.0] * len(completions)

    with Rewards([hangs, lengths], workers=1, timeout=0.3) as rewards:
        started = time.perf_counter()
        done = score(rewards, [sample("stuck")] * 2)
        assert time.perf_counter() - started < 5
        assert [s.reward for s in done] == [None, None]
        assert [s.rewards for s in done] == [{"hangs": None, "lengths": 5.0}] * 2
        assert rewards.failures == {("hangs", "timeout"): 1}
        assert "no answer within 0.3 s" in caplog.text
        assert all(not alive(int(pid)) for pid in note.read_text().split())
        assert [s.reward for s in score(rewards)] == [2.0, 3.0, 4.0]  # by its successor


def test_a_crash_gives_none_and_a_new_worker():
    def crashes(completions, **_):
        if completions[0] == "boom":
            os.kill(os.getpid(), signal.SIGKILL)
        return [1.0] * len(completions)

    with Rewards(crashes, workers=1) as rewards:
        assert [s.reward for s in score(rewards, [sample("boom")])] == [None]
        assert rewards.failures == {("crashes", "died"): 1}
        assert [s.reward for s in score(rewards)] == [1.0] * 3


@pytest.mark.parametrize(("ending", "calls"), [("killed", 2), ("exit", 1), ("terminated", 1)])
def test_what_was_killed_from_outside_is_done_once_more(tmp_path, ending, calls):
    def ends(completions, **_):
        (tmp_path / str(os.getpid())).touch()
        if len(list(tmp_path.iterdir())) > 1:
            return [1.0] * len(completions)
        if ending == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif ending == "terminated":
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)

    with Rewards(ends, workers=1) as rewards:
        expected = None if calls == 1 else 1.0
        assert [s.reward for s in score(rewards)] == [expected] * 3
        assert rewards.failures == ({} if calls == 2 else {("ends", "died"): 1})
    assert len(list(tmp_path.iterdir())) == calls


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers do not go with their nursery")
def test_the_end_of_the_nursery_is_said_and_ends_its_workers(tmp_path):
    note = tmp_path / "pids"

    def hangs(**_):
        note.write_text(f"{os.getpid()} {os.getppid()}")
        time.sleep(60)

    with Rewards(hangs, workers=1) as rewards:
        pending = rewards.submit("p", GROUP, {}, step=0, index=0)
        while not note.exists() or not note.read_text().count(" "):
            time.sleep(0.01)
        worker, nursery = map(int, note.read_text().split())
        os.kill(nursery, signal.SIGKILL)
        with pytest.raises(RewardError, match="reward workers come from is gone"):
            pending.result()
        while alive(worker):
            time.sleep(0.01)


def test_a_worker_killed_while_idle_is_replaced_and_nothing_is_lost():
    with Rewards(lambda completions, **_: [os.getpid()], workers=1) as rewards:
        (first,) = score(rewards, [sample()])
        os.kill(int(first.reward), signal.SIGKILL)
        time.sleep(0.1)
        (second,) = score(rewards, [sample()])
    assert second.reward not in (None, first.reward)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def below(pid: int) -> set[int]:
    """All processes that descend from `pid`."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found, grew = {pid}, True
    while grew:
        grew = bool(new := {child for child, parent in parents.items() if parent in found} - found)
        found |= new
    return found - {pid}


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts in /proc")


@needs_proc
def test_nothing_leaks():
    before = below(os.getpid()), len(os.listdir("/proc/self/fd"))
    calls = iter(range(10**6))

    def sometimes(completions, **_):
        if completions[0] == "hang":
            time.sleep(60)
        if completions[0] == "die":
            os._exit(1)
        return [float(len(os.listdir("/proc/self/fd")))] * len(completions)

    with Rewards(sometimes, workers=2, timeout=0.5) as rewards:
        seen = set()
        for scored in range(600):
            text = {100: "hang", 200: "die"}.get(next(calls) % 250, "x")
            seen |= {s.reward for s in score(rewards, [sample(text)] * 2)}
            if scored == 300:
                middle = len(below(os.getpid())), len(os.listdir("/proc/self/fd"))
        after = len(below(os.getpid())), len(os.listdir("/proc/self/fd"))
        assert after == middle
        assert after[0] <= len(before[0]) + 3  # the nursery, two workers
        assert seen - {None}
        assert max(seen - {None}) <= before[1] + 8
        assert rewards.failures == {("sometimes", "timeout"): 2, ("sometimes", "died"): 2}
    assert (below(os.getpid()), len(os.listdir("/proc/self/fd"))) == before


@needs_proc
def test_workers_go_when_the_trainer_is_killed():
    script = """
        import os, sys, time
        from elastic_decode.rl.rewards import Rewards
        from tests_sample import sample
        rewards = Rewards(lambda completions, **_: time.sleep(60) or [1.0], workers=1)
        rewards.submit("p", [sample()], {}, step=0, index=0)
        time.sleep(0.3)
        print("ready", flush=True)
        time.sleep(60)
    """
    code = textwrap.dedent(script).replace("from tests_sample import sample", "exec(sys.argv[1])")
    make = f"from elastic_decode.rl.batch import Sample\nsample = lambda: Sample(**{fields()!r})"
    process = subprocess.Popen([sys.executable, "-c", code, make], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    children = below(process.pid)
    assert len(children) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 5
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, children))


def fields() -> dict:
    made = sample()
    return {name: getattr(made, name) for name in Sample.__dataclass_fields__}


def test_close_does_not_wait_for_a_hanging_function():
    rewards = Rewards(lambda **_: time.sleep(60), workers=1)
    pending = rewards.submit("p", GROUP, {}, step=0, index=0)
    time.sleep(0.1)
    started = time.perf_counter()
    rewards.close()
    rewards.close()
    assert time.perf_counter() - started < 5
    assert pending.done
    with pytest.raises(RewardError, match="closed"):
        score(rewards)


def test_what_cannot_be_is_refused_at_once():
    def needs(completions, answer, topic):
        return [0.0]

    with Rewards(needs, workers=0) as rewards:
        with pytest.raises(ConfigError, match=r"'needs' needs the column topic; .*answer"):
            score(rewards, columns={"answer": 1})
        with pytest.raises(ConfigError, match="'prompts'"):
            score(rewards, columns={"answer": 1, "topic": 2, "prompts": 1})
    with (
        Rewards(lengths, workers=1) as rewards,
        pytest.raises(ConfigError, match=r"'lengths' .*weird.* cannot be sent"),
    ):
        score(rewards, columns={"weird": lambda: 0})
    for bad in (
        lambda: Rewards([]),
        lambda: Rewards([lengths, lengths]),
        lambda: Rewards({"x": 3}),
        lambda: Rewards(lengths, weights=[1, 2]),
        lambda: Rewards(lengths, weights=[0]),
        lambda: Rewards(lengths, weights=[float("nan")]),
        lambda: Rewards(lengths, workers=-1),
        lambda: Rewards(lengths, timeout=0),
        lambda: Rewards(lengths, on_error="zero"),
    ):
        with pytest.raises(ConfigError):
            bad()


def test_failures_are_logged_ever_more_rarely(caplog):
    def down(**_):
        raise TimeoutError

    with caplog.at_level(logging.WARNING), Rewards(down, workers=0) as rewards:
        for _ in range(20):
            score(rewards)
    assert rewards.failures == {("down", "unreachable"): 20}
    assert len(caplog.records) == 5  # 1, 2, 4, 8, 16
