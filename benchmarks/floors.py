"""The least time an operation can take, from the bytes it must move and the matrix products it must do.

Pure functions of shapes. Bytes count each input once and each output once; flops count matrix products only
(two for a multiplication with its addition), since all else is far below a GPU's rate. A floor is the larger
of bytes over the memory's rate and flops over the matrix units' rate. A prediction adds what is known to be
lost: see `Assumptions`.

    python benchmarks/floors.py            # print the predictions
    python benchmarks/floors.py --write    # into docs/predictions.md
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import shapes

from elastic_decode.model_config import ModelConfig

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "predictions.md"
BFLOAT16, FLOAT32, INT32 = 2, 4, 4


class Work(NamedTuple):
    """What must be moved and multiplied, and the kernels that it takes here."""

    bytes: float
    flops: float = 0.0
    kernels: int = 1

    def times(self, count: int) -> Work:
        return Work(self.bytes * count, self.flops * count, self.kernels * count)


class Rates(NamedTuple):
    """A device's ceilings. bandwidth: bytes/s, read and written together; matmul: dense bfloat16 flop/s."""

    bandwidth: float
    matmul: float
    source: str = ""


# https://www.nvidia.com/en-us/data-center/h100/ , column H100 SXM; its 1,979 TFLOPS are with sparsity.
H100_DATASHEET = Rates(3.35e12, 989e12, "the datasheet of an H100 SXM: 3.35 TB/s, 989 TFLOP/s dense bfloat16")
H100_SEEN = Rates(
    3.0e12,
    798e12,
    "an H100 80GB HBM3 with PyTorch 2.11: device-to-device copy 3.0 TB/s (read and written),\n"
    "  8192 x 8192 x 8192 bfloat16 product 798 TFLOP/s",
)


class Assumptions(NamedTuple):
    """What a prediction adds to a floor.

    kernel_us: between two kernels of one graph, start and end of a kernel included. About 1.3 on an H100 by
    the measurements of the Llama-1B megakernel (Hazy Research, May 2025, "Look Ma, No Bubbles!").
    bandwidth: the share of the copy's rate that a kernel reaches while it runs; matmul: likewise of the
    matrix products'. Guesses, to be proven wrong.
    """

    kernel_us: float = 1.3
    bandwidth: float = 0.85
    matmul: float = 0.60


def floor_us(work: Work, rates: Rates) -> float:
    """Microseconds below which no version of `work` can run."""
    return 1e6 * max(work.bytes / rates.bandwidth, work.flops / rates.matmul)


def predicted_us(work: Work, rates: Rates, assume: Assumptions = Assumptions()) -> float:  # noqa: B008
    """What `work` is expected to take in a replayed graph."""
    reached = Rates(rates.bandwidth * assume.bandwidth, rates.matmul * assume.matmul)
    return work.kernels * assume.kernel_us + floor_us(work, reached)


# ---- the ops ----


def linear(
    tokens: int, inputs: int, outputs: int, *, bias: bool = False, size: int = 2, out_size: int = 2
) -> Work:
    """x [tokens, inputs] times weight [outputs, inputs]; element sizes in bytes."""
    moved = size * (tokens * inputs + outputs * inputs + bias * outputs) + out_size * tokens * outputs
    return Work(moved, 2.0 * tokens * inputs * outputs)


def rms_norm(tokens: int, hidden: int, *, residual: bool = True, size: int = 2) -> Work:
    """Reads x and the weight, writes the result; a residual is read and written as well."""
    return Work(size * ((4 if residual else 2) * tokens * hidden + hidden))


def silu_mul(tokens: int, inner: int, *, size: int = 2) -> Work:
    return Work(size * 3 * tokens * inner)


def rope(tokens: int, heads: int, kv_heads: int, head_dim: int, *, size: int = 2, kv_size: int = 2) -> Work:
    """q, k and v read, q and the cache's k and v written, the table and two indices a token read."""
    read = size * tokens * (heads + 2 * kv_heads) * head_dim + tokens * (FLOAT32 * head_dim + 2 * INT32)
    return Work(read + tokens * head_dim * (size * heads + kv_size * 2 * kv_heads))


