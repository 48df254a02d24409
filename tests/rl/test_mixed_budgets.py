"""Whole runs: budgets that differ between groups, steps, branches; forced tokens in the loss; L1's wish."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elastic_decode.errors import ConfigError
from elastic_decode.rl.advantage import grpo
from elastic_decode.rl.assemble import assemble
from elastic_decode.rl.config import load_config
from elastic_decode.rl.optim import MasterAdamW
from elastic_decode.tasks import countdown

RECIPE = Path(__file__).parents[2] / "recipes" / "toy.yaml"
SETTINGS = (
    "evaluation=null",
    "run.eval_every=0",
    "run.steps=4",
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "grading.workers=0",
    "engine.max_batch=16",
    "objective={name: dapo, drop_flat: false}",
)
PLANS = {
    "uniform": "{plan: uniform, low: 2, high: 20, solve: 3}",
    "choice": "{plan: choice, think: [4, 9, null], solve: 3}",
    "ramp": "{plan: ramp, first: 4, last: 16, steps: 3, solve: 3}",
    "fork": "{plan: fork, think_at: [5, 10], solve: 3}",
    "schedule": "{plan: schedule, stages: [{start: 0, plan: fixed, think: 6, solve: 3}, "
    "{start: 1, plan: uniform, low: 2, high: 9, solve: 3}, "
    "{start: 3, plan: fork, think_at: [4, 12], solve: 2}]}",
}


def config(folder, *overrides):
    return load_config(RECIPE, [*SETTINGS, f"run.folder={folder}", *overrides])


class Story:
    """What a run did, to be compared: by step its metrics without the clock's, and its groups without the
    count of updates that this engine has seen.
    """

    def __init__(self):
        self.steps: dict[int, tuple[dict, list]] = {}

    def __call__(self, step, metrics, groups):
        kept = {name: value for name, value in metrics.items() if "second" not in name}
        self.steps[step] = (kept, [replace(g, samples=tuple(map(since_when, g.samples))) for g in groups])


def since_when(sample):
    return replace(sample, weight_epoch=0)


def thoughts(group):
    """The tokens each sample's policy chose of its thinking."""
    return [
        [token for token, forced in zip(s.token_ids, s.forced, strict=True) if not forced][: s.think_tokens]
        for s in group.samples
    ]


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_keeps_to_its_plan_and_goes_on_bit_for_bit(tmp_path, plan):
    budgets = f"rollout.budgets={PLANS[plan]}"
    whole, cut = Story(), Story()
    with assemble(config(tmp_path / "whole", budgets), on_step=[whole]) as parts:
        parts.trainer.train()
        weights = [parameter.detach().clone() for parameter in parts.model.parameters()]
    with assemble(config(tmp_path / "cut", budgets), on_step=[cut]) as parts:
        for _ in range(2):
            parts.trainer.train_step()
        parts.trainer.save()
        parts.trainer.train_step()  # is lost
    with assemble(config(tmp_path / "cut", budgets), on_step=[cut]) as parts:
        assert parts.trainer.resume()
        parts.trainer.train()
        assert all(map(torch.equal, weights, parts.model.parameters()))
    assert cut.steps == {step: whole.steps[step] for step in (3, 4)}

    seen: list[tuple[int | None, ...]] = []
    for metrics, groups in whole.steps.values():
        here = [sample.think_budget for group in groups for sample in group.samples]
        limited = [budget for budget in here if budget is not None]
        assert metrics["think_budget_min"] == min(limited)
        assert metrics["think_budget_max"] == max(limited)
        assert metrics["think_budget"] == sum(limited) / len(limited)
        for group in groups:
            seen.append(tuple(dict.fromkeys(sample.think_budget for sample in group.samples)))
            for sample in group.samples:
                assert sample.think_budget is None or sample.think_tokens <= sample.think_budget
                assert sample.solve_tokens <= sample.solve_budget
            if len(seen[-1]) > 1:  # pairs of branches of two thoughts
                less, more, other, _ = thoughts(group)
                assert more[: len(less)] == less
                assert other != less
    assert len(seen) == 16
    if plan == "fork":
        assert set(seen) == {(5, 10)}
    elif plan == "schedule":
        assert set(seen[:4]) == {(6,)}
        assert set(seen[12:]) == {(4, 12)}
        assert len(set(seen[4:12])) > 2
    elif plan == "ramp":
        assert [seen[place] for place in (0, 4, 8, 12)] == [(4,), (8,), (12,), (16,)]
    else:
        assert all(len(budgets) == 1 for budgets in seen), "one budget a group"
        assert len(set(seen)) > 2 - (plan == "choice")


