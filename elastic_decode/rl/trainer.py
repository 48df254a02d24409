"""GRPOTrainer: rollout, advantage, update, in a loop, over one set of weights.

The engine decodes with the module's own parameters (Engine.from_model), so an update needs no copy: after it,
`sync_weights` says that prefixes of the old weights are gone. Everything a step draws derives from (run seed,
step, dataset row, sample), and groups are put in the batch's order before the update, whatever order they
were complete in: a run that is resumed does what it would have done.

    state of a run = the module's weights, the optimizer's state, the step, the position in the data

With several processes (rl/distributed.py) each decodes its part of a step's rows; from then on all know all
samples, and what they compute, log and save is what one process would.

Left out here: reading a configuration (a trainer is given its parts).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from elastic_decode.core import SamplingParams
from elastic_decode.errors import CheckpointError, ConfigError
from elastic_decode.llm import Engine
from elastic_decode.rl import checkpoint, seeds
from elastic_decode.rl.advantage import Advantages, advantages
from elastic_decode.rl.batch import Group, Row, Sample
from elastic_decode.rl.budgets import BudgetPlan
from elastic_decode.rl.evaluation import Evaluation
from elastic_decode.rl.exchange import exchange
from elastic_decode.rl.lora import Adapters
from elastic_decode.rl.optim import MasterAdamW, Schedule, learning_rate
from elastic_decode.rl.parallel import Parallel
from elastic_decode.rl.refill import DynamicSampling, Gather, NextRows, one_batch
from elastic_decode.rl.rewards import Rewards
from elastic_decode.rl.rollout import RolloutStats, rollout
from elastic_decode.rl.scores import EvaluationResult
from elastic_decode.rl.update import Trained, UpdateOptions, update

_log = logging.getLogger(__name__)
OnStep = Callable[[int, dict[str, float], Sequence[Group]], None]
OnEvaluation = Callable[[int, EvaluationResult], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerOptions:
    """What a run does. Numbers of updates and rates are per step; `update` is one step's objective.

    sampling_rounds: of dynamic sampling (see rl/refill.py); None = a step is one batch of prompts.
    """

    steps: int
    prompts_per_step: int
    group_size: int
    update: UpdateOptions
    lr: float
    schedule: Schedule = "constant"
    warmup: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)
    train_on_forced: bool = False
    too_long: Literal["skip", "raise"] = "skip"
    max_prompt_tokens: int | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    sampling_rounds: int | None = None
    sleep_in_update: bool = False
    run_seed: int = 0
    save_every: int | None = None
    keep: int = 2
    identity: str = ""  # of all that decides the run's numbers: resuming another's checkpoint is refused

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "group_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"TrainerOptions.{name} must be an int >= 1, got {value!r}")
        if self.save_every is not None and self.save_every < 1:
            raise ConfigError(f"TrainerOptions.save_every must be >= 1 or None, got {self.save_every}")


class GRPOTrainer:
    """Trains `model`, whose parameters `engine` decodes with.

    next_rows: the dataset as a function of a position. reference: see `update`. adapters: those of `model`
    where it has any; the engine is fed their `names`. folder: where checkpoints go. on_step: called after
    every step with the number of steps so far, its metrics and its groups. evaluation: what to evaluate and
    when; on_evaluation: called after each with the number of steps so far. Both are called on every rank with
    the same. parallel: how ranks share the work, None = one process; an engine is fed its `names`.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        model: Any,
        next_rows: NextRows,
        rewards: Rewards,
        budgets: BudgetPlan,
        optimizer: MasterAdamW,
        options: TrainerOptions,
        reference: Any = None,
        adapters: Adapters | None = None,
        folder: Path | None = None,
        on_step: Sequence[OnStep] = (),
        evaluation: Evaluation | None = None,
        on_evaluation: Sequence[OnEvaluation] = (),
        parallel: Parallel | None = None,
    ) -> None:
        if options.save_every is not None and folder is None:
            raise ConfigError("TrainerOptions.save_every needs a folder to save in")
        self.engine = engine
        self.model = model
        self.parallel = parallel or Parallel(model)
        self.world = self.parallel.world
        self.optimizer = optimizer
        self.options = options
        self.step = 0
        self.position = 0
        self.evaluated = -1  # the last step that was evaluated
        self._next_rows = next_rows
        self._rewards = rewards
        self._budgets = budgets
        self._reference = reference
        self._adapters = adapters
        self._folder = None if folder is None else folder / "checkpoints"
        self._on_step = on_step
        self.evaluation = evaluation  # one that asks the engine can only be made when it has its weights
        self._on_evaluation = on_evaluation
        self._stats = RolloutStats()
        self._gather: Gather = one_batch
        if options.sampling_rounds is not None:
            skips = options.too_long == "skip"
            self._gather = DynamicSampling(
                options.sampling_rounds, too_long_skips=skips, warns=self.world.main
            )
        if engine.weight_shapes:
            self._sync()

    def train(self) -> None:
        """Go on to `options.steps`, evaluating and saving as asked.

        A checkpoint is written after its step's evaluation: what is resumed has been evaluated, or is now.
        """
        self._evaluate_if_due()
        while self.step < self.options.steps:
            metrics, groups = self.train_step()
            with self.world.together(f"what follows step {self.step}"):
                for call in self._on_step:
                    call(self.step, metrics, groups)
            self._evaluate_if_due()
            every = self.options.save_every
            if every is not None and (self.step % every == 0 or self.step == self.options.steps):
                self.save()

    def train_step(self) -> tuple[dict[str, float], list[Group]]:
        """One step: its metrics and all groups it decoded, in the batch's order."""
        options, started = self.options, time.perf_counter()
        asked, waited = self._stats.reward_seconds, self._stats.reward_wait_seconds
        gathered = self._gather(
            self._next_rows, self._rollout, position=self.position, wanted=options.prompts_per_step
        )
        groups = gathered.groups
        rolled = time.perf_counter()
        chosen = options.update.objective
        graded = advantages([group.rewards for group in groups], chosen.estimator, drop_flat=chosen.drop_flat)
        trained = [
            Trained(sample=sample, advantage=advantage, temperature=options.sampling.temperature)
            for group, values, kept in zip(groups, graded.values, gathered.kept, strict=True)
            for sample, advantage in zip(group.samples, values, strict=True)
            if kept and advantage is not None
        ]
        rate = learning_rate(
            self.step,
            lr=options.lr,
            schedule=options.schedule,
            warmup=options.warmup,
            steps=options.steps,
        )
        doing = f"the update of step {self.step}"
        with self.world.listening(doing), self._asleep(), self._noise():
            changes = update(
                self.model,
                self.optimizer,
                trained,
                options.update,
                lr=rate,
                reference=self._reference,
                parallel=self.parallel,
            )
        self._sync()
        updated = time.perf_counter()
        self.step += 1
        self.position = gathered.position
        metrics = {
            **_summary(groups, graded),
            **gathered.metrics,
            **changes,
            "lr": rate,
            "seconds": updated - started,
            "rollout_seconds": rolled - started,
            "reward_seconds": self._stats.reward_seconds - asked,  # within rollout_seconds, as is the next
            "reward_wait_seconds": self._stats.reward_wait_seconds - waited,
            "update_seconds": updated - rolled,
        }
        tokens = sum(len(sample.token_ids) for group in groups for sample in group.samples)
        metrics["rollout_tokens_per_second"] = tokens / max(rolled - started, 1e-9)
        return metrics, groups

    def _evaluate_if_due(self) -> None:
        evaluation = self.evaluation
        if evaluation is None or self.evaluated == self.step:
            return
        if evaluation.due(self.step, self.options.steps):
            with self.world.together(f"the evaluation after {self.step} steps"):
                result = evaluation.run(self.step)
                for call in self._on_evaluation:
                    call(self.step, result)
            self.evaluated = self.step

    def save(self) -> Path:
        """A checkpoint of now."""
        if self._folder is None:
            raise ConfigError("this trainer has no folder to save in")
        weights, main = self.parallel.state_dict(), self.world.main
        state = {
            "step": self.step,
            "position": self.position,
            "evaluated": self.evaluated,
            "run_seed": self.options.run_seed,
            "identity": self.options.identity,
            "optimizer": self.optimizer.state_dict(keep=main),
        }
        with self.world.together(f"the checkpoint of step {self.step}"):
            if main:
                checkpoint.save(
                    self._folder,
                    self.step,
                    model=self._adapters or self.model,
                    tokenizer=self.engine.tokenizer,
                    state=state,
                    keep=self.options.keep,
                    weights=weights,
                )
        return checkpoint.path_of(self._folder, self.step)

    def resume(self, path: Path | None = None) -> bool:
        """Take a run up where `path`, or the newest whole checkpoint, left it; False where there is none.

        Checkpoints of later steps are set aside: these are trained again. Raises CheckpointError where it is
        another run's, with nothing changed.
        """
        with self.world.together("to resume"):
            if path is None and self._folder is not None and self.world.main:
                path = checkpoint.latest(self._folder)  # it puts the folder in order: one rank does
        path = self.world.gather(path)[0]
        if path is None:
            return False
        with self.world.together("to resume"):
            self._load(path)
        with self.world.together("to resume"):
            if self.world.main and self._folder is not None:
                if aside := checkpoint.set_aside(self._folder, self.step):
                    names = ", ".join(path.name for path in aside)
                    _log.warning("%s: set aside, to go on from step %d: %s", self._folder, self.step, names)
                checkpoint.prune(self._folder, self.step, self.options.keep)
        self._sync()
        return True

    def _load(self, path: Path) -> None:
        state = checkpoint.load_state(path, mapped=self.world.size > 1)
        if state["run_seed"] != self.options.run_seed:
            raise CheckpointError(
                f"{path} is of a run with seed {state['run_seed']}, this one has {self.options.run_seed}: it "
                "would go on with other samples; use that seed, or start in another folder"
            )
        if state["identity"] != self.options.identity:
            raise CheckpointError(
                f"{path} is of a run with another configuration or other data ({state['identity']}, not "
                f"{self.options.identity}): take that run's, or start in another folder"
            )
        if self._adapters is not None:
            self._adapters.load(path)
        else:
            checkpoint.load_weights(path, self.model)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.position, self.evaluated = state["step"], state["position"], state["evaluated"]

    def _sync(self) -> None:
        """The engine decodes with what the module is now."""
        weights = self.parallel.weights() if self._adapters is None else self._adapters.merged()
        self.engine.sync_weights(weights)

    @contextmanager
    def _asleep(self) -> Iterator[None]:
        """The engine's memory is the update's, where that is asked for."""
        if not self.options.sleep_in_update:
            yield
            return
        self.engine.sleep()
        try:
            yield
        finally:
            self.engine.wake()

    @contextmanager
    def _noise(self) -> Iterator[None]:
        """Dropout draws by (run seed, step), so that a resumed run draws what it would have drawn."""
        device = next(self.model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seeds.derive("update", self.options.run_seed, self.step))
            yield

    def _rollout(self, rows: Sequence[Row]) -> list[Group]:
        """The groups of all rows, in their order; each rank decodes its part of them."""
        own: list[Group] = []
        with self.world.together(f"the rollout of step {self.step}"):
            mine = self.world.mine(len(rows))
            if mine:
                own = self._decode(rows, None if self.world.size == 1 else mine)
        return exchange(self.world, own, rows, self._stats)

    def _decode(self, rows: Sequence[Row], mine: Sequence[int] | None) -> list[Group]:
        options = self.options
        was_training = self.model.training
        self.model.eval()
        try:
            with closing(
                rollout(
                    self.engine,
                    rows,
                    step=self.step,
                    group_size=options.group_size,
                    budgets=self._budgets,
                    rewards=self._rewards,
                    run_seed=options.run_seed,
                    sampling=options.sampling,
                    train_on_forced=options.train_on_forced,
                    too_long=options.too_long,
                    max_prompt_tokens=options.max_prompt_tokens,
                    chat_template_kwargs=options.chat_template_kwargs,
                    stats=self._stats,
                    mine=mine,
                )
            ) as groups:
                return list(groups)
        finally:
            self.model.train(was_training)


