"""Budget policies by name, as a sweep asks for them: a think budget and a solve budget each.

Compared at equal totals: every policy may sample think + solve tokens, the natural close among them.
`l1_exact` and `l1_max` are prompt policies: the total is said in the prompt, nothing is enforced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from elastic_decode import budgets
from elastic_decode.core import Prompt
from elastic_decode.errors import ConfigError
from elastic_decode.tasks.l1 import with_l1_suffix

Sharing = Literal["fork", "cut", "none"]


@dataclass(frozen=True, kw_only=True)
class EvalPolicy:
    """budget: (think, solve) -> the policy of one cell. sharing: how one decode serves several budgets:
    `fork` branches one thought, `cut` takes the beginnings of one output. prompt: (prompt, total) -> the
    prompt asked. options: what it was made with.
    """

    name: str
    budget: Callable[[int | None, int | None], budgets.Policy]
    sharing: Sharing = "none"
    prompt: Callable[[Prompt, int], Prompt] | None = None
    budgeted: bool = True  # False: one cell, whatever the think budgets are
    options: Mapping[str, Any] = field(default_factory=dict)


def total_of(think: int | None, solve: int | None) -> int | None:
    """Sampled tokens that a cell may have in all."""
    return None if think is None or solve is None else think + solve


def policy(name: str, options: Mapping[str, Any] | None = None) -> EvalPolicy:
    """The policy `name`. options: of s1 waits, wait, final, newline; of soft_landing grace; of wrap_up text
    and after. Raises ConfigError for another name or option.
    """
    if name not in POLICIES:
        raise ConfigError(f"no policy {name!r}; there are {', '.join(POLICIES)}")
    given = dict(options or {})
    try:
        return POLICIES[name](**given)
    except TypeError as error:
        raise ConfigError(f"policy {name}: {error}") from None


def _elastic() -> EvalPolicy:
    return EvalPolicy(name="elastic", budget=budgets.elastic, sharing="fork")


def _truncate() -> EvalPolicy:
    def whole(think: int | None, solve: int | None) -> budgets.Policy:
        return budgets.truncate(total_of(think, solve))

    return EvalPolicy(name="truncate", budget=whole, sharing="cut")


def _s1(**options: Any) -> EvalPolicy:
    budgets.budget_forcing(1, 1, **options)  # wrong options are told at once

    def forced(think: int | None, solve: int | None) -> budgets.Policy:
        return budgets.budget_forcing(think, solve, **options)

    return EvalPolicy(name="s1", budget=forced, options=options)


def _soft_landing(*, grace: int = 64) -> EvalPolicy:
    def landing(think: int | None, solve: int | None) -> budgets.Policy:
        return budgets.soft_landing(think, grace, solve)

    return EvalPolicy(name="soft_landing", budget=landing, options={"grace": grace})


def _wrap_up(*, text: str, after: str = "") -> EvalPolicy:
    def wrapped(think: int | None, solve: int | None) -> budgets.Policy:
        return budgets.wrap_up(think, text, solve, after=after)

    return EvalPolicy(name="wrap_up", budget=wrapped, options={"text": text, "after": after})


def _no_thinking() -> EvalPolicy:
    def without(think: int | None, solve: int | None) -> budgets.Policy:
        return budgets.no_thinking(solve)

    return EvalPolicy(name="no_thinking", budget=without, budgeted=False)


def _l1(exact: bool) -> Callable[[], EvalPolicy]:
    def made() -> EvalPolicy:
        def unlimited(think: int | None, solve: int | None) -> budgets.Policy:
            return budgets.elastic()

        def said(prompt: Prompt, total: int) -> Prompt:
            return with_l1_suffix(prompt, total, exact=exact)

        name = "l1_exact" if exact else "l1_max"
        return EvalPolicy(name=name, budget=unlimited, prompt=said)

    return made


POLICIES: dict[str, Callable[..., EvalPolicy]] = {
    "elastic": _elastic,
    "truncate": _truncate,
    "s1": _s1,
    "soft_landing": _soft_landing,
    "wrap_up": _wrap_up,
    "no_thinking": _no_thinking,
    "l1_exact": _l1(True),
    "l1_max": _l1(False),
}
