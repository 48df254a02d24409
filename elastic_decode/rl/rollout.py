"""Rollouts: dataset rows in, scored groups out, in the order in which they are complete.

The engine decodes when the generator is asked for more; meanwhile reward workers score what is done, and a
group comes out when it is decoded and scored. What is sampled depends on run seed, step, dataset row and
sample alone, so a step done again, on other ranks or in another batch, gives the same samples.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from elastic_decode.core import Budget, Completion, Generation, Prompt, SamplingParams
from elastic_decode.errors import BudgetError, CapacityError, ConfigError
from elastic_decode.llm import Engine
from elastic_decode.rl.batch import Group, Row, Sample
from elastic_decode.rl.budgets import BudgetPlan, GroupBudget
from elastic_decode.rl.rewards import Pending, Rewards
from elastic_decode.rl.seeds import derive

_log = logging.getLogger(__name__)
FEW_SPREAD = 0.05  # a smaller share of groups with a spread than this is worth a warning
FEW_GROUPS = 4  # fewer groups say nothing


@dataclass(slots=True)
class RolloutStats:
    """What a run's rollouts have come to so far: give the same one to every step.

    groups: yielded. groups_with_spread: with at least two different rewards. unscorable_samples: reward None.
    skipped_prompts: that did not fit. warned: a warning about the spread has been given. reward_seconds: what
    rewards took of the caller's time, while workers score beside it: handing samples over, taking rewards,
    and reward_wait_seconds, waiting for them with nothing left to decode. refusal: why the last rollout
    skipped a prompt.
    """

    groups: int = 0
    groups_with_spread: int = 0
    samples: int = 0
    unscorable_samples: int = 0
    skipped_prompts: int = 0
    warned: bool = False
    reward_seconds: float = 0.0
    reward_wait_seconds: float = 0.0
    refusal: Exception | None = None


def rollout(
    engine: Engine,
    rows: Sequence[Row],
    *,
    step: int,
    group_size: int,
    budgets: BudgetPlan,
    rewards: Rewards,
    run_seed: int,
    sampling: SamplingParams | None = None,
    train_on_forced: bool = False,
    too_long: Literal["skip", "raise"] = "skip",
    max_prompt_tokens: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    stats: RolloutStats | None = None,
    mine: Sequence[int] | None = None,
) -> Generator[Group, None, None]:
    """A Group of `group_size` scored samples for every row, as they are complete. Closing the generator
    aborts what runs.

    A group has one budget, or, under a plan with several budgets of one thought (`Fork`), its samples are
    `group_size / budgets` thoughts times their branches, a thought's branches side by side; branches past a
    thought's natural end repeat one completion. The prompt is computed once a group (once a thought where
    they are forked, unless the engine's prefix cache is on).

    sampling: without a seed, seeds are derived; a row that comes twice in `rows` is sampled twice.
    too_long: prompts that leave no room for their budgets, or are longer than max_prompt_tokens, are skipped
    with a warning, and counted, or raise; where no row at all fits, the engine's error is raised. Raises
    ConfigError, and RewardError as `rewards` decides.

    mine: places in `rows` of those that this process decodes, where others decode the rest: then none of them
    fitting is no error, but `stats.refusal`, and whether rewards have a spread is left to `warn_of_spread`.
    """
    sampling = sampling or SamplingParams()
    stats = stats if stats is not None else RolloutStats()
    if sampling.seed is not None:
        raise ConfigError("sampling.seed must be None: seeds are derived from the run's seed, step and row")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ConfigError(f"group_size must be an int >= 1, got {group_size!r}")
    if too_long not in ("skip", "raise"):
        raise ConfigError(f"too_long must be 'skip' or 'raise', got {too_long!r}")
    if not rows:
        raise ConfigError("rollout needs at least one row; the dataset, or this step's part of it, is empty")
    asked = _tasks(rows, budgets, sampling, run_seed, step, group_size)
    asked = asked if mine is None else [asked[place] for place in mine]
    decoder = _Decoder(engine, group_size, max_prompt_tokens, chat_template_kwargs)
    runs = _that_fit(decoder, asked, too_long, step, stats, alone=mine is None)
    return _groups(engine, runs, rewards, step, group_size, train_on_forced, stats, alone=mine is None)


@dataclass(frozen=True, slots=True)
class _Task:
    """A row, and how it is decoded. sampling: one, or one a thought."""

    row: Row
    budget: GroupBudget
    sampling: tuple[SamplingParams, ...]

    @property
    def forked(self) -> bool:
        return len(self.budget.think_at) > 1


def _tasks(
    rows: Sequence[Row],
    budgets: BudgetPlan,
    sampling: SamplingParams,
    run_seed: int,
    step: int,
    group_size: int,
) -> list[_Task]:
    tasks = []
    seen: dict[int, int] = {}
    for row in rows:
        budget = budgets.at(run_seed, step, row.index)
        count = len(budget.think_at)
        if group_size % count:
            raise ConfigError(
                f"group_size {group_size} is not a multiple of the {count} budgets of one thought "
                f"({', '.join(map(str, budget.think_at))})"
            )
        again = seen.get(row.index, 0)
        seen[row.index] = again + 1
        thoughts = group_size // count if count > 1 else 1
        seeds = [derive("sample", run_seed, step, row.index, again, thought) for thought in range(thoughts)]
        tasks.append(_Task(row, budget, tuple(replace(sampling, seed=seed) for seed in seeds)))
    return tasks


_Done = tuple[list[int], Completion, int | None]  # prompt ids, completion, think budget


class _Run(NamedTuple):
    """Tasks that one call of the engine decodes: all plain ones, or those forked at the same budgets."""

    tasks: list[_Task]
    forked: bool


class _Decoder(NamedTuple):
    engine: Engine
    group_size: int
    max_prompt_tokens: int | None
    template: Mapping[str, Any] | None

    def start(self, run: _Run) -> Generator[Generation, None, None]:
        """Checks every prompt now, decodes when asked. A forked task is a prompt a thought. Raises
        CapacityError or BudgetError where a prompt is too long.
        """
        for task in run.tasks if self.max_prompt_tokens is not None else ():
            length = len(self.engine.encode(task.row.prompt, chat_template_kwargs=self.template))
            if self.max_prompt_tokens is not None and length > self.max_prompt_tokens:
                raise CapacityError(
                    f"the prompt has {length} tokens, max_prompt_tokens is {self.max_prompt_tokens}"
                )
        prompts = [task.row.prompt for task in run.tasks for _ in task.sampling]
        sampling = [params for task in run.tasks for params in task.sampling]
        first = run.tasks[0].budget
        if run.forked:
            think_at = [b for b in first.think_at if b is not None]  # a plan forks at finite budgets only
            return self.engine.fork_rollout(
                prompts,
                think_at=think_at,
                solve=first.solve,
                sampling=sampling,
                chat_template_kwargs=self.template,
            )
        each = [Budget(task.budget.think_at[0], task.budget.solve) for task in run.tasks]
        return self.engine.rollout(
            prompts,
            n=self.group_size,
            budget=each,
            sampling=sampling,
            chat_template_kwargs=self.template,
        )


def _that_fit(
    decoder: _Decoder,
    tasks: list[_Task],
    too_long: str,
    step: int,
    stats: RolloutStats,
    *,
    alone: bool,
) -> list[tuple[_Run, Generator[Generation, None, None]]]:
    """The engine's calls, checked and not begun. Rows are tried one by one only if some do not fit."""
    kinds: dict[GroupBudget | None, list[_Task]] = {}
    for task in tasks:
        kinds.setdefault(task.budget if task.forked else None, []).append(task)
    started = []
    skipped: list[int] = []
    refusal: Exception | None = None
    for kind, listed in kinds.items():
        run = _Run(listed, kind is not None)
        try:
            started.append((run, decoder.start(run)))
            continue
        except (BudgetError, CapacityError):
            pass  # of some row: find out which
        fitting = []
        for task in listed:
            try:
                decoder.start(_Run([task], run.forked))
                fitting.append(task)
            except (BudgetError, CapacityError) as error:
                refusal = type(error)(f"dataset row {task.row.index}: {error}")
                if too_long == "raise":
                    raise refusal from error
                skipped.append(task.row.index)
        if fitting:
            run = _Run(fitting, run.forked)
            started.append((run, decoder.start(run)))
    stats.refusal = refusal
    if refusal is not None and not started and alone:
        raise refusal
    if skipped:
        stats.skipped_prompts += len(skipped)
        _log.warning(
            "step %d: %d of %d prompts skipped, they leave no room for their budgets (dataset rows %s; %d "
            "skipped so far): %s",
            step,
            len(skipped),
            len(tasks),
            ", ".join(map(str, skipped[:8])) + (" …" if len(skipped) > 8 else ""),
            stats.skipped_prompts,
            refusal,
        )
    return started


