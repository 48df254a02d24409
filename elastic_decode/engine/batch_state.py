"""BatchState: everything a decode step reads and writes on the device, a row a slot.

The host writes a row once, when a sequence is admitted; from then on only the step does (and
`finish`/`request_end`, which are single-word writes on the same stream). So a step depends on no host value
that was not known before it was launched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from elastic_decode.core import SamplingParams
from elastic_decode.kernels.budget.layout import PROGRAM_WORDS, STATE_WORDS, Finish, Header, State
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

    def __init__(self, device: torch.device, capacity: int = 1 << 16) -> None:
        self.tensor = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._placed: dict[object, _Placed] = {}
        self._clock = 0

    def hold(self, key: object, words: torch.Tensor) -> int:
        """The offset of the automaton `key`, placed if it is not there, and held until `release(key)`."""
        self._clock += 1
        placed = self._placed.get(key)
        if placed is None:
            placed = _Placed(offset=self._room(len(words)), size=len(words))
            self.tensor[placed.offset : placed.offset + placed.size] = words
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
            grown = torch.zeros(
                max(2 * len(self.tensor), start + size), dtype=torch.int32, device=self.tensor.device
            )
            grown[: len(self.tensor)] = self.tensor
            self.tensor = grown


class BatchState:
    """Device arrays of `num_slots` rows.

    state int32 [num_slots, STATE_WORDS], programs int32 [num_slots, PROGRAM_WORDS], page_table int32
    [num_slots, max_pages], automata int32 [pool], table: the sampling parameters
    (kernels.sample.SamplingTable).
    """

    def __init__(self, *, num_slots: int, max_pages: int, vocab_size: int, device: torch.device) -> None:
        self.device = device
        self.num_slots = num_slots
        self.vocab_size = vocab_size
        self.state = torch.zeros((num_slots, STATE_WORDS), dtype=torch.int32, device=device)
        self.state[:, State.FINISH] = int(Finish.HOST)
        self.programs = torch.zeros((num_slots, PROGRAM_WORDS), dtype=torch.int32, device=device)
        self.page_table = torch.zeros((num_slots, max_pages), dtype=torch.int32, device=device)
        self.pool = AutomatonPool(device)
        self.table: SamplingTable = make_table(num_slots, device=device)
        self._automaton_of: dict[int, object] = {}
        self._penalised: set[int] = set()

    @property
    def automata(self) -> torch.Tensor:
        return self.pool.tensor

    @property
    def counts_tokens(self) -> bool:
        """Whether a row in use has penalties, so that the step must count its tokens."""
        return bool(self._penalised)

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
        row = program.program_row.clone()
        offset = self.pool.hold(program.key, program.automaton)
        row[Header.AUTOMATON] = offset
        state_row = np.array(state_row, dtype=np.int32)
        if state_row[State.FORCED_LEFT] > 0:  # so far relative to the automaton itself
            state_row[State.FORCED_AT] += offset
        self._automaton_of[slot] = program.key
        self.programs[slot] = row
        self.state[slot] = torch.from_numpy(state_row)
        self.page_table[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self._write_sampling(slot, sampling, seed, sample_index, len(prompt_ids), ban_ids)
        self._write_counts(slot, sampling, prompt_ids, output_ids)

    def release(self, slot: int) -> None:
        """The row is nobody's: it idles in any step that still names it."""
        self.finish(slot)
        self.pool.release(self._automaton_of.pop(slot))
        self._penalised.discard(slot)

    def finish(self, slot: int) -> None:
        self.state[slot, State.FINISH] = int(Finish.HOST)

    def request_end(self, slot: int) -> None:
        """Ask the machine to end THINK before its next draw."""
        self.state[slot, State.END_REQUESTED] = 1

    def count_tokens(self, slots: torch.Tensor, emitted: torch.Tensor) -> None:
        """Add the tokens a step has just emitted to the penalty counts. slots int32 [R]; emitted bool [R]."""
        counts = self.table.output_counts
        if counts is not None:
            rows = slots.clamp(min=0).long()
            tokens = self.state[rows, State.TOKEN].long()
            counts.index_put_((rows, tokens), emitted.to(counts.dtype), accumulate=True)

    def _write_sampling(
        self,
        slot: int,
        sampling: SamplingParams,
        seed: int,
        sample_index: int,
        prompt_len: int,
        ban_ids: Sequence[int],
    ) -> None:
        bias = sampling.logit_bias or {}
        bans = list(ban_ids) if sampling.min_tokens > 0 else []
        self._widen(len(bans), len(bias))
        table = self.table
        table.temperature[slot] = sampling.temperature
        table.top_k[slot] = sampling.top_k
        table.top_p[slot] = sampling.top_p
        table.min_p[slot] = sampling.min_p
        table.seed[slot] = seed
        table.sample_index[slot] = sample_index
        table.repetition[slot] = sampling.repetition_penalty
        table.presence[slot] = sampling.presence_penalty
        table.frequency[slot] = sampling.frequency_penalty
        table.ban_until[slot] = prompt_len + sampling.min_tokens
        table.ban_ids[slot] = -1
        table.ban_ids[slot, : len(bans)] = torch.tensor(bans, dtype=torch.int32)
        table.bias_ids[slot] = -1
        table.bias_ids[slot, : len(bias)] = torch.tensor(list(bias), dtype=torch.int32)
        table.bias_values[slot, : len(bias)] = torch.tensor(list(bias.values()), dtype=torch.float32)

    def _widen(self, num_ban_ids: int, num_bias: int) -> None:
        """Give the table room for more ids a row; the neutral table has none, so that most steps pay nothing
        for them.
        """
        old = self.table
        have_ban, have_bias = old.ban_ids.shape[1], old.bias_ids.shape[1]
        if num_ban_ids <= have_ban and num_bias <= have_bias:
            return
        wide = make_table(
            self.num_slots, max(have_ban, num_ban_ids), max(have_bias, num_bias), device=self.device
        )
        wide.ban_ids[:, :have_ban] = old.ban_ids
        wide.bias_ids[:, :have_bias] = old.bias_ids
        wide.bias_values[:, :have_bias] = old.bias_values
        self.table = old._replace(ban_ids=wide.ban_ids, bias_ids=wide.bias_ids, bias_values=wide.bias_values)

    def _write_counts(
        self, slot: int, sampling: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]
    ) -> None:
        penalised = (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        )
        if penalised and self.table.output_counts is None:
            shape = (self.num_slots, self.vocab_size)
            self.table = self.table._replace(
                output_counts=torch.zeros(shape, dtype=torch.int32, device=self.device),
                prompt_mask=torch.zeros(shape, dtype=torch.uint8, device=self.device),
            )
        if not penalised:
            return
        self._penalised.add(slot)
        counts, mask = self.table.output_counts, self.table.prompt_mask
        assert counts is not None
        assert mask is not None
        counts[slot] = 0
        mask[slot] = 0
        mask[slot, torch.tensor(prompt_ids, dtype=torch.long, device=self.device)] = 1
        if output_ids:
            tokens = torch.tensor(output_ids, dtype=torch.long, device=self.device)
            counts[slot] += torch.bincount(tokens, minlength=self.vocab_size).to(counts.dtype)
