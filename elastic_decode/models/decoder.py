"""The decoder: embeddings to logits over paged key/value caches, for every family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding

from elastic_decode.kernels import registry
from elastic_decode.model_config import ModelConfig
from elastic_decode.models.layout import Weights
from elastic_decode.models.rope import cos_sin_table


@dataclass(slots=True)
class ForwardBatch:
    """Where a batch of T tokens of R rows stands; all int32 on the model's device.

    positions [T]; slot_mapping [T]: page * page_size + offset for each token's keys and values, -1 writes
    none; page_table [R, max_pages]; seq_lens [R]: keys a row has after this call, 0 = idle; query_start [R +
    1]: the tokens of row r are query_start[r] : query_start[r + 1].
    """

    positions: torch.Tensor
    slot_mapping: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start: torch.Tensor


class Decoder:
    """Runs `weights` on the kernels of one backend. Checks nothing: the engine builds well-formed batches."""

    def __init__(
        self, config: ModelConfig, weights: Weights, *, backend: str = "cpu", max_positions: int
    ) -> None:
        """max_positions: rows of the rotary table; positions stay below. backend: one of the registry's."""
        self.config = config
        self.weights = weights
        self.max_positions = max_positions
        self.cos_sin = cos_sin_table(config.rope, config.head_dim, max_positions, weights.device)
        self._linear = registry.implementation("linear", backend)
        self._rms_norm = registry.implementation("rms_norm", backend)
        self._rope = registry.implementation("rope", backend)
        self._attention = registry.implementation("paged_attention", backend)
        self._silu_mul = registry.implementation("silu_mul", backend)

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
        wanted; None is all.
        """
        config, linear, norm = self.config, self._linear, self._rms_norm
        heads, kv_heads, eps = config.num_heads, config.num_kv_heads, config.rms_norm_eps
        scale = config.head_dim**-0.5
        positions, slot_mapping = batch.positions, batch.slot_mapping
        last = config.num_layers - 1
        residual = embedding(input_ids, self.weights.embed)
        hidden = norm(residual, self.weights.layers[0].input_norm, eps)
        for index, layer in enumerate(self.weights.layers):
            keys, values = kv_pages[index]
            if index:
                hidden = norm(hidden, layer.input_norm, eps, residual=residual)
            query = self._rope(
                linear(hidden, layer.qkv, layer.qkv_bias),
                self.cos_sin,
                positions,
                slot_mapping,
                keys,
                values,
                num_heads=heads,
                num_kv_heads=kv_heads,
                q_weight=layer.q_norm,
                k_weight=layer.k_norm,
                eps=eps,
            )
            attended = self._attention(
                query,
                keys,
                values,
                batch.page_table,
                batch.seq_lens,
                batch.query_start,
                scale=scale,
                window=config.sliding_window[index],
            ).flatten(1)
            if index == last and rows is not None:
                # Past the last attention a token needs no other token: only the wanted ones go on.
                attended, residual = attended.index_select(0, rows), residual.index_select(0, rows)
            hidden = linear(attended, layer.o, layer.o_bias)
            hidden = norm(hidden, layer.post_norm, eps, residual=residual)
            hidden = self._silu_mul(linear(hidden, layer.gate_up, layer.gate_up_bias))
            hidden = linear(hidden, layer.down, layer.down_bias)
        return norm(hidden, self.weights.final_norm, eps, residual=residual)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [R, vocab_size] of `hidden` [R, hidden] as `forward` returns it."""
        return self._linear(hidden, self.weights.lm_head, out_dtype=torch.float32)
