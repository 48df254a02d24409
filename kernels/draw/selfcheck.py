"""`draw` over a model's vocabulary on random programs, beside the reference."""

import math
import random as python_random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..budget import reference as budget
from ..budget.layout import AutomatonWord, State
from ..budget.testing import random_tables
from ..sample import SamplingTable
from ..sample.selfcheck import SLOTS, coarse, make_options
from ..selfcheck import Finding, Random, Shapes, Use, same, within
from . import Machine, Ring, make_ring, reference

STEPS = 3
MANY = 128  # rows that fill a GPU: a program may then take more of a row's vocabulary


class Tables(NamedTuple):
    """One way of running the steps: its own copy of what they read and change."""

    options: SamplingTable
    machine: Machine
    ring: Ring

    def copy(self, where: torch.device) -> "Tables":
        return Tables(*(_copy(part, where) for part in self))


def _copy(part: Any, where: torch.device) -> Any:
    return type(part)(*(None if each is None else each.to(where, copy=True) for each in part))


def checks(use: Use, shapes: Shapes, random: Random, batch_invariant: bool) -> Iterator[Finding]:
    draw = use()
    cpu = torch.device("cpu")
    for penalties in (False, True):
        rng = python_random.Random(penalties)
        tables = random_tables(rng, len(SLOTS))
        for slot, start in enumerate(tables.starts):
            budget.enter_start(tables.state[slot], tables.programs[slot], tables.automata, start)
        ring = make_ring(3, len(SLOTS) + 1)
        for part in (ring.logprobs, ring.sampling_logprobs):
            part.fill_(math.nan)

        start_of_run = Tables(
            make_options(shapes, random, penalties=penalties),
            Machine(tables.state, tables.programs, tables.automata),
            ring,
        )
        want, have, alone = (start_of_run.copy(where) for where in (cpu, random.device, random.device))
        order = list(range(len(SLOTS)))
        for step in range(STEPS):
            rng.shuffle(order)
            rows = [-1, *order[: rng.randint(len(SLOTS) - 3, len(SLOTS) - 1)]]
            for each in (want, have, alone):
                each.machine.state[order[-1], State.END_REQUESTED] = 1
            wanted = tables.draws(rng, want.machine.state, rows).tolist()
            logits = coarse(2 * random.normal(len(rows), shapes.vocab_size))
            for row, (slot, token) in enumerate(zip(rows, wanted, strict=True)):
                if slot < 0:
                    continue
                # Drawn from what the program knows, so that the row goes on; else nothing can be drawn.
                known = tables.machines[slot].words[AutomatonWord.VOCAB_SIZE]
                logits[row, :known] += 14
                if token < 0:
                    logits[row, row] = math.nan
                elif row % 4 == 0:
                    logits[row, token % shapes.vocab_size] = 40.0  # what moves the machine
            slots = random.ints(rows)
            positions = random.ints([100 + 11 * row + step for row in range(len(rows))])
            reference.draw(logits.cpu(), slots.cpu(), positions.cpu(), *want)
            inputs = logits, slots, positions
            before = have.copy(random.device)
            draw(*inputs, *have)
            name = f"step {step}{' with penalties' if penalties else ''}"
            yield from _compare(name, have, want)
            if step == STEPS - 1:
                yield from _many(name, draw, inputs, before, want)
            if batch_invariant:
                yield from _halves(name, draw, inputs, alone, have)


def _compare(name: str, have: Tables, want: Tables) -> Iterator[Finding]:
    yield same(f"{name}: state", have.machine.state.cpu(), want.machine.state)
    for field in Ring._fields:
        mine, theirs = getattr(have.ring, field).cpu(), getattr(want.ring, field)
        if mine.is_floating_point():
            yield within(f"{name}: {field}", mine, theirs, rtol=4e-6, atol=2e-5)
        else:
            yield same(f"{name}: {field}", mine, theirs)
    mine, theirs = have.options.output_counts, want.options.output_counts
    if mine is not None and theirs is not None:
        yield same(f"{name}: output_counts", mine.cpu(), theirs)


def _many(
    name: str,
    draw: Callable[..., None],
    inputs: tuple[torch.Tensor, ...],
    before: Tables,
    want: Tables,
) -> Iterator[Finding]:
    """The step again with every row many times over, each time with a slot of its own."""
    logits, slots, positions = inputs
    count = -(-(MANY if slots.is_cuda else 24) // len(slots))
    name = f"{name}, {count} times"
    ring = make_ring(len(before.ring.tokens), count * len(slots), device=slots.device)
    ring.index.copy_(before.ring.index)
    state, programs, automata = before.machine
    options: list[Any] = [
        None if each is None else each.repeat(count, *[1] * (each.dim() - 1)) for each in before.options
    ]
    machine = Machine(state.repeat(count, 1), programs.repeat(count, 1), automata)
    first = torch.arange(count, dtype=torch.int32, device=slots.device)[:, None] * len(SLOTS)
    own = torch.where(slots >= 0, slots + first, -1).flatten()
    draw(logits.repeat(count, 1), own, positions.repeat(count), SamplingTable(*options), machine, ring)
    wanted = want.machine.state.repeat(count, 1)
    yield same(f"{name}: state", machine.state.cpu(), wanted)
    at = int(want.ring.index)
    entries = [
        (mine[at].cpu(), theirs[at, : len(slots)].repeat(count))
        for mine, theirs in zip(ring[:4], want.ring[:4], strict=True)
    ]
    valid = entries[Ring._fields.index("flags")][1] & 1 == 1
    for field, (mine, theirs) in zip(Ring._fields, entries, strict=False):
        if field == "flags":
            yield same(f"{name}: {field}", mine, theirs)
        elif mine.is_floating_point():
            yield within(f"{name}: {field}", mine[valid], theirs[valid], rtol=4e-6, atol=2e-5)
        else:
            yield same(f"{name}: {field}", mine[valid], theirs[valid])


def _halves(
    name: str, draw: Callable[..., None], inputs: tuple[torch.Tensor, ...], alone: Tables, have: Tables
) -> Iterator[Finding]:
    """The last row by itself after the others: the same state and the same entries as all at once."""
    at, count = int(have.ring.index), len(inputs[1])
    columns = []
    for rows in (slice(-1), slice(-1, None)):
        alone.ring.index.copy_(have.ring.index - 1)
        part = [each[rows].contiguous() for each in inputs]
        draw(*part, *alone)
        columns.append([each[at, : len(part[0])].clone() for each in alone.ring[:4]])
    yield same(f"{name}: state, in two calls", alone.machine.state, have.machine.state)
    valid = have.ring.flags[at, :count] & 1 == 1  # an entry without a token has only its flags written
    for field, whole, first, rest in zip(Ring._fields, have.ring[:4], *columns, strict=False):
        entries = (each[valid] for each in (torch.cat((first, rest)), whole[at, :count]))
        yield same(f"{name}: {field}, in two calls", *entries)
