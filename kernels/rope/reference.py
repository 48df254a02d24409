"""Rotary position embedding in plain PyTorch: float32 throughout, rounded once at the end."""

import torch


def rope(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    tokens, head_dim = qkv.shape[0], cos_sin.shape[1]
    heads = qkv.view(tokens, num_heads + 2 * num_kv_heads, head_dim).float()
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)

    q = _rotate(_norm(q, q_weight, eps), cos, sin).to(qkv.dtype)
    k = _rotate(_norm(k, k_weight, eps), cos, sin)
    written = slot_mapping >= 0
    slots = slot_mapping[written].long()
    _write(k_cache, slots, k[written])
    _write(v_cache, slots, v[written])
    return q if out is None else out.copy_(q)


def _write(cache: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
    flat = cache.view(-1, *cache.shape[2:])
    if cache.dtype == torch.float8_e4m3fn:
        # PyTorch turns what is too large into NaN, and writes no float8 by index.
        flat.view(torch.uint8)[slots] = values.clamp(-448.0, 448.0).to(cache.dtype).view(torch.uint8)
    else:
        flat[slots] = values.to(cache.dtype)


def _norm(heads: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if weight is None:
        return heads
    return heads * torch.rsqrt(heads.square().mean(dim=-1, keepdim=True) + eps) * weight.float()


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = heads.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
