"""BatchState: everything a decode step reads and writes on the device, a row a slot.

The host writes a row once, when a sequence is admitted; from then on only the step does. What the host has to
say (a new row, "you are finished", "end your thinking") is collected and enqueued by `flush`, before the next
steps: in one upload for all rows, however many there are. A step depends on no host value that was not known
before it was launched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from elastic_decode.core import SamplingParams
from elastic_decode.engine.device import Device
from elastic_decode.kernels.budget.layout import PROGRAM_WORDS, STATE_WORDS, Finish, Header, State
from elastic_decode.kernels.draw import Machine
from elastic_decode.kernels.sample import SamplingTable, make_table

if TYPE_CHECKING:
    from elastic_decode.automata import CompiledProgram


@dataclass(slots=True)
class _Placed:
    offset: int
    size: int
    holders: int = 0
    last_use: int = 0


class AutomatonPool:
    """Automata in one flat int32 device tensor. Rows with the same delimiters share one; unused ones stay
    until room is needed.
    """

    def __init__(self, device: Device, capacity: int = 1 << 16) -> None:
        self._device = device
        self.tensor = torch.zeros(capacity, dtype=torch.int32, device=device.device)
        self.growths = 0
        self._placed: dict[object, _Placed] = {}
        self._clock = 0

    def hold(self, key: object, words: torch.Tensor) -> int:
        """The offset of the automaton `key`, placed if it is not there, and held until `release(key)`."""
        self._clock += 1
        placed = self._placed.get(key)
        if placed is None:
            placed = _Placed(offset=self._room(len(words)), size=len(words))
            source = self._device.upload(words.numpy())
            target = self.tensor[placed.offset : placed.offset + placed.size]
            self._device.launch(lambda: target.copy_(source))
            self._placed[key] = placed
        placed.holders += 1
        placed.last_use = self._clock
        return placed.offset

    def release(self, key: object) -> None:
        self._placed[key].holders -= 1

    def _room(self, size: int) -> int:
        while True:
            start = 0
            for placed in sorted(self._placed.values(), key=lambda p: p.offset):
                if placed.offset - start >= size:
                    return start
                start = placed.offset + placed.size
            if len(self.tensor) - start >= size:
                return start
            unused = [(p.last_use, key) for key, p in self._placed.items() if p.holders == 0]
            if unused:
                del self._placed[min(unused, key=lambda pair: pair[0])[1]]
                continue
            self._grow(start + size)

    def _grow(self, size: int) -> None:
        old = self.tensor
        grown = torch.zeros(max(2 * len(old), size), dtype=torch.int32, device=old.device)
        self._device.launch(lambda: grown[: len(old)].copy_(old))
        self.tensor = grown
        self.growths += 1


class _Columns:
    """Where a packed row holds what, in int32 words."""

    def __init__(self, max_pages: int) -> None:
        self.seed = slice(0, 2)  # first: an int64 in the place of two
        self.state = slice(self.seed.stop, self.seed.stop + STATE_WORDS)
        self.programs = slice(self.state.stop, self.state.stop + PROGRAM_WORDS)
        self.page_table = slice(self.programs.stop, self.programs.stop + max_pages)
        self.ints = slice(self.page_table.stop, self.page_table.stop + len(_INTS))
        self.floats = slice(self.ints.stop, self.ints.stop + len(_FLOATS))
        self.width = self.floats.stop + self.floats.stop % 2  # even, for the same reason


_INTS = ("top_k", "sample_index", "ban_until")
_FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")


class BatchState:
    """Device arrays of `num_slots` rows.

    state int32 [num_slots, STATE_WORDS], programs int32 [num_slots, PROGRAM_WORDS], page_table int32
    [num_slots, max_pages], automata int32 [pool], table: the sampling parameters
    (kernels.sample.SamplingTable).
    """

    def __init__(self, *, num_slots: int, max_pages: int, vocab_size: int, device: Device) -> None:
        self._device = device
        self.num_slots = num_slots
        self.vocab_size = vocab_size
        on = device.device
        self.state = torch.zeros((num_slots, STATE_WORDS), dtype=torch.int32, device=on)
        self.state[:, State.FINISH] = int(Finish.HOST)
        self.programs = torch.zeros((num_slots, PROGRAM_WORDS), dtype=torch.int32, device=on)
        self.page_table = torch.zeros((num_slots, max_pages), dtype=torch.int32, device=on)
        self._pool = AutomatonPool(device)
        self._columns = _Columns(max_pages)
        # Rows of two arrays, so that a sequence's parameters are written in two operations.
        self._ints = torch.zeros((len(_INTS), num_slots), dtype=torch.int32, device=on)
        self._floats = torch.ones((len(_FLOATS), num_slots), dtype=torch.float32, device=on)
        self._table = make_table(num_slots, device=on)._replace(
            **dict(zip(_INTS, self._ints, strict=True)), **dict(zip(_FLOATS, self._floats, strict=True))
        )
        self._growths = 0
        self._machine = Machine(self.state, self.programs, self._pool.tensor)
        self._shown: tuple[Any, ...] = (-1, (), None)  # what `table` was last made from, and the table
        self._automaton_of: dict[int, object] = {}
        self.admissions = (
            0  # how often a slot was given to a sequence: page-table rows change then, and only then
        )
        self._admitted: dict[int, np.ndarray] = {}  # packed rows to write
        self._finished: set[int] = set()
        self._ending: set[int] = set()
        self._penalised: set[int] = set()
        self._banned: set[int] = set()
        self._biased: set[int] = set()

    @property
    def machine(self) -> Machine:
        if self._machine.automata is not self._pool.tensor:
            self._machine = Machine(self.state, self.programs, self._pool.tensor)
        return self._machine

    @property
    def table(self) -> SamplingTable:
        """The parameters, without those that no row in use has: a step then spends nothing on them."""
        if self._shown[:2] == (self._growths, self.options):
            shown: SamplingTable = self._shown[2]
            return shown
        table = self._table
        if not self._banned:
            table = table._replace(ban_ids=table.ban_ids[:, :0])
        if not self._biased:
            table = table._replace(bias_ids=table.bias_ids[:, :0], bias_values=table.bias_values[:, :0])
        if not self._penalised:
            table = table._replace(output_counts=None, prompt_mask=None)
        self._shown = (self._growths, self.options, table)
        return table

    @property
    def options(self) -> tuple[bool, bool, bool]:
        """Which of bans, bias and penalties `table` holds: what a recorded step depends on."""
        return bool(self._banned), bool(self._biased), bool(self._penalised)

    @property
    def version(self) -> int:
        """Counts tensors replaced by larger ones: steps recorded before name the old ones."""
        return self._pool.growths + self._growths

    def admit(
        self,
        slot: int,
        *,
        program: CompiledProgram,
        state_row: np.ndarray,
        pages: Sequence[int],
        sampling: SamplingParams,
        seed: int,
        sample_index: int,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        ban_ids: Sequence[int],
    ) -> None:
        """Write a sequence's whole row. `output_ids` are tokens that count as output already (a branch's
        shared thought).
        """
        columns = self._columns
        offset = self._pool.hold(program.key, program.automaton)
        self._automaton_of[slot] = program.key
        row = np.zeros(columns.width, dtype=np.int32)
        state = row[columns.state]
        state[:] = state_row
        if state[State.FORCED_LEFT] > 0:  # so far relative to the automaton itself
            state[State.FORCED_AT] += offset
        row[columns.programs] = program.program_row.numpy()
        row[columns.programs][Header.AUTOMATON] = offset
        row[columns.page_table][: len(pages)] = pages
        row[columns.ints] = (sampling.top_k, sample_index, len(prompt_ids) + sampling.min_tokens)
        row[columns.floats].view(np.float32)[:] = (
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
        row[columns.seed].view(np.int64)[:] = seed
        self._admitted[slot] = row
        self.admissions += 1
        self._finished.discard(slot)
        self._write_bias(slot, sampling, ban_ids)
        self._write_counts(slot, sampling, prompt_ids, output_ids)

    def release(self, slot: int) -> None:
        """The row is nobody's: it idles in any step launched from now on."""
        self._admitted.pop(slot, None)
        self._ending.discard(slot)
        self._finished.add(slot)
        self._pool.release(self._automaton_of.pop(slot))
        for users in (self._penalised, self._banned, self._biased):
            users.discard(slot)

    def request_end(self, slot: int) -> None:
        """Ask the machine to end THINK before its next draw."""
        self._ending.add(slot)

    def flush(self) -> None:
        """Enqueue what was said since the last time."""
        upload, launch = self._device.upload, self._device.launch
        if self._admitted:
            slots = upload(list(self._admitted), np.int64)
            packed = upload(np.stack(list(self._admitted.values())))
            launch(lambda: self._scatter(slots, packed))
        for users, word, value in (
            (self._finished, State.FINISH, int(Finish.HOST)),
            (self._ending, State.END_REQUESTED, 1),
        ):
            if users:
                rows = upload(list(users), np.int64)
                launch(partial(self.state[:, word].index_fill_, 0, rows, value))
        self._admitted.clear()
        self._finished.clear()
        self._ending.clear()

    def _scatter(self, slots: torch.Tensor, packed: torch.Tensor) -> None:
        columns = self._columns
        self.state[slots] = packed[:, columns.state]
        self.programs[slots] = packed[:, columns.programs]
        self.page_table[slots] = packed[:, columns.page_table]
        self._ints[:, slots] = packed[:, columns.ints].T
        self._floats[:, slots] = packed[:, columns.floats].view(torch.float32).T
        self._table.seed[slots] = packed[:, columns.seed].view(torch.int64)[:, 0]

    def _write_bias(self, slot: int, sampling: SamplingParams, ban_ids: Sequence[int]) -> None:
        bias = sampling.logit_bias or {}
        bans = list(ban_ids) if sampling.min_tokens > 0 else []
        self._widen(len(bans), len(bias))
        upload, launch, table = self._device.upload, self._device.launch, self._table
        if bans:
            self._banned.add(slot)
            ban_row = upload(bans + [-1] * (table.ban_ids.shape[1] - len(bans)))
            launch(lambda: table.ban_ids[slot].copy_(ban_row))
        if bias:
            self._biased.add(slot)
            padding = table.bias_ids.shape[1] - len(bias)
            id_row = upload(list(bias) + [-1] * padding)
            values = np.array([*bias.values(), *[0.0] * padding], dtype=np.float32)
            value_row = upload(values.view(np.int32))
            launch(lambda: table.bias_ids[slot].copy_(id_row))
            launch(lambda: table.bias_values[slot].copy_(value_row.view(torch.float32)))
        # A row without its own must not take its predecessor's, once another row brings the table in.
        if not bans and table.ban_ids.shape[1]:
            launch(lambda: table.ban_ids[slot].fill_(-1))
        if not bias and table.bias_ids.shape[1]:
            launch(lambda: table.bias_ids[slot].fill_(-1))

    def _widen(self, num_ban_ids: int, num_bias: int) -> None:
        """Give the table room for more ids a row."""
        old = self._table
        have_ban, have_bias = old.ban_ids.shape[1], old.bias_ids.shape[1]
        if num_ban_ids <= have_ban and num_bias <= have_bias:
            return
        # Powers of two: kernels are compiled, and steps recorded, for a width.
        wide = make_table(
            self.num_slots,
            have_ban if num_ban_ids <= have_ban else 1 << max(2, (num_ban_ids - 1).bit_length()),
            have_bias if num_bias <= have_bias else 1 << max(2, (num_bias - 1).bit_length()),
            device=self._device.device,
        )

        def carry_over() -> None:
            wide.ban_ids[:, :have_ban] = old.ban_ids
            wide.bias_ids[:, :have_bias] = old.bias_ids
            wide.bias_values[:, :have_bias] = old.bias_values

        self._device.launch(carry_over)
        self._growths += 1
        self._table = old._replace(ban_ids=wide.ban_ids, bias_ids=wide.bias_ids, bias_values=wide.bias_values)

    def _write_counts(
        self, slot: int, sampling: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]
    ) -> None:
        penalised = (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        )
        if not penalised:
            return
        if self._table.output_counts is None:
            self._growths += 1
            shape, on = (self.num_slots, self.vocab_size), self._device.device
            self._table = self._table._replace(
                output_counts=torch.zeros(shape, dtype=torch.int32, device=on),
                prompt_mask=torch.zeros(shape, dtype=torch.uint8, device=on),
            )
        self._penalised.add(slot)
        counts, mask = self._table.output_counts, self._table.prompt_mask
        assert counts is not None
        assert mask is not None
        prompt = self._device.upload(prompt_ids, np.int64)
        output = self._device.upload(output_ids, np.int64)

        def write() -> None:
            mask[slot].zero_().index_fill_(0, prompt, 1)
            counts[slot].zero_().index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

        self._device.launch(write)
