"""`linear` on every matrix of a model, at batch sizes of decoding and one of prefill."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..selfcheck import Finding, Matrix, Random, Shapes, Use, close, same

TOKENS = (1, 2, 3, 8, 17, 64, 67)  # powers of two and what lies beside them
PREFILL = 520  # rows that a GPU's kernel may cut up in yet another way
CHUNK = 16 << 20  # elements of a weight that are widened at a time


def checks(use: Use, shapes: Shapes, random: Random, batch_invariant: bool) -> Iterator[Finding]:
    linear = use()
    for matrix in sorted(set(shapes.matrices), key=lambda m: -m.outputs * m.inputs):
        x = random.normal(TOKENS[-1], matrix.inputs, dtype=shapes.dtype)
        rows = min(matrix.outputs, _most_elements(random.device, shapes.dtype) // matrix.inputs)
        weight = random.pooled(rows, matrix.inputs, shapes.dtype)
        bias = random.normal(rows, dtype=shapes.dtype) if matrix.bias else None
        out_dtype = torch.float32 if matrix.float32_out else shapes.dtype
        exact, baseline, floor = _expected(x, weight, bias, out_dtype)
        name = f"{rows} x {matrix.inputs}" + _part(matrix, rows)

        def run(tokens: slice, x=x, weight=weight, bias=bias, out_dtype=out_dtype) -> torch.Tensor:
            out = random.nan(len(x[tokens]), len(weight), dtype=out_dtype)
            linear(x[tokens], weight, bias, out=out, out_dtype=out_dtype)
            return out

        whole = run(slice(None))
        yield close(f"{name}, {TOKENS[-1]} rows", whole, exact, baseline, floor)
        for count in TOKENS[:-1]:
            part = run(slice(count))
            yield close(f"{name}, {count} rows", part, exact[:count], baseline[:count], floor)
            if batch_invariant:
                yield same(f"{name}, bits of {count} rows and of {TOKENS[-1]}", part, whole[:count])
        if batch_invariant:
            yield same(f"{name}, bits of the last row alone", run(slice(-1, None)), whole[-1:])
            more = torch.cat((x, random.normal(PREFILL - len(x), matrix.inputs, dtype=shapes.dtype)))
            yield same(
                f"{name}, bits of {len(x)} rows and of {PREFILL}", run(slice(None), more)[: len(x)], whole
            )


def _most_elements(device: torch.device, dtype: torch.dtype) -> int:
    """Of a weight made for the check: a quarter of what is free on a GPU, 64 MiB on the CPU."""
    free = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 64 << 20
    return free // dtype.itemsize


def _part(matrix: Matrix, rows: int) -> str:
    return "" if rows == matrix.outputs else f" (of {matrix.outputs} x {matrix.inputs}: memory)"


def _expected(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    """In float64, in PyTorch's own `out_dtype`, and for float32 the floor: terms cancel, so that a unit in
    the last place is one of the sum of their sizes, not of the result's."""
    exact, baseline, sizes = [], [], 0.0
    for start in range(0, len(weight), max(1, CHUNK // x.shape[1])):
        part = weight[start : start + max(1, CHUNK // x.shape[1])]
        added = None if bias is None else bias[start : start + len(part)]
        wide = part.double()
        exact.append(F.linear(x.double(), wide, None if added is None else added.double()))
        baseline.append(
            F.linear(x.to(out_dtype), part.to(out_dtype), None if added is None else added.to(out_dtype))
        )
        if out_dtype == torch.float32:
            sizes = max(sizes, float(F.linear(x.double().abs(), wide.abs_()).max()))
    floor = torch.finfo(torch.float32).eps * sizes if out_dtype == torch.float32 else None
    return torch.cat(exact, dim=1), torch.cat(baseline, dim=1), floor
