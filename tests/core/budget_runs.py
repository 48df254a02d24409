"""A program run over given draws by the reference machine, and its output worked out from the laws alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from elastic_decode import automata
from elastic_decode.budgets import Policy
from elastic_decode.core import Phase
from elastic_decode.delimiters import Delimiters, Marker
from elastic_decode.kernels.budget.layout import STATE_WORDS, Finish, Flag, Header, State, ThinkEnd
from elastic_decode.kernels.budget.reference import Machine
from elastic_decode.vocabulary import Vocabulary

AT = 5  # where the automaton lies in the pool: not at its start, so that a missing offset shows
PROMPT = 3


# One world whose close is one token, one where it is a sequence and one where it is a text that tokens split.
EOS, CLOSE, NEWLINE = 0, 1, 2
TOKENS = [
    b"<eos>",
    b"</t>",
    b"\n",
    b"a",
    b"b",
    b"</",
    b"t>",
    b"<",
    b"/",
    b"t",
    b">",
    b"x</",
    b">b",
    b"/t>a",
    b"\n<",
    b"b\n",
]
WORLDS = {
    "token": (Vocabulary(TOKENS, excluded=[CLOSE]), Delimiters(None, Marker((CLOSE,)), (EOS,))),
    "sequence": (Vocabulary(TOKENS), Delimiters(None, Marker((7, 8, 7, 9)), (EOS,))),
    "text": (
        Vocabulary([TOKENS[0], b"c", *TOKENS[2:]]),
        Delimiters(None, Marker((5, 6), "</t>"), (EOS,)),
    ),
}


@dataclass
class Output:
    """What came out: tokens, and for each whether it was forced and its phase."""

    tokens: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    think_end: str = "none"
    finish: str = "running"

    def sampled(self, phase: Phase) -> int:
        return sum(p is phase and not f for p, f in zip(self.phases, self.forced, strict=True))

    def emit(self, token: int, forced: bool, phase: Phase) -> None:
        self.tokens.append(token)
        self.forced.append(forced)
        self.phases.append(phase)


def run(
    policy: Policy,
    delimiters: Delimiters,
    vocabulary: Vocabulary,
    draws: Iterable[int],
    *,
    start: Phase = Phase.THINK,
    max_new: int = 10_000,
    end_thinking_at: int | None = None,
    ignore_eos: bool = False,
) -> Output:
    """Compiles the policy and steps it once a draw, as a decode loop does, until it or the draws end.

    Checks on the way that no output is longer than the compiled program's bound.
    """
    compiled = automata.compile(
        policy.program(delimiters),
        delimiters,
        vocabulary,
        len(vocabulary),
        max_new=max_new,
        start=start,
        ignore_eos=ignore_eos,
    )
    pool = torch.cat([torch.full((AT,), -1, dtype=torch.int32), compiled.automaton]).tolist()
    program = compiled.program_row.tolist()
    program[Header.AUTOMATON] = AT
    state = [0] * STATE_WORDS
    state[State.POSITION], state[State.LIMIT] = PROMPT - 1, PROMPT + max_new
    machine = Machine(state, program, pool)
    machine.enter_start(compiled.start[compiled.start_label])
    out = Output()
    for at, draw in enumerate(draws):
        if state[State.FINISH] != Finish.RUNNING:
            break
        if at == end_thinking_at:
            state[State.END_REQUESTED] = 1
        token, flags = machine.step(draw)
        if not flags & Flag.VALID:  # ended without a token: only a request to end the thinking does that
            assert end_thinking_at is not None
            break
        out.emit(token, bool(flags & Flag.FORCED), Phase.SOLVE if flags & Flag.SOLVE else Phase.THINK)
    out.finish = Finish(state[State.FINISH]).name.lower()
    out.think_end = ThinkEnd(state[State.THINK_END]).name.lower()
    bound = compiled.bound()
    assert bound is not None
    assert len(out.tokens) <= bound <= max_new
    return out


def written(ids: Sequence[int], delimiters: Delimiters, vocabulary: Vocabulary) -> int:
    """How much of the close (ids, or bytes of a text) these sampled tokens end with; less than all of it."""
    close = delimiters.close
    if close.text is None:
        have, want = tuple(ids), close.ids
    else:
        have, want = vocabulary.join(ids), close.text.encode()
    return next(n for n in range(min(len(want) - 1, len(have)), -1, -1) if n == 0 or have[-n:] == want[:n])


def completes(ids: Sequence[int], delimiters: Delimiters, vocabulary: Vocabulary) -> bool:
    """Whether the last of these sampled tokens completes the close."""
    close = delimiters.close
    if close.text is None:
        return tuple(ids[-len(close.ids) :]) == close.ids
    data = close.text.encode()
    return data in vocabulary.join(ids) and data not in vocabulary.join(ids[:-1])


def rest(done: int, delimiters: Delimiters, vocabulary: Vocabulary) -> list[int]:
    """The tokens that complete a close of which `done` is written."""
    close = delimiters.close
    if close.text is None or done == 0:
        return list(close.ids[done:])
    ids = vocabulary.spell(close.text.encode()[done:])
    assert ids is not None
    return list(ids)


def by_law(
    delimiters: Delimiters,
    vocabulary: Vocabulary,
    draws: Sequence[int],
    *,
    think: int | None,
    solve: int | None,
    grace: int | None = None,
    before: Sequence[int] = (),
    unless_after: bytes = b"",
    before_at_eos: bool = False,
    final: Sequence[int] = (),
    wait: Sequence[int] = (),
    waits: int = 0,
    start: Phase = Phase.THINK,
) -> Output:
    """The output that the budget laws give: lists and searches only, no table and no automaton.

    grace: after `think` tokens, so many more until a newline. before: forced ahead of a close not yet begun.
    final: forced behind a forced close. wait: forced in place of a close, `waits` times.
    """
    out = Output()
    ids: list[int] = []  # sampled since anything was forced
    queue: list[tuple[int, Phase]] = []  # what is still to be forced
    phase, used, budget = start, 0, solve if start is Phase.SOLVE else think
    landing = False

    def force(think_end: str, lead: bool) -> None:
        nonlocal phase, used, budget
        out.think_end = think_end
        done = written(ids, delimiters, vocabulary)
        there = unless_after and vocabulary.join(ids).endswith(unless_after)
        lead = lead and done == 0 and not there
        tokens = [*(before if lead else ()), *rest(done, delimiters, vocabulary)]
        queue.extend((token, Phase.THINK) for token in tokens)
        queue.extend((token, Phase.SOLVE) for token in final)
        ids.clear()
        phase, used, budget = Phase.SOLVE, 0, solve

    def expire() -> None:
        """The budget may be used up; whatever then has to be forced is queued."""
        nonlocal landing, used, budget
        if phase is Phase.THINK and used == budget and grace is not None and not landing:
            landing, used, budget = True, 0, grace
        if phase is Phase.THINK and used == budget:
            force("forced", lead=True)
        if phase is Phase.SOLVE and used == budget and not queue:
            out.finish = "budget"

    expire()
    for draw in draws:
        if out.finish != "running":
            break
        if not queue and phase is Phase.THINK:
            if draw in delimiters.eos_ids:
                force("eos", lead=before_at_eos)
            elif waits and completes([*ids, draw], delimiters, vocabulary):
                waits -= 1
                queue.extend((token, Phase.THINK) for token in wait)
                ids.clear()
        if queue:
            token, label = queue.pop(0)
            out.emit(token, True, label)
            if not queue:
                expire()
            continue
        out.emit(draw, False, phase)
        used += 1
        if phase is Phase.SOLVE:
            if draw in delimiters.eos_ids:
                out.finish = "eos"
            else:
                expire()
            continue
        ids.append(draw)
        if completes(ids, delimiters, vocabulary):
            out.think_end = "natural"
            ids.clear()
            phase, used, budget = Phase.SOLVE, 0, solve
            expire()
        elif landing and b"\n" in vocabulary[draw]:
            force("forced", lead=True)
        else:
            expire()
    return out