def _groups(
    engine: Engine,
    runs: list[tuple[_Run, Generator[Generation, None, None]]],
    rewards: Rewards,
    step: int,
    group_size: int,
    train_on_forced: bool,
    stats: RolloutStats,
    *,
    alone: bool,
) -> Generator[Group, None, None]:
    waiting: list[tuple[Row, Pending]] = []
    counted, spread = 0, 0

    def ready() -> Iterator[Group]:
        """Those that have been scored by now, oldest first."""
        nonlocal counted, spread
        for item in [item for item in waiting if item[1].done]:
            waiting.remove(item)
            row, pending = item
            began = time.perf_counter()
            group = Group(index=row.index, step=step, samples=pending.result(), columns=row.columns)
            stats.reward_seconds += time.perf_counter() - began
            counted, spread = counted + 1, spread + group.has_spread
            stats.groups += 1
            stats.groups_with_spread += group.has_spread
            stats.samples += group_size
            stats.unscorable_samples += sum(reward is None for reward in group.rewards)
            yield group

    try:
        for run, generations in runs:
            with closing(generations):
                for task, completions in _complete(run, generations):
                    samples = _samples(task, completions, train_on_forced)
                    prompt = shown(engine, task.row.prompt)
                    columns = task.row.columns
                    began = time.perf_counter()
                    pending = rewards.submit(prompt, samples, columns, step=step, index=task.row.index)
                    stats.reward_seconds += time.perf_counter() - began
                    waiting.append((task.row, pending))
                    yield from ready()
        while waiting:
            began = time.perf_counter()
            wait([f for _, p in waiting for f in p.futures if not f.done()], return_when=FIRST_COMPLETED)
            waited = time.perf_counter() - began
            stats.reward_seconds += waited
            stats.reward_wait_seconds += waited
            yield from ready()
    finally:
        for _, pending in waiting:
            pending.cancel()
    if alone:
        warn_of_spread(step, counted, spread, stats)


