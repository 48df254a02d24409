"""`draw`: every backend against the reference on random programs, against its parts bit for bit, and its
laws."""

import math
import os
import random
from collections import Counter

import pytest
import torch

from elastic_decode.kernels.budget import budget_step, enter_start
from elastic_decode.kernels.budget.layout import STATE_WORDS, Finish, Flag, Label, State
from elastic_decode.kernels.budget.testing import automaton, event, phase, program, random_tables
from elastic_decode.kernels.draw import Machine, Ring, draw, make_ring
from elastic_decode.kernels.registry import implementation
from elastic_decode.kernels.sample import SamplingTable, make_table, sample
from elastic_decode.kernels.testing import device_of, runnable

NAN, INF = math.nan, math.inf


@pytest.fixture(params=runnable("draw"))
def backend(request):
    """A backend's name; tensors are made where it wants them."""
    with torch.device(device_of(request.param)):
        yield request.param


def poisoned_ring(length: int, width: int) -> Ring:
    ring = make_ring(length, width, torch.get_default_device())
    for part in ring[:2]:
        part.fill_(-77)
    for part in ring[2:4]:
        part.fill_(NAN)
    return ring


def copy(parts, device):
    """A NamedTuple of tensors, each copied to `device`."""
    return type(parts)(*(None if part is None else part.to(device, copy=True) for part in parts))


# ---- against the reference and against the parts, at random ----


def random_sampling(rng: random.Random, num_slots: int, vocab: int, *, penalties: bool) -> SamplingTable:
    """A table in which about half of the slots use each option; on the CPU."""
    table = make_table(num_slots, num_ban_ids=2, num_bias=3, device="cpu")
    options = {
        "temperature": (0.0, 0.6, 1.0, 1.7),
        "top_k": (0, 0, 1, 3, vocab),
        "top_p": (1.0, 1.0, 0.9, 0.5),
        "min_p": (0.0, 0.0, 0.05),
        "repetition": (1.0, 1.0, 1.3),
        "presence": (0.0, 0.0, 0.7),
        "frequency": (0.0, 0.0, 0.4),
        "ban_until": (0, 10_000),
    }
    for name, values in options.items():
        for slot in range(num_slots):
            getattr(table, name)[slot] = rng.choice(values)
    for slot in range(num_slots):
        table.seed[slot] = rng.randrange(-(2**63), 2**63)
        table.sample_index[slot] = rng.randrange(8)
        for column in range(2):
            table.ban_ids[slot, column] = rng.choice((-1, -1, rng.randrange(vocab + 1)))
        for column in range(3):
            table.bias_ids[slot, column] = rng.choice((-1, -1, rng.randrange(vocab + 1)))
            table.bias_values[slot, column] = rng.uniform(-4, 4)
    if not penalties:
        return table
    shape, generator = (num_slots, vocab), torch.Generator("cpu").manual_seed(rng.getrandbits(32))
    counts = torch.randint(0, 3, shape, generator=generator, dtype=torch.int32, device="cpu")
    mask = torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8, device="cpu")
    return table._replace(output_counts=counts, prompt_mask=mask)


def random_logits(
    rng: random.Random, wanted: list[int], vocab: int, generator: torch.Generator
) -> torch.Tensor:
    """Rows that mostly make the wanted draw; for an impossible one, a row with NaN or with nothing."""
    logits = torch.randn(len(wanted), vocab, generator=generator, device="cpu") * 2
    for row, token in enumerate(wanted):
        if token < 0:
            logits[row, rng.randrange(vocab)] = rng.choice((NAN, INF))
            if rng.random() < 0.3:
                logits[row] = -INF
        elif rng.random() < 0.7:
            logits[row, token % vocab] = 25.0
    return logits


