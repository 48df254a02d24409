"""The decoder: embeddings to logits over paged key/value caches, for every family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch.nn.functional import embedding

from elastic_decode.kernels import registry
from elastic_decode.kernels.paged_attention import SharedPrefixes
from elastic_decode.model_config import ModelConfig
from elastic_decode.models.layout import Weights
from elastic_decode.models.rope import cos_sin_table


@dataclass(slots=True)
class ForwardBatch:
    """Where a batch of T tokens of R rows stands; all int32 on the model's device.

    positions [T]; slot_mapping [T]: page * page_size + offset for each token's keys and values, -1 writes
    none; page_table [R, max_pages]; seq_lens [R]: keys a row has after this call, 0 = idle; query_start [R +
    1]: the tokens of row r are query_start[r] : query_start[r + 1]. shared: prefixes that rows of a decode
    step have in common.
    """

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start: torch.Tensor
    shared: SharedPrefixes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Operators:
    """What a forward pass is made of, each with the contract of the op of its name in `kernels`."""

    linear: Callable[..., torch.Tensor]
    rms_norm: Callable[..., torch.Tensor]
    rope: Callable[..., torch.Tensor]
    paged_attention: Callable[..., torch.Tensor]
    silu_mul: Callable[..., torch.Tensor]

    @classmethod
    def of(cls, backend: str | Mapping[str, str]) -> Operators:
        """The kernels themselves: of one backend, or of each op's own."""
        return cls(**{each.name: registry.implementation(each.name, backend) for each in fields(cls)})


class _Buffers(NamedTuple):
    """What the operators of a forward pass write; every layer writes the same ones again."""

    normed: torch.Tensor
    qkv: torch.Tensor
    query: torch.Tensor
    attended: torch.Tensor
    attended_rows: torch.Tensor  # the same memory as [T, heads * head_dim]
    projected: torch.Tensor
    gate_up: torch.Tensor
    activated: torch.Tensor


