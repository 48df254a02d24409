"""`elastic-decode serve`: an OpenAI-compatible server over one engine."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any

from elastic_decode.cli import options
from elastic_decode.errors import ConfigError

_EPILOG = """examples:
  elastic-decode serve --model tiny --port 8000 --think 1024 --solve 1024
  curl localhost:8000/v1/chat/completions -H 'content-type: application/json' -d \\
    '{"model": "tiny", "messages": [{"role": "user", "content": "9 1 6 = 3"}], "thinking_token_budget": 20}'

Budgets and sampling flags are what a request does not say. docs/server.md has the fields.
"""
_KEY = "ELASTIC_DECODE_API_KEY"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="an OpenAI-compatible server",
        description="Serve chat and text completions as the OpenAI API has them, with budgets as fields of a "
        "request. Needs pip install 'elastic-decode[serve]'.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a checkpoint folder, a hub id, or 'tiny'")
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="what requests call it (default: --model)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"what requests must bring (default: ${_KEY}, or none)"
    )
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=128,
        metavar="N",
        help="samples taken on beyond --max-batch; more are answered with 429 (default: 128)",
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=int,
        default=30,
        metavar="SECONDS",
        help="how long requests may go on after SIGTERM before they are aborted (default: 30)",
    )
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--access-log", action="store_true", help="a line a request")
    parser.add_argument("--no-warmup", action="store_true", help="the first request pays for first runs")
    options.add_budget(parser)
    options.add_sampling(parser)
    options.add_delimiters(parser)
    options.add_engine(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        import uvicorn

        from elastic_decode.server.app import create_app
        from elastic_decode.server.options import ServerOptions
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "elastic_decode":
            raise
        raise ConfigError(
            f"serve needs the package {error.name}: pip install 'elastic-decode[serve]'"
        ) from None
    if not 0 <= arguments.port < 65536:
        raise ConfigError(f"--port must be in [0, 65535], got {arguments.port}")
    if arguments.shutdown_timeout < 0:
        raise ConfigError(f"--shutdown-timeout must be >= 0, got {arguments.shutdown_timeout}")
    served = ServerOptions(
        model_name=arguments.served_model_name or arguments.model,
        api_key=arguments.api_key if arguments.api_key is not None else os.environ.get(_KEY) or None,
        policy=options.policy_of(arguments),
        sampling=options.sampling_of(arguments),
        max_waiting=arguments.max_waiting,
    )
    from elastic_decode.llm import Engine

    with Engine.from_pretrained(
        options.checkpoint(arguments.model),
        options.engine_of(arguments),
        think_open=arguments.think_open,
        think_close=arguments.think_close,
        eos_ids=arguments.eos_id,
    ) as engine:
        if not arguments.no_warmup:
            engine.warmup()
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(engine, served),
                host=arguments.host,
                port=arguments.port,
                log_level=arguments.log_level,
                access_log=arguments.access_log,
                timeout_graceful_shutdown=arguments.shutdown_timeout,
            )
        )
        # uvicorn raises a signal that it has obeyed once more when it is done; ended as asked is exit code 0.
        before = signal.signal(signal.SIGTERM, lambda number, frame: None)
        try:
            server.run()
        finally:
            signal.signal(signal.SIGTERM, before)
    if not server.started:
        print("elastic-decode: the server could not start; its log says why", file=sys.stderr)
        return 1
    return 0
