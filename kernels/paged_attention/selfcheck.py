"""`paged_attention` with a model's heads and pages: decode, prefill in chunks, windows, shared prefixes."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..gpu import num_processors
from ..selfcheck import Finding, Random, Shapes, Use, close, same, to_cache
from . import SharedPrefixes, reference

SPLIT = 256  # where the backends' splits of the keys are, or near it
WINDOW = 37  # stands for a model's own, which short rows would not fill


@dataclass
class Rows:
    """The arguments of one call: rows of (seq_len, queries). Pages hold NaN where no token is."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k_cache, self.v_cache, self.page_table, self.seq_lens, self.query_start

    def row(self, index: int, last: bool = False) -> "Rows":
        """The call of one row alone; `last`: with its last query only, as in decode."""
        start, stop = self.query_start[index : index + 2].tolist()
        start = stop - 1 if last else start
        own = slice(index, index + 1)
        begin = torch.tensor([0, stop - start], dtype=torch.int32, device=self.q.device)
        return Rows(
            self.q[start:stop], self.k_cache, self.v_cache, self.page_table[own].contiguous(),
            self.seq_lens[own], begin,
        )  # fmt: skip

    def times(self, count: int) -> "Rows":
        """The call of all rows `count` times over, on the same pages."""
        starts, tokens = self.query_start[:-1], len(self.q)
        begin = [starts + tokens * index for index in range(count)]
        end = torch.full_like(starts[:1], tokens * count)
        return Rows(
            self.q.repeat(count, 1, 1), self.k_cache, self.v_cache, self.page_table.repeat(count, 1),
            self.seq_lens.repeat(count), torch.cat((*begin, end)),
        )  # fmt: skip


