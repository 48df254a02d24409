"""Paged attention with a gradient: of whole sequences to themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

# Sequences are padded to a common length for attention's gradient; of a group's positions at least this
# share is real.
_DENSE = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Where the tokens of whole sequences, laid end to end, are; and where their keys and values.

    first_pages: each sequence's first page; its others follow. slots int64 [T]: page * page_size + offset of
    each token. groups: sequences of about equal length, padded to the longest: (index int64 [B, L] of each
    token, the sequence's last where there is none; real bool [B, L]).
    """

    lengths: tuple[int, ...]
    page_size: int
    first_pages: tuple[int, ...]
    slots: torch.Tensor
    groups: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @classmethod
    def of(cls, lengths: Sequence[int], page_size: int, device: torch.device) -> Sequences:
        pages = [-(-length // page_size) for length in lengths]
        starts, first_pages = ([0, *accumulate(counts)][:-1] for counts in (lengths, pages))
        per_sequence = torch.tensor([*starts, *first_pages, *lengths], device=device).view(3, -1)
        start, first, length = per_sequence
        behind = (first * page_size - start).repeat_interleave(length, output_size=sum(lengths))
        groups = []
        for group in _similar(lengths):
            width = torch.arange(lengths[group[0]], device=device)
            at = torch.tensor(group, device=device)
            own = length[at].unsqueeze(1)
            groups.append((start[at].unsqueeze(1) + torch.minimum(width, own - 1), width < own))
        return cls(
            lengths=tuple(lengths),
            page_size=page_size,
            first_pages=tuple(first_pages),
            slots=behind + torch.arange(sum(lengths), device=device),
            groups=tuple(groups),
        )

    @property
    def pages(self) -> int:
        return self.first_pages[-1] - (-self.lengths[-1] // self.page_size)


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Which sequences are padded together, the longest of each group first."""
    groups: list[list[int]] = []
    held = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or held + lengths[i] < _DENSE * lengths[groups[-1][0]] * (len(groups[-1]) + 1):
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += lengths[i]
    return groups


def paged_attention(
    kernel: Callable[..., torch.Tensor],
    sequences: Sequences,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    shared: object = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of whole sequences to themselves; its gradient is that of PyTorch's own attention, which is
    made again for it.
    """
    rows = {"page_table": page_table, "seq_lens": seq_lens, "query_start": query_start}
    run = partial(kernel, **rows, scale=scale, window=window)
    result: torch.Tensor = _Attention.apply(run, sequences, q, k_cache, v_cache, scale, window)
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., torch.Tensor],
        sequences: Sequences,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k_cache, v_cache)
        ctx.sequences, ctx.scale, ctx.window = sequences, scale, window
        return run(q, k_cache, v_cache)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k_cache, v_cache = ctx.saved_tensors
        keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
        to_q = torch.empty_like(q)
        # Slots between the sequences hold nothing, but are read back with the rest.
        to_keys, to_values = torch.zeros_like(keys), torch.zeros_like(values)
        for index, real in ctx.sequences.groups:
            lie = ctx.sequences.slots[index]
            grads = _attention_grads(
                q[index],
                keys[lie],
                values[lie],
                grad[index].masked_fill_(~real[:, :, None, None], 0),
                scale=ctx.scale,
                window=ctx.window,
            )
            index, lie = index[real], lie[real]
            for target, at, part in zip((to_q, to_keys, to_values), (index, lie, lie), grads, strict=True):
                target[at] = part[real]
        shape = k_cache.shape
        return None, None, to_q, to_keys.view(shape), to_values.view(shape), None, None


def _attention_grads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    *,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, ...]:
    """q, grad [B, L, Hq, D] and k, v [B, L, Hkv, D] -> the gradients of q, k, v.

    Padding is at the end, where no query of a sequence sees it, and its own queries have gradient 0.
    """
    q, k, v = (each.transpose(1, 2).requires_grad_() for each in (q, k, v))
    mask = None
    length = q.shape[2]
    if window is not None and window < length:
        at = torch.arange(length, device=q.device)
        behind = at[:, None] - at
        mask = (behind >= 0) & (behind < window)
    with torch.enable_grad():
        attended = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        grads = torch.autograd.grad(attended, (q, k, v), grad.transpose(1, 2))
    return tuple(each.transpose(1, 2) for each in grads)
