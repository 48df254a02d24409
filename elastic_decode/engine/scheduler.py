"""Who runs: slots and pages are reserved for a sequence's whole bound at admission, so nothing that runs is
ever preempted.

First come, first served. The samples of a group wait for the first one's prompt; each then starts with the
prompt's full pages shared, a private copy of the last partial one, and one position (the last) still to
compute, which is an ordinary decode step. Branches of a fork start the same way from the root's thought, on
pages that were reserved with the root.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from elastic_decode.engine.batch_state import BatchState
from elastic_decode.engine.kv_cache import KVPages, PagePool, prefix_keys
from elastic_decode.engine.sequence import Group, Sequence, Source, Stage
from elastic_decode.kernels.budget.layout import State


@dataclass(slots=True)
class Chunk:
    """Positions [start, stop) of a sequence's known tokens, to be computed in one prefill pass."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def completes(self) -> bool:
        return self.stop == self.sequence.num_known


class Scheduler:
    def __init__(self, pool: PagePool, kv_pages: KVPages, batch: BatchState, *, prefill_tokens: int) -> None:
        self._pool = pool
        self._kv_pages = kv_pages
        self._batch = batch
        self._prefill_tokens = prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.active: dict[int, Sequence] = {}  # slot -> PREFILL or DECODE, in order of admission
        self._free_slots = list(range(batch.num_slots - 1, -1, -1))
        self.epoch = 0
        self.prefix_hit_tokens = 0

    def add(self, group: Group) -> None:
        """Queue a group's first sample (or a fork's root); the others follow when there is something to
        share.
        """
        first = group.sequences[0]
        group.epoch = self.epoch
        if self._pool.index_prefixes:
            group.keys = prefix_keys(group.prompt_ids, self._pool.page_size, self.epoch)
        group.sharers = len(group.siblings) + len(group.branches)
        self.waiting.append(first)

    def admit(self) -> None:
        """Give slots and pages to waiting sequences, in order, as long as both last."""
        while self.waiting and self._free_slots:
            sequence = self.waiting[0]
            if not self._reserve(sequence):
                if self.active:
                    return
                # Nothing runs that could return pages: only pages kept for sharing can be in the way.
                self._drop_sources()
                if not self._reserve(sequence):
                    raise AssertionError(
                        f"an idle engine cannot admit {sequence.bound} positions with "
                        f"{self._pool.available} pages"
                    )
            self.waiting.popleft()
            self._activate(sequence)

    def prefill_chunks(self) -> list[Chunk]:
        """The next prompt positions to compute: oldest sequences first, `prefill_tokens` in all."""
        left = self._prefill_tokens
        chunks = []
        for sequence in self.active.values():
            if sequence.stage is Stage.PREFILL and left > 0:
                stop = min(sequence.num_known, sequence.computed + left)
                chunks.append(Chunk(sequence, sequence.computed, stop))
                left -= stop - sequence.computed
        return chunks

    def prefilled(self, chunk: Chunk) -> None:
        """A chunk has been launched: its keys and values are there for whatever is launched after it."""
        sequence = chunk.sequence
        sequence.computed = chunk.stop
        if chunk.completes:
            sequence.stage = Stage.DECODE
            self._publish(sequence)

    def decoding(self) -> list[Sequence]:
        return [sequence for sequence in self.active.values() if sequence.stage is Stage.DECODE]

    def start_branch(self, branch: Sequence) -> None:
        """The root's thought has reached this branch's budget: it is next in line."""
        group = branch.group
        group.branches.remove(branch)
        root = group.sequences[0]
        length = branch.num_known - 1
        branch.source = Source(root.pages[: self._pool.pages_for(length)], length)
        self.waiting.appendleft(branch)

    def drop_branch(self, branch: Sequence) -> None:
        """The root's thought ended before this branch's budget: it will never run."""
        branch.group.branches.remove(branch)
        self._pool.release(branch.reserved)
        branch.reserved = []
        self._admitted_sharer(branch.group)

    def retire(self, sequence: Sequence) -> None:
        """Return a sequence's slot and pages. Its row has finished on the device, or has been told to."""
        if sequence.stage is Stage.DONE:
            return
        group = sequence.group
        if sequence.stage is Stage.WAITING:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
                if sequence is not group.sequences[0]:
                    self._admitted_sharer(group)
            elif sequence in group.siblings:
                group.siblings.remove(sequence)
                self._admitted_sharer(group)
            elif sequence in group.branches:
                group.branches.remove(sequence)
                self._admitted_sharer(group)
            self._pool.release(sequence.reserved)
            sequence.reserved = []
        else:
            del self.active[sequence.slot]
            self._batch.release(sequence.slot)
            self._free_slots.append(sequence.slot)
            if sequence.stage is Stage.DECODE:
                self._index_output(sequence)
            self._pool.release(sequence.pages)
        sequence.pages = []
        sequence.stage = Stage.DONE

    def _reserve(self, sequence: Sequence) -> bool:
        """Hold every page the sequence may ever need; False, holding nothing, when they are not to be had."""
        pool = self._pool
        total = pool.pages_for(sequence.bound)
        group = sequence.group
        source = sequence.source or (group.source if sequence is not group.sequences[0] else None)
        if source is not None:
            shared = source.pages[: source.length // pool.page_size]
            if sequence.reserved:
                private, sequence.reserved = sequence.reserved, []
            elif total - len(shared) > pool.available:
                return False
            else:
                private = pool.allocate(total - len(shared))
            pool.hold(shared)
            if source.length % pool.page_size:
                self._kv_pages.copy(source.pages[len(shared) : len(shared) + 1], private[:1])
            sequence.computed = source.length
        else:
            shared = pool.find(group.keys[: (sequence.num_known - 1) // pool.page_size])
            wanted = [
                total - len(shared),
                *(len(b.reserved) or self._branch_pages(b) for b in group.branches),
            ]
            if sum(wanted) > pool.available:
                pool.release(shared)
                return False
            private = pool.allocate(wanted[0])
            for branch, count in zip(group.branches, wanted[1:], strict=True):
                branch.reserved = pool.allocate(count)
            sequence.computed = len(shared) * pool.page_size
            self.prefix_hit_tokens += sequence.computed
        sequence.pages = shared + private
        return True

    def _branch_pages(self, branch: Sequence) -> int:
        """Private pages of a branch: all but those filled before its last known position."""
        return self._pool.pages_for(branch.bound) - (branch.num_known - 1) // self._pool.page_size

    def _activate(self, sequence: Sequence) -> None:
        group = sequence.group
        sequence.slot = self._free_slots.pop()
        # A branch goes on with its root's thought: the weights that began it are what it is labelled with.
        sequence.weight_epoch = group.sequences[0].weight_epoch if sequence.known_output else self.epoch
        self.active[sequence.slot] = sequence
        if sequence.end_requested:
            sequence.state_row[State.END_REQUESTED] = 1
        self._batch.admit(
            sequence.slot,
            program=sequence.program,
            state_row=sequence.state_row,
            pages=sequence.pages,
            sampling=group.sampling,
            seed=group.seed,
            sample_index=0 if group.think_at else sequence.sample,  # branches of a thought share its noise
            prompt_ids=group.prompt_ids,
            output_ids=sequence.token_ids[: sequence.known_output],
            ban_ids=group.ban_ids,
        )
        if sequence is not group.sequences[0]:
            sequence.source = None
            self._admitted_sharer(group)
        # One position left to compute is what a decode step does: it writes that position's keys and values.
        sequence.stage = Stage.DECODE if sequence.computed == sequence.num_known - 1 else Stage.PREFILL
        if sequence.stage is Stage.DECODE:
            self._publish(sequence)

    def _publish(self, sequence: Sequence) -> None:
        """The prompt is computed: make its pages findable and let the rest of the group start from them."""
        group, pool = sequence.group, self._pool
        if sequence is not group.sequences[0]:
            return
        if group.epoch == self.epoch:
            full = min(sequence.computed // pool.page_size, len(group.keys))
            pool.index(sequence.pages[:full], group.keys[:full])
        if group.siblings and sequence.weight_epoch != self.epoch:
            self.waiting.extendleft(reversed(group.siblings))
            group.siblings = []
        elif group.siblings:
            length = len(group.prompt_ids) - 1
            group.source = Source(sequence.pages[: pool.pages_for(length)], length)
            pool.hold(group.source.pages)
            self.waiting.extendleft(reversed(group.siblings))
            group.siblings = []
        elif group.branches:
            group.source = Source(list(sequence.pages), 0)
            pool.hold(group.source.pages)
            for branch in [b for b in group.branches if b.known_output == 0]:
                self.start_branch(branch)

    def _admitted_sharer(self, group: Group) -> None:
        """One sequence fewer that may still want the group's source; the last one lets it go."""
        group.sharers -= 1
        if group.sharers == 0 and group.source is not None:
            self._pool.release(group.source.pages)
            group.source = None

    def new_weights(self) -> None:
        """Keys and values of the old weights begin nothing any more: no prefix, no waiting sample."""
        self.epoch += 1
        self.forget_prefixes()

    def forget_prefixes(self) -> None:
        """No page begins anything any more."""
        self._pool.clear_index()
        self._drop_sources()

    def _drop_sources(self) -> None:
        """Give up what waiting samples would have shared; they compute their prompts again."""
        for sequence in self.waiting:
            group = sequence.group
            if group.source is not None and sequence.source is None:
                self._pool.release(group.source.pages)
                group.source = None

    def _index_output(self, sequence: Sequence) -> None:
        """A finished sequence's full pages can begin a later prompt (the next turn of a chat, for one)."""
        group, pool = sequence.group, self._pool
        if not pool.index_prefixes or sequence.weight_epoch != self.epoch or group.epoch != self.epoch:
            return
        written = max(sequence.computed, sequence.length - 1)
        tokens = (group.prompt_ids + sequence.token_ids)[:written]
        keys = prefix_keys(tokens, pool.page_size, self.epoch, group.keys[: written // pool.page_size])
        pool.index(sequence.pages[: len(keys)], keys)