def attention_decode(
    rows: int,
    context: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    page_size: int = 16,
    size: int = 2,
    kv_size: int = 2,
) -> Work:
    """One query a row over `context` keys. Two kernels: the splits, and their sum."""
    cache = kv_size * 2 * rows * context * kv_heads * head_dim
    pages = INT32 * rows * -(-context // page_size)
    return Work(
        cache + pages + size * 2 * rows * heads * head_dim, 4.0 * rows * context * heads * head_dim, 2
    )


def draw(rows: int, vocab: int) -> Work:
    """Every logit read once. Two kernels: the scan, and the end with the budget machine."""
    return Work(FLOAT32 * rows * vocab, 0.0, 2)


def decode_inputs(rows: int) -> Work:
    """Four words of state and a page number a row read, four inputs written."""
    return Work(INT32 * rows * (4 + 1 + 4))


def embedding(rows: int, hidden: int, *, size: int = 2) -> Work:
    return Work(size * 2 * rows * hidden + INT32 * rows)


# ---- a decode step ----


def layer(
    config: ModelConfig, rows: int, context: int, *, size: int = 2, kv_size: int = 0
) -> dict[str, Work]:
    """The ops of one layer of a decode step of `rows` rows that have `context` keys each. kv_size: bytes of a
    key's or value's element, 0 as the weights'.
    """
    kv_size = kv_size or size
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_heads
    kv_heads, dim = config.num_kv_heads, config.head_dim
    return {
        "linear qkv": linear(rows, hidden, (heads + 2 * kv_heads) * dim, bias=True, size=size, out_size=size),
        "rope": rope(rows, heads, kv_heads, dim, size=size, kv_size=kv_size),
        "paged_attention": attention_decode(rows, context, heads, kv_heads, dim, size=size, kv_size=kv_size),
        "linear o": linear(rows, heads * dim, hidden, size=size, out_size=size),
        "rms_norm": rms_norm(rows, hidden, size=size).times(2),
        "linear gate_up": linear(rows, hidden, 2 * inner, size=size, out_size=size),
        "silu_mul": silu_mul(rows, inner, size=size),
        "linear down": linear(rows, inner, hidden, size=size, out_size=size),
    }


def decode_step(
    config: ModelConfig, rows: int, context: int, *, size: int = 2, kv_size: int = 0
) -> dict[str, Work]:
    """All ops of a decode step; those of the layers counted for all layers together."""
    one = layer(config, rows, context, size=size, kv_size=kv_size)
    step = {name: work.times(config.num_layers) for name, work in one.items()}
    step["decode_inputs"] = decode_inputs(rows)
    step["embedding"] = embedding(rows, config.hidden_size, size=size)
    step["linear lm_head"] = linear(rows, config.hidden_size, config.vocab_size, size=size, out_size=FLOAT32)
    step["draw"] = draw(rows, config.vocab_size)
    return step


def total(step: dict[str, Work]) -> Work:
    """The ops together. Its floor is what a step that overlaps everything would still need."""
    return Work(
        sum(work.bytes for work in step.values()),
        sum(work.flops for work in step.values()),
        sum(work.kernels for work in step.values()),
    )


def step_floor_us(config: ModelConfig, rows: int, context: int, rates: Rates, **sizes: int) -> float:
    """sizes: size and kv_size of `layer`."""
    return floor_us(total(decode_step(config, rows, context, **sizes)), rates)


def step_predicted_us(config: ModelConfig, rows: int, context: int, rates: Rates, **sizes: int) -> float:
    """The ops one after the other."""
    return sum(predicted_us(work, rates) for work in decode_step(config, rows, context, **sizes).values())


# ---- the document ----

BATCHES = (1, 8, 64, 256)
START, END = 256, 2048
HEAD = """# Predictions

Written before any kernel of this project ran on a GPU, by `python benchmarks/floors.py --write` (with
`PYTHONPATH=benchmarks`), from shapes, rates and three assumptions. The first measurements are to be compared
with these figures, whichever way they miss; `make gpu-bench` measures both rates anew and puts floor and
prediction beside each row.

## Rates
- {datasheet}
  ([NVIDIA](https://www.nvidia.com/en-us/data-center/h100/)).
- {seen}. The tables use these.
- {kernel} µs a kernel in a replayed graph, from measurements of CUDA graphs on an H100 ([Hazy
  Research](https://hazyresearch.stanford.edu/blog/2025-05-27-no-bubbles), May 2025).
- Our own guesses, to be proven wrong: a kernel reaches {bandwidth:.0%} of the copy's rate while it runs,
  a matrix product of ours {matmul:.0%} of the rate of PyTorch's. Programmatic dependent launch, which
  should take from the time between kernels, is not in the figures.

## Decode
R1-Distill-Qwen-1.5B's shape ({layers} layers, hidden {hidden}, {heads}/{kv_heads} heads of {dim}, MLP
{inner}, vocabulary {vocab:,}), bfloat16: {weights:.2f} GB of weights a step. Context {start} to {end:,};
the figures are those of its middle, {middle:,}.

| batch | GB | TFLOP | floor, ms | tokens/s | by the datasheet | predicted, ms | tokens/s | of the floor |
|---|---|---|---|---|---|---|---|---|
"""
AIMS = """
Aims: at batch 1 at least 60 % of the measured bandwidth, at batch 256 at least 60 % of the floor. A step is
{kernels} kernels, so {starts:.2f} of the {lost:.2f} ms that the prediction loses at batch 1 are between
them. The best published (a persistent megakernel) is 78 % of the bandwidth at batch 1.

## The ops of a step
Microseconds for all {layers} layers together, floor / predicted, at context {middle:,}.

"""
ATTENTION = """
## Attention in decode, one layer
Microseconds, floor / predicted, heads of 128, pages of 16.

| heads | batch | 512 | 2,048 | 16,384 |
|---|---|---|---|---|
"""
BUDGET = """
## The budget step
It adds a few hundred bytes a row and no kernel (`draw` does it in the kernel that ends the sampling), so its
own time should be that kernel's longer run: a chain of dependent loads, 2 to 4 µs whatever the batch. Aims:
at most 5 µs at batch 256, and at most 1 % of a step. One percent of the predicted steps is
{shares}.
"""


def both(work: Work) -> str:
    return f"{floor_us(work, H100_SEEN):,.1f} / {predicted_us(work, H100_SEEN):,.0f}"


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


def document() -> str:
    """docs/predictions.md."""
    config, assume = shapes.config("1.5B"), Assumptions()
    middle = (START + END) // 2
    steps = {rows: decode_step(config, rows, middle) for rows in BATCHES}
    predicted = {rows: step_predicted_us(config, rows, middle, H100_SEEN) for rows in BATCHES}
    whole = {rows: total(steps[rows]) for rows in BATCHES}
    weights = sum(work.bytes for name, work in decode_step(config, 0, 0).items() if name.startswith("linear"))
    text = HEAD.format(
        datasheet=H100_DATASHEET.source,
        seen=H100_SEEN.source,
        kernel=assume.kernel_us,
        bandwidth=assume.bandwidth,
        matmul=assume.matmul,
        layers=config.num_layers,
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        dim=config.head_dim,
        inner=config.intermediate_size,
        vocab=config.vocab_size,
        weights=weights / 1e9,
        start=START,
        end=END,
        middle=middle,
    )
    for rows in BATCHES:
        floor, sheet = floor_us(whole[rows], H100_SEEN), floor_us(whole[rows], H100_DATASHEET)
        text += row(
            rows,
            f"{whole[rows].bytes / 1e9:.2f}",
            f"{whole[rows].flops / 1e12:.3f}",
            f"{floor / 1e3:.2f}",
            f"{rows / floor * 1e6:,.0f}",
            f"{rows / sheet * 1e6:,.0f}",
            f"{predicted[rows] / 1e3:.2f}",
            f"{rows / predicted[rows] * 1e6:,.0f}",
            f"{floor / predicted[rows]:.0%}",
        )
    text += AIMS.format(
        kernels=whole[1].kernels,
        starts=whole[1].kernels * assume.kernel_us / 1e3,
        lost=(predicted[1] - floor_us(whole[1], H100_SEEN)) / 1e3,
        layers=config.num_layers,
        middle=middle,
    )
    text += row("op", *(f"batch {rows}" for rows in BATCHES)) + f"|{'---|' * (1 + len(BATCHES))}\n"
    for name in steps[1]:
        text += row(f"`{name}`", *(both(steps[rows][name]) for rows in BATCHES))
    text += ATTENTION
    for heads, kv_heads in shapes.HEADS.values():
        for rows in (1, 64, 256):
            cells = (attention_decode(rows, context, heads, kv_heads, 128) for context in (512, 2048, 16384))
            text += row(f"{heads}/{kv_heads}", rows, *map(both, cells))
    shares = [f"{predicted[rows] / 100:.0f} µs at batch {rows}" for rows in (1, 64, 256)]
    return text + BUDGET.format(shares=", ".join(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.name}")
    if parser.parse_args().write:
        DOCUMENT.write_text(document(), encoding="utf-8")
    else:
        print(document(), end="")


if __name__ == "__main__":
    main()
