"""Phase programs: what a budget policy comes to, as data that every backend interprets the same way.

A program is phases with a budget of sampled tokens each, and events: what happens when a phase's budget is
used up, when one of its patterns is completed, or at EOS. `automata.compile` makes tables of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from elastic_decode.delimiters import Marker
from elastic_decode.errors import BudgetError
from elastic_decode.kernels.budget.layout import MAX_ENDS, MAX_EVENTS, MAX_PHASES, Finish, Label, ThinkEnd

Text = str | tuple[int, ...]  # forced text: exact characters, or token ids


@dataclass(frozen=True)
class IdSequence:
    """These tokens in a row; each step is the set of ids that will do."""

    steps: tuple[frozenset[int], ...]

    def __post_init__(self) -> None:
        if not self.steps or not all(self.steps):
            raise BudgetError("an id sequence needs at least one step, and every step at least one id")


@dataclass(frozen=True)
class Printed:
    """This text in the bytes the tokens print, wherever the tokens' borders fall."""

    text: str

    def __post_init__(self) -> None:
        if not self.text:
            raise BudgetError("a text pattern must not be empty")


Pattern = IdSequence | Printed


def pattern_of(marker: Marker) -> Pattern:
    """What recognises a delimiter."""
    if marker.text is not None:
        return Printed(marker.text)
    return IdSequence(tuple(frozenset((i,)) for i in marker.ids))


def _is_one_token(pattern: Pattern) -> bool:
    if isinstance(pattern, IdSequence):
        return len(pattern.steps) == 1
    return len(pattern.text.encode("utf-8")) == 1  # one byte is never split


@dataclass(frozen=True, kw_only=True)
class Inject:
    """Tokens to force: `before`, then `close`. A close that is half written is completed, and `before` left
    out.

    unless_after: `before` is also left out where the last token's text ends in this.
    """

    before: Text = ""
    unless_after: str = ""
    close: Marker | None = None

    def __post_init__(self) -> None:
        if not self.before and self.close is None:
            raise BudgetError(
                "an injection needs a text or a close; an event that forces nothing has inject=None"
            )
        if self.unless_after and self.close is None:
            raise BudgetError("Inject.unless_after needs a close: the injection could come out empty")


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happens: tokens are forced, then the output moves to `next`, a phase's name or a Finish.

    replace: the draw that triggered it is no token. max_count: how often it may happen in an output; then
    `fallback` does. Equal events are one event: they share their count.
    """

    next: str | Finish
    inject: Inject | None = None
    replace: bool = False
    max_count: int | None = None
    fallback: Event | None = None
    think_end: ThinkEnd | None = None

    def __post_init__(self) -> None:
        if isinstance(self.next, Finish) and self.next not in (Finish.EOS, Finish.BUDGET):
            raise BudgetError(f"an event may finish with EOS or BUDGET, not {self.next.name}")
        if (self.max_count is None) != (self.fallback is None):
            raise BudgetError(
                "Event.max_count and Event.fallback go together: the fallback is used once the count is spent"
            )
        if self.max_count is not None and self.max_count < 0:
            raise BudgetError(f"Event.max_count must be >= 0, got {self.max_count}")
        if self.replace and self.inject is None:
            raise BudgetError("an event that replaces the draw must force something in its place")

    def chain(self) -> Iterator[Event]:
        """The event and its fallbacks."""
        event: Event | None = self
        while event is not None:
            yield event
            event = event.fallback


@dataclass(frozen=True, kw_only=True)
class PhaseSpec:
    """One phase. budget: sampled tokens, None = unlimited; a finite one needs `on_expire`.

    carry: the previous phase's unused tokens are added. ends: (pattern, event), the first that matches wins;
    one wins over EOS, EOS over the budget. on_eos None: EOS is an ordinary token.
    """

    name: str
    label: Label
    budget: int | None
    carry: bool = False
    ends: tuple[tuple[Pattern, Event], ...] = ()
    on_expire: Event | None = None
    on_eos: Event | None = None

    def __post_init__(self) -> None:
        check_budget(f"the budget of phase {self.name!r}", self.budget)
        if self.budget is not None and self.on_expire is None:
            raise BudgetError(
                f"phase {self.name!r} has a budget of {self.budget} and no on_expire: it would do nothing"
            )
        if len(self.ends) > MAX_ENDS:
            raise BudgetError(f"phase {self.name!r} has {len(self.ends)} ends, at most {MAX_ENDS} fit")
        for pattern, event in self.ends:
            if any(e.replace for e in event.chain()) and not _is_one_token(pattern):
                raise BudgetError(
                    f"phase {self.name!r} replaces an end of more than one token ({pattern}): the tokens "
                    "before the last are already out. Use a policy without replacement, or a one-token close."
                )
        for event in self.on_expire.chain() if self.on_expire else ():
            if event.replace:
                raise BudgetError(f"phase {self.name!r}: an expiry has no draw to replace")
            if event.next == self.name:
                raise BudgetError(f"phase {self.name!r} expires into itself: its budget would not hold")

    def events(self) -> Iterator[Event]:
        """Every event the phase can fire, fallbacks included."""
        for first in (*(event for _, event in self.ends), self.on_expire, self.on_eos):
            if first is not None:
                yield from first.chain()


@dataclass(frozen=True, kw_only=True)
class PhaseProgram:
    """Phases and where to start: `start_think` where the prompt leaves thinking open, `start_solve` where it
    is closed.
    """

    name: str
    phases: tuple[PhaseSpec, ...]
    start_think: str
    start_solve: str

    def __post_init__(self) -> None:
        names = [phase.name for phase in self.phases]
        if not names or len(names) > MAX_PHASES:
            raise BudgetError(
                f"program {self.name!r} has {len(names)} phases, 1 to {MAX_PHASES} are possible"
            )
        if len(set(names)) < len(names):
            raise BudgetError(f"program {self.name!r} names a phase twice: {names}")
        asked = [self.start_think, self.start_solve]
        asked += [e.next for phase in self.phases for e in phase.events() if not isinstance(e.next, Finish)]
        for name in asked:
            if name not in names:
                raise BudgetError(
                    f"program {self.name!r} has no phase {name!r}; its phases are {', '.join(names)}"
                )
        if len(self.events()) > MAX_EVENTS:
            raise BudgetError(
                f"program {self.name!r} has {len(self.events())} events, at most {MAX_EVENTS} fit"
            )
        for phase in self.phases:
            self._check_circle(phase)

    def _check_circle(self, start: PhaseSpec) -> None:
        phase, seen = start, [start.name]
        while phase.budget == 0 and phase.on_expire is not None:
            *_, last = phase.on_expire.chain()
            if isinstance(last.next, Finish):
                return
            if last.next in seen:
                circle = " -> ".join([*seen, last.next])
                raise BudgetError(
                    f"program {self.name!r}: phases without budget expire in a circle: {circle}"
                )
            seen.append(last.next)
            phase = self.phase(last.next)

    def phase(self, name: str) -> PhaseSpec:
        return next(phase for phase in self.phases if phase.name == name)

    def events(self) -> list[Event]:
        """Every different event, in the order of first use: their numbers in the compiled tables."""
        return list(dict.fromkeys(event for phase in self.phases for event in phase.events()))


def check_budget(name: str, value: int | None, *, optional: bool = True) -> None:
    """Raises BudgetError unless `value` is an int >= 0 (or None, if optional)."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BudgetError(
            f"{name} must be an int >= 0{' or None (unlimited)' if optional else ''}, got {value!r}"
        )
