"""The budget machine's laws and its reading and writing of tensors, on programs made by hand."""

import pytest
import torch

from elastic_decode.kernels import budget as op
from elastic_decode.kernels.budget import layout
from elastic_decode.kernels.budget.layout import STATE_WORDS, Finish, Flag, Label, State, ThinkEnd
from elastic_decode.kernels.budget.testing import automaton, event, phase, program
from elastic_decode.kernels.testing import device_of, runnable


@pytest.fixture(params=runnable("budget"))
def backend(request):
    """A backend's name; tensors are made where it wants them."""
    with torch.device(device_of(request.param)):
        yield request.param


def entered(backend, state, programs, automata, starts):
    """The three tables, made on the CPU, with every row at its start, where `backend` wants them."""
    for slot, start in enumerate(starts):
        op.enter_start(state[slot], programs[slot], automata, start, backend=backend)
    return [each.to(device_of(backend)) for each in (state, programs, automata)]


def ints(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cpu")


# The laws, on programs made by hand. Tokens 0 to 5 are ordinary.

NEWLINE, OPEN_CLOSE, CLOSE, SHORT, EOS, WAIT, FINAL = range(6, 13)
VOCAB = 13
CLOSED, ENDED_LINE, CLOSED_SHORT = range(3)  # patterns: the close, the newline, a close of one token
FORCE_CLOSE, FORCE_WAIT, FORCE_SHORT, FORCE_FINAL = range(4)  # injects
THINK, SOLVE = Label.THINK, Label.SOLVE
F = "forced"


def hand_automaton() -> list[int]:
    """DFA state 1: the first token of the close is written."""
    following = [[int(token == OPEN_CLOSE) for token in range(VOCAB)]] * 2
    match = [[0] * VOCAB for _ in range(2)]
    for state in range(2):
        match[state][NEWLINE] = 1 << ENDED_LINE
        match[state][SHORT] = 1 << CLOSED_SHORT
    match[1][CLOSE] = 1 << CLOSED
    injects = [[[OPEN_CLOSE, CLOSE], [CLOSE]], [[WAIT]] * 2, [[SHORT]] * 2, [[FINAL, NEWLINE]] * 2]
    return automaton(range(VOCAB), following, match, [int(token == EOS) for token in range(VOCAB)], injects)


def elastic(think: int, solve: int, **options: bool) -> list[int]:
    natural, forced, by_eos, spent, done = range(5)
    return program(
        0,
        [
            phase(THINK, think, ends=[(CLOSED, natural)], on_expire=forced, on_eos=by_eos),
            phase(SOLVE, solve, on_expire=spent, on_eos=done),
        ],
        [
            event(1, think_end=ThinkEnd.NATURAL),
            event(1, inject=FORCE_CLOSE, think_end=ThinkEnd.FORCED),
            event(1, inject=FORCE_CLOSE, replace=True, think_end=ThinkEnd.EOS),
            event(-Finish.BUDGET),
            event(-Finish.EOS),
        ],
        **options,
    )


class Row:
    """One slot, decoded a draw at a time. `out` holds (token, phase label) or (token, phase label, F)."""

    def __init__(
        self, backend: str, words: list[int], *, start: int = 0, position: int = 7, limit: int = 1000
    ):
        self.backend = backend
        state = ints([[0] * STATE_WORDS])
        state[0, State.TOKEN], state[0, State.POSITION], state[0, State.LIMIT] = 3, position, limit
        tables = (state, ints([words]), ints(hand_automaton()))
        self.state, self.program, self.automata = entered(backend, *tables, [start])
        self.out: list[tuple] = []
        self.flags: list[int] = []

    def __getitem__(self, word: State) -> int:
        return int(self.state[0, word])

    def __call__(self, *draws: int) -> "Row":
        for draw in draws:
            one = torch.zeros(1)
            ring = [torch.zeros(1, 1, dtype=torch.int32) for _ in range(2)] + [
                torch.zeros(1, 1) for _ in range(2)
            ]
            tables = (self.state, self.program, self.automata, torch.zeros(1, dtype=torch.int32))
            sampled = (torch.tensor([draw], dtype=torch.int32), torch.zeros(1, VOCAB), one, one, one)
            index = torch.zeros(1, dtype=torch.int32)
            op.budget_step(*tables, *sampled, *ring, index, backend=self.backend)
            token, flags = ring[0].item(), ring[1].item()
            self.flags.append(flags)
            if flags & Flag.VALID:
                label = SOLVE if flags & Flag.SOLVE else THINK
                self.out.append((token, label, F) if flags & Flag.FORCED else (token, label))
                assert self[State.TOKEN] == token
                assert flags >> Flag.FINISH_SHIFT & 15 == self[State.FINISH]
                assert flags >> Flag.THINK_END_SHIFT == self[State.THINK_END]
        return self

    @property
    def ends(self) -> tuple[int, int]:
        return self[State.THINK_END], self[State.FINISH]


class TestLaws:
    def test_natural_close_then_eos(self, backend):
        row = Row(backend, elastic(9, 9))(1, OPEN_CLOSE, CLOSE, 2, EOS)
        assert row.out == [(1, THINK), (OPEN_CLOSE, THINK), (CLOSE, THINK), (2, SOLVE), (EOS, SOLVE)]
        assert row.ends == (ThinkEnd.NATURAL, Finish.EOS)
        assert row[State.POSITION] == 7 + 5

    def test_close_as_the_last_token_of_the_budget_is_natural(self, backend):
        row = Row(backend, elastic(3, 9))(1, OPEN_CLOSE, CLOSE)
        assert row.out == [(1, THINK), (OPEN_CLOSE, THINK), (CLOSE, THINK)]
        assert row.ends == (ThinkEnd.NATURAL, Finish.RUNNING)
        assert (row[State.PHASE], row[State.USED], row[State.LEFT]) == (1, 0, 9)

    def test_expiry_forces_the_close_and_counts_only_samples(self, backend):
        row = Row(backend, elastic(2, 2))(1, 2, 3, 3, 4, 5)
        assert row.out == [
            (1, THINK),
            (2, THINK),
            (OPEN_CLOSE, THINK, F),
            (CLOSE, THINK, F),
            (4, SOLVE),
            (5, SOLVE),
        ]
        assert row.ends == (ThinkEnd.FORCED, Finish.BUDGET)

    def test_half_sampled_close_is_completed_where_it_stands(self, backend):
        row = Row(backend, elastic(2, 9))(1, OPEN_CLOSE, 5)
        assert row.out == [(1, THINK), (OPEN_CLOSE, THINK), (CLOSE, THINK, F)]
        assert row.ends == (ThinkEnd.FORCED, Finish.RUNNING)
        assert (row[State.PHASE], row[State.DFA]) == (1, 0)

    @pytest.mark.parametrize("written", [0, 1])
    def test_eos_in_thinking_is_replaced_by_what_is_left_of_the_close(self, backend, written):
        row = Row(backend, elastic(9, 9))(1, *[OPEN_CLOSE] * written, EOS, *[EOS] * (1 - written), 2)
        close = [(OPEN_CLOSE, THINK, F), (CLOSE, THINK, F)]
        assert row.out == [(1, THINK), *[(OPEN_CLOSE, THINK)] * written, *close[written:], (2, SOLVE)]
        assert row.ends == (ThinkEnd.EOS, Finish.RUNNING)
        assert row[State.USED] == 1

    def test_eos_as_the_last_token_of_the_solution_is_eos(self, backend):
        assert Row(backend, elastic(9, 2), start=1)(1, EOS).ends == (ThinkEnd.NONE, Finish.EOS)
        assert Row(backend, elastic(9, 2), start=1)(1, 2).ends == (ThinkEnd.NONE, Finish.BUDGET)

    def test_ignored_eos_is_an_ordinary_token(self, backend):
        row = Row(backend, elastic(2, 2, ignore_eos=True))(1, EOS, 0, 0, EOS, EOS)
        assert row.out[:2] == [(1, THINK), (EOS, THINK)]
        assert row.out[4:] == [(EOS, SOLVE), (EOS, SOLVE)]
        assert row.ends == (ThinkEnd.FORCED, Finish.BUDGET)

    def test_no_thinking_budget_begins_with_the_close(self, backend):
        row = Row(backend, elastic(0, 1))
        assert (row[State.FORCED_LEFT], row[State.THINK_END]) == (2, ThinkEnd.FORCED)
        row(EOS, -1, 4)
        assert row.out == [(OPEN_CLOSE, THINK, F), (CLOSE, THINK, F), (4, SOLVE)]
        assert row.ends == (ThinkEnd.FORCED, Finish.BUDGET)

    def test_no_solution_budget_ends_with_the_close(self, backend):
        natural = Row(backend, elastic(9, 0))(OPEN_CLOSE, CLOSE, 1)
        assert natural.out == [(OPEN_CLOSE, THINK), (CLOSE, THINK)]
        assert natural.ends == (ThinkEnd.NATURAL, Finish.BUDGET)
        forced = Row(backend, elastic(0, 0))(1, 2, 3)
        assert forced.out == [(OPEN_CLOSE, THINK, F), (CLOSE, THINK, F)]
        assert forced.ends == (ThinkEnd.FORCED, Finish.BUDGET)
        nothing = Row(backend, elastic(9, 0), start=1)(1)
        assert (nothing.out, nothing.flags) == ([], [0])
        assert nothing.ends == (ThinkEnd.NONE, Finish.BUDGET)

    def test_unlimited_budgets_never_expire(self, backend):
        row = Row(backend, elastic(-1, -1))(*[1] * 12, OPEN_CLOSE, CLOSE, *[2] * 12)
        assert [label for _, label in row.out] == [THINK] * 14 + [SOLVE] * 12
        assert row.ends == (ThinkEnd.NATURAL, Finish.RUNNING)

    def test_early_closes_are_replaced_by_wait_a_number_of_times(self, backend):
        wait, natural, final, spent, done = range(5)
        words = program(
            0,
            [
                phase(THINK, 4, ends=[(CLOSED_SHORT, wait)], on_expire=final, on_eos=wait),
                phase(SOLVE, 3, on_expire=spent, on_eos=done),
            ],
            [
                event(0, inject=FORCE_WAIT, replace=True, max_count=2, fallback=natural),
                event(1, think_end=ThinkEnd.NATURAL),
                event(1, inject=FORCE_FINAL, think_end=ThinkEnd.FORCED),
                event(-Finish.BUDGET),
                event(-Finish.EOS),
            ],
        )
        row = Row(backend, words)(1, SHORT, EOS, SHORT, 2)
        assert row.out == [(1, THINK), (WAIT, THINK, F), (WAIT, THINK, F), (SHORT, THINK), (2, SOLVE)]
        assert row.ends == (ThinkEnd.NATURAL, Finish.RUNNING)
        # The replaced draws and the forced words are in no count: four samples remain four.
        row = Row(backend, words)(1, SHORT, 2, SHORT, 3, 4, 5, 5)
        assert row.out[-4:] == [(3, THINK), (4, THINK), (FINAL, THINK, F), (NEWLINE, THINK, F)]
        assert row.ends == (ThinkEnd.FORCED, Finish.RUNNING)

    def test_grace_ends_at_a_newline_or_by_force(self, backend):
        natural, grace, line, forced = range(4)
        words = program(
            0,
            [
                phase(THINK, 2, ends=[(CLOSED, natural)], on_expire=grace),
                phase(SOLVE, -1),
                phase(THINK, 2, ends=[(CLOSED, natural), (ENDED_LINE, line)], on_expire=forced),
            ],
            [
                event(1, think_end=ThinkEnd.NATURAL),
                event(2),
                event(1, inject=FORCE_CLOSE, think_end=ThinkEnd.FORCED),
                event(1, inject=FORCE_CLOSE, think_end=ThinkEnd.FORCED),
            ],
        )
        close = [(OPEN_CLOSE, THINK, F), (CLOSE, THINK, F)]
        row = Row(backend, words)(NEWLINE, 1, NEWLINE, 0, 0, NEWLINE)
        assert row.out == [(NEWLINE, THINK), (1, THINK), (NEWLINE, THINK), *close, (NEWLINE, SOLVE)]
        assert Row(backend, words)(1, 2, 3, 4, 0, 0).out[4:] == close
        # A close half written when the budget ends survives into the grace phase.
        row = Row(backend, words)(1, OPEN_CLOSE, CLOSE, 5)
        assert row.out == [(1, THINK), (OPEN_CLOSE, THINK), (CLOSE, THINK), (5, SOLVE)]
        assert row.ends[0] == ThinkEnd.NATURAL
        row = Row(backend, words)(1, OPEN_CLOSE)
        row.state[0, State.END_REQUESTED] = 1  # in the grace already: expires it, from where the close stands
        assert row(5, 5).out[2:] == [(CLOSE, THINK, F), (5, SOLVE)]

    def test_end_thinking_expires_the_phase_before_the_next_draw(self, backend):
        row = Row(backend, elastic(9, 9))(1, OPEN_CLOSE)
        row.state[0, State.END_REQUESTED] = 1
        assert row(EOS, 2).out[2:] == [(CLOSE, THINK, F), (2, SOLVE)]
        assert row.ends == (ThinkEnd.FORCED, Finish.RUNNING)
        row.state[0, State.END_REQUESTED] = 1  # nothing to end any more
        assert row(3).out[-1] == (3, SOLVE)
        assert row[State.END_REQUESTED] == 0

    def test_end_thinking_waits_for_forced_tokens(self, backend):
        words = program(
            0,
            [phase(THINK, ends=[(CLOSED_SHORT, 0)], on_expire=1), phase(SOLVE)],
            [event(0, inject=FORCE_FINAL, replace=True), event(1, inject=FORCE_CLOSE)],
        )
        row = Row(backend, words)(SHORT)
        row.state[0, State.END_REQUESTED] = 1
        row(1, 1, 1)
        assert row.out == [(t, THINK, F) for t in (FINAL, NEWLINE, OPEN_CLOSE, CLOSE)]

    def test_end_thinking_without_an_expiry_does_nothing(self, backend):
        row = Row(backend, program(0, [phase(THINK, 1)], []))
        row.state[0, State.END_REQUESTED] = 1
        assert row(1, 2).out == [(1, THINK), (2, THINK)]
        assert row[State.END_REQUESTED] == 0

    def test_end_thinking_may_finish_the_row_without_a_token(self, backend):
        row = Row(backend, program(0, [phase(THINK, 5, on_expire=0)], [event(-Finish.BUDGET)]))(1)
        row.state[0, State.END_REQUESTED] = 1
        assert row(2).out == [(1, THINK)]
        assert row.flags[-1] == Finish.BUDGET << Flag.FINISH_SHIFT
        assert row[State.POSITION] == 8

    def test_final_eos_is_solve_even_inside_the_thinking(self, backend):
        spent, done = range(2)
        words = program(
            0,
            [phase(THINK, 3, on_expire=spent, on_eos=done)],
            [event(-Finish.BUDGET), event(-Finish.EOS, think_end=ThinkEnd.EOS)],
        )
        row = Row(backend, words)(1, 2, EOS)
        assert row.out == [(1, THINK), (2, THINK), (EOS, SOLVE)]
        assert row.ends == (ThinkEnd.EOS, Finish.EOS)
        assert Row(backend, words)(1, 2, 3).ends == (ThinkEnd.NONE, Finish.BUDGET)

    def test_carry_adds_what_the_thinking_left(self, backend):
        words = program(
            0,
            [
                phase(THINK, 5, ends=[(CLOSED_SHORT, 0)], on_expire=1),
                phase(SOLVE, 1, carry=True, on_expire=1),
            ],
            [event(1, think_end=ThinkEnd.NATURAL), event(-Finish.BUDGET)],
        )
        row = Row(backend, words)(1, SHORT, 2, 3, 4)
        assert row.ends == (ThinkEnd.NATURAL, Finish.RUNNING)
        assert row(5).ends == (ThinkEnd.NATURAL, Finish.BUDGET)

    def test_text_put_in_by_the_last_token_of_a_budget_does_not_extend_it(self, backend):
        words = program(
            0,
            [phase(THINK, 2, ends=[(ENDED_LINE, 0)], on_expire=1), phase(SOLVE)],
            [event(0, inject=FORCE_WAIT), event(1, inject=FORCE_CLOSE, think_end=ThinkEnd.FORCED)],
        )
        row = Row(backend, words)(1, NEWLINE, 5, 5, 5, 5)
        forced = [(WAIT, THINK, F), (OPEN_CLOSE, THINK, F), (CLOSE, THINK, F)]
        assert row.out == [(1, THINK), (NEWLINE, THINK), *forced, (5, SOLVE)]

    def test_length_limit(self, backend):
        row = Row(backend, elastic(9, 9), position=7, limit=10)(1, 2, 3)
        assert row.out == [(1, THINK), (2, THINK)]
        assert row.ends == (ThinkEnd.NONE, Finish.LENGTH)
        assert row[State.POSITION] == 9
        forced = Row(backend, elastic(1, 9), limit=10)(1, 2)  # inside the forced close
        assert (forced.out[-1], forced[State.FINISH]) == ((OPEN_CLOSE, THINK, F), Finish.LENGTH)
        assert Row(backend, elastic(9, 2), start=1, limit=10)(1, EOS)[State.FINISH] == Finish.EOS

    @pytest.mark.parametrize("draw", [-1, VOCAB, 2**31 - 1])
    def test_impossible_draws_end_the_row(self, backend, draw):
        row = Row(backend, elastic(9, 9))(1, draw, 2)
        assert row.out == [(1, THINK)]
        assert row.flags[1:] == [Finish.INVALID << Flag.FINISH_SHIFT, 0]
        assert row[State.POSITION] == 8

    def test_malformed_programs_end_the_row(self, backend):
        circle = program(
            0, [phase(THINK, 0, on_expire=0), phase(SOLVE, 0, on_expire=1)], [event(1), event(0)]
        )
        assert Row(backend, circle)[State.FINISH] == Finish.INVALID
        nothing_to_force = program(0, [phase(THINK, on_eos=0), phase(SOLVE)], [event(1, replace=True)])
        assert Row(backend, nothing_to_force)(EOS)[State.FINISH] == Finish.INVALID
        no_such_phase = program(0, [phase(THINK, on_eos=0)], [event(layout.MAX_PHASES)])
        assert Row(backend, no_such_phase)(EOS)[State.FINISH] == Finish.INVALID

    def test_longest_chain_of_phases_without_budget(self, backend):
        phases = [phase(THINK, 0, on_expire=index) for index in range(layout.MAX_PHASES)]
        events = [event(index + 1) for index in range(layout.MAX_PHASES - 1)]
        assert (
            Row(backend, program(0, phases, [*events, event(-Finish.BUDGET)]))[State.FINISH] == Finish.BUDGET
        )
        row = Row(backend, program(0, phases, [*events, event(7, inject=FORCE_WAIT, max_count=1)]))
        assert row(1, 2).out == [(WAIT, THINK, F), (2, THINK)]


# The ops around the machine.


class TestRing:
    def step(self, backend, slots, draws, logits, lse, temperature, index=0, length=3, width=5):
        """Four slots: running, running, forced close pending, finished."""
        programs = ints([elastic(9, 9), elastic(9, 9), elastic(0, 9), elastic(9, 0)])
        state = ints([[0] * STATE_WORDS] * 4)
        state[:, State.LIMIT] = 100
        tables = (state, programs, ints(hand_automaton()))
        state, programs, automata = entered(backend, *tables, (0, 0, 0, 1))
        before = state.clone()
        ring = [torch.full((length, width), -77, dtype=torch.int32) for _ in range(2)]
        ring += [torch.full((length, width), -77.0) for _ in range(2)]
        tables = (state, programs, automata, torch.tensor(slots, dtype=torch.int32))
        logprob = torch.arange(len(slots)) - 9.5
        sampled = (torch.tensor(draws, dtype=torch.int32), logits, torch.tensor(lse), logprob, temperature)
        at = torch.tensor([index], dtype=torch.int32)
        op.budget_step(*tables, *sampled, *ring, at, backend=backend)
        assert int(at) == index
        return before, state, ring

    def test_idle_rows_and_other_columns_are_untouched(self, backend):
        rows = ([3, -1, 0], [1, 2, 3], torch.zeros(3, VOCAB), [0.0] * 3, torch.ones(4))
        before, after, (tokens, flags, logprobs, sampling) = self.step(backend, *rows, index=7)
        assert torch.equal(before[1:], after[1:])
        assert after[0, State.TOKEN] == 3
        assert flags[1].tolist() == [0, 0, Flag.VALID, -77, -77]
        assert tokens[1].tolist() == [-77, -77, 3, -77, -77]
        for tensor in (tokens, flags, logprobs, sampling):
            assert (tensor[[0, 2]] == -77).all()
            assert (tensor[1, 3:] == -77).all()

    def test_logprobs(self, backend):
        logits = torch.arange(3 * 8).reshape(3, 8).float()
        temperature = torch.tensor([0.0, 2.0, 4.0, 1.0])
        _, _, ring = self.step(backend, [1, 0, 2], [5, 3, 1], logits, [1.0, 2.0, 3.0], temperature)
        assert ring[0][0, :3].tolist() == [5, 3, OPEN_CLOSE]
        assert ring[2][0, :3].tolist() == [5 / 2 - 1, 8 + 3 - 2, (16 + OPEN_CLOSE) / 4 - 3]
        assert ring[3][0, :3].tolist() == [-9.5, -8.5, 0.0]

    def test_token_beyond_the_logits_has_no_probability(self, backend):
        _, _, ring = self.step(backend, [2], [1], torch.zeros(1, OPEN_CLOSE), [0.0], torch.ones(4))
        assert ring[0][0, 0] == OPEN_CLOSE
        assert ring[2][0, 0] == -float("inf")

    def test_no_rows(self, backend):
        before, after, ring = self.step(backend, [], [], torch.zeros(0, VOCAB), [], torch.ones(4))
        assert torch.equal(before, after)
        assert all((tensor == -77).all() for tensor in ring)


@pytest.mark.parametrize("page_size", [1, 16])
def test_decode_inputs(backend, page_size):
    max_pages = 4
    positions = [0, page_size - 1, page_size, 2 * page_size + page_size // 2, max_pages * page_size, 1, 2]
    state = torch.zeros(len(positions), STATE_WORDS, dtype=torch.int32)
    state[:, State.POSITION] = torch.tensor(positions)
    state[:, State.TOKEN] = torch.arange(40, 40 + len(positions))
    state[5, State.FINISH] = Finish.HOST
    table = torch.randint(50, (len(positions), max_pages), dtype=torch.int32)
    table[6, 2 // page_size] = -1
    rows = [4, 2, -1, 0, 6, 5, 1, 3]
    out = torch.full((4, len(rows)), -77, dtype=torch.int32)
    op.decode_inputs(state, table, torch.tensor(rows, dtype=torch.int32), page_size, *out, backend=backend)
    for column, slot in enumerate(rows):
        want = [0, 0, 0, -1]
        if slot not in (-1, 5):
            at = positions[slot]
            want = [40 + slot, at, at + 1, -1]
            if slot not in (4, 6):
                want[3] = int(table[slot, at // page_size]) * page_size + at % page_size
        assert out[:, column].tolist() == want
    empty = torch.empty(4, 0, dtype=torch.int32)
    op.decode_inputs(state, table, torch.empty(0, dtype=torch.int32), page_size, *empty, backend=backend)


def test_wrong_arguments_are_refused():
    state = torch.zeros(2, STATE_WORDS, dtype=torch.int32)
    slots = torch.zeros(3, dtype=torch.int32)
    out = [torch.zeros(3, dtype=torch.int32) for _ in range(4)]
    table = torch.zeros(2, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="page_size"):
        op.decode_inputs(state, table, slots, 0, *out)
    with pytest.raises(ValueError, match="page_table"):
        op.decode_inputs(state, table[:1], slots, 1, *out)
    with pytest.raises(TypeError, match="slots"):
        op.decode_inputs(state, table, slots.long(), 1, *out)
    with pytest.raises(ValueError, match="contiguous"):
        op.decode_inputs(state, table.T.contiguous().T, slots, 1, *out)
    with pytest.raises(ValueError, match="backend"):
        op.decode_inputs(state, table, slots, 1, *out, backend="abacus")
    programs = torch.tensor([elastic(1, 1)] * 2, dtype=torch.int32)
    automata = torch.tensor(hand_automaton(), dtype=torch.int32)
    with pytest.raises(ValueError, match="phase"):
        op.enter_start(state[0], programs[0], automata, layout.MAX_PHASES)
    floats = torch.zeros(3)
    sampled = (out[0], torch.zeros(3, VOCAB), floats, floats, torch.ones(2))
    ring = [torch.zeros(4, 2, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32)]
    ring += [torch.zeros(4, 2), torch.zeros(4, 2)]
    with pytest.raises(ValueError, match="ring"):
        op.budget_step(state, programs, automata, slots, *sampled, *ring, torch.zeros(1, dtype=torch.int32))
