"""Paged attention with a gradient: of whole sequences to themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

# Sequences are padded to a common length for attention's gradient; of a group's positions at least this
# share is real.
_DENSE = 0.75


class Padded(NamedTuple):
    """B sequences of about equal length, padded to L positions; N tokens."""

    tokens: torch.Tensor  # int64 [B, L]: of each position, the sequence's last where there is none
    padding: torch.Tensor  # bool [B, L, 1, 1]
    positions: torch.Tensor  # int64 [N]: which of the B * L positions are not padding

    def take(self, source: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Rows of `source` at `at[tokens]`, [B, L, ...]."""
        return source.index_select(0, at[self.tokens].flatten()).unflatten(0, self.tokens.shape)

    def put(self, target: torch.Tensor, at: torch.Tensor, values: torch.Tensor) -> None:
        """The inverse of `take`, without the padding."""
        tokens = self.tokens.flatten()[self.positions]
        target.index_copy_(0, at[tokens], values.flatten(0, 1).index_select(0, self.positions))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Where the tokens of whole sequences, laid end to end, are; and where their keys and values.

    first_pages: each sequence's first page; its others follow. slots int64 [T]: page * page_size + offset of
    each token.
    """

    lengths: tuple[int, ...]
    page_size: int
    first_pages: tuple[int, ...]
    slots: torch.Tensor
    groups: tuple[Padded, ...]

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
            padding = width >= own
            groups.append(
                Padded(
                    tokens=start[at].unsqueeze(1) + torch.minimum(width, own - 1),
                    padding=padding[:, :, None, None],
                    positions=(~padding).flatten().nonzero().flatten(),
                )
            )
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
        slots = ctx.sequences.slots
        itself = torch.arange(len(q), device=q.device)
        for group in ctx.sequences.groups:
            grads = _attention_grads(
                group.take(q, itself),
                group.take(keys, slots),
                group.take(values, slots),
                group.take(grad, itself).masked_fill_(group.padding, 0),
                scale=ctx.scale,
                window=ctx.window,
            )
            for target, at, part in zip(
                (to_q, to_keys, to_values), (itself, slots, slots), grads, strict=True
            ):
                group.put(target, at, part)
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
    # On the CPU PyTorch's derivative is far slower in bfloat16 than in float32, and coarser.
    dtype, compute = (
        q.dtype,
        torch.float32 if q.device.type == "cpu" and q.dtype != torch.float64 else q.dtype,
    )
    q, k, v = (each.transpose(1, 2).to(compute).requires_grad_() for each in (q, k, v))
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
        grads = torch.autograd.grad(attended, (q, k, v), grad.transpose(1, 2).to(compute))
    return tuple(each.transpose(1, 2).to(dtype) for each in grads)
