"""The decode loop: forward -> sample -> budget step -> output ring, entirely on device arrays.

A step runs over row -> slot indices that the host writes when it launches a flight; tokens, positions and
budgets are read from and written to BatchState on the device. Nothing in a step depends on the result of an
earlier one having reached the host.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch

from elastic_decode.engine.batch_state import BatchState
from elastic_decode.engine.kv_cache import KVPages, PagePool
from elastic_decode.engine.output_ring import Flight, OutputRing
from elastic_decode.engine.scheduler import Chunk
from elastic_decode.engine.sequence import Sequence
from elastic_decode.kernels import registry
from elastic_decode.models.decoder import Decoder, ForwardBatch


class DecodeLoop:
    def __init__(
        self,
        decoder: Decoder,
        kv_pages: KVPages,
        pool: PagePool,
        batch: BatchState,
        ring: OutputRing,
        *,
        backend: str,
    ) -> None:
        self._decoder = decoder
        self._kv_pages = kv_pages
        self._pool = pool
        self._batch = batch
        self._ring = ring
        self._sample = registry.implementation("sample", backend)
        self._budget_step = registry.implementation("budget", backend, "budget_step")
        self._decode_inputs = registry.implementation("budget", backend, "decode_inputs")
        device = batch.device
        self._arange = torch.arange(batch.num_slots + 1, dtype=torch.int32, device=device)
        self._inputs = torch.zeros((4, batch.num_slots), dtype=torch.int32, device=device)
        self._logits = torch.empty((0, batch.vocab_size), dtype=torch.float32, device=device)
        self.steps = 0

    def prefill(self, chunks: SequenceOf[Chunk]) -> Flight | None:
        """Compute prompt chunks in one ragged pass; sequences whose prompt this completes draw their first
        token.
        """
        batch, device = self._batch, self._batch.device
        page_size = self._pool.page_size
        ids: list[int] = []
        positions: list[int] = []
        slot_mapping: list[int] = []
        query_start = [0]
        last_rows = []
        for chunk in chunks:
            sequence = chunk.sequence
            ids += sequence.known_ids(chunk.start, chunk.stop)
            positions += range(chunk.start, chunk.stop)
            pages = sequence.pages
            slot_mapping += [
                pages[p // page_size] * page_size + p % page_size for p in range(chunk.start, chunk.stop)
            ]
            query_start.append(len(ids))
            if chunk.completes:
                last_rows.append(len(ids) - 1)
        longest = max(chunk.stop for chunk in chunks)

        def upload(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        slots = upload([chunk.sequence.slot for chunk in chunks])
        forward_batch = ForwardBatch(
            positions=upload(positions),
            slot_mapping=upload(slot_mapping),
            page_table=batch.page_table[:, : self._pool.pages_for(longest)].index_select(0, slots),
            seq_lens=upload([chunk.stop for chunk in chunks]),
            query_start=upload(query_start),
        )
        hidden = self._decoder.forward(
            upload(ids),
            forward_batch,
            self._kv_pages.layers,
            rows=upload(last_rows) if last_rows else self._arange[:0],
        )
        if not last_rows:
            return None
        sequences = [chunk.sequence for chunk in chunks if chunk.completes]
        flight = Flight(sequences, self._ring.launched, 1)
        self._draw(
            hidden,
            upload([sequence.slot for sequence in sequences]),
            upload([chunk.stop for chunk in chunks if chunk.completes]),
        )
        return flight

    def decode(self, sequences: list[Sequence], steps: int) -> Flight:
        """Launch `steps` decode steps over the rows of `sequences`."""
        batch = self._batch
        slots = torch.tensor(
            [sequence.slot for sequence in sequences], dtype=torch.int32, device=batch.device
        )
        longest = min(max(s.length for s in sequences) + steps, max(s.bound for s in sequences))
        page_table = batch.page_table[:, : self._pool.pages_for(longest)].index_select(0, slots)
        flight = Flight(sequences, self._ring.launched, steps)
        for _ in range(steps):
            self._step(slots, page_table)
        return flight

    def _step(self, slots: torch.Tensor, page_table: torch.Tensor) -> None:
        batch, rows = self._batch, len(slots)
        token, position, seq_len, slot_mapping = (column[:rows] for column in self._inputs)
        self._decode_inputs(
            batch.state, batch.page_table, slots, self._pool.page_size, token, position, seq_len, slot_mapping
        )
        forward_batch = ForwardBatch(
            positions=position,
            slot_mapping=slot_mapping,
            page_table=page_table,
            seq_lens=seq_len,
            query_start=self._arange[: rows + 1],
        )
        hidden = self._decoder.forward(token, forward_batch, self._kv_pages.layers)
        self._draw(hidden, slots, seq_len)
        self.steps += 1

    def _logits_buffer(self, rows: int) -> torch.Tensor:
        """float32 [rows, vocab_size], the same memory every step: at a large vocabulary a new one costs page
        faults.
        """
        if len(self._logits) < rows:
            self._logits = torch.empty(
                (rows, self._batch.vocab_size), dtype=torch.float32, device=self._batch.device
            )
        return self._logits[:rows]

    def _draw(self, hidden: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Hidden states [R, H] of rows `slots` -> a token each, through the budget machine, into the ring.

        positions int32 [R]: where the drawn tokens will stand.
        """
        batch, ring = self._batch, self._ring
        logits = self._decoder.logits(hidden, out=self._logits_buffer(len(slots)))
        sampled = self._sample(logits, slots, positions, batch.table)
        self._budget_step(
            batch.state,
            batch.programs,
            batch.automata,
            slots,
            sampled.token,
            logits,
            sampled.lse,
            sampled.sampling_logprob,
            batch.table.temperature,
            ring.tokens,
            ring.flags,
            ring.logprobs,
            ring.sampling_logprobs,
            ring.index,
        )
        if batch.counts_tokens:
            emitted = ring.flags.index_select(0, ring.index)[0, : len(slots)] & 1
            batch.count_tokens(slots, emitted)
        ring.advance()
