"""This project's trainer, as `elastic-decode train` runs it.

The way "end to end" lays a micro-batch's samples end to end, as the trainer does where the attention kernel
knows where sequences end; here it does not.
"""

from __future__ import annotations

import time
from typing import Any

from elastic_decode.rl.config import GRPOConfig
from peers.grpo import Step, Tell


def why_unavailable() -> str:
    return ""


def versions() -> dict[str, str]:
    return {}


def train(config: GRPOConfig, tell: Tell, *, way: str) -> None:
    from elastic_decode.rl import update
    from elastic_decode.rl.assemble import assemble

    if way == "end to end":
        update.attends_in_rows = lambda model: False  # type: ignore[assignment]
    with assemble(config) as parts:
        trainer = parts.trainer
        rollout, spent = trainer._rollout, 0.0

        def timed(rows: Any) -> Any:
            nonlocal spent
            began = time.process_time()
            groups = rollout(rows)
            spent = time.process_time() - began
            return groups

        trainer._rollout = timed  # type: ignore[method-assign]
        for _ in range(config.run.steps):
            began = time.process_time()
            metrics, groups = trainer.train_step()
            cpu = time.process_time() - began
            samples = [sample for group in groups for sample in group.samples]
            tell(
                Step(
                    seconds=metrics["seconds"],
                    rollout=metrics["rollout_seconds"],
                    rewards=metrics["reward_seconds"],
                    update=metrics["update_seconds"],
                    cpu=cpu,
                    rollout_cpu=spent,
                    reward=metrics["reward"],
                    tokens=sum(len(sample.token_ids) for sample in samples) / len(samples),
                    forced=metrics["think_forced"],
                    closed=sum(sample.think_end != "none" for sample in samples) / len(samples),
                )
            )
