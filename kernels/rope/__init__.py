"""Rotary position embedding (Su et al., arXiv 2104.09864), and the writing of keys and values into pages."""

import torch

from ..checks import check_tensor
from ..dtypes import CODES
from ..registry import default_backend, implementation

_DTYPES = {"cpu": (torch.float32, torch.bfloat16)}
_CACHE_DTYPES = (*CODES, torch.float8_e4m3fn)
_DEVICES = {"cpu": torch.device("cpu")}


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
    backend: str = "auto",
) -> torch.Tensor:
    """Splits qkv into heads, rotates q and k to their positions, writes k and v into the cache; returns q
    [T, Hq, D].

    qkv [T, (Hq + 2 Hkv) D]: q, then k, then v, head by head; float32, bfloat16 or float16 (not float16 on
    the CPU kernels). cos_sin float32 [max_positions, D]: a row a position, D/2 cosines, then D/2 sines.
    positions int32 [T]. slot_mapping int32 [T]: page * page_size + offset; negative: that token writes no k
    and v. k_cache, v_cache [num_pages, page_size, Hkv, D], of one dtype, which need not be qkv's and may also
    be float8_e4m3fn (not on the CPU kernels): rounded to nearest even, without scales, beyond 448 to 448.
    q_weight, k_weight [D] of qkv's dtype: where given, each head of q or k is first RMS-normed with it and
    `eps` (as Qwen3 does). out [T, Hq, D] of qkv's dtype.

    The rotation pairs element i with i + D/2, as transformers (and GPT-NeoX) do:
    `(a, b) -> (a cos - b sin, b cos + a sin)`. Computed in float32, rounded once. Two tokens must not share
    a slot.

    Raises ValueError for shapes, strides, devices and (on the CPU) positions or slots out of range,
    TypeError for dtypes, RuntimeError for an absent backend.
    """
    if backend == "auto":
        backend = default_backend(qkv.device.type)
    dtypes = _DTYPES.get(backend, tuple(CODES))
    cache_dtypes = _DTYPES.get(backend, _CACHE_DTYPES)
    device = qkv.device
    check_tensor("cos_sin", cos_sin, (None, None), torch.float32, device)
    head_dim = cos_sin.shape[1]
    if head_dim % 2:
        raise ValueError(f"cos_sin must have an even number of columns, got {head_dim}")
    if num_heads < 1 or num_kv_heads < 1:
        raise ValueError(f"num_heads and num_kv_heads must be positive, got {num_heads} and {num_kv_heads}")
    check_tensor("qkv", qkv, (None, (num_heads + 2 * num_kv_heads) * head_dim), dtypes, _DEVICES.get(backend))
    tokens = qkv.shape[0]
    check_tensor("positions", positions, (tokens,), torch.int32, device)
    check_tensor("slot_mapping", slot_mapping, (tokens,), torch.int32, device)
    check_tensor("k_cache", k_cache, (None, None, num_kv_heads, head_dim), cache_dtypes, device)
    check_tensor("v_cache", v_cache, k_cache.shape, k_cache.dtype, device)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_tensor(name, weight, (head_dim,), qkv.dtype, device)
    if out is not None:
        check_tensor("out", out, (tokens, num_heads, head_dim), qkv.dtype, device)
    if torch.compiler.is_compiling():
        result = _rope(
            qkv,
            cos_sin,
            positions,
            slot_mapping,
            k_cache,
            v_cache,
            num_heads,
            num_kv_heads,
            q_weight,
            k_weight,
            eps,
            backend,
        )
        return result if out is None else out.copy_(result)
    if device.type == "cpu" and tokens:
        _check_range("positions", positions, 0, cos_sin.shape[0])
        _check_range("slot_mapping", slot_mapping, None, k_cache.shape[0] * k_cache.shape[1])
    return implementation("rope", backend)(
        qkv,
        cos_sin,
        positions,
        slot_mapping,
        k_cache,
        v_cache,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=eps,
        out=out,
    )


def _check_range(name: str, values: torch.Tensor, low: int | None, high: int) -> None:
    smallest, largest = (int(value) for value in values.aminmax())
    if largest >= high or (low is not None and smallest < low):
        raise ValueError(f"{name} holds values from {smallest} to {largest}, but they must be below {high}")


@torch.library.custom_op("elastic_decode::rope", mutates_args=("k_cache", "v_cache"))
def _rope(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    backend: str,
) -> torch.Tensor:
    return implementation("rope", backend)(
        qkv,
        cos_sin,
        positions,
        slot_mapping,
        k_cache,
        v_cache,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=eps,
    )


@_rope.register_fake
def _(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    backend: str,
) -> torch.Tensor:
    return qkv.new_empty((qkv.shape[0], num_heads, cos_sin.shape[1]))
