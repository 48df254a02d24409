"""Trainer and engine on one set of weights: no page of the old ones is used; memory lent comes back."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from elastic_decode import Budget, Engine, SamplingParams
from elastic_decode.errors import EngineAsleep
from elastic_decode.rl.assemble import assemble
from elastic_decode.rl.config import load_config
from elastic_decode.rl.logprobs import pack, token_logprobs

RECIPE = Path(__file__).parents[2] / "recipes" / "toy.yaml"
SETTINGS = (
    "evaluation=null",
    "run.eval_every=0",
    "run.steps=2",
    "data.limit=4",  # the same four prompts every step
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "grading.workers=0",
    "optim.lr=1e-3",
    "objective={name: grpo, entropy: 0.01}",  # so that every step has an update, whatever its rewards
    "engine.max_batch=16",
    "engine.page_size=2",  # prompts are short: so they have whole pages
    "engine.prefix_cache=true",
)


@contextmanager
def run(tmp_path, *overrides):
    config = load_config(RECIPE, [*SETTINGS, f"run.folder={tmp_path}", *overrides])
    with assemble(config) as parts:
        yield parts


def furthest(parts) -> float:
    """The largest difference of a rollout's log-probabilities from what the module computes now."""
    prompts = [row.prompt for row in parts.dataset.rows]
    found = parts.engine.generate(
        prompts, budget=Budget(think=15, solve=3), sampling=SamplingParams(temperature=1.0, seed=1)
    )
    pairs = [(tuple(g.prompt_token_ids), tuple(g.completions[0].token_ids)) for g in found]
    packed = pack(pairs, range(len(pairs)), [1.0] * len(pairs), torch.device("cpu"))
    parts.model.eval()
    with torch.no_grad():
        expected, _ = token_logprobs(parts.model, packed)
    got = torch.tensor([logprob for g in found for logprob in g.completions[0].logprobs])
    return float((got - expected).abs().max())


def test_no_page_of_the_old_weights_is_used_after_an_update(tmp_path):
    with run(tmp_path) as parts:
        first, _ = parts.trainer.train_step()
        assert first["updates"] == 1
        assert parts.engine.stats()["indexed_pages"] == 0, "the rollout's are forgotten"
        assert furthest(parts) < 1e-5
        assert parts.engine.stats()["indexed_pages"] > 0, "and there is something to forget"
        second, _ = parts.trainer.train_step()
        assert second["mismatch_max"] < 1e-5


def test_the_test_above_would_see_them(tmp_path, monkeypatch):
    """Without sync_weights, both of its assertions on numbers fail by far."""
    with run(tmp_path) as parts:
        monkeypatch.setattr(Engine, "sync_weights", lambda self, *args: 0)
        parts.trainer.train_step()
        assert furthest(parts) > 1e-3
        second, _ = parts.trainer.train_step()
        assert second["mismatch_max"] > 1e-3


@pytest.mark.parametrize("forward", ["hf", "engine"])
def test_an_engine_that_sleeps_during_updates_changes_nothing(tmp_path, monkeypatch, forward):
    asleep: list[int] = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        try:
            parts.engine.generate(["1"], budget=Budget(think=1, solve=1))
        except EngineAsleep:
            asleep.append(parts.trainer.step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    ends = []
    for sleeps in ("true", "false"):
        told: list[str] = []
        settings = (f"rollout.sleep_in_update={sleeps}", f"optim.forward={forward}", "run.steps=3")
        with run(tmp_path / sleeps, *settings) as parts:
            while parts.trainer.step < 3:
                metrics, groups = parts.trainer.train_step()
                kept = {name: value for name, value in metrics.items() if "second" not in name}
                told.append(
                    json.dumps([kept, [[s.token_ids, s.logprobs] for g in groups for s in g.samples]])
                )
            ends.append((told, [parameter.detach().clone() for parameter in parts.model.parameters()]))
            assert parts.engine.stats()["free_pages"] == parts.engine.stats()["num_pages"]
    assert asleep == [0, 1, 2]
    (lent, weights), (kept, others) = ends
    assert lent == kept
    assert all(map(torch.equal, weights, others))
