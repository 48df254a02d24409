"""Whole runs from a configuration: options together that other tests try one by one."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
import torch

from elastic_decode.errors import ConfigError
from elastic_decode.rl.assemble import assemble
from elastic_decode.rl.config import GRPOConfig
from elastic_decode.tasks import countdown

REWARDS = '''
"""Reward functions in TRL's signature; SEEN notes their arguments."""
SEEN = []

def parity(prompts, completions, completion_ids, **columns):
    """What nearly every group has a spread of."""
    SEEN.append({"prompts": prompts, "completions": completions, "ids": completion_ids, **columns})
    return [sum(ids) % 7 / 7 for ids in completion_ids]

def length(completions, completion_ids, bonus, **columns):
    """None, unscorable, where `bonus` says nothing."""
    return [None if b is None else b * len(ids) for b, ids in zip(bonus, completion_ids)]

def recorded(completion_ids, **columns):
    return [1000.0] * len(completion_ids)
'''


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """The module of REWARDS, imported anew."""
    name = f"rewards_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def config(folder, module, **changes):
    values = {
        "model": {"path": "tiny"},
        "data": {"source": "countdown"},
        "engine": {"device": "cpu", "dtype": "auto", "max_batch": 16, "max_model_len": 128},
        "rollout": {
            "prompts_per_step": 3,
            "group_size": 4,
            "budgets": {"plan": "fixed", "think": 10, "solve": 3},
        },
        "rewards": [{"function": f"{module}:parity"}],
        "grading": {"workers": 0},
        "optim": {"lr": 1e-3, "dtype": "float32", "max_tokens_per_microbatch": 256},
        "run": {"name": "test", "steps": 5, "folder": str(folder), "save_every": 2, "progress": False},
    }
    for room, options in changes.items():
        values[room] = {**values[room], **options} if isinstance(options, dict) else options
    return GRPOConfig.from_dict(values)


def trained(config, steps=None):
    """A run's metrics without what the clock says, and its state at the end."""
    told = []
    with assemble(config, on_step=[lambda step, metrics, groups: told.append(metrics)]) as parts:
        resumed = parts.trainer.resume()
        for _ in range(steps or 0):
            parts.trainer.train_step()
        if steps is None:
            parts.trainer.train()
        state = parts.trainer.optimizer.state_dict()
        weights = [p.detach().clone() for p in parts.model.parameters()]
    return [{k: v for k, v in m.items() if "second" not in k} for m in told], weights, state, resumed


BF16 = {"dtype": "bfloat16", "gradient_checkpointing": True, "updates_per_step": 2}
RISING = {"schedule": "cosine", "warmup": 2}


@pytest.mark.parametrize(
    "optim",
    [
        pytest.param({**BF16, **RISING}, id="bfloat16, checkpointing, cosine"),
        pytest.param({**RISING, "schedule": "linear"}, id="float32, linear"),
        pytest.param({**BF16, **RISING, "lora": {"r": 4, "dropout": 0.1}}, id="LoRA, dropout"),
    ],
)
def test_a_run_that_was_cut_ends_as_one_that_was_not(tmp_path, rewards, optim):
    """Cut behind step 3 with a checkpoint of 2 steps: at the end all is equal, bit for bit."""
    if "lora" in optim:
        pytest.importorskip("peft")
    told, weights, state, _ = trained(config(tmp_path / "whole", rewards, optim=optim))
    rates = [metrics["lr"] for metrics in told]
    assert rates[:3] == [5e-4, 1e-3, 1e-3]
    assert rates[2] > rates[3] > rates[4] > 0
    assert all(metrics["grad_norm"] > 0 for metrics in told)

    cut = config(tmp_path / "cut", rewards, optim=optim)
    with assemble(cut) as parts:
        for _ in range(2):
            parts.trainer.train_step()
        parts.trainer.save()
        parts.trainer.train_step()
    again, weights_again, state_again, resumed = trained(cut)
    assert resumed
    assert again == told[2:]
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_again, strict=True))
    masters = [
        pair for pair in zip(state["masters"], state_again["masters"], strict=True) if pair[0] is not None
    ]
    assert bool(masters) == (optim.get("dtype") == "bfloat16" and "lora" not in optim)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in masters)
    if masters:  # what is trained lies between the bfloat16 numbers
        assert any(not torch.equal(a, a.bfloat16().float()) for a, _ in masters)


def rows_of(problems):
    """Rows as TRL has them: a chat, and other columns; every fourth leaves `bonus` open."""
    return [
        {
            "prompt": problem.chat,
            "target": index,
            "tags": ["a", str(index)],
            "bonus": None if index % 4 == 0 else index / 100,
        }
        for index, problem in enumerate(problems)
    ]


def test_trls_conventions(tmp_path, rewards):
    """Columns reach every function, a row a sample; rewards are added up by weight, without the open ones;
    weight 0 is only recorded.
    """
    problems = countdown.problems("train")[:8]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(problems)))
    wanted = [
        {"function": f"{rewards}:parity", "weight": 2.0},
        {"function": f"{rewards}:length", "weight": -0.5, "name": "short"},
        {"function": f"{rewards}:recorded", "weight": 0.0},
    ]
    found = []
    run = config(tmp_path / "run", rewards, data={"source": str(path)}, rewards=wanted, run={"steps": 4})
    note = lambda step, metrics, groups: found.append((metrics, groups))  # noqa: E731
    with assemble(run, on_step=[note]) as parts:
        parts.trainer.train()

    rows, seen = rows_of(problems), __import__(rewards).SEEN
    assert sum(len(call["ids"]) for call in seen) == 4 * 3 * 4
    asked = defaultdict(int)
    for call in seen:
        for place, target in enumerate(call["target"]):
            assert call["prompts"][place] == rows[target]["prompt"]
            assert (call["tags"][place], call["bonus"][place]) == (
                rows[target]["tags"],
                rows[target]["bonus"],
            )
            (message,) = call["completions"][place]  # a chat's completion is one
            assert message["role"] == "assistant"
            asked[target] += 1
    assert sum(asked.values()) == 48
    assert max(asked.values()) - min(asked.values()) == 4, (
        "12 rows of 8: every row once before one comes again"
    )

    for metrics, groups in found:
        for group in groups:
            row = rows[group.columns["target"]]
            for sample in group.samples:
                parity, short = sample.rewards["parity"], sample.rewards["short"]
                assert parity == sum(sample.token_ids) % 7 / 7
                assert short == (None if row["bonus"] is None else row["bonus"] * len(sample.token_ids))
                assert sample.reward == pytest.approx(2 * parity - 0.5 * (short or 0))
        assert metrics["reward/recorded"] == 1000
        total = [sample.reward for group in groups for sample in group.samples]
        assert metrics["reward"] == pytest.approx(sum(total) / len(total))


def test_a_column_that_a_function_needs_and_the_data_has_not(tmp_path, rewards):
    run = config(tmp_path, rewards, rewards=[{"function": f"{rewards}:length"}])
    with pytest.raises(ConfigError, match="bonus"), assemble(run):
        pass
