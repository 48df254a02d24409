"""Attention calls made up for tests: rows over shuffled pages, groups that share pages, and the answer."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..testing import device_of
from . import SharedPrefixes, paged_attention

KEY_SCALE = 2.0  # of random keys, so that weights differ


@dataclass
class Case:
    """Rows of (seq_len, number of queries) and everything the op takes for them, all on one device."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start: torch.Tensor
    keys: list[torch.Tensor]  # a row's [seq_len, Hkv, D], on the CPU
    values: list[torch.Tensor]

    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.q, self.k_cache, self.v_cache, self.page_table, self.seq_lens, self.query_start

    def to(self, device: torch.device) -> "Case":
        q, k_cache, v_cache, *indices = (tensor.to(device) for tensor in self.inputs())
        table, lens, start = indices
        return Case(q, k_cache, v_cache, table, lens, start, self.keys, self.values)

    def run(
        self, backend: str, *, window: int | None = None, shared: SharedPrefixes | None = None
    ) -> torch.Tensor:
        """The public op where `backend` runs, into an output of NaN. The result is on the CPU."""
        device = device_of(backend)
        out = torch.full_like(self.q, torch.nan, device=device)
        if shared is not None:
            shared = SharedPrefixes(*(tensor.to(device) for tensor in shared))
        inputs = self.to(device).inputs()
        result = paged_attention(*inputs, window=window, shared=shared, out=out, backend=backend)
        assert result is out
        return out.cpu()


def pack(
    keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], page_size: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows' keys and values in shuffled pages; what no token fills is NaN, spare entries are garbage."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-len(k) // page_size) for k in keys]
    num_pages, width = sum(counts) + 2, max([*counts, 0]) + 2
    order = torch.randperm(num_pages, generator=generator).tolist()
    shape = (num_pages, page_size, *keys[0].shape[1:])
    k_cache = torch.full(shape, torch.nan).to(keys[0].dtype)
    v_cache = torch.full(shape, torch.nan).to(keys[0].dtype)
    table = torch.full((len(keys), width), -(2**30), dtype=torch.int32)
    for row, (k, v) in enumerate(zip(keys, values, strict=True)):
        for page in range(counts[row]):
            table[row, page] = order.pop()
            part = slice(page * page_size, (page + 1) * page_size)
            k_cache[table[row, page], : len(k[part])] = k[part]
            v_cache[table[row, page], : len(v[part])] = v[part]
    return k_cache, v_cache, table


def make_case(
    rows: Sequence[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    seed: int = 0,
    idle_tokens: int = 0,
) -> Case:
    """Random rows of (seq_len, number of queries), on the CPU; idle_tokens: tokens after the last row's."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    kv_dtype = kv_dtype or dtype
    lens = [max(0, seq_len) for seq_len, _ in rows]
    keys = [normal(n, kv_heads, head_dim).mul(KEY_SCALE).to(kv_dtype) for n in lens]
    values = [normal(n, kv_heads, head_dim).to(kv_dtype) for n in lens]
    counts = [n for _, n in rows]
    start = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    q = normal(sum(counts) + idle_tokens, heads, head_dim).to(dtype)
    k_cache, v_cache, table = pack(keys, values, page_size, seed)
    seq_lens = torch.tensor([n for n, _ in rows], dtype=torch.int32)
    return Case(q, k_cache, v_cache, table, seq_lens, start, keys, values)


def make_groups(
    groups: Sequence[tuple[int, Sequence[int]]],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
) -> tuple[Case, SharedPrefixes]:
    """Decode rows by group: (length of the prefix, seq_lens of the group's rows). The rows have in common the
    pages that the prefix fills; idle rows have garbage for pages."""
    lens = [n for _, rows in groups for n in rows]
    case = make_case(
        [(n, 1) for n in lens],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        kv_dtype=kv_dtype,
    )
    num_rows = len(lens)
    starts = list(itertools.accumulate((len(rows) for _, rows in groups), initial=0))
    shared_len = torch.zeros(num_rows, dtype=torch.int32)
    for group, (length, _) in enumerate(groups):
        live = [row for row in range(starts[group], starts[group + 1]) if lens[row] > 0]
        pages = length // page_size
        shared_len[group] = pages * page_size
        for row in live[1:]:
            case.page_table[row, :pages] = case.page_table[live[0], :pages]
            for rows in (case.keys, case.values):
                rows[row][: pages * page_size] = rows[live[0]][: pages * page_size]
    starts += [num_rows] * (num_rows + 1 - len(starts))
    return case, SharedPrefixes(torch.tensor(starts, dtype=torch.int32), shared_len)


def pytorch_attention(case: Case, dtype: torch.dtype, window: int | None = None) -> torch.Tensor:
    """The same with scaled_dot_product_attention in `dtype`, a row at a time, on the CPU."""
    queries = case.q.cpu()
    out = torch.zeros_like(queries, dtype=dtype)
    starts = case.query_start.tolist()
    for row, seq_len in enumerate(case.seq_lens.tolist()):
        start, end = starts[row], starts[row + 1]
        if seq_len <= 0 or start == end:
            continue
        q, k, v = (
            x.to(dtype).transpose(0, 1)[None] for x in (queries[start:end], case.keys[row], case.values[row])
        )
        positions = torch.arange(seq_len - (end - start), seq_len)[:, None]
        columns = torch.arange(seq_len)[None]
        mask = (columns <= positions) & (columns > positions - (window or seq_len + 1))
        out[start:end] = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)
    return out
