"""One advance of the engine: admit, prefill, decode a horizon, hand out what came. All requests move
together.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from elastic_decode.engine.batch_state import BatchState
from elastic_decode.engine.decode_loop import DecodeLoop
from elastic_decode.engine.delivery import Delivery
from elastic_decode.engine.device import Device
from elastic_decode.engine.intake import Intake
from elastic_decode.engine.output_ring import Flight, collect
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
        batch: BatchState,
        intake: Intake,
        delivery: Delivery,
        device: Device,
        horizon: int,
    ) -> None:
        self.scheduler = scheduler
        self._loop = loop
        self._batch = batch
        self._intake = intake
        self.delivery = delivery
        self._device = device
        self._horizon = horizon
        self._flights: deque[Flight] = deque()  # launched and not read yet, oldest first
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

    def release_memory(self) -> None:
        """Let go of KV pages, recorded steps and all known prefixes. Nothing may be in flight."""
        while self._flights:  # rows that idled on after their last token
            self._land(self._flights.popleft(), queued_behind=False)
        self._device.finish()
        self.scheduler.forget_prefixes()
        self._loop.release()
        self._device.give_back()

    def take_memory(self) -> None:
        """Take back what `release_memory` let go of."""
        self._loop.take()

    def _turn(self) -> None:
        """Launch what can be launched, then turn to what was launched the turn before: the device has work
        while the host reads."""
        before = list(self._flights)
        self._launch()
        launched = len(self._flights) - len(before)
        # Where only one flight may be under way, this turn's are read at once.
        due = len(before) if self._device.flights > 1 else len(self._flights)
        for remaining in reversed(range(due)):
            self._land(self._flights.popleft(), queued_behind=launched > 0 or remaining > 0)

    def _launch(self) -> None:
        scheduler = self.scheduler
        scheduler.admit()
        chunks = scheduler.prefill_chunks()
        if chunks:
            flight = self._loop.prefill(chunks)
            for chunk in chunks:
                scheduler.prefilled(chunk)
            if flight is not None:
                self._flights.append(flight)
                if self._device.flights == 1:  # a first token can free a row at once
                    self._land(self._flights.popleft(), queued_behind=False)
            scheduler.admit()  # samples that waited for a prompt computed just now
        # Rows whose last possible token has been launched need only be waited for.
        rows = [sequence for sequence in scheduler.decoding() if sequence.draws_left > 0]
        if rows:
            steps = min(self._horizon, max(sequence.draws_left for sequence in rows))
            self._flights.append(self._loop.decode(rows, steps))

    def _land(self, flight: Flight, *, queued_behind: bool) -> None:
        finished = self.delivery.accept(flight, collect(flight, queued_behind=queued_behind))
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
