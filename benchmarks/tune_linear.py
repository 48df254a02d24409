"""Times linear in Triton with other tiles and splits than kernels/linear/triton.py has in its tables.

    python benchmarks/tune_linear.py [--shape 1.5B] [--only qkv down] [--tokens 1 16 64 256] [--top 5]

For each weight of a layer and each number of tokens: the quickest choices, how much quicker than the table's
they are, PyTorch's time and the floor. A split holds for every batch, so choose it by the batches that
matter, then the tile for each batch. Choices with the table's splits must give the table's bits: another sum
is an error here, and the end of batch invariance. Kernels are compiled first, a process a core. With
`--device cpu` and TRITON_INTERPRET=1 it runs a tiny shape: a check of this program, no measurement.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import floors
import shapes
import torch
from timing import Replayable, ceilings, copies_for, samples_in_turn, summary

from elastic_decode.kernels.gpu import architecture
from elastic_decode.kernels.linear import triton as module
from elastic_decode.kernels.linear.triton import SPLIT_DEPTH, TILES, Plan, Tile, linear, plan

SHARED = {
    80: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
}  # bytes a program may have; 80: of the smaller GPUs too


def tiles(tokens: int, arch: int) -> Iterator[Tile]:
    """What may be worth a try for that many tokens."""
    widths = [width for width in (16, 32, 64, 128, 256) if width >= min(tokens, 128)][:2]
    for width in widths:
        for outputs in (64, 128):
            for depth in (64, 128, 256):
                for stages in (3, 4, 6):
                    bytes_ = stages * depth * (outputs + width) * 2
                    if 40 << 10 <= bytes_ <= SHARED[arch]:
                        yield Tile(outputs, width, depth, 8 if outputs * width >= 128 * 128 else 4, stages)


def choices(tokens: int, outputs: int, inputs: int, dtype: torch.dtype, arch: int) -> list[Plan]:
    """The table's plan first."""
    own = plan(tokens, outputs, inputs, dtype, arch)
    steps = -(-inputs // SPLIT_DEPTH)
    lengths = {-(-steps // count) for count in (own.splits, 1, own.splits // 2, 2 * own.splits) if count > 0}
    found = [own]
    for tile in tiles(tokens, arch):
        for length in sorted(lengths):
            count = -(-steps // length)
            cut = -(-outputs // tile.outputs) * -(-tokens // tile.tokens)
            spread = count > 1 and cut < max(one.processors for one in TILES.values())
            if count <= module.MAX_SPLITS and (count == 1 or spread):
                found.append(Plan(tile, count, length * SPLIT_DEPTH, spread))
    return list(dict.fromkeys(found))


def run(chosen: Plan, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`linear` cut up as `chosen` says."""
    module.plan = lambda *_: chosen
    try:
        return linear(x, weight, out=out)
    finally:
        module.plan = plan


def compile_one(chosen: Plan, inputs: int, tokens: int, out_dtype: torch.dtype) -> str:
    """Into Triton's cache on disk, by a run on this process's own small tensors; what failed, or nothing."""
    weight = torch.zeros(16, inputs, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(min(tokens, 16), inputs, dtype=torch.bfloat16, device="cuda")
    try:
        run(chosen, x, weight, torch.empty(len(x), 16, dtype=out_dtype, device="cuda"))
        torch.cuda.synchronize()
    except Exception as error:  # one choice that does not compile or fit is left out
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def tune(
    name: str,
    outputs: int,
    inputs: int,
    tokens: int,
    device: torch.device,
    rates: floors.Rates,
    pool: Executor,
    arguments: argparse.Namespace,
) -> bool:
    """Prints what was found; False where a choice with the table's splits had other bits."""
    arch, dtype = architecture(device), torch.bfloat16 if device.type == "cuda" else torch.float32
    out_dtype = torch.float32 if name == "lm_head" else dtype
    offered = choices(tokens, outputs, inputs, dtype, arch)
    if device.type == "cuda":
        job = partial(compile_one, inputs=inputs, tokens=tokens, out_dtype=out_dtype)
        problems = list(pool.map(job, offered))
        offered = [one for one, problem in zip(offered, problems, strict=True) if not problem]
    nbytes = dtype.itemsize * outputs * inputs
    sets = [
        (
            torch.randn(tokens, inputs, device=device, dtype=dtype),
            torch.randn(outputs, inputs, device=device, dtype=dtype) * inputs**-0.5,
            torch.full((tokens, outputs), torch.nan, device=device, dtype=out_dtype),
        )
        for _ in range(copies_for(nbytes, device))
    ]
    x, weight, out = sets[0]
    table = run(offered[0], x, weight, out).clone()
    ready, kept, same_bits = [], [], True
    for one in offered:
        result = run(one, x, weight, out.fill_(torch.nan))
        if device.type == "cuda" and one.splits == offered[0].splits and not torch.equal(result, table):
            print(f"  OTHER BITS: {one}: {int((result != table).sum())} of {result.numel()}")
            same_bits = False
        ready.append(Replayable([partial(run, one, *each) for each in sets], device))
        kept.append(one)
    if out_dtype == dtype:
        ready.append(Replayable([partial(torch.mm, a, b.T, out=c) for a, b, c in sets], device))
    times = [summary(samples).us for samples in samples_in_turn(ready, seconds=arguments.seconds)]
    pytorch = f", PyTorch {times.pop():.1f}" if len(times) > len(kept) else ""
    work = floors.linear(tokens, inputs, outputs, size=dtype.itemsize, out_size=out_dtype.itemsize)
    floor = floors.floor_us(work, rates)
    print(
        f"{name} {outputs} x {inputs}, {tokens} tokens: floor {floor:.1f} us{pytorch}, table {times[0]:.1f}"
    )
    for us, one in sorted(zip(times, kept, strict=True), key=lambda pair: pair[0])[: arguments.top]:
        spread = "spread" if one.spread else "walked"
        print(f"  {us:8.1f} us  {times[0] / us:5.2f}x  {one.splits:2} splits {spread}  {tuple(one.tile)[:5]}")
    return same_bits


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", default="1.5B", choices=shapes.SHAPES)
    parser.add_argument("--only", nargs="+", default=["qkv", "o", "gate_up", "down", "lm_head"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=0.03, help="for each choice")
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    c = shapes.config(arguments.shape)
    weights = {
        "qkv": (c.qkv_rows, c.hidden_size),
        "o": (c.hidden_size, c.num_heads * c.head_dim),
        "gate_up": (2 * c.intermediate_size, c.hidden_size),
        "down": (c.hidden_size, c.intermediate_size),
        "lm_head": (c.vocab_size, c.hidden_size),
    }
    rates = floors.Rates(*ceilings(device))
    print(f"copy {rates.bandwidth / 1e12:.2f} TB/s, product {rates.matmul / 1e12:.0f} TFLOP/s")
    torch.manual_seed(0)
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        good = [
            tune(name, *weights[name], tokens, device, rates, pool, arguments)
            for name in arguments.only
            for tokens in arguments.tokens
        ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
