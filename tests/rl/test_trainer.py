"""The trainer on the bundled model: a few real steps, and runs that are cut and go on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_decode import Engine, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.errors import CheckpointError, ConfigError
from elastic_decode.rl.batch import Row
from elastic_decode.rl.budgets import Fixed
from elastic_decode.rl.loss import objective
from elastic_decode.rl.optim import MasterAdamW
from elastic_decode.rl.rewards import Rewards
from elastic_decode.rl.trainer import GRPOTrainer, TrainerOptions
from elastic_decode.rl.update import UpdateOptions
from elastic_decode.tasks import countdown

PROBLEMS = countdown.problems("train")


def next_rows(position: int, count: int) -> tuple[list[Row], int]:
    order = random.Random(0).sample(range(len(PROBLEMS)), len(PROBLEMS))
    chosen = [order[i % len(order)] for i in range(position, position + count)]
    return [Row(i, PROBLEMS[i].chat, {"problem": PROBLEMS[i].prompt}) for i in chosen], position + count


def right(completions, solution, problem, **columns):
    by_prompt = {p.prompt: p for p in PROBLEMS}
    return [countdown.grade(by_prompt[p], s) for p, s in zip(problem, solution, strict=True)]


class Run:
    """A trainer with everything it stands on."""

    def __init__(self, folder: Path | None = None, dtype: torch.dtype = torch.float32, **changes) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
        config = EngineConfig(max_batch=16, max_model_len=128, kv_memory="32MiB")
        self.engine = Engine.from_model(self.model, tokenizer, config)
        self.rewards = Rewards(right, workers=0)
        options = {
            "steps": 3,
            "prompts_per_step": 4,
            "group_size": 4,
            "lr": 1e-4,
            "sampling": SamplingParams(temperature=1.0),
            "run_seed": 1,
            "update": UpdateOptions(objective=objective("grpo"), max_tokens=256, updates=2),
        }
        self.metrics: list[dict[str, float]] = []
        self.trainer = GRPOTrainer(
            engine=self.engine,
            model=self.model,
            next_rows=next_rows,
            rewards=self.rewards,
            budgets=Fixed(think=15, solve=3),
            optimizer=MasterAdamW(self.model.parameters(), lr=1e-4),
            options=TrainerOptions(**{**options, **changes}),
            folder=folder,
            on_step=[lambda step, metrics, groups: self.metrics.append(metrics)],
        )

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten().float() for p in self.model.parameters()])

    def told(self) -> list[dict[str, float]]:
        """The metrics without what the clock says."""
        return [{k: v for k, v in m.items() if "second" not in k} for m in self.metrics]


def test_steps_train_the_weights_that_the_engine_decodes_with():
    run = Run()
    before = run.weights()
    run.trainer.train()
    assert run.trainer.step == 3
    assert run.trainer.position == 12
    assert not torch.equal(run.weights(), before)
    assert run.engine.stats()["weight_epoch"] == 3
    for metrics in run.metrics:
        assert 0 <= metrics["reward"] <= 1
        assert metrics["think_tokens"] <= 15
        assert metrics["solve_tokens"] <= 3
        assert (metrics["updates"] > 0) == (metrics["groups_with_spread"] > 0)
        if metrics["updates"]:
            assert metrics["grad_norm"] > 0
            assert metrics["mismatch_max"] < 1e-5, (
                "float32: the rollout's log-probabilities are the trainer's"
            )
            assert metrics["mismatch_outside"] == 0
        assert metrics["reward/right"] == metrics["reward"]
    assert any(metrics["groups_with_spread"] for metrics in run.metrics)
    assert run.engine.stats()["free_pages"] == run.engine.stats()["num_pages"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_is_cut_goes_on_as_if_nothing_had_happened(tmp_path, dtype):
    straight = Run(dtype=dtype, steps=4)
    straight.trainer.train()

    cut = Run(tmp_path, dtype=dtype, steps=4, save_every=2)
    assert not cut.trainer.resume()
    while cut.trainer.step < 3:  # one step past the last checkpoint is lost, as with kill -9
        cut.trainer.train_step()
        if cut.trainer.step == 2:
            cut.trainer.save()

    resumed = Run(tmp_path, dtype=dtype, steps=4, save_every=2)
    assert resumed.trainer.resume()
    assert (resumed.trainer.step, resumed.trainer.position) == (2, 8)
    resumed.trainer.train()
    assert torch.equal(resumed.weights(), straight.weights())
    assert resumed.told() == straight.told()[2:]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


def test_learning_happens():
    """Twelve steps at a high rate on a handful of problems: the reward goes up."""
    few = [Row(i, PROBLEMS[i].chat, {"problem": PROBLEMS[i].prompt}) for i in range(40, 48)]
    run = Run(
        steps=12,
        prompts_per_step=8,
        group_size=8,
        lr=5e-4,
        update=UpdateOptions(objective=objective("dapo"), max_tokens=2048),
    )
    run.trainer._next_rows = lambda position, count: (few, position + count)
    run.trainer.train()
    rewards = [metrics["reward"] for metrics in run.metrics]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05, rewards


def test_bad_input(tmp_path):
    with pytest.raises(ConfigError, match="needs a folder"):
        Run(save_every=1)
    with pytest.raises(ConfigError, match="steps must be an int >= 1"):
        Run(steps=0)
    run = Run(tmp_path)
    run.trainer.save()
    with pytest.raises(CheckpointError, match="of a run with seed 1, this one has 2"):
        Run(tmp_path, run_seed=2).trainer.resume()
    with pytest.raises(ConfigError, match="no folder"):
        Run().trainer.save()