class Decoder:
    """Runs `weights` on the kernels. Checks nothing: the engine builds well-formed batches."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        backend: str | Mapping[str, str] = "cpu",
        max_positions: int,
        operators: Operators | None = None,
        cos_sin: torch.Tensor | None = None,
    ) -> None:
        """max_positions: rows of the rotary table; positions stay below. backend: of each op (what
        `registry.resolve` gives), or one that has them all.

        operators: used in place of the kernels of `backend`; they leave `out` alone and return new tensors,
        so that autograd may keep them (`forward_with_grad`). cos_sin: a table made for an equal decoder.
        """
        self.config = config
        self.weights = weights
        self.max_positions = max_positions
        if cos_sin is None:
            cos_sin = cos_sin_table(config.rope, config.head_dim, max_positions, weights.device)
        self.cos_sin = cos_sin
        self._writes_buffers = operators is None
        operators = operators or Operators.of(backend)
        self._linear = operators.linear
        self._rms_norm = operators.rms_norm
        self._rope = operators.rope
        self._attention = operators.paged_attention
        self._silu_mul = operators.silu_mul
        next_norms = [layer.input_norm for layer in weights.layers[1:]]
        self._plan = list(zip(weights.layers, config.sliding_window, [*next_norms, None], strict=True))
        self._reuse = (
            weights.device.type == "cpu"
        )  # on a GPU the allocator does, also within a captured graph
        self._largest: _Buffers | None = None
        self._sliced: dict[int, _Buffers] = {}

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        batch: ForwardBatch,
        kv_pages: Sequence[tuple[torch.Tensor, torch.Tensor]],
        *,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm, [T, hidden] or [len(rows), hidden], in the weights' dtype.

        input_ids: int32 [T]. kv_pages: a (keys, values) pair a layer, each [pages, page_size, kv heads,
        head_dim], written at `slot_mapping`. rows: int32 indices of the tokens whose hidden states are
        wanted; None is all. The result is the caller's own; nothing here keeps it.
        """
        return self.forward_with_grad(input_ids, batch, kv_pages, rows=rows)

    def forward_with_grad(
        self,
        input_ids: torch.Tensor,
        batch: ForwardBatch,
        kv_pages: Sequence[tuple[torch.Tensor, torch.Tensor]],
        *,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`forward` as autograd sees it: differentiable where the operators and the weights are."""
        config, linear, norm, silu_mul = self.config, self._linear, self._rms_norm, self._silu_mul
        rope, attention, cos_sin = self._rope, self._attention, self.cos_sin
        heads, kv_heads, eps = config.num_heads, config.num_kv_heads, config.rms_norm_eps
        scale = config.head_dim**-0.5
        positions, slot_mapping = batch.positions, batch.slot_mapping
        page_table, seq_lens, query_start = batch.page_table, batch.seq_lens, batch.query_start
        normed, qkv, query, attended, attended_rows, projected, gate_up, activated = self._buffers(
            len(input_ids)
        )
        residual = embedding(input_ids, self.weights.embed)
        normed = norm(residual, self.weights.layers[0].input_norm, eps, out=normed)
        for (layer, window, next_norm), (keys, values) in zip(self._plan, kv_pages, strict=True):
            qkv = linear(normed, layer.qkv, layer.qkv_bias, out=qkv)
            query = rope(
                qkv,
                cos_sin,
                positions,
                slot_mapping,
                keys,
                values,
                num_heads=heads,
                num_kv_heads=kv_heads,
                q_weight=layer.q_norm,
                k_weight=layer.k_norm,
                eps=eps,
                out=query,
            )
            attended = attention(
                query,
                keys,
                values,
                page_table,
                seq_lens,
                query_start,
                scale=scale,
                window=window,
                shared=batch.shared,
                out=attended,
            )
            if not self._writes_buffers:
                attended_rows = attended.flatten(1)
            if next_norm is None and rows is not None:
                # Past the last attention a token needs no other token: only the wanted ones go on.
                attended_rows, residual = attended_rows.index_select(0, rows), residual.index_select(0, rows)
                normed, _, _, _, _, projected, gate_up, activated = self._buffers(len(rows))
            projected = linear(attended_rows, layer.o, layer.o_bias, out=projected)
            normed = norm(projected, layer.post_norm, eps, residual=residual, out=normed)
            gate_up = linear(normed, layer.gate_up, layer.gate_up_bias, out=gate_up)
            activated = silu_mul(gate_up, out=activated)
            projected = linear(activated, layer.down, layer.down_bias, out=projected)
            if next_norm is not None:
                normed = norm(projected, next_norm, eps, residual=residual, out=normed)
        return norm(projected, self.weights.final_norm, eps, residual=residual)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [R, vocab_size] of `hidden` [R, hidden] as `forward` returns it; into `out` where given."""
        return self._linear(hidden, self.weights.lm_head, out=out, out_dtype=torch.float32)

    def _buffers(self, tokens: int) -> _Buffers:
        """Buffers of `tokens` rows: on the CPU the first rows of the largest so far, else new ones; nothing
        for operators that write none.
        """
        if not self._writes_buffers:
            return _Buffers(*[self.weights.embed.new_empty(0)] * len(_Buffers._fields))
        if not self._reuse:
            return self._allocate(tokens)
        found = self._sliced.get(tokens)
        if found is None:
            if self._largest is None or tokens > len(self._largest.normed):
                self._largest = self._allocate(tokens)
                self._sliced.clear()
            found = self._sliced[tokens] = _Buffers(*(buffer[:tokens] for buffer in self._largest))
        return found

    def _allocate(self, tokens: int) -> _Buffers:
        c, embed = self.config, self.weights.embed
        attended = embed.new_empty(tokens, c.num_heads, c.head_dim)
        return _Buffers(
            normed=embed.new_empty(tokens, c.hidden_size),
            qkv=embed.new_empty(tokens, c.qkv_rows),
            query=torch.empty_like(attended),
            attended=attended,
            attended_rows=attended.view(tokens, c.num_heads * c.head_dim),
            projected=embed.new_empty(tokens, c.hidden_size),
            gate_up=embed.new_empty(tokens, 2 * c.intermediate_size),
            activated=embed.new_empty(tokens, c.intermediate_size),
        )
