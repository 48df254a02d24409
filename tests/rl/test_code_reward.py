"""The reward `code` from a configuration, in the trainer's worker processes."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_decode.errors import ConfigError
from elastic_decode.rl.batch import Sample
from elastic_decode.rl.config import RewardOptions
from elastic_decode.rl.reward_names import resolve
from elastic_decode.rl.rewards import Rewards
from elastic_decode.tasks import sandbox

pytestmark = pytest.mark.usefixtures("isolation")
TESTS = json.dumps([{"input": "2 3", "output": "5"}, {"input": "1 1", "output": "2"}])
ADDS = "```python\nprint(sum(map(int, input().split())))\n```"
SLEEPS = "```python\nimport time\ntime.sleep(1e9)\n```"


def sample(solution: str, thinking: str = "hm") -> Sample:
    return Sample(
        prompt_ids=(1,),
        token_ids=(5,),
        logprobs=(-1.0,),
        sampling_logprobs=(-1.0,),
        forced=(False,),
        loss_mask=(True,),
        text=f"{thinking}</think>{solution}",
        thinking=thinking,
        solution=solution,
        think_tokens=1,
        solve_tokens=0,
        think_end="natural",
        finish_reason="eos",
        think_budget=None,
        solve_budget=None,
        seed=0,
        weight_epoch=0,
    )


def made(**options: Any) -> dict[str, Callable[..., Any]]:
    return resolve([RewardOptions(function="code", options={"limits": {"wall": 15, "cpu": 9}, **options})])


def marked(mark: str) -> set[str]:
    """Processes whose environment has it."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.add(folder.name)
        except OSError:
            continue
    return found


def test_a_group_in_a_worker_process() -> None:
    """The solution alone counts, and it is the engine's, whatever the dataset calls a column."""
    group = [sample(ADDS), sample("```\nprint(5)\n```"), sample("none", thinking=ADDS), sample(ADDS)]
    with Rewards(made(), workers=1, timeout=60) as rewards:
        rewards.check_columns(["tests", "solution"])
        columns = {"tests": TESTS, "solution": "a worked one"}
        scored = rewards.submit("add", group, columns, step=0, index=0).result()
        with pytest.raises(ConfigError, match="needs the column tests"):
            rewards.check_columns(["answer"])
    assert [one.reward for one in scored] == [1.0, 0.0, 0.0, 1.0]


def test_a_group_that_takes_too_long_takes_its_programs_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer kills the worker; the sandbox, which is in a session of its own, dies all the same."""
    mark = f"sandbox-of-{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setitem(sandbox._ENVIRONMENT, "MARK", mark)
    with Rewards(made(patience=50), workers=1, timeout=2) as rewards:
        pending = rewards.submit("add", [sample(SLEEPS)], {"tests": TESTS}, step=0, index=0)
        (scored,) = pending.result()
    assert scored.reward is None
    end = time.monotonic() + 20
    while marked(mark) and time.monotonic() < end:
        time.sleep(0.05)
    assert not marked(mark)


def test_options_are_checked_with_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"limits\.memory"):
        made(limits={"memory": 0})
    with pytest.raises(ConfigError, match="options"):
        made(timeout=3)
