"""One advance of the engine: admit, prefill, decode a horizon, hand out what came. All requests move
together.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from elastic_decode.engine.batch_state import BatchState
from elastic_decode.engine.decode_loop import DecodeLoop
from elastic_decode.engine.delivery import Delivery
from elastic_decode.engine.intake import Intake
from elastic_decode.engine.output_ring import Flight, OutputRing
from elastic_decode.engine.scheduler import Scheduler
from elastic_decode.engine.sequence import Group, Sequence, Stage
from elastic_decode.errors import ConfigError
from elastic_decode.kernels.budget.layout import Finish, State


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait until the block is done: an engine interrupted in the middle of a step could not be
    used again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # not set from Python (or Python is going): not ours to replace
    if signal.getsignal(signal.SIGINT) is None:
        yield
        return
    caught: list[tuple[int, Any]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught:
            if callable(before):
                before(*caught[0])
            elif before == signal.SIG_DFL:
                raise KeyboardInterrupt


class Runner:
    """Owns the order of things; the parts own their data. Not reentrant."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        loop: DecodeLoop,
        ring: OutputRing,
        batch: BatchState,
        intake: Intake,
        delivery: Delivery,
        horizon: int,
    ) -> None:
        self.scheduler = scheduler
        self._loop = loop
        self._ring = ring
        self._batch = batch
        self._intake = intake
        self.delivery = delivery
        self._horizon = horizon
        self.groups: dict[str, Group] = {}

    @property
    def idle(self) -> bool:
        return not self.groups

    def add(self, group: Group) -> None:
        if group.request_id in self.groups:
            raise ConfigError(f"request_id {group.request_id!r} is already in use by a running request")
        group.sink.open_groups += 1
        self.groups[group.request_id] = group
        self.scheduler.add(group)
        for sequence in list(group.sequences):
            # A program can be over before it begins: a prompt that is past thinking, and no solution budget.
            if sequence.state_row[State.FINISH] != Finish.RUNNING:
                self.delivery.finish(sequence, "budget")
                self._retire(sequence)

    def advance(self) -> None:
        """One turn. Raises what a kernel raises, after every running request has been aborted and its pages
        returned.
        """
        try:
            self._turn()
        except BaseException:
            self.abort_all()
            raise

    def abort(self, group: Group) -> None:
        """End every sample of a group that has not ended, keeping what it has."""
        if self.groups.get(group.request_id) is not group:
            return
        del self.groups[group.request_id]
        for sequence in group.sequences:
            if sequence.finish_reason is None and sequence.stage is not Stage.DONE:
                self.delivery.finish(sequence, "abort")
            self.scheduler.retire(sequence)

    def abort_all(self) -> None:
        for group in list(self.groups.values()):
            self.abort(group)

    def end_thinking(self, group: Group) -> None:
        """Ask each sample that still thinks to close at its next token."""
        for sequence in group.sequences:
            sequence.end_requested = True
            if sequence.stage in (Stage.PREFILL, Stage.DECODE):
                self._batch.request_end(sequence.slot)

    def _turn(self) -> None:
        scheduler = self.scheduler
        scheduler.admit()
        chunks = scheduler.prefill_chunks()
        if chunks:
            flight = self._loop.prefill(chunks)
            for chunk in chunks:
                scheduler.prefilled(chunk)
            if flight is not None:
                self._land(flight)
            scheduler.admit()  # samples that waited for a prompt computed just now
        rows = scheduler.decoding()
        if rows:
            self._land(self._loop.decode(rows, self._horizon))

    def _land(self, flight: Flight) -> None:
        finished = self.delivery.accept(flight, self._ring.collect(flight))
        for sequence in flight.sequences:
            if sequence.group.branches and sequence is sequence.group.sequences[0]:
                self._branch(sequence)
        for sequence in finished:
            self._retire(sequence)

    def _branch(self, root: Sequence) -> None:
        """Start the branches whose budget the root's thought has used up, drop those it ended before.

        A natural close as the budget's last token is the root's own run; an EOS or a forced close after it is
        not.
        """
        closed_by_last = root.think_end == "natural" or (
            root.think_end == "none" and root.finish_reason is not None
        )
        for branch in list(root.group.branches):
            budget = branch.known_output
            if root.think_tokens > budget or (root.think_tokens == budget and not closed_by_last):
                self._intake.grow_branch(branch)
                self.scheduler.start_branch(branch)
            elif root.think_end != "none" or root.finish_reason is not None:
                self.scheduler.drop_branch(branch)
                self.delivery.finish_like_root(branch)
                branch.stage = Stage.DONE

    def _retire(self, sequence: Sequence) -> None:
        self.scheduler.retire(sequence)
        group = sequence.group
        if group.unfinished == 0 and self.groups.get(group.request_id) is group:
            del self.groups[group.request_id]
