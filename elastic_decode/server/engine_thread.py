"""The thread that owns the engine, and the tickets through which the event loop gets its tokens.

The engine works only inside a call and in one thread, so everything reaches it as a command in a queue. The
thread steps while there is work and sleeps in `queue.get` otherwise; each step's events go to the event loop
in one callback.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from elastic_decode.core import Completion, Request, TokenEvent
from elastic_decode.errors import ConfigError, NonFiniteLogits
from elastic_decode.llm import Engine
from elastic_decode.server.errors import RequestError
from elastic_decode.server.metrics import Metrics

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
Batch = list[tuple[int, list[TokenEvent]]]  # (choice, its new events)


@dataclass(slots=True, eq=False)
class _Submit:
    ticket: Ticket
    requests: Sequence[Request]


@dataclass(slots=True, eq=False)
class _Abort:
    ticket: Ticket


@dataclass(slots=True, eq=False)
class _Ask:
    question: Callable[[Engine], object]
    answer: asyncio.Future[object]


_STOP = object()


class Ticket:
    """What one HTTP request has in the engine: `n` samples of each of its prompts, numbered as choices.

    Lives on the event loop, but for `request_ids` and `cancelled`.
    """

    def __init__(self, owner: EngineThread, requests: Sequence[Request], *, streams: bool) -> None:
        self._owner = owner
        self._per_prompt = requests[0].n
        self._streams = streams
        self._new: Batch = []
        self._wake = asyncio.Event()
        self._last_token: dict[int, float] = {}  # choice -> when
        self._failure: Exception | None = None
        self.arrived = time.perf_counter()
        self.open_samples = self._per_prompt * len(requests)
        self.completions: list[Completion | None] = [None] * self.open_samples
        self.prompt_tokens: int | None = None  # of all prompts, known once they are accepted
        self.request_ids: dict[str, int] = {}  # -> which prompt; the engine thread's
        self.cancelled = False

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return self.open_samples == 0 or self._failure is not None

    async def accepted(self) -> int:
        """Tokens of all prompts, once the engine has taken them. Raises what it raised instead."""
        while self.prompt_tokens is None and self._failure is None and not self.cancelled:
            await self._woken()
        if self._failure is not None:
            raise self._failure
        return self.prompt_tokens or 0

    async def batches(self) -> AsyncIterator[Batch]:
        """Everything that has come since the last batch, until all samples have finished or it is cancelled.
        Raises what went wrong.
        """
        while True:
            new, self._new = self._new, []
            if new:
                yield new
            elif self._failure is not None:
                raise self._failure
            elif self.open_samples == 0 or self.cancelled:
                return
            else:
                await self._woken()

    async def finished(self) -> list[Completion]:
        """All completions in the order of choices; an empty list where it was cancelled."""
        async for _ in self.batches():
            pass
        return [completion for completion in self.completions if completion is not None]

    def cancel(self) -> None:
        """Nobody waits for this any more: what is left is aborted, its rows and pages return."""
        if not self.done and not self.cancelled:
            self.cancelled = True
            self._wake.set()
            self._owner.abort(self)

    async def _woken(self) -> None:
        await self._wake.wait()
        self._wake.clear()

    def take(self, events: list[TokenEvent], at: float, metrics: Metrics) -> None:
        """New events of one sample, read at `at` by perf_counter."""
        first = events[0]
        choice = self.request_ids[first.request_id] * self._per_prompt + first.sample
        last = self._last_token.get(choice)
        metrics.tokens(events, at - (self.arrived if last is None else last), first=last is None)
        self._last_token[choice] = at
        completion = events[-1].completion
        if completion is not None:
            self.completions[choice] = completion
            self.open_samples -= 1
            metrics.finished(completion)
        if self._streams:
            self._new.append((choice, events))
            self._wake.set()
        elif self.open_samples == 0:
            self._wake.set()

    def accept(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self._wake.set()

    def fail(self, error: Exception) -> None:
        self._failure = error
        self._wake.set()


class EngineThread:
    """Made, started and asked on the event loop; `engine` belongs to the thread from `start` to `stop`."""

    def __init__(self, engine: Engine, metrics: Metrics, *, limit: int) -> None:
        """limit: samples taken on and not finished, beyond which `submit` refuses."""
        self._engine = engine
        self._metrics = metrics
        self.limit = limit
        self._commands: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.tickets: set[Ticket] = set()
        self._running: dict[str, Ticket] = {}
        self._asked: set[asyncio.Future[object]] = set()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self.failure: BaseException | None = None  # what ended the thread
        self.stopping = False

    # ---- on the event loop ----

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Abort what is left and wait for the thread's end."""
        self.stopping = True
        self._commands.put(_STOP)
        await asyncio.to_thread(self._thread.join)

    @property
    def open_samples(self) -> int:
        """Samples taken on and not finished, those about to be aborted among them."""
        return sum(ticket.open_samples for ticket in self.tickets)

    def submit(self, requests: Sequence[Request], *, streams: bool) -> Ticket:
        """All requests of one HTTP request, of equal n. Raises RequestError where there is no room now (429)
        or never (400), or no engine (500, 503).
        """
        if self.failure is not None or self.stopping:
            raise self._broken()
        samples = sum(request.n for request in requests)
        if samples > self.limit:
            raise RequestError(
                400,
                f"{samples} samples in one request; this server takes on at most {self.limit} at a time",
                code="too_many_samples",
            )
        if self.open_samples + samples > self.limit:
            raise RequestError(
                429,
                f"{self.open_samples} samples are under way or waiting and {samples} more would exceed "
                f"{self.limit}; try again later",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        ticket = Ticket(self, requests, streams=streams)
        self.tickets.add(ticket)
        self._commands.put(_Submit(ticket, requests))
        return ticket

    def abort(self, ticket: Ticket) -> None:
        self._commands.put(_Abort(ticket))

    async def ask(self, question: Callable[[Engine], T]) -> T:
        """`question(engine)`, between two steps. Raises RequestError where there is no engine any more."""
        if self.failure is not None or self.stopping:
            raise self._broken()
        answer = self._loop.create_future()
        self._asked.add(answer)
        self._commands.put(_Ask(question, answer))
        try:
            return await answer
        finally:
            self._asked.discard(answer)

    def _broken(self) -> RequestError:
        if self.failure is None:
            return RequestError(503, "the server is shutting down", kind="server_error", code="stopping")
        why = f"{type(self.failure).__name__}: {self.failure}"
        return RequestError(500, f"the engine failed: {why}", kind="server_error", code="engine_failed")

    def _accepted(self, ticket: Ticket, prompt_tokens: int) -> None:
        for request_id in ticket.request_ids:
            self._running[request_id] = ticket
        self._metrics.accepted(prompt_tokens)
        ticket.accept(prompt_tokens)

    def _refused(self, ticket: Ticket, error: Exception) -> None:
        ticket.fail(error)
        self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        self.tickets.discard(ticket)
        for request_id in ticket.request_ids:
            self._running.pop(request_id, None)

    def _deliver(self, events: list[TokenEvent], at: float) -> None:
        samples: dict[tuple[str, int], list[TokenEvent]] = {}
        for event in events:
            samples.setdefault((event.request_id, event.sample), []).append(event)
        for (request_id, _), new in samples.items():
            ticket = self._running.get(request_id)
            if ticket is not None:
                ticket.take(new, at, self._metrics)
                if ticket.done:
                    self._forget(ticket)

    def _failed_one(self, request_id: str, error: Exception) -> None:
        ticket = self._running.get(request_id)
        if ticket is not None:
            ticket.cancel()  # its other prompts
            self._refused(ticket, error)

    def _ended(self, failure: BaseException | None) -> None:
        self.failure = failure
        for ticket in list(self.tickets):
            self._refused(ticket, self._broken())
        for answer in self._asked:
            if not answer.done():
                answer.set_exception(self._broken())

    # ---- in the thread ----

    def _post(self, call: Callable[..., object], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(call, *arguments)

    def _main(self) -> None:
        failure: BaseException | None = None
        try:
            while self._obey():
                self._step()
        except BaseException as error:
            failure = error
            _LOG.critical("the engine failed", exc_info=error)
        try:
            self._post(self._ended, failure)
        except RuntimeError:  # the loop was closed first: there is nobody left to tell
            _LOG.warning("the event loop ended before the engine's thread")

    def _obey(self) -> bool:
        """Carry out what is queued, waiting for it where there is nothing to step; False at the end."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if command is _STOP:
                for ticket in list(self.tickets):
                    self._abort(ticket)
                return False
            if isinstance(command, _Submit):
                self._submit(command)
            elif isinstance(command, _Abort):
                self._abort(command.ticket)
            elif isinstance(command, _Ask):
                self._answer(command)

    def _submit(self, command: _Submit) -> None:
        ticket, ids = command.ticket, command.ticket.request_ids
        try:
            if ticket.cancelled:
                raise RequestError(499, "the client has gone")
            tokens = 0
            for index, request in enumerate(command.requests):
                request_id = self._engine.submit(request)
                ids[request_id] = index
                tokens += self._prompt_tokens(request_id, request)
        except Exception as error:
            self._abort(ticket)
            self._post(self._refused, ticket, error)
        else:
            self._post(self._accepted, ticket, tokens)

    def _abort(self, ticket: Ticket) -> None:
        for request_id in ticket.request_ids:
            self._engine.abort(request_id)

    def _prompt_tokens(self, request_id: str, request: Request) -> int:
        try:
            return len(self._engine.prompt_token_ids(request_id))
        except ConfigError:  # it was over before it began: past thinking already, and no solution budget
            return len(self._engine.encode(request.prompt, chat_template_kwargs=request.chat_template_kwargs))

    def _answer(self, command: _Ask) -> None:
        answer = command.answer

        def settle(set_it: Callable[..., None], value: object) -> None:
            if not answer.done():
                set_it(value)

        try:
            value = command.question(self._engine)
        except Exception as error:
            self._post(settle, answer.set_exception, error)
        else:
            self._post(settle, answer.set_result, value)

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except NonFiniteLogits as error:
            if error.request_id is None:
                raise
            self._post(self._failed_one, error.request_id, error)
            return
        if events:
            self._post(self._deliver, events, time.perf_counter())
