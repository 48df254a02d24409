"""The routes: what comes over HTTP to the engine's thread, and back."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from elastic_decode import __version__
from elastic_decode.core import Request as EngineRequest
from elastic_decode.llm import Engine
from elastic_decode.server.engine_thread import EngineThread, Ticket
from elastic_decode.server.errors import RequestError, refusal, validation
from elastic_decode.server.metrics import CONTENT_TYPE, Metrics
from elastic_decode.server.options import ServerOptions
from elastic_decode.server.protocol import ChatRequest, CompletionRequest
from elastic_decode.server.replies import ChatReply, CompletionReply, Reply, event_stream

_LOG = logging.getLogger(__name__)
_GONE = 499  # nobody reads it: the client has closed the connection


def create_app(engine: Engine, options: ServerOptions) -> FastAPI:
    """The application. While it runs the engine belongs to its thread: use it before or after, not meanwhile.

    The caller closes the engine. `app.state.engine_thread` and `app.state.metrics` are there to look at.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        thread = EngineThread(engine, metrics, limit=engine.config.max_batch + options.max_waiting)
        thread.start()
        app.state.engine_thread = thread
        try:
            yield
        finally:
            await thread.stop()

    app = FastAPI(title="elastic_decode", version=__version__, lifespan=lifespan)
    app.state.metrics = metrics
    _answer_errors(app)
    started = int(time.time())
    card = {"id": options.model_name, "object": "model", "created": started, "owned_by": "elastic_decode"}
    card["max_model_len"] = engine.max_model_len

    def admitted(request: Request) -> None:
        if options.api_key is not None:
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            good = hmac.compare_digest(key.strip().encode(), options.api_key.encode())
            if scheme.lower() != "bearer" or not good:
                raise RequestError(
                    401, "no valid API key in the Authorization header", code="invalid_api_key"
                )

    keyed: list[Any] = [Depends(admitted)]

    def known(model: str) -> None:
        if model != options.model_name:
            message = f"there is no model {model!r} here; it is {options.model_name!r}"
            raise RequestError(404, message, param="model", code="model_not_found")

    async def decode(
        http: Request, endpoint: str, reply: Reply, requests: Sequence[EngineRequest], *, streams: bool
    ) -> Response:
        thread: EngineThread = http.app.state.engine_thread
        ticket = thread.submit(requests, streams=streams)
        watch = asyncio.create_task(_cancel_when_gone(http, ticket))
        handed_on = False
        try:
            prompt_tokens = await ticket.accepted()
            if streams and not ticket.cancelled:
                handed_on = True
                return StreamingResponse(
                    _stream(ticket, reply, prompt_tokens, endpoint, metrics, watch),
                    media_type="text/event-stream",
                    headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
                )
            completions = await ticket.finished()
            if ticket.cancelled:
                return _count(metrics, endpoint, "aborted", Response(status_code=_GONE))
            metrics.duration.observe(time.perf_counter() - ticket.arrived)
            return _count(
                metrics, endpoint, "completed", JSONResponse(reply.whole(prompt_tokens, completions))
            )
        finally:
            if not handed_on:
                watch.cancel()
                ticket.cancel()

    async def answer(http: Request, endpoint: str, body: ChatRequest | CompletionRequest) -> Response:
        try:
            known(body.model)
            requests = body.requests(options)
            kind = ChatReply if isinstance(body, ChatRequest) else CompletionReply
            reply = kind(
                engine,
                options.model_name,
                sum(request.n for request in requests),
                logprobs=body.logprobs is not None and body.logprobs is not False,
                with_usage=body.stream_options is not None and body.stream_options.include_usage,
            )
            return await decode(http, endpoint, reply, requests, streams=bool(body.stream))
        except Exception as error:
            refused = refusal(error)
            if refused.status >= 500 and not isinstance(error, RequestError):
                _LOG.error("a request failed", exc_info=error)
            outcome = "overloaded" if refused.status == 429 else "failed"
            if refused.status < 500 and outcome == "failed":
                outcome = "aborted" if refused.status == _GONE else "refused"
            return _count(metrics, endpoint, outcome, refused.response())
        except asyncio.CancelledError:
            metrics.requests.labels(endpoint, "aborted").inc()
            raise

    @app.post("/v1/chat/completions", dependencies=keyed)
    async def chat(body: ChatRequest, http: Request) -> Response:
        return await answer(http, "chat", body)

    @app.post("/v1/completions", dependencies=keyed)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        return await answer(http, "completions", body)

    @app.get("/v1/models", dependencies=keyed)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}", dependencies=keyed)
    async def model(name: str) -> dict[str, Any]:
        known(name)
        return card

    @app.get("/health")
    async def health(http: Request) -> Response:
        thread: EngineThread = http.app.state.engine_thread
        if thread.failure is not None:
            why = f"{type(thread.failure).__name__}: {thread.failure}"
            return JSONResponse({"status": "failed", "reason": why}, status_code=503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def prometheus(http: Request) -> Response:
        thread: EngineThread = http.app.state.engine_thread
        stats: dict[str, int] = {}
        with suppress(RequestError):  # without an engine the counters are still there
            stats = await thread.ask(Engine.stats)
        page = metrics.page(stats, open_samples=thread.open_samples, limit=thread.limit)
        return Response(page, media_type=CONTENT_TYPE)

    return app


async def _cancel_when_gone(http: Request, ticket: Ticket) -> None:
    """The body has been read, so all that can still come is the end of the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    ticket.cancel()


async def _stream(
    ticket: Ticket,
    reply: Reply,
    prompt_tokens: int,
    endpoint: str,
    metrics: Metrics,
    watch: asyncio.Task[None],
) -> AsyncIterator[bytes]:
    outcome = "aborted"
    try:
        yield reply.opening()
        async for batch in ticket.batches():
            data = b"".join([reply.chunk(index, events) for index, events in batch])
            if data:
                yield data
        if not ticket.cancelled:
            outcome = "completed"
            metrics.duration.observe(time.perf_counter() - ticket.arrived)
            yield reply.ending(prompt_tokens, [c for c in ticket.completions if c is not None])
    except Exception as error:  # the status has been sent: only an event can say it
        outcome = "failed"
        yield event_stream(refusal(error).body)
    finally:
        metrics.requests.labels(endpoint, outcome).inc()
        watch.cancel()
        ticket.cancel()


def _count(metrics: Metrics, endpoint: str, outcome: str, response: Response) -> Response:
    metrics.requests.labels(endpoint, outcome).inc()
    return response


def _answer_errors(app: FastAPI) -> None:
    """Every error as the OpenAI API's object, also those of the framework."""

    @app.exception_handler(RequestError)
    async def refused(http: Request, error: RequestError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        return _refuse(http, validation(error))

    @app.exception_handler(HTTPException)
    async def framework(http: Request, error: HTTPException) -> Response:
        return RequestError(error.status_code, f"{http.method} {http.url.path}: {error.detail}").response()

    def _refuse(http: Request, error: RequestError) -> Response:
        endpoint = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}.get(http.url.path)
        if endpoint is not None:
            app.state.metrics.requests.labels(endpoint, "refused").inc()
        return error.response()
