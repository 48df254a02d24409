"""The math reward where training calls it: in worker processes, and in a run from a file of problems."""

import json
import os
import time
from pathlib import Path

import pytest

from elastic_decode.errors import ConfigError
from elastic_decode.rl.assemble import assemble
from elastic_decode.rl.batch import Sample
from elastic_decode.rl.config import load_config
from elastic_decode.rl.rewards import Rewards
from elastic_decode.tasks.math import MathReward

pytest.importorskip("math_verify")
RECIPES = Path(__file__).parents[2] / "recipes"
HANGS = r"\boxed{\binom{10^{9}}{500000}}"  # one call into C, for hours


def sample(solution: str, think_end: str = "natural") -> Sample:
    return Sample(
        prompt_ids=(1,),
        token_ids=(5, 6),
        logprobs=(-1.0, -2.0),
        sampling_logprobs=(-1.0, 0.0),
        forced=(False, True),
        loss_mask=(True, False),
        text=f"hm</think>{solution}",
        thinking="hm",
        solution=solution,
        think_tokens=1,
        solve_tokens=0,
        think_end=think_end,
        finish_reason="budget",
        think_budget=1,
        solve_budget=None,
        seed=0,
        weight_epoch=0,
    )


GROUP = [
    sample(r"\boxed{\sqrt{12}}"),
    sample(HANGS),
    sample(r"\boxed{3}"),
    sample(r"\boxed{2\sqrt{3}}", "none"),
    sample("no box"),
]
COLUMNS = {"answer": r"2\sqrt{3}", "solution": r"The worked one: \boxed{2\sqrt{3}}"}


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("workers", [0, 1], ids=["caller", "worker"])
def test_a_hang_costs_its_sample_and_not_the_group(workers):
    def nursery(prompts, **_):  # of the grader: the newest child of the process that calls the reward
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        return [float(children[-1])] * len(prompts)

    functions = {"math": MathReward(limit=0.5), "nursery": nursery}
    with Rewards(functions, weights=[1, 0], workers=workers) as rewards:
        rewards.submit("p", GROUP[:1], COLUMNS, step=0, index=0).result()
        done = rewards.submit("p", GROUP, COLUMNS, step=0, index=0).result()
        assert [s.rewards["math"] for s in done] == [1.0, None, 0.0, 0.0, 0.0]
        assert [s.reward for s in done] == [1.0, None, 0.0, 0.0, 0.0]
        assert not rewards.failures
        started = int(done[0].rewards["nursery"])
        assert not gone(started)
    end = time.monotonic() + 10
    while workers and not gone(started) and time.monotonic() < end:
        time.sleep(0.02)
    assert gone(started) == bool(workers), "a worker's graders end with it"


def test_a_dataset_without_the_column_is_refused():
    with Rewards(MathReward(answer="gold"), workers=0) as rewards:
        rewards.check_columns(["gold", "solution"])
        with pytest.raises(
            ConfigError, match="'math' needs the column gold; the dataset and the engine give"
        ):
            rewards.check_columns(["answer", "solution"])


def test_a_run_on_a_file_of_problems(tmp_path):
    problems = tmp_path / "problems.json"
    rows = [
        {"problem": f"{n} 5 2 = 16", "answer": float(n), "solution": f"\\boxed{{{n}}}"} for n in range(1, 9)
    ]
    problems.write_text(json.dumps(rows))
    paper = load_config(RECIPES / "e1_math_1.5b.yaml")
    math = [{"function": r.function, "options": dict(r.options)} for r in paper.rewards]
    overrides = [
        f"data={{source: {problems}, columns: {{prompt: problem}}, chat: true}}",
        f"rewards={json.dumps(math)}",
        f"run.folder={tmp_path / 'run'}",
        "run.steps=1",
        "run.eval_every=0",
        "evaluation=null",
        "rollout.prompts_per_step=2",
        "rollout.group_size=2",
        "grading.workers=1",
        "engine.max_batch=4",
    ]
    with assemble(load_config(RECIPES / "toy.yaml", overrides)) as parts:
        metrics, groups = parts.trainer.train_step()
    assert metrics["reward/math"] == 0
    assert [s.rewards for group in groups for s in group.samples] == [{"math": 0.0}] * 4
    problems.write_text(json.dumps([{"problem": "1 5 2 = 16", "gold": 1}]))
    config = load_config(RECIPES / "toy.yaml", overrides)
    with pytest.raises(ConfigError, match="'math' needs the column answer"), assemble(config):
        pass
