"""What bench_ops.py measures: each op at the sizes of a decode step, its floor, and who can do it here.

A case's contestants are lists of calls that do the same work over different inputs (timing.copies_for).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import floors
import shapes
import torch
from timing import Call, copies_for
from torch.nn import functional

from elastic_decode import automata, budgets
from elastic_decode.delimiters import Delimiters, Marker
from elastic_decode.kernels import registry
from elastic_decode.kernels.budget.layout import PROGRAM_WORDS, STATE_WORDS, Label, State
from elastic_decode.kernels.draw import Machine, make_ring
from elastic_decode.kernels.sample import make_table

PAGE = 16
Contestants = dict[str, list[Call]]


@dataclass
class Case:
    """One op at one size. `make` allocates the inputs and names the contestants, ours by their backend."""

    op: str
    size: dict[str, Any]
    work: floors.Work
    make: Callable[[], Contestants]
    skipped: str = ""


def ours(op: str, device: torch.device) -> list[str]:
    """This project's backends of `op` for tensors there; the reference is nobody's contestant."""
    names = [name for name in registry.BACKENDS if name != "reference"]
    return [name for name in names if registry.why_not_on(op, name, device.type) is None]


def linears(shape: str, tokens: list[int], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The products of one layer and the one to logits."""
    c = shapes.config(shape)
    sizes = {
        "qkv": (c.hidden_size, c.qkv_rows),
        "o": (c.num_heads * c.head_dim, c.hidden_size),
        "gate_up": (c.hidden_size, 2 * c.intermediate_size),
        "down": (c.intermediate_size, c.hidden_size),
        "lm_head": (c.hidden_size, c.vocab_size),
    }
    for name, (inputs, outputs) in sizes.items():
        for rows in tokens:
            out_dtype = torch.float32 if name == "lm_head" else dtype
            work = floors.linear(
                rows, inputs, outputs, size=dtype.itemsize, out_size=out_dtype.itemsize, bias=name == "qkv"
            )

            def make(
                rows: int = rows,
                inputs: int = inputs,
                outputs: int = outputs,
                out_dtype: torch.dtype = out_dtype,
                bias: bool = name == "qkv",
                nbytes: float = work.bytes,
            ) -> Contestants:
                sets = [
                    (
                        torch.randn(rows, inputs, device=device, dtype=dtype),
                        torch.randn(outputs, inputs, device=device, dtype=dtype) * inputs**-0.5,
                        torch.randn(outputs, device=device, dtype=dtype) if bias else None,
                        torch.empty(rows, outputs, device=device, dtype=out_dtype),
                    )
                    for _ in range(copies_for(nbytes, device))
                ]
                found: Contestants = {}
                for backend in ours("linear", device):
                    run = registry.implementation("linear", backend)
                    found[backend] = [
                        partial(run, x, w, b, out=out, out_dtype=out_dtype) for x, w, b, out in sets
                    ]
                # In the inputs' dtype: rounded logits, which the engine does not have, and half the bytes.
                found["torch linear"] = [partial(functional.linear, x, w, b) for x, w, b, _ in sets]
                return found

            yield Case("linear", {"name": name, "tokens": rows, "in": inputs, "out": outputs}, work, make)


