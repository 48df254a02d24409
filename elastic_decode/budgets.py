"""Budget policies: each compiles to a PhaseProgram, so that no policy is a branch in a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from elastic_decode.core import Budget
from elastic_decode.delimiters import Delimiters
from elastic_decode.errors import BudgetError
from elastic_decode.kernels.budget.layout import Finish, Label, ThinkEnd
from elastic_decode.phases import (
    Event,
    Inject,
    Pattern,
    PhaseProgram,
    PhaseSpec,
    Printed,
    Text,
    check_budget,
    pattern_of,
)


def _text(name: str, value: str | Sequence[int], *, empty: bool = False) -> Text:
    value = value if isinstance(value, str) else tuple(int(i) for i in value)
    if not value and not empty:
        raise BudgetError(f"{name} must not be empty")
    return value


@dataclass(frozen=True)
class Policy:
    """A budget policy. Give it wherever a Budget goes; make one with the functions below, or subclass it."""

    name: ClassVar[str] = "policy"

    def program(self, delimiters: Delimiters, tokenizer: Any = None) -> PhaseProgram:
        """The policy for these delimiters. tokenizer: for policies of one's own; the ones here leave texts to
        `compile`.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        fields = ((key, value) for key, value in vars(self).items() if value is not None)
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in fields)})"


_EOS = Event(next=Finish.EOS)
_BUDGET = Event(next=Finish.BUDGET)


def _solve(budget: int | None, name: str = "solve", **changes: Any) -> PhaseSpec:
    return PhaseSpec(name=name, label=Label.SOLVE, budget=budget, on_expire=_BUDGET, on_eos=_EOS, **changes)


def _close(
    delimiters: Delimiters, next: str, think_end: ThinkEnd, *, replace: bool = False, **before: Any
) -> Event:
    """The close is forced, or completed where it is half written."""
    return Event(
        next=next, inject=Inject(close=delimiters.close, **before), replace=replace, think_end=think_end
    )


def _natural(delimiters: Delimiters) -> tuple[Pattern, Event]:
    return pattern_of(delimiters.close), Event(next="solve", think_end=ThinkEnd.NATURAL)


@dataclass(frozen=True)
class Elastic(Policy):
    think: int | None
    solve: int | None
    name: ClassVar[str] = "elastic"

    def __post_init__(self) -> None:
        check_budget(f"{self.name}: think", self.think)
        check_budget(f"{self.name}: solve", self.solve)

    def program(self, delimiters: Delimiters, tokenizer: Any = None) -> PhaseProgram:
        think = PhaseSpec(
            name="think",
            label=Label.THINK,
            budget=self.think,
            ends=(_natural(delimiters),),
            on_expire=_close(delimiters, "solve", ThinkEnd.FORCED),
            on_eos=_close(delimiters, "solve", ThinkEnd.EOS, replace=True),
        )
        phases = (think, _solve(self.solve))
        return PhaseProgram(name=str(self), phases=phases, start_think="think", start_solve="solve")


@dataclass(frozen=True)
class NoThinking(Elastic):
    name: ClassVar[str] = "no_thinking"


@dataclass(frozen=True)
class Truncate(Policy):
    total: int | None
    name: ClassVar[str] = "truncate"

    def __post_init__(self) -> None:
        check_budget("truncate: total", self.total)

    def program(self, delimiters: Delimiters, tokenizer: Any = None) -> PhaseProgram:
        think = PhaseSpec(
            name="think",
            label=Label.THINK,
            budget=self.total,
            ends=(_natural(delimiters),),
            on_expire=_BUDGET,
            on_eos=Event(next=Finish.EOS, think_end=ThinkEnd.EOS),
        )
        # The solution has what thinking left; a prompt that has closed its thinking starts with all of it.
        phases = (think, _solve(0, carry=True), _solve(self.total, name="solve_only"))
        return PhaseProgram(name=str(self), phases=phases, start_think="think", start_solve="solve_only")


@dataclass(frozen=True)
class BudgetForcing(Policy):
    think: int | None
    solve: int | None
    waits: int
    wait: Text = "Wait"
    final: Text = "Final Answer:"
    newline: Text = "\n"
    name: ClassVar[str] = "budget_forcing"

    def __post_init__(self) -> None:
        check_budget("budget_forcing: think", self.think)
        check_budget("budget_forcing: solve", self.solve)
        check_budget("budget_forcing: waits", self.waits, optional=False)
        object.__setattr__(self, "wait", _text("budget_forcing: wait", self.wait))
        object.__setattr__(self, "final", _text("budget_forcing: final", self.final, empty=True))
        object.__setattr__(self, "newline", _text("budget_forcing: newline", self.newline, empty=True))

    def program(self, delimiters: Delimiters, tokenizer: Any = None) -> PhaseProgram:
        pattern, natural = _natural(delimiters)
        early = natural
        if self.waits:
            early = Event(
                next="think",
                inject=Inject(before=self.wait),
                replace=True,
                max_count=self.waits,
                fallback=natural,
            )
        line: dict[str, Any] = {"before": self.newline}
        if isinstance(self.newline, str):
            line["unless_after"] = self.newline
        after = "final" if self.final else "solve"
        think = PhaseSpec(
            name="think",
            label=Label.THINK,
            budget=self.think,
            ends=((pattern, early),),
            on_expire=_close(delimiters, after, ThinkEnd.FORCED, **line),
            on_eos=_close(delimiters, after, ThinkEnd.EOS, replace=True, **line),
        )
        phases = [think, _solve(self.solve)]
        if self.final:
            # A phase of no budget forces its text at once: so the text belongs to the solution.
            announce = Event(next="solve", inject=Inject(before=self.final))
            phases.append(PhaseSpec(name="final", label=Label.SOLVE, budget=0, on_expire=announce))
        return PhaseProgram(name=str(self), phases=tuple(phases), start_think="think", start_solve="solve")