def gradient_by_hand(model, groups, *, forced):
    """Of DAPO's loss on-policy: minus the mean over the tokens trained on of advantage times log-probability,
    each sample alone through the module.
    """
    total, count = torch.zeros(()), 0
    for group in groups:
        for sample, advantage in zip(group.samples, grpo([s.reward for s in group.samples]), strict=True):
            ids = torch.tensor([[*sample.prompt_ids, *sample.token_ids]])
            start = len(sample.prompt_ids)
            logprobs = torch.log_softmax(model(ids).logits[0, start - 1 : -1], -1)
            own = logprobs.gather(1, ids[0, start:].unsqueeze(1)).squeeze(1)
            trained = torch.tensor([forced or not one for one in sample.forced])
            total = total - advantage * own[trained].sum()
            count += int(trained.sum())
    (total / count).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_forced_tokens_are_in_the_loss_where_asked(tmp_path, monkeypatch):
    seen = []

    def step(self, lr):
        seen.append(torch.cat([parameter.grad.flatten() for parameter in self.parameters]))

    monkeypatch.setattr(MasterAdamW, "step", step)  # so the weights stay
    gradients = {}
    for forced in (True, False):
        settings = (
            f"rollout.train_on_forced={str(forced).lower()}",
            "rollout.budgets={plan: fixed, think: 6, solve: 3}",
            "optim.grad_clip=null",
        )
        with assemble(config(tmp_path, *settings)) as parts:
            model = copy.deepcopy(parts.model)
            metrics, groups = parts.trainer.train_step()
        assert metrics["think_forced"] > 0.5
        gradients[forced] = seen.pop()
        for asked in (True, False):
            model.zero_grad()
            expected = gradient_by_hand(model, groups, forced=asked)
            distance = float((gradients[forced] - expected).norm() / expected.norm())
            assert distance < 1e-4 if asked == forced else distance > 1e-2
        masks = [masked for group in groups for sample in group.samples for masked in sample.loss_mask]
        assert all(masks) == forced


@pytest.mark.parametrize("name", ["l1_exact", "l1_max"])
def test_l1_from_a_configuration(tmp_path, name):
    """The wish stands behind the prompt, and the reward knows it."""
    story = Story()
    settings = (
        "data.wish={low: 5, high: 50, words: ' {tokens}'}",  # all words that the bundled model knows
        "rollout.budgets={plan: fixed, think: null, solve: null}",
        "run.steps=1",
        f"rewards=[{{function: {name}, options: {{correct: countdown, alpha: 0.024}}}}]",
    )
    with assemble(config(tmp_path, *settings), on_step=[story]) as parts:
        parts.trainer.train()
        tokenizer = parts.engine.tokenizer
        rows = parts.dataset.rows
    wishes = set()
    for metrics, groups in story.steps.values():
        assert "think_budget" not in metrics
        for group in groups:
            problem = {key: group.columns[key] for key in ("x", "y", "z", "target")}
            wish = group.columns["target_tokens"]
            wishes.add(wish)
            assert rows[group.index].prompt[-1]["content"].endswith(f" {wish}")
            for sample in group.samples:
                assert f" {wish}" in tokenizer.decode(list(sample.prompt_ids))
                right = countdown.grade(countdown.Problem(**problem), sample.solution)
                off = wish - len(sample.token_ids)
                expected = (
                    right - 0.024 * abs(off)
                    if name == "l1_exact"
                    else right * min(1, max(0, 0.024 * off + 0.5))
                )
                assert sample.reward == pytest.approx(expected)
    assert len(wishes) > 3
    assert all(5 <= row.columns["target_tokens"] <= 50 for row in rows)


def test_wishes_that_cannot_be(tmp_path):
    for wish, message in (
        ("{low: 0, high: 5}", "1 <= low <= high"),
        ("{low: 5, high: 9, words: please}", "must have {tokens} in it"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(tmp_path, f"data.wish={wish}")
    without = config(tmp_path, "rewards=[{function: l1_exact, options: {correct: countdown}}]")
    with pytest.raises(ConfigError, match="'l1_exact' needs the column target_tokens"), assemble(without):
        pass
