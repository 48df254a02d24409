"""Accuracy under several budgets, on held-out rows, between the steps of a run.

A sample's seed derives from (run seed, dataset row, sample) and from nothing else: evaluations of different
steps draw with the same random numbers, so they are paired, and so are the budgets of one evaluation. That is
also why a thought is decoded once for all finite budgets of one solution budget (`Engine.fork_rollout`): a
branch is, token for token, what decoding under its budget alone would give.

Training does not notice an evaluation: samples, weights, the optimizer and the position in the data are what
they are without it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from elastic_decode.budgets import truncate
from elastic_decode.core import Budget, Completion, Generation, SamplingParams
from elastic_decode.errors import BudgetError, CapacityError, ConfigError, RewardError
from elastic_decode.llm import AnyBudget, Engine
from elastic_decode.rl import data
from elastic_decode.rl.batch import Row, Sample
from elastic_decode.rl.distributed import World
from elastic_decode.rl.options import EvaluationBudget, EvaluationOptions
from elastic_decode.rl.rewards import Pending, Rewards
from elastic_decode.rl.rollout import shown
from elastic_decode.rl.scores import EvaluationResult, Outcome, score_of
from elastic_decode.rl.seeds import derive

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a trainer evaluates, and when: `run` gets the number of updates so far."""

    run: Callable[[int], EvaluationResult]
    every: int
    at_start: bool = True
    at_end: bool = True

    def due(self, step: int, steps: int) -> bool:
        """After `step` of `steps` updates."""
        if step == 0:
            return self.at_start
        return step % self.every == 0 or (self.at_end and step == steps)