@dataclass(frozen=True)
class SoftLanding(Policy):
    think: int | None
    grace: int
    solve: int | None
    name: ClassVar[str] = "soft_landing"

    def __post_init__(self) -> None:
        check_budget("soft_landing: think", self.think)
        check_budget("soft_landing: grace", self.grace, optional=False)
        check_budget("soft_landing: solve", self.solve)

    def program(self, delimiters: Delimiters, tokenizer: Any = None) -> PhaseProgram:
        natural = _natural(delimiters)
        forced = _close(delimiters, "solve", ThinkEnd.FORCED)
        on_eos = _close(delimiters, "solve", ThinkEnd.EOS, replace=True)
        think = PhaseSpec(
            name="think",
            label=Label.THINK,
            budget=self.think,
            ends=(natural,),
            on_expire=Event(next="landing"),
            on_eos=on_eos,
        )
        landing = PhaseSpec(
            name="landing",
            label=Label.THINK,
            budget=self.grace,
            ends=(natural, (Printed("\n"), forced)),
            on_expire=forced,
            on_eos=on_eos,
        )
        phases = (think, landing, _solve(self.solve))
        return PhaseProgram(name=str(self), phases=phases, start_think="think", start_solve="solve")


@dataclass(frozen=True)
class WrapUp(Policy):
    think: int | None
    text: Text
    solve: int | None
    after: Text = ""
    name: ClassVar[str] = "wrap_up"

    def __post_init__(self) -> None:
        check_budget("wrap_up: think", self.think)
        check_budget("wrap_up: solve", self.solve)
        object.__setattr__(self, "text", _text("wrap_up: text", self.text))
        object.__setattr__(self, "after", _text("wrap_up: after", self.after, empty=True))

    def program(self, delimiters: Delimiters, tokenizer: Any = None) -> PhaseProgram:
        after = "after" if self.after else "solve"
        think = PhaseSpec(
            name="think",
            label=Label.THINK,
            budget=self.think,
            ends=(_natural(delimiters),),
            on_expire=_close(delimiters, after, ThinkEnd.FORCED, before=self.text),
            on_eos=_close(delimiters, "solve", ThinkEnd.EOS, replace=True),
        )
        phases = [think, _solve(self.solve)]
        if self.after:
            forced = Event(next="solve", inject=Inject(before=self.after))
            phases.append(PhaseSpec(name="after", label=Label.SOLVE, budget=0, on_expire=forced))
        return PhaseProgram(name=str(self), phases=tuple(phases), start_think="think", start_solve="solve")


def elastic(think: int | None = None, solve: int | None = None) -> Elastic:
    """At most `think` sampled tokens of thinking, then the close is forced, then at most `solve` of solution.

    The default policy, and what `Budget(think, solve)` means (Elastic Reasoning, arXiv 2505.05315). EOS in
    the thinking is replaced by the close. think=None with a finite solve: thinking ends where the close and
    `solve` still fit.
    """
    return Elastic(think, solve)


def truncate(total: int | None = None) -> Truncate:
    """The whole output in one budget of `total` sampled tokens; EOS ends it wherever it comes. The vanilla
    baseline.
    """
    return Truncate(total)


def budget_forcing(
    think: int | None,
    solve: int | None,
    waits: int = 1,
    wait: str | Sequence[int] = "Wait",
    final: str | Sequence[int] = "Final Answer:",
    *,
    newline: str | Sequence[int] = "\n",
) -> BudgetForcing:
    """S1 (simplescaling/s1): an early close is replaced by `wait`, at most `waits` times; needs a one-token
    close if any.

    After `think` sampled tokens, or at EOS in the thinking: `newline` unless the text stands behind one, the
    close, `final`. `final` belongs to the solution. Texts are strings or token ids; an empty `final` or
    `newline` is left out.
    """
    return BudgetForcing(
        think,
        solve,
        waits,
        _text("budget_forcing: wait", wait),
        _text("budget_forcing: final", final, empty=True),
        _text("budget_forcing: newline", newline, empty=True),
    )


def soft_landing(think: int | None, grace: int, solve: int | None) -> SoftLanding:
    """After `think` sampled tokens the close is forced behind the next newline, after `think + grace` in any
    case.

    The way of Nemotron's and NIM's budgets: a line of thought is finished where that costs at most `grace`
    tokens.
    """
    return SoftLanding(think, grace, solve)


def wrap_up(
    think: int | None, text: str | Sequence[int], solve: int | None, *, after: str | Sequence[int] = ""
) -> WrapUp:
    """After `think` sampled tokens `text` is forced, then the close, then `after`: Qwen3's wind-down, for
    one.

    A close that is half written is completed without `text`. `after` (a blank line, for Qwen3) belongs to the
    solution.
    """
    return WrapUp(think, _text("wrap_up: text", text), solve, _text("wrap_up: after", after, empty=True))


def no_thinking(solve: int | None = None) -> NoThinking:
    """No thinking: the close is forced first, then at most `solve` sampled tokens of solution."""
    return NoThinking(0, solve)


def as_policy(budget: Budget | Policy | None) -> Policy:
    """The policy that a request's budget means: a Budget is `elastic`, None is no budget at all. Raises
    BudgetError.
    """
    if budget is None:
        return Elastic(None, None)
    if isinstance(budget, Budget):
        return Elastic(budget.think, budget.solve)
    if isinstance(budget, Policy):
        return budget
    raise BudgetError(
        "a budget must be a Budget or a policy of elastic_decode.budgets, "
        f"got {type(budget).__name__} {budget!r}"
    )
