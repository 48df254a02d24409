"""The decoder's operators with gradients: values by the engine's own kernels, derivatives by formula.

Each takes and returns what its kernel does (`residual`, keys and values are changed in place), but leaves
`out` alone: autograd keeps what it returned. Whatever a kernel computes is what a rollout computed, bit for
bit; derivatives need no such thing and are PyTorch's matrix products and elementwise operations, in float32
where the formula is not linear (float64 where the tensors are, for checks by finite differences).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from elastic_decode.models.decoder import Operators
from elastic_decode.rl.attention_gradient import Sequences, paged_attention

Kernel = Callable[..., torch.Tensor]
Grad = torch.Tensor | None


def operators(backend: str | Mapping[str, str], sequences: Sequences) -> Operators:
    """Differentiable operators for one pack of `sequences`, each of whose rows is a whole sequence."""
    kernels = Operators.of(backend)
    return Operators(
        linear=partial(linear, kernels.linear),
        rms_norm=partial(rms_norm, kernels.rms_norm),
        rope=partial(rope, kernels.rope),
        paged_attention=partial(paged_attention, kernels.paged_attention, sequences),
        silu_mul=partial(silu_mul, kernels.silu_mul),
    )


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# ---- fused weights ----


def fused(buffer: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`buffer`, whose rows are those of `parts` one after the other: its gradient goes to them."""
    result: torch.Tensor = _Fused.apply(buffer, *parts)
    return result


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        ctx.rows = [len(part) for part in parts]
        return buffer.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Grad, ...]:
        return None, *grad.split(ctx.rows)


def low_rank(down: torch.Tensor, up: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Stands for `scale * up @ down` among the parts of `fused`: of its shape, without values of its own.

    With G the whole's gradient, that of up is scale G downᵀ, that of down scale upᵀ G.
    """
    result: torch.Tensor = _LowRank.apply(down, up, scale, dtype)
    return result


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, down: torch.Tensor, up: torch.Tensor, scale: float, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(down, up)
        ctx.scale = scale
        return up.new_zeros((), dtype=dtype).expand(len(up), down.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Grad, ...]:
        down, up = ctx.saved_tensors
        grad = grad.to(up.dtype).mul(ctx.scale)
        return up.T @ grad, grad @ down.T, None, None


# ---- linear ----


def linear(
    kernel: Kernel,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x Wᵀ + b, so dx = dy W, dW = dyᵀ x, db = the sum of dy over tokens."""
    result: torch.Tensor = _Linear.apply(kernel, x, weight, bias)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return kernel(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Grad, ...]:
        x, weight = ctx.saved_tensors
        _, to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            None,
            grad @ weight if to_x else None,
            grad.T @ x if to_weight else None,
            grad.sum(0) if to_bias else None,
        )


# ---- rms_norm ----


def rms_norm(
    kernel: Kernel,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = n w with n = s r, r = (mean s² + eps)^-1/2, s = x or residual + x.

    ds = r (dn - n mean(n dn)) with dn = dy w; dw = the sum of n dy over tokens.
    """
    if residual is None:
        result: torch.Tensor = _Norm.apply(kernel, x, weight, eps)
        return result
    normed, _ = _AddNorm.apply(kernel, x, weight, eps, residual)
    return normed


def _norm_grads(
    total: torch.Tensor, weight: torch.Tensor, eps: float, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the sum and of the weight, over the last dimension; in the dtype of `_wide`."""
    total, grad = _wide(total), _wide(grad)
    scale = torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + eps)
    normed = total * scale
    to_normed = grad * weight
    to_total = scale * (to_normed - normed * (normed * to_normed).mean(dim=-1, keepdim=True))
    return to_total, (normed * grad).flatten(0, -2).sum(0)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        # x is the first layer's residual, which is added to in place afterwards.
        ctx.save_for_backward(x.clone(), weight)
        ctx.eps = eps
        return kernel(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Grad, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight = _norm_grads(x, weight, ctx.eps, grad)
        return None, to_x.to(x.dtype), to_weight.to(weight.dtype), None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        residual: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed = kernel(x, weight, eps, residual=residual)
        ctx.mark_dirty(residual)
        ctx.save_for_backward(residual.clone(), weight)  # a copy: later norms add to it in place
        ctx.eps = eps
        return normed, residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, passed: torch.Tensor) -> tuple[Grad, ...]:
        total, weight = ctx.saved_tensors
        to_total, to_weight = _norm_grads(total, weight, ctx.eps, grad)
        to_sum = (to_total + passed).to(total.dtype)  # x and residual are added: both get it
        return None, to_sum, to_weight.to(weight.dtype), None, to_sum


