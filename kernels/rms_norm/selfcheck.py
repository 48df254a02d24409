"""`rms_norm` at a model's width, with and without a residual."""

from collections.abc import Iterator

import torch

from ..selfcheck import Finding, Random, Shapes, Use, close, same
from .reference import rms_norm as reference

ROWS = 67


def checks(use: Use, shapes: Shapes, random: Random, batch_invariant: bool) -> Iterator[Finding]:
    rms_norm = use()
    x = random.normal(ROWS, shapes.hidden_size, dtype=shapes.dtype)
    weight = random.normal(shapes.hidden_size, dtype=shapes.dtype)
    added = 3 * random.normal(ROWS, shapes.hidden_size, dtype=shapes.dtype)
    for small in (x, added):
        small[::5] *= shapes.eps**0.5  # where eps matters

    def run(rows: slice, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        updated = None if residual is None else residual[rows].clone()
        out = random.nan(*x[rows].shape, dtype=x.dtype)
        rms_norm(x[rows], weight, shapes.eps, residual=updated, out=out)
        return out, updated

    for residual in (None, added):
        name = "plain" if residual is None else "with a residual"
        total = x if residual is None else residual + x
        wide = total.double()
        exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + shapes.eps) * weight.double()
        out, updated = run(slice(None), residual)
        yield close(name, out, exact, reference(total, weight, shapes.eps))
        if updated is not None:
            yield same(f"{name}: the sum", updated, total)
        if batch_invariant:
            for rows in (slice(1), slice(5, 8), slice(-1, None)):
                yield same(f"{name}, bits of {len(x[rows])} rows", run(rows, residual)[0], out[rows])
