"""What the arms of bench_grpo.py have in common: the configuration, the reward, a step's figures.

An arm is a module with
    why_unavailable() -> str        why it cannot run here, in one line; empty where it can
    train(config, tell) -> None     runs the steps of `config`, and calls `tell` after each; time in `tell` is
                                    not a step's
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

from elastic_decode.rl.config import GRPOConfig
from elastic_decode.tasks import countdown

# name -> (module, what is special about it)
ARMS = {
    "ours": (
        "grpo_ours",
        "objective.drop_flat=false",
    ),  # TRL keeps groups without a spread in its denominators
    "ours_recipe": ("grpo_ours", ""),  # as recipes/toy.yaml says it: such groups are left out
    "trl_budgets": ("grpo_trl", "budgets"),
    "trl_truncated": ("grpo_trl", "truncated"),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of one optimizer step and its parts: rollout (generation and rewards), of which rewards (what
    the trainer's process gave to them), update (all that follows). cpu, rollout_cpu: seconds of processor
    that the trainer's process used, all its threads: what a busy machine changes least. reward: their mean.
    tokens: of an output, forced ones included. forced: share of outputs whose close was forced; closed: that
    have one.
    """

    seconds: float
    rollout: float
    rewards: float
    update: float
    cpu: float
    rollout_cpu: float
    reward: float
    tokens: float
    forced: float
    closed: float


Tell = Callable[[Step], None]


def arm(name: str) -> ModuleType:
    return importlib.import_module(f"peers.{ARMS[name][0]}")


def budgets(config: GRPOConfig) -> tuple[int, int]:
    """(think, solve) of the one plan that all arms know."""
    plan = dict(config.rollout.budgets)
    if plan.pop("plan") != "fixed" or None in plan.values():
        raise SystemExit("the arms know fixed, finite budgets only")
    return plan["think"], plan["solve"]


def graded(solutions: Sequence[str], columns: dict[str, Sequence[int]]) -> list[float]:
    """The reward function of every arm, over a solution's text."""
    return countdown.reward(solutions, columns["x"], columns["y"], columns["z"], columns["target"])
