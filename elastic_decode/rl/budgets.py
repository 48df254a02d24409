"""Which budgets a group is decoded under: a pure function of (run seed, step, prompt index).

One budget a group, so that its samples differ in what was drawn and not in what was allowed; or, with `Fork`,
several budgets of one thought.

    Fixed(think=1024, solve=1024)                  the paper's setting
    Choice(think=(256, 512, 1024), solve=512)      one of them a group, at random
    Uniform(low=0, high=30, solve=3)               any of low..high a group
    Ramp(first=256, last=1024, steps=100, solve=512)
    Schedule(((0, Fixed(...)), (200, Fixed(...)))) another plan from a step on
    Fork(think_at=(256, 512, 1024), solve=512)     a thought, branched at each
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from elastic_decode.errors import ConfigError
from elastic_decode.rl.seeds import derive


@dataclass(frozen=True, slots=True)
class GroupBudget:
    """What one group gets. None = unlimited. More than one `think_at`: branches of shared thoughts."""

    think_at: tuple[int | None, ...]
    solve: int | None


class BudgetPlan(ABC):
    """Gives every group its budgets."""

    @abstractmethod
    def at(self, run_seed: int, step: int, prompt: int) -> GroupBudget:
        """The budgets of the group of dataset row `prompt` in `step`; the same for the same arguments."""


def _tokens(name: str, value: object, *, unlimited: bool = True) -> None:
    if value is None and unlimited:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        wanted = "a number of tokens >= 0" + (", or None for unlimited" if unlimited else "")
        raise ConfigError(f"{name} must be {wanted}, got {value!r}")


def _random(run_seed: int, step: int, prompt: int) -> random.Random:
    return random.Random(derive("budget", run_seed, step, prompt))


@dataclass(frozen=True, kw_only=True)
class Fixed(BudgetPlan):
    """The same for all groups."""

    think: int | None
    solve: int | None

    def __post_init__(self) -> None:
        _tokens("Fixed.think", self.think)
        _tokens("Fixed.solve", self.solve)

    def at(self, run_seed: int, step: int, prompt: int) -> GroupBudget:
        return GroupBudget((self.think,), self.solve)


@dataclass(frozen=True, kw_only=True)
class Choice(BudgetPlan):
    """One of `think` a group, with equal chances or in proportion to `weights`."""

    think: Sequence[int | None]
    solve: int | None
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.think, (str, int)) or not self.think:
            raise ConfigError(f"Choice.think must list one or more budgets, got {self.think!r}")
        for value in self.think:
            _tokens("Choice.think", value)
        _tokens("Choice.solve", self.solve)
        object.__setattr__(self, "think", tuple(self.think))
        if self.weights is None:
            return
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        finite = all(0 <= weight < float("inf") for weight in self.weights)
        if len(self.weights) != len(self.think) or not finite or not sum(self.weights):
            raise ConfigError(
                f"Choice.weights must be {len(self.think)} numbers >= 0, one a budget, not all 0; got "
                f"{self.weights!r}"
            )

    def at(self, run_seed: int, step: int, prompt: int) -> GroupBudget:
        (think,) = _random(run_seed, step, prompt).choices(self.think, self.weights)
        return GroupBudget((think,), self.solve)


@dataclass(frozen=True, kw_only=True)
class Uniform(BudgetPlan):
    """Any of low, low + 1 … high a group, both included."""

    low: int
    high: int
    solve: int | None

    def __post_init__(self) -> None:
        _tokens("Uniform.low", self.low, unlimited=False)
        _tokens("Uniform.high", self.high, unlimited=False)
        _tokens("Uniform.solve", self.solve)
        if self.low > self.high:
            raise ConfigError(f"Uniform.low must not be above high, got {self.low} and {self.high}")

    def at(self, run_seed: int, step: int, prompt: int) -> GroupBudget:
        return GroupBudget((_random(run_seed, step, prompt).randint(self.low, self.high),), self.solve)


@dataclass(frozen=True, kw_only=True)
class Ramp(BudgetPlan):
    """From `first` at step 0 in a straight line to `last` at step `steps`, and `last` after it. Steps are the
    run's, in a later stage of a schedule, too.
    """

    first: int
    last: int
    steps: int
    solve: int | None

    def __post_init__(self) -> None:
        _tokens("Ramp.first", self.first, unlimited=False)
        _tokens("Ramp.last", self.last, unlimited=False)
        _tokens("Ramp.solve", self.solve)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigError(f"Ramp.steps must be an int >= 1, got {self.steps!r}")

    def at(self, run_seed: int, step: int, prompt: int) -> GroupBudget:
        done = min(max(step, 0), self.steps)
        return GroupBudget((self.first + (self.last - self.first) * done // self.steps,), self.solve)


@dataclass(frozen=True)
class Schedule(BudgetPlan):
    """(first step, plan) pairs: each plan holds from its step to the next one's. The first begins at 0."""

    stages: Sequence[tuple[int, BudgetPlan]]

    def __post_init__(self) -> None:
        stages = tuple((first, plan) for first, plan in self.stages)
        firsts = [first for first, _ in stages]
        if not stages or firsts[0] != 0 or any(b <= a for a, b in pairwise(firsts)):
            raise ConfigError(f"Schedule's steps must begin at 0 and rise, got {firsts}")
        if not all(isinstance(plan, BudgetPlan) for _, plan in stages):
            raise ConfigError(f"Schedule takes (first step, plan) pairs, got {self.stages!r}")
        object.__setattr__(self, "stages", stages)

    def at(self, run_seed: int, step: int, prompt: int) -> GroupBudget:
        plan = next(plan for first, plan in reversed(self.stages) if first <= max(step, 0))
        return plan.at(run_seed, step, prompt)