# ---- rope ----


def rope(
    kernel: Kernel,
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
    """A rotation's gradient is rotated back. Every slot is >= 0; the caches are of qkv's dtype."""
    run = partial(kernel, num_heads=num_heads, num_kv_heads=num_kv_heads, eps=eps)
    query, _, _ = _Rope.apply(
        run, qkv, cos_sin, positions, slot_mapping, k_cache, v_cache, num_heads, q_weight, k_weight, eps
    )
    return query


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Kernel,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        num_heads: int,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query = run(
            qkv,
            cos_sin,
            positions,
            slot_mapping,
            k_cache,
            v_cache,
            q_weight=q_weight,
            k_weight=k_weight,
        )
        ctx.mark_dirty(k_cache, v_cache)
        kept = qkv if q_weight is not None or k_weight is not None else None
        ctx.save_for_backward(kept, cos_sin, positions, slot_mapping, q_weight, k_weight)
        ctx.num_heads, ctx.eps = num_heads, eps
        return query, k_cache, v_cache

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, to_query: torch.Tensor, to_keys: torch.Tensor, to_values: torch.Tensor
    ) -> tuple[Grad, ...]:
        qkv, cos_sin, positions, slots, q_weight, k_weight = ctx.saved_tensors
        to_keys, to_values = (each.flatten(0, 1).index_select(0, slots) for each in (to_keys, to_values))
        cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
        to_q, to_k = (_rotate_back(_wide(each), cos, sin) for each in (to_query, to_keys))
        to_q_weight = to_k_weight = None
        if qkv is not None:
            heads = qkv.view(len(qkv), -1, to_query.shape[-1])
            queries, keys = ctx.num_heads, to_keys.shape[1]
            if q_weight is not None:
                to_q, to_q_weight = _norm_grads(heads[:, :queries], q_weight, ctx.eps, to_q)
                to_q_weight = to_q_weight.to(q_weight.dtype)
            if k_weight is not None:
                own = heads[:, queries : queries + keys]
                to_k, to_k_weight = _norm_grads(own, k_weight, ctx.eps, to_k)
                to_k_weight = to_k_weight.to(k_weight.dtype)
        dtype = to_query.dtype
        to_qkv = torch.cat((to_q.to(dtype), to_k.to(dtype), to_values.to(dtype)), dim=1).flatten(1)
        # The caches' old values are overwritten where written, and read by nobody elsewhere.
        return None, to_qkv, None, None, None, None, None, None, to_q_weight, to_k_weight, None


def _rotate_back(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = heads.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


# ---- silu_mul ----


def silu_mul(kernel: Kernel, gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """y = g σ(g) u, so dg = dy u σ(g) (1 + g (1 - σ(g))), du = dy g σ(g)."""
    result: torch.Tensor = _SiluMul.apply(kernel, gate_up)
    return result


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        return kernel(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Grad, ...]:
        (gate_up,) = ctx.saved_tensors
        gate, up = _wide(gate_up).chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        to_gate, to_up = result.chunk(2, dim=-1)
        grad = _wide(grad)
        to_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        to_up.copy_(torch.nn.functional.silu(gate).mul_(grad))
        return None, result
