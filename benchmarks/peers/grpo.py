"""What the arms of bench_grpo.py have in common: the configuration, the reward, a step's figures.

An arm is a module with
    why_unavailable() -> str        why it cannot run here, in one line; empty where it can
    train(config, tell, way=...) -> None
                                    runs the steps of `config`, and calls `tell` after each; time in `tell` is
                                    not a step's
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

from elastic_decode.rl.config import GRPOConfig
from elastic_decode.tasks import countdown


@dataclass(frozen=True, kw_only=True)
class Arm:
    """module: in this folder. way: which of its ways. overrides: of the configuration."""

    module: str
    way: str = ""
    overrides: tuple[str, ...] = ()


# TRL keeps groups without a spread of rewards in its denominators; the recipe leaves them out.
_KEEP_FLAT = "objective.drop_flat=false"
ARMS = {
    "ours": Arm(module="grpo_ours", overrides=(_KEEP_FLAT,)),
    "ours_recipe": Arm(module="grpo_ours"),
    "trl_budgets": Arm(module="grpo_trl", way="budgets"),
    "trl_truncated": Arm(module="grpo_trl", way="truncated"),
    # As `ours`, with samples laid end to end where rows are cheaper; 256 tokens suit that best.
    "ours_end_to_end": Arm(
        module="grpo_ours",
        way="end to end",
        overrides=(_KEEP_FLAT, "optim.max_tokens_per_microbatch=256"),
    ),
}
PEERS = ("ours", "ours_recipe", "trl_budgets", "trl_truncated")


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
    return importlib.import_module(f"peers.{ARMS[name].module}")


def budgets(config: GRPOConfig) -> tuple[int, int]:
    """(think, solve) of the one plan that all arms know."""
    plan = dict(config.rollout.budgets)
    if plan.pop("plan") != "fixed" or None in plan.values():
        raise SystemExit("the arms know fixed, finite budgets only")
    return plan["think"], plan["solve"]


def graded(solutions: Sequence[str], columns: dict[str, Sequence[int]]) -> list[float]:
    """The reward function of every arm, over a solution's text."""
    return countdown.reward(solutions, columns["x"], columns["y"], columns["z"], columns["target"])
