"""`rope` with a model's heads and pages: rotation, norms of q and k, and what is written into which page."""

from collections.abc import Iterator

import torch

from ..selfcheck import FLOAT8_MAX, Finding, Random, Shapes, Use, close, same, to_cache

TOKENS = 37
POSITIONS = 211


def checks(use: Use, shapes: Shapes, random: Random, batch_invariant: bool) -> Iterator[Finding]:
    rope = use()
    heads, kv_heads, dim, size = shapes.num_heads, shapes.num_kv_heads, shapes.head_dim, shapes.page_size
    qkv = random.normal(TOKENS, (heads + 2 * kv_heads) * dim, dtype=shapes.dtype)
    qkv[1::5] *= shapes.eps**0.5  # where eps matters
    if shapes.kv_dtype == torch.float8_e4m3fn:
        qkv[::3, -dim:] *= 2 * FLOAT8_MAX  # the values of the last head saturate
    angles = torch.arange(POSITIONS, device=random.device)[:, None] * random.normal(dim // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = random.ints([(5 * token * token) % POSITIONS for token in range(TOKENS)])
    # Every third slot of the pages in falling order; every seventh token has none.
    pages = 3 * TOKENS // size + 3
    flat = [(pages - 1 - 3 * token // size) * size + 3 * token % size for token in range(TOKENS)]
    slots = random.ints([-1 if token % 7 == 3 else slot for token, slot in enumerate(flat)])
    weights = [random.normal(dim, dtype=shapes.dtype) if shapes.qk_norm else None for _ in range(2)]

    def run(tokens: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        caches = [random.nan(pages, size, kv_heads, dim, dtype=shapes.kv_dtype) for _ in range(2)]
        out = random.nan(len(qkv[tokens]), heads, dim, dtype=shapes.dtype)
        rope(
            qkv[tokens], cos_sin, positions[tokens], slots[tokens], *caches, num_heads=heads,
            num_kv_heads=kv_heads, q_weight=weights[0], k_weight=weights[1], eps=shapes.eps, out=out,
        )  # fmt: skip
        return out, caches[0], caches[1]

    def formula(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """q, k and v with every step in `dtype`."""
        parts = qkv.to(dtype).view(TOKENS, -1, dim).split((heads, kv_heads, kv_heads), dim=1)
        cos, sin = cos_sin[positions.long()].unsqueeze(1).to(dtype).chunk(2, dim=-1)
        rotated = []
        for part, weight in zip(parts, weights, strict=False):
            if weight is not None:
                scale = torch.rsqrt(part.square().mean(-1, keepdim=True) + shapes.eps)
                part = part * scale * weight.to(dtype)
            a, b = part.chunk(2, dim=-1)
            rotated.append(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1))
        return (*rotated, parts[2])

    q, k_cache, v_cache = run(slice(None))
    exact, baseline = formula(torch.float64), formula(shapes.dtype)
    yield close("q", q, exact[0], baseline[0])
    written = slots >= 0
    at = slots[written].long()
    k = k_cache.view(-1, kv_heads, dim)[at]
    yield close("k in its page", k, exact[1][written], to_cache(baseline[1][written], shapes.kv_dtype))
    expected = random.nan(*v_cache.shape, dtype=shapes.kv_dtype)
    expected.view(-1, kv_heads, dim)[at] = to_cache(baseline[2][written], shapes.kv_dtype)
    yield same("v in its page, and no other slot", v_cache, expected)
    # NaN where no token is, in all of k's elements that v left alone, too.
    yield same("k in no other slot", k_cache.float().isnan().int(), expected.float().isnan().int())
    if batch_invariant:
        for tokens in (slice(1), slice(4, 9), slice(-1, None)):
            alone, keys, _ = run(tokens)
            name = f"bits of {len(alone)} tokens"
            yield same(f"{name}: q", alone, q[tokens])
            own = slots[tokens][slots[tokens] >= 0].long()
            flat_keys = (each.view(-1, kv_heads, dim)[own] for each in (keys, k_cache))
            yield same(f"{name}: k", *flat_keys)
