"""The budget machine: every backend equals the reference on random programs (laws: test_budget_laws.py)."""

import random
from collections import Counter
from enum import IntEnum

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_decode.kernels import _C
from elastic_decode.kernels import budget as op
from elastic_decode.kernels.budget import layout
from elastic_decode.kernels.budget.layout import Finish, Flag, State, ThinkEnd
from elastic_decode.kernels.budget.testing import RandomTables, random_tables
from elastic_decode.kernels.registry import implementation
from elastic_decode.kernels.testing import device_of, runnable


def test_header_numbers_the_words_like_the_layout():
    numbers = {name: value for name, value in vars(layout).items() if name.isupper()}
    for group in vars(layout).values():
        if isinstance(group, type) and issubclass(group, IntEnum) and group is not IntEnum:
            numbers |= {f"{group.__name__}.{name}": int(word) for name, word in group.__members__.items()}
    assert _C.cpu.budget_layout() == numbers


class Run:
    """One backend's copy of a launch, where it wants it: its state, and a ring poisoned so that a stray write
    shows.
    """

    def __init__(self, tables: RandomTables, backend: str, width: int, length: int = 3):
        self.backend, self.device = backend, device_of(backend)
        state = tables.state.clone()
        for slot, start in enumerate(tables.starts):
            enter = implementation("budget", backend, "enter_start")
            enter(state[slot], tables.programs[slot], tables.automata, start)
        self.state, self.programs, self.automata = self.moved(state, tables.programs, tables.automata)
        self.ring = self.moved(
            *(torch.full((length, width), -77, dtype=torch.int32) for _ in range(2)),
            *(torch.full((length, width), float("nan")) for _ in range(2)),
        )

    def moved(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [each.to(self.device) for each in tensors]

    def step(self, slots, draws, logits, lse, logprobs, temperature, index):
        at = torch.tensor([index], dtype=torch.int32)
        inputs = self.moved(slots, draws, logits, lse, logprobs, temperature)
        step = implementation("budget", self.backend, "budget_step")
        step(self.state, self.programs, self.automata, *inputs, *self.ring, *self.moved(at))


def assert_equal_runs(want: Run, have: Run, note: str) -> None:
    expected, actual = want.state.cpu(), have.state.cpu()
    if not torch.equal(expected, actual):
        slot = int((expected != actual).any(1).nonzero()[0])
        raise AssertionError(f"{note}: slot {slot}: {expected[slot].tolist()} != {actual[slot].tolist()}")
    rings = [[each.cpu() for each in run.ring] for run in (want, have)]
    assert torch.equal(rings[0][0], rings[1][0]), note
    assert torch.equal(rings[0][1], rings[1][1]), note
    for a, b in zip(rings[0][2:], rings[1][2:], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6, equal_nan=True, msg=lambda m: f"{note}: {m}")


def compare(rng: random.Random, backend: str, num_slots: int, steps: int, seen: Counter) -> None:
    """Runs `num_slots` random programs for `steps` steps on the reference and on `backend`."""
    tables = random_tables(rng, num_slots)
    generator = torch.Generator("cpu").manual_seed(rng.getrandbits(32))
    temperature = torch.rand(num_slots, generator=generator) * 2
    temperature[torch.rand(num_slots, generator=generator) < 0.3] = 0.0
    want, have = (Run(tables, name, num_slots + 1) for name in ("reference", backend))
    assert_equal_runs(want, have, "start")
    order = list(range(num_slots))
    for index in range(steps):
        rng.shuffle(order)
        rows = [
            slot if rng.random() < 0.97 else -1 for slot in order[: rng.randint(num_slots // 2, num_slots)]
        ]
        for slot in range(num_slots):
            if rng.random() < 0.04:
                want.state[slot, State.END_REQUESTED] = have.state[slot, State.END_REQUESTED] = 1
        slots = torch.tensor(rows, dtype=torch.int32)
        draws = tables.draws(rng, want.state, rows)
        logits = torch.randn(len(rows), rng.randint(1, 30), generator=generator) * 5
        lse, logprobs = torch.randn(2, len(rows), generator=generator)
        for run in (want, have):
            run.step(slots, draws, logits, lse, logprobs, temperature, index)
        assert_equal_runs(want, have, f"step {index}")
        for flags in want.ring[1][index % 3, : len(rows)].tolist():
            seen["idle" if flags == 0 else "no token" if not flags & Flag.VALID else "token"] += 1
            seen["forced"] += bool(flags & Flag.FORCED)
            seen["solve"] += bool(flags & Flag.SOLVE)
            seen[repr(Finish(flags >> Flag.FINISH_SHIFT & 15))] += 1
            seen[repr(ThinkEnd(flags >> Flag.THINK_END_SHIFT))] += 1


def test_ten_thousand_random_programs_equal_the_reference():
    seen: Counter = Counter()
    for seed in range(28):
        compare(random.Random(seed), "cpu", 360, 14, seen)
    assert all(seen[name] > 300 for name in ("idle", "no token", "token", "forced", "solve")), dict(seen)
    assert all(seen[repr(code)] > 200 for code in (*list(Finish)[:5], *ThinkEnd)), dict(seen)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_random_programs_found_by_hypothesis_equal_the_reference(rng):
    compare(rng, "cpu", 3, 8, Counter())


@pytest.mark.parametrize("backend", ["triton", *set(runnable("budget")) & {"cuda"}])
def test_random_programs_on_the_gpus_backends_equal_the_reference(backend):
    seen: Counter = Counter()
    for seed in range(3):
        compare(random.Random(seed), backend, 300, 8, seen)
    assert all(seen[repr(code)] > 10 for code in (*list(Finish)[:5], *ThinkEnd)), dict(seen)


def test_ops_compile():
    tables = random_tables(random.Random(5), 6)
    slots = torch.arange(6, dtype=torch.int32)
    for slot, start in enumerate(tables.starts):
        op.enter_start(tables.state[slot], tables.programs[slot], tables.automata, start)
    draws = tables.draws(random.Random(6), tables.state, range(6))
    sampled = (draws, torch.randn(6, 24), torch.randn(6), torch.randn(6), torch.ones(6))
    fixed = (tables.programs, tables.automata, slots, *sampled)
    page_table = torch.randint(9, (6, 8), dtype=torch.int32)

    def fresh() -> list[torch.Tensor]:
        ring = [torch.zeros(2, 6, dtype=torch.int32), torch.zeros(2, 6, dtype=torch.int32)]
        ring += [torch.zeros(2, 6), torch.zeros(2, 6)]
        return [tables.state.clone(), *ring, *torch.zeros(4, 6, dtype=torch.int32)]

    def step(state, tokens, flags, logprobs, sampling_logprobs, *out):
        index = torch.ones(1, dtype=torch.int32)
        op.budget_step(state, *fixed, tokens, flags, logprobs, sampling_logprobs, index)
        op.decode_inputs(state, page_table, slots, 16, *out)

    eager, compiled = fresh(), fresh()
    step(*eager)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b)
    state, *ring = fresh()[:5]
    index = torch.zeros(1, dtype=torch.int32)
    torch.library.opcheck(torch.ops.elastic_decode.budget_step, (state, *fixed, *ring, index, "cpu"))
    arguments = (state, page_table, slots, 16, *fresh()[5:], "cpu")
    torch.library.opcheck(torch.ops.elastic_decode.decode_inputs, arguments)
