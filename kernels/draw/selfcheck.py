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
            draw(*inputs, *have)
            name = f"step {step}{' with penalties' if penalties else ''}"
            yield from _compare(name, have, want)
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
