"""Paged attention in plain PyTorch, a query at a time: what the other backends are compared with."""

import torch

from . import SharedPrefixes


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    shared: SharedPrefixes | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See the package's `paged_attention`. Computes in float32 (float64 where q is float64). `shared` is not
    used: every row is computed by itself."""
    num_tokens, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    result = torch.zeros(num_tokens, num_heads, head_dim, dtype=compute, device=q.device)
    starts = query_start.tolist()
    for row, seq_len in enumerate(seq_lens.tolist()):
        start, end = starts[row], starts[row + 1]
        if seq_len <= 0 or end <= start:
            continue
        num_pages = -(-seq_len // page_size)
        pages = page_table[row, :num_pages].long()
        keys = k_cache[pages].reshape(-1, num_kv_heads, head_dim)[:seq_len].to(compute)
        values = v_cache[pages].reshape(-1, num_kv_heads, head_dim)[:seq_len].to(compute)
        keys = keys.repeat_interleave(num_heads // num_kv_heads, dim=1)
        values = values.repeat_interleave(num_heads // num_kv_heads, dim=1)
        for token in range(start, end):
            position = seq_len - (end - token)
            if position < 0:
                continue
            first = 0 if window is None else max(0, position - window + 1)
            visible = slice(first, position + 1)
            scores = torch.einsum("hd,nhd->hn", q[token].to(compute), keys[visible]) * scale
            result[token] = torch.einsum("hn,nhd->hd", scores.softmax(dim=-1), values[visible])
    if out is None:
        return result.to(q.dtype)
    return out.copy_(result)
