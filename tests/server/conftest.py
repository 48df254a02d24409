"""A server in this process: uvicorn in a thread, on a port of its own, over the bundled model."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import httpx
import pytest
import uvicorn
from openai import AsyncOpenAI, OpenAI

from elastic_decode import Engine, EngineConfig
from elastic_decode.assets import tiny_model_path
from elastic_decode.server.app import create_app
from elastic_decode.server.engine_thread import EngineThread
from elastic_decode.server.options import ServerOptions

T = TypeVar("T")
CONFIG = EngineConfig(dtype="float32", max_model_len=512, kv_memory="64MiB", max_batch=32)
PATIENCE = 60.0  # seconds until a wait counts as failed; no test waits for it to pass


class Gate:
    """Stands before `engine.step`: closed, the engine thread obeys commands but decodes nothing."""

    def __init__(self, step: Callable[[], list[Any]]) -> None:
        self._step = step
        self._open = threading.Event()
        self._open.set()
        self.steps = 0  # how often one was asked for
        self.failure: Exception | None = None  # to raise at the next step

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def step(self) -> list[Any]:
        self.steps += 1
        if self.failure is not None:
            raise self.failure
        return self._step() if self._open.wait(0.002) else []


class Running:
    """A server that runs, and clients for it."""

    def __init__(self, engine: Engine, options: ServerOptions, port: int, gate: Gate) -> None:
        self.app = create_app(engine, options)
        self.url = f"http://127.0.0.1:{port}"
        self.gate = gate
        self.left: dict[str, int] = {}  # the engine's stats at the end
        self.quit: Callable[[], None] = lambda: None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._key = options.api_key or "none"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)
        self.client = OpenAI(**self.how)

    @property
    def how(self) -> dict[str, Any]:
        return {"base_url": f"{self.url}/v1", "api_key": self._key, "max_retries": 0, "timeout": PATIENCE}

    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(**self.how)

    @property
    def thread(self) -> EngineThread:
        return self.app.state.engine_thread

    def stats(self) -> dict[str, int]:
        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(self.thread.ask(Engine.stats), self.loop).result(PATIENCE)

    def until(self, reached: Callable[[], bool]) -> None:
        """Look again after everything the event loop and the engine thread had to do, until it is so."""
        end = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < end, "it never came to that"
            self.stats()

    def all_cancelled(self) -> bool:
        """Whether the server has noticed that nobody waits for anything any more."""
        return all(ticket.cancelled for ticket in self.thread.tickets)

    def metric(self, sample: str) -> float:
        """The value of a line of /metrics, like 'elastic_decode_rows_running'."""
        lines = dict(line.rsplit(" ", 1) for line in self.http.get("/metrics").text.splitlines())
        return float(lines[sample])


Serving = Callable[..., AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def reference() -> Iterator[Engine]:
    """An engine like the servers' own, to ask what is right."""
    with Engine.from_pretrained(tiny_model_path(), CONFIG) as made:
        yield made


@contextmanager
def run_server(
    config: EngineConfig = CONFIG, *, grace: int | None = None, **options: Any
) -> Iterator[Running]:
    """A server with an engine of its own while the block runs. grace: seconds that requests then have."""
    engine = Engine.from_pretrained(tiny_model_path(), config)
    gate = Gate(engine.step)
    engine.step = gate.step  # type: ignore[method-assign]
    listener = socket.create_server(("127.0.0.1", 0))  # connections wait in it until the server is there
    options = {"model_name": "tiny"} | options
    running = Running(engine, ServerOptions(**options), listener.getsockname()[1], gate)
    server = uvicorn.Server(
        uvicorn.Config(running.app, log_level="critical", timeout_graceful_shutdown=grace)
    )

    async def main() -> None:
        running.loop = asyncio.get_running_loop()
        await server.serve([listener])

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    running.quit = lambda: setattr(server, "should_exit", True)
    try:
        running.http.get("/health")  # answered once it has started
        yield running
    finally:
        gate.open()
        running.http.close()
        running.client.close()
        running.quit()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        running.left = engine.stats()
        engine.close()


@pytest.fixture(scope="session")
def serving() -> Serving:
    return run_server


@pytest.fixture(scope="module")
def server(serving: Serving) -> Iterator[Running]:
    with serving() as running:
        yield running
