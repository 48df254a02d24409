"""Attention as bench_ops.py measures it: decode, decode of groups that share a prefix, float8, prefill."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import floors
import shapes
import torch
from op_cases import PAGE, Case, Contestants, ours
from timing import copies_for
from torch.nn import functional

from elastic_decode.kernels import registry
from elastic_decode.kernels.paged_attention import SharedPrefixes

MOST_CACHE = 16e9  # bytes of keys and values in one case


@dataclass(frozen=True)
class Size:
    """Rows that have `context` keys each, the last `new` of which are queries, too. Rows in groups of
    `group` share all pages but their last `own` tokens'.
    """

    batch: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int
    new: int = 1
    group: int = 1
    own: int = 0
    kv_dtype: str = ""

    @property
    def shared(self) -> int:
        """Positions that a group has in common."""
        return self.context - self.own if self.group > 1 else 0

    def work(self, dtype: torch.dtype) -> floors.Work:
        """What a group shares counts once; a query sees the keys up to its own position."""
        kv_size = getattr(torch, self.kv_dtype).itemsize if self.kv_dtype else dtype.itemsize
        size = {"page_size": PAGE, "size": dtype.itemsize, "kv_size": kv_size}
        heads = (self.heads, self.kv_heads, self.head_dim)
        one = floors.attention_decode(self.batch, self.context, *heads, **size)
        again = self.shared * (self.batch - self.batch // self.group)  # keys that a group need not read again
        queries = 2 * dtype.itemsize * self.batch * (self.new - 1) * self.heads * self.head_dim
        pairs = self.batch * self.new * (self.context - (self.new - 1) / 2)
        return floors.Work(
            one.bytes - 2 * kv_size * again * self.kv_heads * self.head_dim + queries,
            4.0 * pairs * self.heads * self.head_dim,
            one.kernels,
        )

    def row(self) -> dict[str, Any]:
        """As a result's fields; what is as usual is left out."""
        usual = Size(0, 0, 0, 0, 0)
        named = {name: getattr(self, name) for name in ("batch", "context", "heads", "kv_heads", "head_dim")}
        for name in ("new", "group", "own", "kv_dtype"):
            if getattr(self, name) != getattr(usual, name):
                named[name] = getattr(self, name)
        return {**named, "page_size": PAGE}


def cases(
    batches: list[int],
    contexts: list[int],
    ratios: list[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    head_dim: int = 128,
    group: int = 8,
    chunk: int = 2048,
) -> Iterator[Case]:
    """Decode over batches, contexts and head ratios; at the last ratio but one (as the model that
    bench_decode.py has) the others, too.
    """
    special = ratios[-2:][0]
    for ratio in ratios:
        heads, kv_heads = shapes.HEADS[ratio]
        for context in contexts:
            for batch in batches:
                yield _case(Size(batch, context, heads, kv_heads, head_dim), dtype, device)
        if ratio != special:
            continue
        for context in contexts:
            for batch in batches:
                size = Size(batch, context, heads, kv_heads, head_dim)
                if batch % group == 0 and context > 256:
                    yield _case(replace(size, group=group, own=256), dtype, device)
                if device.type == "cuda" and batch == max(batches):
                    yield _case(replace(size, kv_dtype="float8_e4m3fn"), dtype, device)
        for context in (chunk, 4 * chunk):
            yield _case(Size(1, context, heads, kv_heads, head_dim, new=chunk), dtype, device)


def _case(size: Size, dtype: torch.dtype, device: torch.device) -> Case:
    work = size.work(dtype)
    too_large = f"{work.bytes / 1e9:.0f} GB of keys and values" if work.bytes > MOST_CACHE else ""
    return Case("paged_attention", size.row(), work, partial(make, size, dtype, device), too_large)


def make(size: Size, dtype: torch.dtype, device: torch.device) -> Contestants:
    rows, dim, per_row = size.batch, size.head_dim, -(-size.context // PAGE)
    pages = rows * per_row
    kv_dtype = getattr(torch, size.kv_dtype) if size.kv_dtype else dtype
    query_start = torch.arange(rows + 1, device=device, dtype=torch.int32) * size.new
    seq_lens = torch.full((rows,), size.context, device=device, dtype=torch.int32)
    backends = ours("paged_attention", device)
    found: Contestants = {backend: [] for backend in backends}
    shared = _groups(size, device)
    # float8 and shared pages have no like in SDPA over contiguous memory.
    plain = shared is None and kv_dtype == dtype
    for _ in range(copies_for(size.work(dtype).bytes, device)):
        q = torch.randn(rows * size.new, size.heads, dim, device=device, dtype=dtype)
        cache = torch.randn(2, pages, PAGE, size.kv_heads, dim, device=device, dtype=dtype).to(kv_dtype)
        table = torch.randperm(pages, device=device).int().view(rows, per_row)
        common = size.shared // PAGE
        if common:  # the first of a group has the pages of all
            table[:, :common] = table[:: size.group, :common].repeat_interleave(size.group, 0)
        arguments = (q, cache[0], cache[1], table, seq_lens, query_start)
        for backend in backends:
            run = partial(registry.implementation("paged_attention", backend), *arguments)
            run = partial(run, scale=dim**-0.5, window=None, out=torch.empty_like(q))
            found[backend].append(run)
            if shared is not None:
                found.setdefault(f"{backend}, told of groups", []).append(partial(run, shared=shared))
        if plain:
            # The cache's memory as [rows, kv_heads, context, dim]: other numbers, as many reads.
            shape = (rows, size.kv_heads, per_row * PAGE, dim)
            k, v = (part.view(shape)[:, :, : size.context] for part in cache)
            queries = q.view(rows, size.new, size.heads, dim).transpose(1, 2)
            sdpa = partial(functional.scaled_dot_product_attention, queries, k, v)
            sdpa = partial(sdpa, enable_gqa=size.heads != size.kv_heads)
            if size.new == 1:
                found.setdefault("torch SDPA", []).append(sdpa)
            elif size.new == size.context:  # its causal mask begins at the first key, else ours differs
                found.setdefault("torch SDPA", []).append(partial(sdpa, is_causal=True))
    return found


def _groups(size: Size, device: torch.device) -> SharedPrefixes | None:
    if size.group == 1:
        return None
    groups = size.batch // size.group
    start = torch.full((size.batch + 1,), size.batch, device=device, dtype=torch.int32)
    start[:groups] = torch.arange(groups, device=device, dtype=torch.int32) * size.group
    length = torch.zeros(size.batch, device=device, dtype=torch.int32)
    length[:groups] = size.shared // PAGE * PAGE
    return SharedPrefixes(start, length)
