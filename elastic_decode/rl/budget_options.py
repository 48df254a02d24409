"""Budget plans as a configuration writes them: `{plan: uniform, low: 0, high: 30, solve: 3}`.

`{plan: schedule, stages: [{start: 0, plan: …}, {start: 200, plan: …}]}` changes from one to another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

from elastic_decode.errors import ConfigError
from elastic_decode.rl.budgets import PLANS, plan_of
from elastic_decode.rl.fields import check_keys, require


def check_budgets(budgets: Mapping[str, Any], path: str, *, nested: bool = False) -> None:
    """Raises ConfigError unless the mapping says one plan, with all that belongs to it and nothing else."""
    plan = budgets.get("plan")
    plans = list(PLANS) if nested else [*PLANS, "schedule"]
    require(plan in plans, f"{path}.plan", f"one of {', '.join(plans)}", plan)
    if plan == "schedule":
        check_keys(budgets, ["plan", "stages"], path)
        _check_stages(budgets.get("stages"), path)
        return
    fields = dataclasses.fields(cast(Any, PLANS[str(plan)]))
    check_keys(budgets, ["plan", *(f.name for f in fields), *(["start"] if nested else [])], path)
    for field in fields:
        if field.name not in budgets and field.default is dataclasses.MISSING:
            raise ConfigError(f"{path}.{field.name} is missing: plan {plan} has no default for it")
    try:
        plan_of({key: value for key, value in budgets.items() if key != "start"})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def stages(budgets: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The plans of a schedule; any other plan is its only one."""
    return list(budgets["stages"]) if budgets["plan"] == "schedule" else [budgets]


def longest(budgets: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The largest think and solve budget that a plan gives; None = unlimited."""

    def most(values: Sequence[int | None]) -> int | None:
        return None if any(value is None for value in values) else max(v for v in values if v is not None)

    found = []
    for plan in stages(budgets):
        thinks = [plan[name] for name in ("think", "high", "first", "last", "think_at") if name in plan]
        thinks = [t for item in thinks for t in (item if isinstance(item, (list, tuple)) else [item])]
        found.append((most(thinks), plan["solve"]))
    return most([think for think, _ in found]), most([solve for _, solve in found])


def _check_stages(found: Any, path: str) -> None:
    require(isinstance(found, (list, tuple)) and bool(found), f"{path}.stages", "a list of plans", found)
    for i, stage in enumerate(found):
        require(isinstance(stage, Mapping), f"{path}.stages.{i}", "a plan and its start", stage)
        check_budgets(stage, f"{path}.stages.{i}", nested=True)
    starts = [stage.get("start") for stage in found]
    whole = all(isinstance(start, int) and not isinstance(start, bool) for start in starts)
    rising = whole and starts[0] == 0 and all(a < b for a, b in pairwise(starts))
    require(rising, f"{path}.stages: start", "steps that begin at 0 and rise", starts)
