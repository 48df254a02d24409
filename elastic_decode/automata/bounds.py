"""How many tokens a program can emit: what open budgets come to, what is reserved, and whether it can fit at
all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from elastic_decode.errors import BudgetError
from elastic_decode.kernels.budget.layout import Finish, Label
from elastic_decode.phases import Event, PhaseProgram, PhaseSpec

Lengths = Mapping[Event, int]  # most tokens an event can force


def most_tokens(
    program: PhaseProgram, start: str, lengths: Lengths, *, open_counts: bool = True
) -> int | None:
    """The most tokens, sampled and forced, from phase `start` to the end; None = no limit.

    open_counts False: unlimited phases and circles count nothing, which gives what the finite parts need at
    least.
    """
    known: dict[str, int | None] = {}
    walking: set[str] = set()

    def most(name: str) -> int | None:
        if name in walking:
            return None if open_counts else 0
        if name not in known:
            walking.add(name)
            known[name] = _phase_most(program.phase(name))
            walking.discard(name)
        return known[name]

    def _phase_most(phase: PhaseSpec) -> int | None:
        total = phase.budget
        if total is None:
            if open_counts:
                return None
            total = 0
        after = 0
        for event in dict.fromkeys(phase.events()):
            length = lengths[event]
            if event.next == phase.name:
                if event.max_count is not None:
                    total += event.max_count * length
                elif length and open_counts:
                    return None
            else:
                rest = 0 if isinstance(event.next, Finish) else most(event.next)
                if rest is None:
                    return None
                after = max(after, length + rest)
        return total + after

    return most(start)


def settle(program: PhaseProgram, start: str, lengths: Lengths, max_new: int) -> tuple[PhaseProgram, int]:
    """The program with an open thinking budget settled so that what follows still fits, and its most tokens.

    Only the phase the output starts in is settled, and only where the phases behind it are finite and none
    carries (what follows an unlimited phase and carries is unlimited too). Raises
    BudgetError where the finite budgets alone need more than `max_new`.
    """
    if max_new < 1:
        raise BudgetError(f"no token fits behind the prompt: max_model_len minus the prompt is {max_new}")
    need = most_tokens(program, start, lengths, open_counts=False) or 0
    if need > max_new:
        budgets = [f"{phase.name} {phase.budget}" for phase in program.phases if phase.budget is not None]
        forced = max(lengths.values(), default=0)
        raise BudgetError(
            f"{program.name} can never fit: it needs up to {need} new tokens ({', '.join(budgets)}, and "
            f"up to {forced} forced at a time) and {max_new} fit (max_model_len minus the prompt). Lower the "
            "budgets, shorten the prompt or raise max_model_len."
        )
    first = program.phase(start)
    carries = any(phase.carry for phase in program.phases)
    if first.budget is None and first.label == Label.THINK and not carries:
        closed = [replace(phase, budget=0) if phase is first else phase for phase in program.phases]
        rest = most_tokens(replace(program, phases=tuple(closed)), start, lengths)
        if rest is not None:
            settled = [
                replace(phase, budget=max_new - rest) if phase is first else phase for phase in program.phases
            ]
            return replace(program, phases=tuple(settled)), max_new
    most = most_tokens(program, start, lengths)
    return program, max_new if most is None else min(most, max_new)