class Run:
    """One way of running the steps, with its own copy of all that they change."""

    def __init__(self, backend: str, table: SamplingTable, machine: Machine, ring: Ring) -> None:
        self.backend, self.device = backend, device_of(backend)
        self.table, self.machine, self.ring = (copy(each, self.device) for each in (table, machine, ring))

    def step(self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        arguments = (each.to(self.device) for each in (logits, slots, positions))
        draw(*arguments, self.table, self.machine, self.ring, backend=self.backend)

    def request_end(self, slot: int) -> None:
        self.machine.state[slot, State.END_REQUESTED] = 1


class RunOfParts(Run):
    """The same with the backend's own `sample` and `budget_step`, and the rest in PyTorch."""

    def step(self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        logits, slots, positions = (each.to(self.device) for each in (logits, slots, positions))
        table, machine, ring = self.table, self.machine, self.ring
        ring.index.copy_((ring.index + 1) % len(ring.tokens))
        runs = (slots >= 0) & (machine.state[slots.clamp(min=0).long(), State.FINISH] == Finish.RUNNING)
        slots = torch.where(runs, slots, -1)
        drawn = sample(logits, slots, positions, table, backend=self.backend)
        budget_step(
            *machine, slots, drawn.token, logits, drawn.lse, drawn.sampling_logprob, table.temperature,
            *ring, backend=self.backend,
        )  # fmt: skip
        if table.output_counts is not None:
            tokens, flags = (part[int(ring.index), : len(slots)] for part in ring[:2])
            counted = ((flags & Flag.VALID) != 0) & (tokens < logits.shape[1])
            for slot, token in zip(slots[counted].tolist(), tokens[counted].tolist(), strict=True):
                table.output_counts[slot, token] += 1


def assert_same(want: Run, have: Run, note: str, *, exact: bool = False) -> None:
    def compare(name: str, a: torch.Tensor | None, b: torch.Tensor | None) -> None:
        if a is None or b is None:
            assert a is b, f"{note}: {name}"
            return
        rtol, atol = (0, 0) if exact or not a.is_floating_point() else (1e-5, 2e-5)
        message = f"{note}: {name}: "
        torch.testing.assert_close(
            b.cpu(), a.cpu(), rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: message + text
        )

    compare("state", want.machine.state, have.machine.state)
    for name in Ring._fields:
        compare(name, getattr(want.ring, name), getattr(have.ring, name))
    compare("output_counts", want.table.output_counts, have.table.output_counts)


def compare_runs(
    rng: random.Random, ways: list[type[Run]], backends: list[str], num_slots: int, steps: int, vocab: int,
    seen: Counter, *, penalties: bool, exact: bool = False,
) -> None:  # fmt: skip
    """Random programs, stepped in two ways that must come to the same."""
    tables = random_tables(rng, num_slots)
    for slot, start in enumerate(tables.starts):
        enter_start(tables.state[slot], tables.programs[slot], tables.automata, start)
    table = random_sampling(rng, num_slots, vocab, penalties=penalties)
    generator = torch.Generator("cpu").manual_seed(rng.getrandbits(32))
    ring = poisoned_ring(3, num_slots + 1)
    machine = Machine(tables.state, tables.programs, tables.automata)
    want, have = (way(name, table, machine, ring) for way, name in zip(ways, backends, strict=True))
    order = list(range(num_slots))
    for step in range(steps):
        rng.shuffle(order)
        rows = [
            slot if rng.random() < 0.95 else -1 for slot in order[: rng.randint(num_slots // 2, num_slots)]
        ]
        for slot in range(num_slots):
            if rng.random() < 0.05:
                want.request_end(slot)
                have.request_end(slot)
        logits = random_logits(rng, tables.draws(rng, want.machine.state, rows).tolist(), vocab, generator)
        slots = torch.tensor(rows, dtype=torch.int32)
        positions = torch.tensor([rng.randrange(500) for _ in rows], dtype=torch.int32)
        for run in (want, have):
            run.step(logits, slots, positions)
        assert_same(want, have, f"step {step}", exact=exact)
        for flags in want.ring.flags[step % 3, : len(rows)].tolist():
            seen["idle" if flags == 0 else "no token" if not flags & Flag.VALID else "token"] += 1
            seen["forced"] += bool(flags & Flag.FORCED)
            seen[repr(Finish(flags >> Flag.FINISH_SHIFT & 15))] += 1


def some_of_everything(seen: Counter) -> bool:
    names = ("idle", "no token", "token", "forced", *map(repr, list(Finish)[:5]))
    return all(seen[name] > 0 for name in names)


def cases(backend: str, *vocabularies: int) -> list[tuple[int, int, int]]:
    """(seed, vocabulary, slots); few where every instruction of a kernel is a call of Python."""
    slow = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return [(seed, vocab, 14 if slow else 40) for seed, vocab in enumerate(vocabularies)]


def test_random_programs_equal_the_reference(backend):
    seen: Counter = Counter()
    for seed, vocab, slots in cases(backend, 29, 26, 11):  # 11: automata, and what they force, go beyond it
        compare_runs(
            random.Random(seed), [Run, Run], ["reference", backend], slots, 7, vocab, seen,
            penalties=seed % 2 == 0,
        )  # fmt: skip
    assert some_of_everything(seen), dict(seen)


def test_random_programs_equal_the_parts_bit_for_bit(backend):
    seen: Counter = Counter()
    for seed, vocab, slots in cases(backend, 27, 12):
        compare_runs(
            random.Random(100 + seed), [RunOfParts, Run], [backend, backend], slots, 5, vocab, seen,
            penalties=seed == 0, exact=True,
        )  # fmt: skip
    assert min(seen["forced"], seen["idle"], seen["no token"], seen[repr(Finish.BUDGET)]) > 0, dict(seen)


# ---- laws, on a program made by hand ----

CLOSE, EOS = 5, 6
AUTOMATON_VOCAB = 8


def hand_program(think: int, solve: int, *, forced: int = CLOSE) -> tuple[list[int], list[int]]:
    """THINK for `think` tokens or until CLOSE, at whose end `forced` is forced; then SOLVE until EOS."""
    classes = range(AUTOMATON_VOCAB)
    words = automaton(
        classes,
        [[0] * AUTOMATON_VOCAB],
        [[int(token == CLOSE) for token in classes]],
        [int(token == EOS) for token in classes],
        [[[forced]]],
    )
    natural, expired, spent, done = range(4)
    rows = program(
        0,
        [
            phase(Label.THINK, think, ends=[(0, natural)], on_expire=expired),
            phase(Label.SOLVE, solve, on_expire=spent, on_eos=done),
        ],
        [event(1), event(1, inject=0), event(-Finish.BUDGET), event(-Finish.EOS)],
    )
    return rows, words


def hand_machine(slots: int, think: int = 9, solve: int = 9, **options: int) -> Machine:
    """`slots` rows of the hand-made program at its start, where the tests' tensors are."""
    rows, words = hand_program(think, solve, **options)
    programs = torch.tensor([rows] * slots, dtype=torch.int32, device="cpu")
    automata = torch.tensor(words, dtype=torch.int32, device="cpu")
    state = torch.zeros(slots, STATE_WORDS, dtype=torch.int32, device="cpu")
    state[:, State.LIMIT] = 1000
    for slot in range(slots):
        enter_start(state[slot], programs[slot], automata, 0)
    return copy(Machine(state, programs, automata), torch.get_default_device())


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def peaked(vocab: int, *tokens: int) -> torch.Tensor:
    """Logits whose row r has its maximum, 3, at tokens[r]."""
    logits = torch.zeros(len(tokens), vocab)
    logits[torch.arange(len(tokens)), torch.tensor(tokens)] = 3.0
    return logits


def greedy_table(slots: int, vocab: int | None = None) -> SamplingTable:
    table = make_table(slots, device=torch.get_default_device())
    table.temperature.zero_()
    if vocab is None:
        return table
    counts = torch.zeros(slots, vocab, dtype=torch.int32)
    return table._replace(output_counts=counts, prompt_mask=torch.zeros(slots, vocab, dtype=torch.uint8))


def test_the_ring_wraps_and_its_index_names_the_row_last_written(backend):
    table, machine, ring = greedy_table(1), hand_machine(1), poisoned_ring(3, 2)
    assert int(ring.index) == -1
    for step in range(7):
        draw(peaked(8, step % 4), ints(0), ints(step), table, machine, ring, backend=backend)
        assert int(ring.index) == step % 3
        assert int(ring.tokens[step % 3, 0]) == step % 4
    assert ring.tokens.tolist() == [[6 % 4, -77], [4 % 4, -77], [5 % 4, -77]]


def test_rows_that_do_not_run_get_flags_of_zero_and_nothing_else(backend):
    """Slot 1 has finished; row 2 is idle. Their logits would end a row that ran."""
    table, machine, ring = greedy_table(4, 8), hand_machine(4), poisoned_ring(2, 5)
    machine.state[1, State.FINISH] = int(Finish.HOST)
    before = machine.state.clone()
    logits = peaked(8, 1, 2, 3, 4)
    logits[1:3] = NAN
    draw(logits, ints(0, 1, -1, 3), ints(1, 1, 1, 1), table, machine, ring, backend=backend)
    assert ring.flags[0].tolist() == [Flag.VALID, 0, 0, Flag.VALID, -77]
    assert ring.tokens[0].tolist() == [1, -77, -77, 4, -77]
    assert ring.logprobs[0].isnan().tolist() == [False, True, True, False, True]
    assert ring.sampling_logprobs[0].isnan().tolist() == [False, True, True, False, True]
    assert (ring.tokens[1] == -77).all()
    assert torch.equal(machine.state[1:3], before[1:3])
    assert table.output_counts.sum() == 2
    assert (table.output_counts[0, 1], table.output_counts[3, 4]) == (1, 1)


def test_a_step_without_rows_advances_the_ring(backend):
    table, machine, ring = greedy_table(1), hand_machine(1), poisoned_ring(2, 1)
    draw(torch.zeros(0, 8), ints(), ints(), table, machine, ring, backend=backend)
    assert int(ring.index) == 0
    assert (ring.flags == -77).all()


def test_forced_tokens_are_counted_and_have_the_models_logprob(backend):
    table, machine, ring = greedy_table(1, 8), hand_machine(1, think=1), poisoned_ring(4, 1)
    table.temperature.fill_(2.0)
    table.presence.fill_(0.5)
    for step in range(2):
        logits = peaked(8, 1)
        logits[0, 1] = 60.0
        draw(logits, ints(0), ints(step), table, machine, ring, backend=backend)
    assert ring.tokens[:2, 0].tolist() == [1, CLOSE]
    assert ring.flags[:2, 0].tolist() == [Flag.VALID, Flag.VALID | Flag.FORCED]
    lse = float(torch.logsumexp(logits[0].double() / 2, 0))
    assert ring.logprobs[:2, 0].tolist() == pytest.approx([60 / 2 - lse, -lse], abs=1e-5)
    assert float(ring.sampling_logprobs[1, 0]) == 0.0
    assert table.output_counts[0].tolist() == [int(token in (1, CLOSE)) for token in range(8)]


def test_a_forced_token_needs_nothing_to_draw(backend):
    """Its row may be all -inf: what is forced is forced. A NaN shows in the log-probability."""
    machine, ring = hand_machine(2, think=0), poisoned_ring(1, 2)
    logits = torch.full((2, 8), -INF)
    logits[1] = NAN
    draw(logits, ints(0, 1), ints(1, 1), greedy_table(2), machine, ring, backend=backend)
    assert ring.tokens[0].tolist() == [CLOSE, CLOSE]
    assert ring.flags[0].tolist() == [Flag.VALID | Flag.FORCED] * 2
    assert ring.logprobs[0].isnan().all()


def test_a_forced_token_beyond_the_logits_is_in_no_count(backend):
    table, machine, ring = greedy_table(1, 7), hand_machine(1, think=0, forced=9), poisoned_ring(1, 1)
    draw(peaked(7, 1), ints(0), ints(1), table, machine, ring, backend=backend)
    assert (int(ring.tokens), int(ring.flags)) == (9, Flag.VALID | Flag.FORCED)
    assert float(ring.logprobs) == -INF
    assert table.output_counts.sum() == 0


def test_a_draw_beyond_the_automaton_and_a_row_of_nan_end_the_row(backend):
    table, machine, ring = greedy_table(2, 11), hand_machine(2), poisoned_ring(2, 2)
    logits = peaked(11, AUTOMATON_VOCAB, 1)
    logits[1, 3] = NAN
    draw(logits, ints(0, 1), ints(1, 1), table, machine, ring, backend=backend)
    assert ring.flags[0].tolist() == [Finish.INVALID << Flag.FINISH_SHIFT] * 2
    assert (ring.tokens[0] == -77).all()
    assert table.output_counts.sum() == 0
    draw(peaked(11, 1, 1), ints(0, 1), ints(2, 2), table, machine, ring, backend=backend)
    assert ring.flags[1].tolist() == [0, 0]


def test_a_request_to_end_the_thinking_forces_the_close_in_the_same_step(backend):
    table, machine, ring = greedy_table(1), hand_machine(1), poisoned_ring(3, 1)
    machine.state[0, State.END_REQUESTED] = 1
    for step, token in enumerate((1, 2, EOS)):
        draw(peaked(8, token), ints(0), ints(step), table, machine, ring, backend=backend)
    assert ring.tokens[:, 0].tolist() == [CLOSE, 2, EOS]
    assert [bool(flags & Flag.FORCED) for flags in ring.flags[:, 0].tolist()] == [True, False, False]
    assert int(machine.state[0, State.FINISH]) == Finish.EOS


def test_counts_reach_the_next_draw(backend):
    """A frequency penalty of 1.2 on logits 3 and 2 makes a greedy row alternate."""
    table, machine, ring = greedy_table(1, 8), hand_machine(1), poisoned_ring(6, 1)
    table.frequency.fill_(1.2)
    logits = peaked(8, 1)
    logits[0, 2] = 2.0
    for step in range(4):
        draw(logits, ints(0), ints(step), table, machine, ring, backend=backend)
    assert ring.tokens[:4, 0].tolist() == [1, 2, 1, 2]
    assert table.output_counts[0, 1:3].tolist() == [2, 2]


def test_a_vocabulary_of_a_quarter_million(backend):
    """Greedy, plain and filtered rows, against the reference's `sample`."""
    vocab, rows = 262_144, 4
    generator = torch.Generator("cpu").manual_seed(1)
    table = make_table(rows, device="cpu")
    table.temperature[:] = torch.tensor([0, 1, 0.6, 0.6], device="cpu")
    table.top_p[2], table.top_k[3], table.seed[:] = 0.95, 20, 5
    logits = torch.randn(rows, vocab, generator=generator, device="cpu") * 3
    slots = torch.tensor([0, 1, 2, 3], dtype=torch.int32, device="cpu")
    positions = torch.arange(rows, dtype=torch.int32, device="cpu")
    want = implementation("sample", "reference")(logits, slots, positions, table)
    device = torch.get_default_device()
    automata = automaton([0] * vocab, [[0]], [[0]], [0], [])
    words = program(0, [phase(Label.SOLVE)], [])
    state = torch.zeros(rows, STATE_WORDS, dtype=torch.int32)
    state[:, State.LIMIT], state[:, State.LEFT] = 1000, -1
    machine = Machine(
        state, torch.tensor([words] * rows, dtype=torch.int32), torch.tensor(automata, dtype=torch.int32)
    )
    ring = poisoned_ring(1, rows)
    draw(
        logits.to(device), slots.to(device), positions.to(device), copy(table, device), machine, ring,
        backend=backend,
    )  # fmt: skip
    assert ring.flags[0].tolist() == [Flag.VALID | Flag.SOLVE] * 4
    assert ring.tokens[0].tolist() == want.token.tolist()
    torch.testing.assert_close(ring.sampling_logprobs[0].cpu(), want.sampling_logprob, rtol=1e-5, atol=2e-5)


# ---- the public op ----


def fresh(vocab: int = 9, slots: int = 3) -> tuple:
    tables = random_tables(random.Random(3), slots)
    for slot, start in enumerate(tables.starts):
        enter_start(tables.state[slot], tables.programs[slot], tables.automata, start)
    machine = Machine(tables.state, tables.programs, tables.automata)
    return (
        torch.randn(slots, vocab, generator=torch.Generator("cpu").manual_seed(2)),
        torch.arange(slots, dtype=torch.int32),
        torch.arange(slots, dtype=torch.int32),
        greedy_table(slots, vocab),
        machine,
        make_ring(2, slots + 1),
    )


def test_wrong_arguments_raise():
    logits, slots, positions, table, machine, ring = fresh()
    with pytest.raises(TypeError, match="logits has dtype"):
        draw(logits.double(), slots, positions, table, machine, ring)
    with pytest.raises(TypeError, match=r"table.seed"):
        draw(logits, slots, positions, table._replace(seed=slots), machine, ring)
    with pytest.raises(ValueError, match="programs"):
        draw(logits, slots, positions, table, machine._replace(programs=machine.programs[:1]), ring)
    with pytest.raises(ValueError, match="2 slots, table has 3"):
        draw(logits, slots, positions, table, Machine(machine[0][:2], machine[1][:2], machine.automata), ring)
    with pytest.raises(ValueError, match="expected at least"):
        draw(logits, slots, positions, table, machine, make_ring(2, 2))
    with pytest.raises(ValueError, match="ring_index"):
        draw(logits, slots, positions, table, machine, ring._replace(index=slots))
    with pytest.raises(ValueError, match="backend"):
        draw(logits, slots, positions, table, machine, ring, backend="abacus")


def test_the_op_compiles():
    eager, compiled = fresh(), fresh()

    def step(logits, *arguments):
        draw(logits * 2, *arguments)

    step(*eager)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    for a, b in zip(
        (*eager[3], *eager[4], *eager[5]), (*compiled[3], *compiled[4], *compiled[5]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert int(eager[5].index) == 0
    logits, slots, positions, table, machine, ring = fresh()
    arguments = (logits, slots, positions, *table, *machine, *ring, "cpu")
    torch.library.opcheck(torch.ops.elastic_decode.draw, arguments)
