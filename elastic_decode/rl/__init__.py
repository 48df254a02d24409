"""Budget-constrained rollouts and the GRPO trainer over them. Exports load on first use (PEP 562)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_decode.rl.advantage import ESTIMATORS, Advantages, advantages
    from elastic_decode.rl.batch import Group, Sample
    from elastic_decode.rl.config import GRPOConfig, load_config
    from elastic_decode.rl.evaluation import Evaluation, Evaluator, evaluate
    from elastic_decode.rl.length_rewards import L1Exact, L1Max, Long2Short, SoftOverlong, with_l1_suffix
    from elastic_decode.rl.loss import OBJECTIVES, Objective, objective
    from elastic_decode.rl.scores import EvaluationResult
    from elastic_decode.rl.trainer import GRPOTrainer, TrainerOptions

_HOMES = {
    "Advantages": "advantage",
    "ESTIMATORS": "advantage",
    "Evaluation": "evaluation",
    "EvaluationResult": "scores",
    "Evaluator": "evaluation",
    "GRPOConfig": "config",
    "GRPOTrainer": "trainer",
    "Group": "batch",
    "L1Exact": "length_rewards",
    "L1Max": "length_rewards",
    "Long2Short": "length_rewards",
    "OBJECTIVES": "loss",
    "Objective": "loss",
    "Sample": "batch",
    "SoftOverlong": "length_rewards",
    "TrainerOptions": "trainer",
    "advantages": "advantage",
    "evaluate": "evaluation",
    "load_config": "config",
    "objective": "loss",
    "with_l1_suffix": "length_rewards",
}
__all__ = [
    "ESTIMATORS",
    "OBJECTIVES",
    "Advantages",
    "Evaluation",
    "EvaluationResult",
    "Evaluator",
    "GRPOConfig",
    "GRPOTrainer",
    "Group",
    "L1Exact",
    "L1Max",
    "Long2Short",
    "Objective",
    "Sample",
    "SoftOverlong",
    "TrainerOptions",
    "advantages",
    "evaluate",
    "load_config",
    "objective",
    "with_l1_suffix",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