@dataclass(frozen=True, kw_only=True)
class Fork(BudgetPlan):
    """Every thought is branched at each of `think_at`: a group's samples are the branches of its thoughts.

    After AnytimeReasoner (BRPO, arXiv 2505.13438), with the solution in the place of its summary.
    """

    think_at: Sequence[int]
    solve: int | None

    def __post_init__(self) -> None:
        if (
            isinstance(self.think_at, (str, int))
            or len(set(self.think_at)) != len(self.think_at)
            or not self.think_at
        ):
            raise ConfigError(f"Fork.think_at must list budgets, each once, got {self.think_at!r}")
        for value in self.think_at:
            _tokens("Fork.think_at", value, unlimited=False)
        _tokens("Fork.solve", self.solve)
        object.__setattr__(self, "think_at", tuple(self.think_at))

    def at(self, run_seed: int, step: int, prompt: int) -> GroupBudget:
        return GroupBudget(tuple(self.think_at), self.solve)


PLANS: dict[str, type[BudgetPlan]] = {
    "fixed": Fixed,
    "choice": Choice,
    "uniform": Uniform,
    "ramp": Ramp,
    "fork": Fork,
}


def plan_of(options: Mapping[str, Any]) -> BudgetPlan:
    """The plan that a configuration writes as `{plan: uniform, low: 0, high: 30, solve: 3}`.

    A schedule is `{plan: schedule, stages: [{start: 0, plan: …, …}, {start: 200, plan: …, …}]}`. Raises
    ConfigError.
    """
    given = dict(options)
    name = given.pop("plan", None)
    if name == "schedule":
        stages = [dict(stage) for stage in given.pop("stages", ())]
        if given:
            raise ConfigError(f"a schedule has stages and nothing else, got {', '.join(given)}")
        return Schedule([(stage.pop("start", -1), plan_of(stage)) for stage in stages])
    if name not in PLANS:
        raise ConfigError(f"plan must be one of {', '.join([*PLANS, 'schedule'])}, got {name!r}")
    try:
        return PLANS[name](**given)
    except TypeError as error:
        raise ConfigError(f"plan {name}: {error}") from None