def enough(rows: Rows) -> int:
    """How many times `rows` fill a GPU: kernels may cut up a large batch otherwise than a small one."""
    tiles = len(rows.seq_lens) * rows.k_cache.shape[2]
    return -(-4 * num_processors(rows.q.device) // tiles) if rows.q.is_cuda else 2


def make_rows(shapes: Shapes, random: Random, rows: list[tuple[int, int]], shared: int = 0) -> Rows:
    """Pages in an order of their own; the first `shared` pages of rows 0 to 2 are the same. Past a row's
    pages the table names a page that is all NaN."""
    size, dims = shapes.page_size, (shapes.num_kv_heads, shapes.head_dim)
    counts = [-(-seq_len // size) for seq_len, _ in rows]
    unused = sum(counts)
    fresh = iter(range(unused - 1, -1, -1))
    caches = [random.nan(unused + 1, size, *dims) for _ in range(2)]
    table: list[list[int]] = []
    for row, ((seq_len, _), count) in enumerate(zip(rows, counts, strict=True)):
        own = shared if 0 < row < 3 else 0
        pages = [*table[0][:own], *(next(fresh) for _ in range(count - own))] if own else []
        pages = pages or [next(fresh) for _ in range(count)]
        table.append(pages + [unused] * (max(counts) + 1 - count))
        at = random.ints(pages).long().repeat_interleave(size) * size
        at = (at + torch.arange(count * size, device=random.device) % size)[own * size : seq_len]
        for cache, scale in zip(caches, (2, 1), strict=True):
            cache.view(-1, *dims)[at] = scale * random.normal(len(at), *dims)
    k_cache, v_cache = (to_cache(cache, shapes.kv_dtype) for cache in caches)
    starts = [0, *itertools.accumulate(queries for _, queries in rows)]
    q = random.normal(starts[-1], shapes.num_heads, shapes.head_dim, dtype=shapes.dtype)
    lens = random.ints([seq_len for seq_len, _ in rows])
    flat = random.ints([page for pages in table for page in pages]).view(len(rows), -1)
    return Rows(q, k_cache, v_cache, flat, lens, random.ints(starts))


def pytorch(rows: Rows, dtype: torch.dtype, window: int | None) -> torch.Tensor:
    """scaled_dot_product_attention in `dtype`, a row at a time."""
    out = torch.zeros_like(rows.q, dtype=dtype)
    starts, size = rows.query_start.tolist(), rows.k_cache.shape[1]
    for row, seq_len in enumerate(rows.seq_lens.tolist()):
        start, stop = starts[row], starts[row + 1]
        if seq_len == 0:
            continue
        pages = rows.page_table[row, : -(-seq_len // size)].long()
        k, v = (
            cache[pages].flatten(0, 1)[:seq_len].to(dtype).transpose(0, 1)[None]
            for cache in (rows.k_cache, rows.v_cache)
        )
        columns = torch.arange(seq_len, device=out.device)
        positions = columns[seq_len - (stop - start) :, None]
        mask = (columns <= positions) & (columns > positions - (window or seq_len + 1))
        q = rows.q[start:stop].to(dtype).transpose(0, 1)[None]
        group = q.shape[1] // k.shape[1]
        k, v = (each.repeat_interleave(group, dim=1) for each in (k, v))
        out[start:stop] = F.scaled_dot_product_attention(q, k, v, mask)[0].transpose(0, 1)
    return out


def score_floor(rows: Rows) -> float | None:
    """For float32: a score's rounding, of one unit in its last place, moves a weight by as much relatively;
    the largest score is at most the product of the norms."""
    if rows.q.dtype != torch.float32:
        return None
    k, v = (cache.float().nan_to_num() for cache in (rows.k_cache, rows.v_cache))
    most = rows.q.norm(dim=-1).max() * k.norm(dim=-1).max() * rows.q.shape[-1] ** -0.5
    return float(torch.finfo(torch.float32).eps * most * v.abs().max())


def checks(use: Use, shapes: Shapes, random: Random, batch_invariant: bool) -> Iterator[Finding]:
    attention = use()
    size = shapes.page_size

    def run(rows: Rows, **options: object) -> torch.Tensor:
        out = random.nan(*rows.q.shape, dtype=rows.q.dtype)
        attention(*rows.tensors(), scale=shapes.head_dim**-0.5, out=out, **options)
        return out

    # Both sides of the ends of a page and of a split; an idle row between others.
    lens = sorted({1, size - 1, size, size + 1, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 3 * size + 1} - {0})
    calls = {
        "decode": make_rows(shapes, random, [(n, 1) for n in (*lens[:3], 0, *lens[3:])]),
        "prefill": make_rows(
            shapes, random, [(size + 1, size + 1), (1, 1), (2 * size + 37, 19), (SPLIT + 44, 40)]
        ),
    }
    windows = [None, WINDOW] if any(shapes.windows) else [None]
    for (name, rows), window in itertools.product(calls.items(), windows):
        what = name if window is None else f"{name}, window {window}"
        out = run(rows, window=window)
        exact = reference.paged_attention(rows.q.double(), *rows.tensors()[1:], window=window)
        baseline, floor = pytorch(rows, rows.q.dtype, window), score_floor(rows)
        yield close(what, out, exact, baseline, floor)
        count = enough(rows)
        many = run(rows.times(count), window=window).unflatten(0, (count, -1))
        yield close(f"{what}, {count} times", many, exact.expand_as(many), baseline.expand_as(many), floor)
        if not batch_invariant:
            continue
        yield same(f"{what}, bits of {count} times", many, out.expand_as(many))
        starts = rows.query_start.tolist()
        for index, seq_len in enumerate(rows.seq_lens.tolist()):
            if seq_len == 0:
                continue
            stop = starts[index + 1]
            alone = run(rows.row(index), window=window)
            yield same(f"{what}, bits of {seq_len} keys alone", alone, out[starts[index] : stop])
            if name == "prefill":
                last = run(rows.row(index, last=True), window=window)
                yield same(f"{what}, bits of {seq_len} keys in decode", last, out[stop - 1 : stop])

    pages = -(-(SPLIT + 1) // size)
    lens = [pages * size + more for more in (1, size, 2 * size + 1)]
    rows = make_rows(shapes, random, [(n, 1) for n in (*lens, size + 1, 0)], shared=pages)
    groups = random.ints([0, 3, 5, 5, 5, 5]), random.ints([pages * size, 0, 0, 0, 0])
    for window in windows:
        plain = run(rows, window=window)
        shared = run(rows, window=window, shared=SharedPrefixes(*groups))
        exact = reference.paged_attention(rows.q.double(), *rows.tensors()[1:], window=window)
        baseline, floor = pytorch(rows, rows.q.dtype, window), score_floor(rows)
        yield close("shared prefixes", shared, exact, baseline, floor)
        count, length = enough(rows), len(rows.seq_lens)
        starts = [at + length * index for index in range(count) for at in (0, 3)]
        starts += [length * count] * (length * count + 1 - len(starts))
        lengths = [pages * size, 0] * count + [0] * ((length - 2) * count)
        of_many = SharedPrefixes(random.ints(starts), random.ints(lengths))
        many = run(rows.times(count), window=window, shared=of_many).unflatten(0, (count, -1))
        name = f"shared prefixes, {count} times"
        yield close(name, many, exact.expand_as(many), baseline.expand_as(many), floor)
        if batch_invariant:
            yield same("shared prefixes, bits", shared, plain)
            yield same(f"{name}, bits", many, plain.expand_as(many))
