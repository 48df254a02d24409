"""`sample`, `draw` and the budget machine in CUDA C++, run on the CPU (tests/cuda_on_cpu).

The tests of test_sample.py and test_draw.py run here as they are, with threads and blocks in a random order;
a GPU runs them from their own files.
"""

import importlib.util
import inspect
import random
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

from elastic_decode.kernels.draw import Machine
from elastic_decode.kernels.sample import reference, sample


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_for_cuda", Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SAMPLE, DRAW, BUDGET = load("test_sample"), load("test_draw"), load("test_budget")


def with_backend(module: ModuleType) -> dict[str, object]:
    functions = {name: value for name, value in vars(module).items() if name.startswith("test_")}
    return {n: f for n, f in functions.items() if "backend" in inspect.signature(f).parameters}


globals().update({f"{name}_in_sample": test for name, test in with_backend(SAMPLE).items()})
globals().update({f"{name}_in_draw": test for name, test in with_backend(DRAW).items()})


@pytest.fixture
def backend(cuda_on_cpu, monkeypatch):
    for module in (SAMPLE, DRAW, BUDGET):
        monkeypatch.setattr(module, "device_of", lambda name: torch.device("cpu"), raising=False)
    cuda_on_cpu.set_schedule(1)
    return "cuda"


def test_the_other_files_tests_are_here():
    assert len(with_backend(SAMPLE)) >= 10
    assert len(with_backend(DRAW)) >= 10


# What is rare or hard for the filters: vocabulary, spread of the logits, options of five slots.
SITUATIONS = {
    "plain": (5003, 3.0, {"temperature": [0, 1, 0.6, 2, 1e-3]}),
    "flat, plain": (3000, 0.0, {}),
    "few candidates": (
        20_000,
        5.0,
        {"top_p": 0.9, "top_k": [0, 40, 1, 300, 7], "min_p": [0, 0.1, 0, 0.01, 0]},
    ),
    "more candidates than are listed": (
        9001,
        0.3,
        {"top_p": [0.9, 0.5, 0.99, 1, 1], "min_p": [0, 0, 0, 0.05, 0.3]},
    ),
    "top-k of more than the groups": (
        2500,
        1.0,
        {"top_k": [200, 2499, 1000, 161, 80], "top_p": [1, 1, 0.7, 1, 0.5]},
    ),
    "one value, so one bin": (9000, 0.0, {"top_p": [0.4, 1, 0.9, 1, 1], "top_k": [0, 50, 20, 8000, 0]}),
    "crowded bins": (9000, 1e-6, {"top_p": [0.4, 1, 0.9, 1, 0.2], "top_k": [0, 700, 800, 8000, 0]}),
    "far apart": (
        1500,
        1e4,
        {"top_p": 0.9, "top_k": [0, 5, 0, 1400, 0], "temperature": [0.1, 1, 9, 1e3, 1e-9]},
    ),
    "enormous": (600, 1e37, {"top_p": [0.9, 1, 1, 0.5, 1], "top_k": [0, 5, 0, 590, 0], "temperature": 2}),
}


def situation(name: str) -> tuple[torch.Tensor, SAMPLE.SamplingTable]:
    vocab, spread, options = SITUATIONS[name]
    generator = torch.Generator().manual_seed(len(name))
    logits = torch.randn(5, vocab, generator=generator) * spread
    if name == "far apart":
        logits[:, ::7] = -torch.inf
    penalties = {"repetition": [1, 1, 1.2, 1, 1], "presence": [0, 0, 0, 0.5, 0]}
    biases = {"bias_ids": [[3, vocab - 1, 3]] * 5, "bias_values": [[1, 2, 0.5]] * 5}
    bans = {"ban_until": [0, 0, 0, 1000, 0], "ban_ids": [[5]] * 5}
    changes = {**penalties, **biases, **bans} if len(name) % 2 else {}
    table = SAMPLE.table_of(5, 1, 3, vocab, seed=11, sample_index=[0, 1, 2, 3, 4], **options, **changes)
    table.output_counts[:, ::3] = 2
    return logits, table