def _summary(groups: Sequence[Group], graded: Advantages) -> dict[str, float]:
    """What a step's rollouts were like."""
    samples = [sample for group in groups for sample in group.samples]
    scored = [sample.reward for sample in samples if sample.reward is not None]
    mean = math.fsum(scored) / len(scored) if scored else math.nan
    count = max(1, len(samples))
    found = {
        "reward": mean,
        "reward_std": math.sqrt(math.fsum((r - mean) ** 2 for r in scored) / len(scored)) if scored else 0.0,
        "unscorable": graded.unscorable / count,
        "groups_with_spread": graded.spread / max(1, graded.groups),
        "think_tokens": sum(sample.think_tokens for sample in samples) / count,
        "solve_tokens": sum(sample.solve_tokens for sample in samples) / count,
        "forced_tokens": sum(sum(sample.forced) for sample in samples) / count,
        "think_forced": sum(sample.think_end == "forced" for sample in samples) / count,
        **_think_budgets(samples),
        "solve_cut": sum(sample.finish_reason in ("budget", "length") for sample in samples) / count,
    }
    names = sorted({name for sample in samples for name in sample.rewards})
    for name in names:
        values = [v for sample in samples if (v := sample.rewards.get(name)) is not None]
        found[f"reward/{name}"] = math.fsum(values) / len(values) if values else math.nan
    return found


def _think_budgets(samples: Sequence[Sample]) -> dict[str, float]:
    """Those that are limited."""
    given = [sample.think_budget for sample in samples if sample.think_budget is not None]
    if not given:
        return {}
    return {
        "think_budget": sum(given) / len(given),
        "think_budget_min": min(given),
        "think_budget_max": max(given),
    }
