"""Configurations into runs: the toy recipe, cut short; what cannot be is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_decode.assets import tiny_model_path
from elastic_decode.errors import BudgetError, CapacityError, CheckpointError, ConfigError
from elastic_decode.models import hub
from elastic_decode.rl.assemble import assemble
from elastic_decode.rl.config import load_config

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = (
    "run.steps=2",
    "run.save_every=1",
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "grading.workers=1",
    "engine.max_batch=16",
    "run.eval_every=0",
)


def toy(tmp_path, *overrides):
    return load_config(RECIPES / "toy.yaml", [f"run.folder={tmp_path}", *SMALL, *overrides])


def test_the_toy_recipe_runs_and_is_taken_up_again(tmp_path):
    told = []

    def note(step, metrics, groups):
        told.append((step, metrics))

    with assemble(toy(tmp_path), on_step=[note]) as parts:
        assert not parts.trainer.resume()
        parts.trainer.train()
    assert [step for step, _ in told] == [1, 2]
    for _, metrics in told:  # a step whose groups are all flat trains on nothing
        assert 0 <= metrics["reward"] <= 1
        assert ("mismatch_max" in metrics) == (metrics["groups_with_spread"] > 0)
        assert metrics.get("mismatch_max", 0) < 1e-5
    assert {"reward/countdown", "think_tokens", "think_forced", "lr"} <= told[0][1].keys()

    with assemble(toy(tmp_path, "run.steps=3", "run.progress=false")) as parts:
        assert parts.trainer.resume()
        assert parts.trainer.step == 2
        parts.trainer.train()
        assert parts.trainer.position == 12
    with (
        assemble(toy(tmp_path, "optim.lr=2e-4")) as parts,
        pytest.raises(CheckpointError, match="another configuration"),
    ):
        parts.trainer.resume()


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gspo", "cispo", "rloo"])
def test_every_objective_runs(tmp_path, name):
    changes = (f"objective={{name: {name}, kl: 0.001, entropy: 0.001}}", "run.steps=1")
    with assemble(toy(tmp_path, *changes)) as parts:
        metrics, _ = parts.trainer.train_step()
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["entropy"] > 0


def test_what_top_p_makes_of_a_rollout_is_in_the_metrics(tmp_path):
    found = {}
    for top_p in (1.0, 0.5):
        with assemble(
            toy(tmp_path, f"rollout.sampling.top_p={top_p}", "objective={name: grpo, entropy: 0.001}")
        ) as parts:
            found[top_p], _ = parts.trainer.train_step()
    assert all(metrics["mismatch_max"] < 1e-5 for metrics in found.values())
    assert not any(name.startswith("drawn_") for name in found[1.0])
    assert found[0.5]["drawn_max"] > 0.1
    assert found[0.5]["drawn_outside"] > 0.05


def test_several_budgets_of_a_thought(tmp_path):
    with assemble(toy(tmp_path, "rollout.budgets={plan: fork, think_at: [5, 15], solve: 3}")) as parts:
        _, groups = parts.trainer.train_step()
    assert {sample.think_budget for group in groups for sample in group.samples} == {5, 15}


def test_a_longest_output_has_to_be_known(tmp_path):
    unlimited = ("objective={name: dr_grpo}", "rollout.budgets={plan: fixed, think: null, solve: 3}")
    with pytest.raises(ConfigError, match="constant_length"), assemble(toy(tmp_path, *unlimited)):
        pass


def test_arguments_of_the_chat_template(tmp_path):
    thinking = {}
    for given in ("true", "false"):  # the bundled template closes the thought where it is false
        override = f"rollout.chat_template_kwargs={{enable_thinking: {given}, unknown: 1}}"
        with assemble(toy(tmp_path, override)) as parts:
            metrics, _ = parts.trainer.train_step()
        thinking[given] = metrics["think_tokens"]
    assert thinking["true"] > 5
    assert thinking["false"] == 0


def test_a_revision_is_of_weights_and_tokenizer(tmp_path, monkeypatch):
    asked = []

    def download(name, *, revision, **_):
        asked.append((name, revision))
        return str(tiny_model_path())

    monkeypatch.setattr(hub, "snapshot_download", download)
    with assemble(toy(tmp_path, "model={path: owner/model, revision: v2}")) as parts:
        metrics, _ = parts.trainer.train_step()
    assert metrics["think_tokens"] > 0
    assert asked == [("owner/model", "v2")], "one snapshot, for both"
    with (
        pytest.raises(CheckpointError, match="is a folder, which has no revision 'v2'"),
        assemble(toy(tmp_path, "model.revision=v2")),
    ):
        pass


def test_prompts_that_are_too_long(tmp_path):
    limit = "rollout.max_prompt_tokens=2"
    for override in (limit, "rollout.too_long=raise"):
        with (
            assemble(toy(tmp_path, limit, override)) as parts,
            pytest.raises((BudgetError, CapacityError, ConfigError), match="prompt"),
        ):
            parts.trainer.train_step()