@pytest.mark.parametrize("name", SITUATIONS)
def test_every_order_of_threads_gives_the_same_bits(backend, cuda_on_cpu, name):
    logits, table = situation(name)
    drawn = []
    for seed in range(3):
        cuda_on_cpu.set_schedule(seed)
        drawn.append(SAMPLE.draw(backend, logits, table))
    SAMPLE.assert_drawn(drawn[0], logits, table)
    for other in drawn[1:]:
        assert all(torch.equal(a, b) for a, b in zip(drawn[0], other, strict=True))


@pytest.mark.parametrize("vocab", [151_936, 151_937])
def test_vocabularies_of_real_models(backend, vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(6, vocab, generator=generator) * 3
    options = {
        "temperature": [0, 1, 0.6, 0.6, 1, 1],
        "top_k": [0, 0, 0, 20, 500, 0],
        "top_p": [1, 1, 0.95, 0.9, 1, 1],
        "min_p": [0, 0, 0, 0, 0, 0.05],
    }
    table = SAMPLE.table_of(6, seed=[-1, 2**62, 3, 4, 5, 6], **options)
    drawn = SAMPLE.draw(backend, logits, table)
    SAMPLE.assert_drawn(drawn, logits, table)
    one = SAMPLE.draw(backend, logits[2:3], table, SAMPLE.ints(2), SAMPLE.ints(102))
    assert all(torch.equal(a[2:3], b) for a, b in zip(drawn, one, strict=True)), (
        "the batch changed a row's bits"
    )


def test_flat_logits_show_the_noise(backend):
    """Where all logits are equal, the draw is the id with the smallest of the reference's words."""
    vocab, rows = 1003, 40
    table = SAMPLE.table_of(1, seed=-123456789, sample_index=7)
    positions = torch.arange(rows, dtype=torch.int32) * 1001
    drawn = SAMPLE.draw(backend, torch.zeros(rows, vocab), table, torch.zeros_like(positions), positions)
    words = [reference.words(-123456789, 7, int(position), vocab) for position in positions]
    assert drawn.token.tolist() == [int(each.argmin()) for each in words]


def test_two_launches(backend, cuda_on_cpu):
    table, machine, ring = DRAW.greedy_table(2, 8), DRAW.hand_machine(2), DRAW.poisoned_ring(2, 2)
    before = cuda_on_cpu.launches()
    sample(DRAW.peaked(8, 1, 2), DRAW.ints(0, 1), DRAW.ints(4, 5), table, backend=backend)
    assert cuda_on_cpu.launches() - before == 2
    DRAW.draw(DRAW.peaked(8, 1, 2), DRAW.ints(0, 1), DRAW.ints(4, 5), table, machine, ring, backend=backend)
    assert cuda_on_cpu.launches() - before == 4
    assert isinstance(machine, Machine)


def test_budget_step_equals_the_reference(backend):
    seen: Counter = Counter()
    for seed in range(3):
        BUDGET.compare(random.Random(seed), backend, 300, 8, seen)
    assert all(seen[name] > 10 for name in ("idle", "no token", "token", "forced", "solve")), dict(seen)


def test_decode_inputs_equals_the_reference(backend):
    tables = BUDGET.random_tables(random.Random(1), 90)
    tables.state[:, BUDGET.State.FINISH] = torch.randint(0, 2, (90,)) * 3
    page_table = torch.randint(-1, 9, (90, 4), dtype=torch.int32)
    slots = torch.randperm(90).int()
    slots[::7] = -1
    results = []
    for name in ("reference", backend):
        out = [torch.full((90,), -77, dtype=torch.int32) for _ in range(4)]
        BUDGET.op.decode_inputs(tables.state, page_table, slots, 16, *out, backend=name)
        results.append(out)
    for want, have in zip(*results, strict=True):
        assert torch.equal(want, have)