def warn_of_spread(step: int, groups: int, spread: int, stats: RolloutStats) -> None:
    """Say, once a run, that nearly none of a step's groups have samples with different rewards."""
    if groups >= FEW_GROUPS and spread < FEW_SPREAD * groups and not stats.warned:
        stats.warned = True
        _log.warning(
            "step %d: %d of %d groups have samples with different rewards; the others teach nothing, and the "
            "few that do can wreck the model. Change the budgets, the temperature, the prompts or the "
            "rewards (said once)",
            step,
            spread,
            groups,
        )


def _complete(run: _Run, generations: Iterator[Generation]) -> Iterator[tuple[_Task, list[_Done]]]:
    """Tasks whose samples have all been decoded, each with (prompt ids, completion, think budget)."""
    task_of = [(task, thought) for task in run.tasks for thought in range(len(task.sampling))]
    parts: dict[int, dict[int, Generation]] = {}
    for generation in generations:
        task, thought = task_of[generation.index]
        mine = parts.setdefault(id(task), {})
        mine[thought] = generation
        if len(mine) < len(task.sampling):
            continue
        del parts[id(task)]
        branches = task.budget.think_at
        yield (
            task,
            [
                (done.prompt_token_ids, completion, branches[place % len(branches)])
                for _, done in sorted(mine.items())
                for place, completion in enumerate(done.completions)
            ],
        )


def _samples(task: _Task, completions: list[_Done], train_on_forced: bool) -> list[Sample]:
    return [
        Sample.of(completion, prompt_ids, think, task.budget.solve, train_on_forced=train_on_forced)
        for prompt_ids, completion, think in completions
    ]


def shown(engine: Engine, prompt: Prompt) -> Prompt:
    """The prompt as reward functions get it: token ids as text."""
    if isinstance(prompt, str) or isinstance(prompt[0], Mapping):
        return prompt
    return str(engine.tokenizer.decode(list(prompt), skip_special_tokens=False))