class Evaluator:
    """Evaluates `engine` as it is when called; see EvaluationOptions for the arguments' meanings.

    Raises ConfigError for names that are no reward functions, and the engine's error where no row leaves room
    for all budgets: now, not at the first evaluation. Single rows that do not fit are skipped with a warning.
    world: the processes that share the rows; each has the whole result.
    """

    def __init__(
        self,
        engine: Engine,
        rows: Sequence[Row],
        budgets: Sequence[EvaluationBudget],
        *,
        rewards: Rewards,
        n: int = 1,
        run_seed: int = 0,
        sampling: SamplingParams | None = None,
        counted: Sequence[str] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        world: World | None = None,
    ) -> None:
        unknown = [name for name in counted if name not in rewards.functions]
        if unknown:
            raise ConfigError(
                f"evaluation.rewards names {unknown[0]!r}; there are {', '.join(rewards.functions)}"
            )
        self._engine, self._rewards, self._counted = engine, rewards, tuple(counted)
        self._budgets, self._n, self._run_seed = tuple(budgets), n, run_seed
        self._sampling = sampling or SamplingParams()
        self._template = chat_template_kwargs
        self._world = world or World()
        self._all = self._that_fit(rows)
        self._skipped = len(rows) - len(self._all)
        self._rows = [self._all[place] for place in self._world.mine(len(self._all))]
        self._plan = self._shared() if self._rows else []

    def __call__(self, step: int) -> EvaluationResult:
        """Decode and score everything. Raises RewardError as the reward functions decide."""
        started = time.perf_counter()
        own: dict[tuple[int, int], list[Outcome]] = {}
        with self._world.together(f"the evaluation of step {step}"):
            own = self._outcomes(step)
        found = {key: outcomes for part in self._world.gather(own) for key, outcomes in part.items()}
        return EvaluationResult(
            step=step,
            budgets=tuple(
                score_of(budget, [found[place, row.index] for row in self._all])
                for place, budget in enumerate(self._budgets)
            ),
            rows=tuple(row.index for row in self._all),
            skipped=self._skipped,
            seconds=time.perf_counter() - started,
        )

    def _outcomes(self, step: int) -> dict[tuple[int, int], list[Outcome]]:
        """By (place of the budget, dataset row), of this process's rows."""
        waiting: dict[tuple[int, int], Pending] = {}
        found: dict[tuple[int, int], list[Outcome]] = {}

        def take(*, wait: bool) -> None:
            for key in [key for key, pending in waiting.items() if wait or pending.done]:
                found[key] = [self._outcome(sample) for sample in waiting.pop(key).result()]

        try:
            with closing(self._decoded()) as decoded:
                for (budget, place), samples in decoded:
                    row = self._rows[place]
                    prompt = shown(self._engine, row.prompt)
                    waiting[budget, row.index] = self._rewards.submit(
                        prompt, samples, row.columns, step=step, index=row.index
                    )
                    take(wait=False)
            take(wait=True)
        except RewardError as error:
            raise RewardError(f"in the evaluation: {error}") from error
        finally:
            for pending in waiting.values():
                pending.cancel()
        return found

    # ---- decoding ----

    def _decoded(self) -> Generator[tuple[tuple[int, int], list[Sample]], None, None]:
        """((budget, row), its n samples) by their places, as they are complete."""
        parts: dict[tuple[int, int], dict[int, Sample]] = {}
        for shared in self._plan:
            with closing(self._start(shared, self._rows, self._n)) as generations:
                for generation in generations:
                    for place, completion, row, sample in self._placed(shared, generation):
                        budget = self._budgets[place]
                        ids = generation.prompt_token_ids
                        mine = parts.setdefault((place, row), {})
                        mine[sample] = Sample.of(completion, ids, budget.think, budget.solve)
                        if len(mine) == self._n:
                            done = parts.pop((place, row))
                            yield (place, row), [done[i] for i in range(self._n)]

    def _shared(self) -> list[_Shared]:
        """Places of budgets that one call of the engine decodes: forks first, then all others at once."""
        by_solve: dict[int | None, list[int]] = {}
        for place, budget in enumerate(self._budgets):
            if budget.think is not None:
                by_solve.setdefault(budget.solve, []).append(place)
        forks = [_Shared(places, fork=True) for places in by_solve.values() if len(places) > 1]
        # Branches hold their pages together: where these are too many, the budgets are decoded one by one.
        forks = [fork for fork in forks if self._fits(fork, self._rows)]
        forked = {place for fork in forks for place in fork.places}
        rest = [place for place in range(len(self._budgets)) if place not in forked]
        return [*forks, *([_Shared(rest, fork=False)] if rest else [])]

    def _start(self, shared: _Shared, rows: Sequence[Row], n: int) -> Generator[Generation, None, None]:
        """Checks everything now, decodes when asked."""
        times = 1 if shared.fork else len(shared.places)
        prompts = [row.prompt for row in rows for _ in range(n)] * times
        sampling = [
            replace(self._sampling, seed=derive("evaluation", self._run_seed, row.index, sample))
            for row in rows
            for sample in range(n)
        ] * times
        chosen = [self._budgets[place] for place in shared.places]
        if shared.fork:
            think_at = [budget.think for budget in chosen if budget.think is not None]
            return self._engine.fork_rollout(
                prompts,
                think_at=think_at,
                solve=chosen[0].solve,
                sampling=sampling,
                chat_template_kwargs=self._template,
            )
        budgets = [_policy(budget) for budget in chosen for _ in range(len(rows) * n)]
        return self._engine.rollout(
            prompts, budget=budgets, sampling=sampling, chat_template_kwargs=self._template
        )

    def _placed(self, shared: _Shared, done: Generation) -> Iterator[tuple[int, Completion, int, int]]:
        """(budget, completion, row, sample) of each completion; the first, third and fourth as places."""
        block, rest = divmod(done.index, len(self._rows) * self._n)
        row, sample = divmod(rest, self._n)
        places = shared.places if shared.fork else [shared.places[block]]
        for place, completion in zip(places, done.completions, strict=True):
            yield place, completion, row, sample

    def _fits(self, shared: _Shared, rows: Sequence[Row]) -> bool:
        try:
            self._start(shared, rows, 1)
        except (BudgetError, CapacityError):
            return False
        return True

    def _that_fit(self, rows: Sequence[Row]) -> list[Row]:
        if not rows:
            raise ConfigError("an evaluation needs at least one row")
        if len({row.index for row in rows}) < len(rows):
            raise ConfigError("an evaluation's rows need different indices: their seeds derive from these")
        alone = _Shared(list(range(len(self._budgets))), fork=False)
        if self._fits(alone, rows):
            return list(rows)
        fitting = [row for row in rows if self._fits(alone, [row])]
        if not fitting:
            self._start(alone, rows, 1)  # raises
        if self._world.main:
            _log.warning(
                "evaluation: %d of %d prompts are left out, they leave no room for its budgets",
                len(rows) - len(fitting),
                len(rows),
            )
        return fitting

    # ---- scores ----

    def _outcome(self, sample: Sample) -> Outcome:
        score = sample.reward
        if self._counted:
            own = [sample.rewards[name] for name in self._counted]
            known = [value for value in own if value is not None]
            score = math.fsum(known) if len(known) == len(own) else None
        return Outcome(
            score=score,
            think_tokens=sample.think_tokens,
            solve_tokens=sample.solve_tokens,
            forced=sample.think_end == "forced",
            natural=sample.think_end == "natural",
            cut=sample.finish_reason in ("budget", "length"),
        )


def evaluate(
    engine: Engine,
    rows: Sequence[Row],
    budgets: Sequence[EvaluationBudget],
    n: int,
    rewards: Rewards,
    seed: int,
    step: int,
    **options: Any,
) -> EvaluationResult:
    """One evaluation. options: of Evaluator."""
    return Evaluator(engine, rows, budgets, rewards=rewards, n=n, run_seed=seed, **options)(step)


def rows_of(options: EvaluationOptions) -> list[Row]:
    """The rows that a configuration evaluates on, the same in every run; in the dataset's order."""
    dataset = data.load(options.data, seed=0)
    count = len(dataset) if options.limit is None else min(options.limit, len(dataset))
    chosen, _ = dataset.batch(0, count)
    return sorted(chosen, key=lambda row: row.index)


class _Shared(NamedTuple):
    """Places of the budgets that are decoded in one call: branches of one thought, or each by itself."""

    places: list[int]
    fork: bool


def _policy(budget: EvaluationBudget) -> AnyBudget:
    if budget.truncate is not None:
        return truncate(budget.truncate)
    return Budget(think=budget.think, solve=budget.solve)
