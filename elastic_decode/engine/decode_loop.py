"""The decode loop: inputs -> forward -> draw, a step at a time, entirely on device arrays.

A step runs over row -> slot indices that the host writes when it launches a flight; tokens, positions and
budgets are read from and written to BatchState on the device. Nothing in a step depends on the result of an
earlier one having reached the host.

Where the device records graphs, a step is recorded once for each shape (rows and page-table width, rounded
up) and replayed; rows past the flight's own idle. Elsewhere a step is as large as its flight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import partial

import torch

from elastic_decode.engine.batch_state import BatchState
from elastic_decode.engine.device import Device, Work
from elastic_decode.engine.kv_cache import KVPages, PagePool
from elastic_decode.engine.output_ring import Flight, OutputRing
from elastic_decode.engine.prefix_groups import PrefixGroups, group_by_prefix
from elastic_decode.engine.scheduler import Chunk
from elastic_decode.engine.sequence import Sequence
from elastic_decode.kernels import registry
from elastic_decode.kernels.draw import Machine
from elastic_decode.kernels.paged_attention import SharedPrefixes
from elastic_decode.kernels.sample import SamplingTable
from elastic_decode.models.decoder import Decoder, ForwardBatch

SHORTEST = 512  # positions of the narrowest page table a step is recorded for; the others double


MOST_RECORDED = 512  # steps; past that the one unused for longest goes. warmup() of 256 rows records fewer


@dataclass(slots=True)
class StepInputs:
    """The tensors of one shape of step: what the host writes for a flight, and what each step overwrites."""

    slots: torch.Tensor  # int32 [R]; -1 idles
    page_table: torch.Tensor  # int32 [R, width]
    shared: SharedPrefixes | None
    token: torch.Tensor  # int32 [R], as the other three: decode_inputs
    position: torch.Tensor
    seq_len: torch.Tensor
    slot_mapping: torch.Tensor
    logits: torch.Tensor  # float32 [R, vocab_size]


@dataclass(slots=True)
class _Recorded:
    inputs: StepInputs
    step: Work
    written: object = None  # what the host wrote into `inputs` last


@dataclass(slots=True)
class Recordings:
    """Recorded steps by shape and sampling options, all of one BatchState.version."""

    version: int = 0
    steps: dict[tuple[object, ...], _Recorded] = field(default_factory=dict)


class DecodeLoop:
    def __init__(
        self,
        decoder: Decoder,
        kv_pages: KVPages,
        pool: PagePool,
        batch: BatchState,
        ring: OutputRing,
        device: Device,
        *,
        backends: Mapping[str, str],
    ) -> None:
        self._decoder = decoder
        self._kv_pages = kv_pages
        self._pool = pool
        self._batch = batch
        self._ring = ring
        self._device = device
        self._draw = registry.implementation("draw", backends["draw"])
        self._decode_inputs = registry.implementation("budget", backends["budget"], "decode_inputs")
        self._groups_prefixes = backends["paged_attention"] == "triton"
        on, slots = device.device, batch.num_slots
        self._arange = torch.arange(slots + 1, dtype=torch.int32, device=on)
        self._inputs = torch.zeros((4, slots), dtype=torch.int32, device=on)
        # The same memory every step: recorded steps name it, and at a large vocabulary a new one costs page
        # faults.
        self._logits = torch.empty((slots, batch.vocab_size), dtype=torch.float32, device=on)
        self._inputs_of: dict[int, StepInputs] = {}  # by rows, where steps are not recorded
        self._recordings = Recordings()
        self.steps = 0

    def prefill(self, chunks: SequenceOf[Chunk]) -> Flight | None:
        """Compute prompt chunks in one ragged pass; sequences whose prompt this completes draw their first
        token.
        """
        batch, upload = self._batch, self._device.upload
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
        width = self._pool.pages_for(max(chunk.stop for chunk in chunks))
        batch.flush()
        slots = upload([chunk.sequence.slot for chunk in chunks])
        input_ids, rows = upload(ids), upload(last_rows)
        forward_batch = ForwardBatch(
            positions=upload(positions),
            slot_mapping=upload(slot_mapping),
            page_table=batch.page_table[:0],  # the rows of `slots`, taken when they are there
            seq_lens=upload([chunk.stop for chunk in chunks]),
            query_start=upload(query_start),
        )
        complete = [chunk for chunk in chunks if chunk.completes]
        draw_slots = upload([chunk.sequence.slot for chunk in complete])
        draw_positions = upload([chunk.stop for chunk in complete])
        table, machine = batch.table, batch.machine

        def work() -> None:
            forward_batch.page_table = batch.page_table[:, :width].index_select(0, slots)
            hidden = self._decoder.forward(input_ids, forward_batch, self._kv_pages.layers, rows=rows)
            if complete:
                logits = self._decoder.logits(hidden, out=self._logits[: len(complete)])
                self._draw(logits, draw_slots, draw_positions, table, machine, self._ring.tensors)

        if not complete:
            self._device.launch(work)
            return None
        self._ring.begin()
        self._device.launch(work)
        for chunk in complete:
            chunk.sequence.draws += 1
        return self._ring.end([chunk.sequence for chunk in complete], 1)

    def decode(self, sequences: list[Sequence], steps: int) -> Flight:
        """Launch `steps` decode steps over the rows of `sequences`, in an order of its own."""
        groups = group_by_prefix(sequences, self._pool.page_size) if self._groups_prefixes else None
        if groups is not None:
            sequences = groups.sequences
        longest = max(min(s.num_known + s.draws + steps, s.bound) for s in sequences)
        self._batch.flush()
        step = self._prepare(sequences, longest, groups)
        self._ring.begin()
        for _ in range(steps):
            step()
        self.steps += steps
        for sequence in sequences:
            sequence.draws += steps
        return self._ring.end(sequences, steps)

    def release(self) -> None:
        """Let go of KV pages and recorded steps; everything launched has been done. Nothing may be launched
        before `take`.
        """
        self._recordings.steps.clear()
        self._inputs_of.clear()
        self._kv_pages.release()

    def take(self) -> None:
        """Allocate KV pages again; steps are recorded again as they are met."""
        self._kv_pages.take()

    def record_all(self) -> None:
        """Record the steps of every shape, for a device that records them: nothing is decoded."""
        if not self._device.graphs:
            return
        self._batch.flush()
        for rows in _buckets(_rows_bucket, self._batch.num_slots):
            for width in _buckets(self._width_bucket, self._batch.page_table.shape[1]):
                for shared in (False, True) if self._groups_prefixes else (False,):
                    self._recorded(rows, width, shared)

    def _prepare(self, sequences: list[Sequence], longest: int, groups: PrefixGroups | None) -> Work:
        """What launches one step over `sequences`, whose slots and pages are on their way to the device."""
        batch, device = self._batch, self._device
        rows, width = len(sequences), self._pool.pages_for(longest)
        slots = [sequence.slot for sequence in sequences]
        if not device.graphs:
            inputs = self._inputs_of.get(rows)
            if inputs is None:
                inputs = self._inputs_of[rows] = self._new_inputs(self._arange[:rows], None)
            shared = None if groups is None else SharedPrefixes(*map(device.upload, groups.rows(rows)))
            device.launch(partial(self._begin, inputs, device.upload(slots), width, shared))
            work = partial(self._step, inputs, batch.table, batch.machine)
            return partial(device.launch, work)
        rows, width = (
            _rows_bucket(rows, batch.num_slots),
            self._width_bucket(width, batch.page_table.shape[1]),
        )
        recorded = self._recorded(rows, width, groups is not None)
        step = partial(device.replay, recorded.step)
        wanted = (slots, None if groups is None else groups.rows(rows), batch.admissions)
        if recorded.written == wanted:  # the same rows as last time, and their pages
            return step
        recorded.written = wanted
        fresh = device.upload(slots + [-1] * (rows - len(slots)))
        fresh_groups = () if groups is None else tuple(map(device.upload, groups.rows(rows)))

        def refresh() -> None:
            inputs = recorded.inputs
            inputs.slots.copy_(fresh)
            torch.index_select(batch.page_table[:, :width], 0, fresh.clamp(min=0), out=inputs.page_table)
            for target, source in zip(inputs.shared or (), fresh_groups, strict=True):
                target.copy_(source)

        device.launch(refresh)
        return step

    def _begin(
        self, inputs: StepInputs, slots: torch.Tensor, width: int, shared: SharedPrefixes | None
    ) -> None:
        """A flight's own tensors take the places of the last one's of as many rows."""
        inputs.slots, inputs.shared = slots, shared
        inputs.page_table = self._batch.page_table[:, :width].index_select(0, slots)

    def _recorded(self, rows: int, width: int, shared: bool) -> _Recorded:
        """The recorded step of this shape, recorded now if there is none that fits."""
        batch, device, held = self._batch, self._device, self._recordings
        if held.version != batch.version:
            held.steps.clear()
            held.version = batch.version
        key = (rows, width, shared, batch.options)
        found = held.steps.pop(key, None)
        if found is None:
            on = device.device
            groups = None
            if shared:
                # Nobody's: every row a group of its own.
                groups = SharedPrefixes(
                    self._arange[: rows + 1].clone(), torch.zeros(rows, dtype=torch.int32, device=on)
                )
            slots = torch.full((rows,), -1, dtype=torch.int32, device=on)
            inputs = self._new_inputs(slots, groups)
            inputs.page_table = torch.zeros((rows, width), dtype=torch.int32, device=on)
            step = device.record(partial(self._step, inputs, batch.table, batch.machine))
            found = _Recorded(inputs, step)
        held.steps[key] = found  # the last in order of use
        while len(held.steps) > MOST_RECORDED:
            del held.steps[next(iter(held.steps))]
        return found

    def _new_inputs(self, slots: torch.Tensor, shared: SharedPrefixes | None) -> StepInputs:
        rows = len(slots)
        token, position, seq_len, slot_mapping = (column[:rows] for column in self._inputs)
        return StepInputs(
            slots=slots,
            page_table=self._batch.page_table[:0],
            shared=shared,
            token=token,
            position=position,
            seq_len=seq_len,
            slot_mapping=slot_mapping,
            logits=self._logits[:rows],
        )

    def _step(self, inputs: StepInputs, table: SamplingTable, machine: Machine) -> None:
        """One decode step. Reads and writes device tensors only."""
        self._decode_inputs(
            machine.state,
            self._batch.page_table,
            inputs.slots,
            self._pool.page_size,
            inputs.token,
            inputs.position,
            inputs.seq_len,
            inputs.slot_mapping,
        )
        forward_batch = ForwardBatch(
            positions=inputs.position,
            slot_mapping=inputs.slot_mapping,
            page_table=inputs.page_table,
            seq_lens=inputs.seq_len,
            query_start=self._arange[: len(inputs.slots) + 1],
            shared=inputs.shared,
        )
        hidden = self._decoder.forward(inputs.token, forward_batch, self._kv_pages.layers)
        logits = self._decoder.logits(hidden, out=inputs.logits)
        self._draw(logits, inputs.slots, inputs.seq_len, table, machine, self._ring.tensors)

    def _width_bucket(self, width: int, most: int) -> int:
        bucket = self._pool.pages_for(SHORTEST)
        while bucket < width:
            bucket *= 2
        return min(bucket, most)


def _rows_bucket(rows: int, most: int) -> int:
    """1, 2, 4, 8, then multiples of 8 up to 64, of 16 up to 256, of 64 beyond."""
    if rows <= 8:
        bucket = 1 << (rows - 1).bit_length()
    else:
        step = 8 if rows <= 64 else 16 if rows <= 256 else 64
        bucket = -(-rows // step) * step
    return min(bucket, most)


def _buckets(bucket: Callable[[int, int], int], most: int) -> Iterator[int]:
    """Every value of `bucket` up to `most`."""
    value = 0
    while value < most:
        value = bucket(value + 1, most)
        yield value
