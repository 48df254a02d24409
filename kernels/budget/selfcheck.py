"""The budget machine on random programs: states and rings must equal the reference's in every bit."""

import random as python_random
from collections.abc import Callable, Iterator

import torch

from ..selfcheck import Finding, Random, Shapes, Use, same, within
from . import reference
from .layout import State
from .testing import random_tables

SLOTS = 48
STEPS = 10
RING = 3
VOCAB = 61  # of the logits; the programs' automata have their own


class Run:
    """One way of running the steps, with its own copy of what they change; a ring with room for one more."""

    def __init__(self, state: torch.Tensor, columns: int, device: torch.device) -> None:
        self.state = state.to(device, copy=True)
        self.ring = [torch.full((RING, columns), -77, dtype=torch.int32, device=device) for _ in range(2)]
        self.ring += [torch.full((RING, columns), torch.nan, device=device) for _ in range(2)]


def checks(use: Use, shapes: Shapes, random: Random, batch_invariant: bool) -> Iterator[Finding]:
    budget_step, decode_inputs = use("budget_step"), use("decode_inputs")
    reference_step: Callable[..., None] = reference.budget_step
    rng, cpu = python_random.Random(0), torch.device("cpu")
    tables = random_tables(rng, SLOTS)
    for slot, start in enumerate(tables.starts):
        reference.enter_start(tables.state[slot], tables.programs[slot], tables.automata, start)
    programs, automata = tables.programs.to(random.device), tables.automata.to(random.device)
    want, have, alone = (Run(tables.state, SLOTS + 1, where) for where in (cpu, random.device, random.device))
    temperature = (random.normal(SLOTS).abs() - 0.3).clamp(min=0)
    order = list(range(SLOTS))
    for step in range(STEPS):
        rng.shuffle(order)
        rows = [slot if rng.random() < 0.95 else -1 for slot in order[: rng.randint(SLOTS // 2, SLOTS)]]
        asked = rng.randrange(SLOTS)
        for run in (want, have, alone):
            run.state[asked, State.END_REQUESTED] = 1
        draws = tables.draws(rng, want.state, rows)
        logits = 5 * random.normal(len(rows), VOCAB)
        lse, logprobs = random.normal(len(rows)), random.normal(len(rows))
        floats = logits, lse, logprobs, temperature
        slots, index = torch.tensor(rows, dtype=torch.int32), torch.tensor([step % RING], dtype=torch.int32)
        host = [programs, automata, slots, draws, *floats]
        reference_step(want.state, *(each.cpu() for each in host), *want.ring, index)
        slots, draws, index = (each.to(random.device) for each in (slots, draws, index))
        arguments = programs, automata, slots, draws, *floats
        budget_step(have.state, *arguments, *have.ring, index)
        yield same(f"step {step}: state", have.state.cpu(), want.state)
        names = "tokens", "flags", "logprobs", "sampling_logprobs"
        for name, mine, theirs in zip(names, have.ring, want.ring, strict=True):
            if mine.is_floating_point():
                yield within(f"step {step}: {name}", mine.cpu(), theirs, rtol=1e-6, atol=4e-6)
            else:
                yield same(f"step {step}: {name}", mine.cpu(), theirs)
        if batch_invariant:
            yield from _halves(budget_step, alone, have, arguments, index, step)
        yield from _inputs(decode_inputs, have.state, want.state, slots, shapes.page_size, step)


def _halves(
    budget_step: Callable[..., None],
    alone: Run,
    have: Run,
    arguments: tuple[torch.Tensor, ...],
    index: torch.Tensor,
    step: int,
) -> Iterator[Finding]:
    """The last row by itself after the others: the same state and the same entries as all at once."""
    programs, automata, *by_row, temperature = arguments
    columns = []
    for rows in (slice(-1), slice(-1, None)):
        part = [each[rows].contiguous() for each in by_row]
        budget_step(alone.state, programs, automata, *part, temperature, *alone.ring, index)
        columns.append([ring[step % RING, : len(part[0])].clone() for ring in alone.ring])
    yield same(f"step {step}: state, in two calls", alone.state, have.state)
    for whole, *parts in zip(have.ring, *columns, strict=True):
        # Where an entry has no token, only its flags are written.
        valid = have.ring[1][step % RING, : len(by_row[0])] & 1 == 1
        entries = (each[valid] for each in (torch.cat(parts), whole[step % RING, : len(by_row[0])]))
        yield same(f"step {step}: ring, in two calls", *entries)


def _inputs(
    decode_inputs: Callable[..., None],
    state: torch.Tensor,
    want: torch.Tensor,
    slots: torch.Tensor,
    page_size: int,
    step: int,
) -> Iterator[Finding]:
    pages = 120 // page_size + 1  # positions begin below 100; past the table there is no slot
    table = torch.arange(SLOTS * pages, dtype=torch.int32).flip(0).view(SLOTS, pages)
    host, device = (
        [torch.full(slots.shape, -77, dtype=torch.int32, device=where) for _ in range(4)]
        for where in ("cpu", slots.device)
    )
    reference.decode_inputs(want, table, slots.cpu(), page_size, *host)
    decode_inputs(state, table.to(slots.device), slots, page_size, *device)
    for name, mine, theirs in zip(
        ("token", "position", "seq_len", "slot_mapping"), device, host, strict=True
    ):
        yield same(f"step {step}: next {name}", mine.cpu(), theirs)