def small_ops(shape: str, tokens: list[int], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """rms_norm with a residual, silu_mul, rope with its write of keys and values."""
    c = shapes.config(shape)
    hidden, inner, heads, kv_heads, dim = (
        c.hidden_size,
        c.intermediate_size,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
    )

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    def norms(rows: int, copies: int) -> Contestants:
        # The residual grows from call to call until bfloat16 no longer sees the difference; no matter here.
        sets = [
            (random(rows, hidden), random(hidden), random(rows, hidden), random(rows, hidden))
            for _ in range(copies)
        ]

        def torch_norm(x: torch.Tensor, w: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            residual += x
            return functional.rms_norm(residual, (hidden,), w, 1e-6)

        found: Contestants = {}
        for backend in ours("rms_norm", device):
            run = registry.implementation("rms_norm", backend)
            found[backend] = [partial(run, x, w, 1e-6, residual=r, out=out) for x, w, r, out in sets]
        found["torch add, rms_norm"] = [partial(torch_norm, x, w, r) for x, w, r, _ in sets]
        return found

    def silus(rows: int, copies: int) -> Contestants:
        sets = [(random(rows, 2 * inner), random(rows, inner)) for _ in range(copies)]

        def torch_silu(x: torch.Tensor) -> torch.Tensor:
            return functional.silu(x[:, :inner]) * x[:, inner:]

        found: Contestants = {}
        for backend in ours("silu_mul", device):
            run = registry.implementation("silu_mul", backend)
            found[backend] = [partial(run, x, out=out) for x, out in sets]
        found["torch silu, mul"] = [partial(torch_silu, x) for x, _ in sets]
        return found

    def ropes(rows: int, copies: int) -> Contestants:
        pages = rows + 1
        found: Contestants = {backend: [] for backend in ours("rope", device)}
        table = torch.randn(4096, dim, device=device)
        for _ in range(copies):
            qkv = random(rows, (heads + 2 * kv_heads) * dim)
            positions = torch.randint(0, 4096, (rows,), device=device, dtype=torch.int32)
            mapping = torch.randperm(pages * PAGE, device=device)[:rows].int()
            k_cache, v_cache = random(pages, PAGE, kv_heads, dim), random(pages, PAGE, kv_heads, dim)
            for backend, calls in found.items():
                run = registry.implementation("rope", backend)
                calls.append(
                    partial(
                        run,
                        qkv,
                        table,
                        positions,
                        mapping,
                        k_cache,
                        v_cache,
                        num_heads=heads,
                        num_kv_heads=kv_heads,
                        out=random(rows, heads, dim),
                    )
                )
        return found

    for rows in tokens:
        kinds = {
            "rms_norm": (floors.rms_norm(rows, hidden, size=dtype.itemsize), norms),
            "silu_mul": (floors.silu_mul(rows, inner, size=dtype.itemsize), silus),
            "rope": (
                floors.rope(rows, heads, kv_heads, dim, size=dtype.itemsize, kv_size=dtype.itemsize),
                ropes,
            ),
        }
        for op, (work, make) in kinds.items():
            yield Case(op, {"tokens": rows}, work, partial(make, rows, copies_for(work.bytes, device)))


OPTIONS: dict[str, dict[str, float]] = {
    "temperature": {"temperature": 0.6},
    "greedy": {"temperature": 0.0},
    "top-k, top-p": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
}


def draws(
    batches: list[int], vocab: int, device: torch.device, options: list[str] | None = None
) -> Iterator[Case]:
    """What follows the logits, and `sample` alone: their difference is the budget machine's own time."""
    for name in options or list(OPTIONS):
        for rows in batches:
            work = floors.draw(rows, vocab)
            make = partial(_draw, rows, vocab, OPTIONS[name], work.bytes, device)
            yield Case("draw", {"batch": rows, "vocab": vocab, "options": name}, work, make)


def budget_tables(rows: int, vocab: int, device: torch.device) -> Machine:
    """A machine whose rows think on, each with a budget of its own, and close at ids that are never drawn."""
    delimiters = Delimiters(open=None, close=Marker(ids=(vocab - 2, vocab - 1)), eos_ids=(vocab - 3,))
    programs = torch.zeros((rows, PROGRAM_WORDS), dtype=torch.int32)
    state = torch.zeros((rows, STATE_WORDS), dtype=torch.int32)
    enter = registry.implementation("budget", "cpu", "enter_start")
    for row in range(rows):
        policy = budgets.elastic(think=1 << 29 | row, solve=64)
        program = automata.compile(policy.program(delimiters, None), delimiters, None, vocab)
        programs[row] = program.program_row
        state[row, State.LIMIT] = (1 << 31) - 1
        enter(state[row], programs[row], program.automaton, program.start[Label.THINK])
    return Machine(state.to(device), programs.to(device), program.automaton.to(device))


def _draw(
    rows: int, vocab: int, options: dict[str, float], nbytes: float, device: torch.device
) -> Contestants:
    table = make_table(rows, device=device)
    for name, value in options.items():
        getattr(table, name).fill_(value)
    table.seed.copy_(torch.arange(rows))
    slots = torch.arange(rows, device=device, dtype=torch.int32)
    positions = torch.full((rows,), 1000, device=device, dtype=torch.int32)
    machine, ring = budget_tables(rows, vocab, device), make_ring(64, rows, device)
    logits = []
    for _ in range(copies_for(nbytes, device)):
        logits.append(torch.randn(rows, vocab, device=device) * 3)
        logits[-1][:, vocab - 3 :] = -40.0  # no end is drawn: every row goes on
    found: Contestants = {}
    for backend in ours("draw", device):
        run = registry.implementation("draw", backend)
        found[backend] = [partial(run, each, slots, positions, table, machine, ring) for each in logits]
    for backend in ours("sample", device):
        run = registry.implementation("sample", backend)
        found[f"{backend} sample"] = [partial(run, each, slots, positions, table) for each in logits]

    def torch_draw(each: torch.Tensor) -> torch.Tensor:
        # torch.multinomial waits for the device; dividing by exponential noise draws the same.
        probabilities = torch.softmax(each / 0.6, -1)
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)

    def torch_greedy(each: torch.Tensor) -> torch.Tensor:
        return each.argmax(-1)

    if len(options) == 1:  # torch alone has no top-p short of a sort
        name, plain = ("argmax", torch_greedy) if not options["temperature"] else ("softmax", torch_draw)
        found[f"torch {name}"] = [partial(plain, each) for each in logits]
    return found
