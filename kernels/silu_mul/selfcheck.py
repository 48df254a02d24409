"""`silu_mul` at a model's width."""

from collections.abc import Iterator

import torch

from ..selfcheck import Finding, Random, Shapes, Use, close, same

ROWS = 33


def checks(use: Use, shapes: Shapes, random: Random, batch_invariant: bool) -> Iterator[Finding]:
    silu_mul = use()
    gate_up = 3 * random.normal(ROWS, 2 * shapes.intermediate_size, dtype=shapes.dtype)

    def run(rows: slice) -> torch.Tensor:
        out = random.nan(len(gate_up[rows]), shapes.intermediate_size, dtype=shapes.dtype)
        silu_mul(gate_up[rows], out=out)
        return out

    def formula(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    out = run(slice(None))
    yield close(f"{ROWS} rows", out, formula(gate_up.double()), formula(gate_up))
    if batch_invariant:
        for rows in (slice(1), slice(5, 8), slice(-1, None)):
            yield same(f"bits of {len(gate_up[rows])} rows", run(rows), out[rows])
