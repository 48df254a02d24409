"""What the server costs beside `engine.generate`: the same requests, engine and thread, in alternation.

Prints a line a way with the median time of a token and, over the rounds, the median of its ratio to
`engine.generate`. The client is a process of its own, which reads bytes and parses nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.server.app import create_app
from elastic_decode.server.options import ServerOptions

_CLIENT = """
import asyncio, sys, time
port, streams = int(sys.argv[1]), int(sys.argv[2])
async def one(body):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/chat/completions HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n"
    head += f"Content-Type: application/json\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n"
    writer.write(head.encode() + body)
    answer = await reader.read()
    assert b" 200 " in answer[:20], answer[:500]
    writer.close()
async def everything(body):
    started = time.perf_counter()
    await asyncio.gather(*[one(body) for _ in range(streams)])
    return time.perf_counter() - started
for line in sys.stdin:
    print(asyncio.run(everything(line.strip().encode())), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(tiny_model_path()))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=300, help="of each stream, EOS ignored")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    think = options.tokens // 2
    budget = Budget(think, options.tokens - think)
    chat = [{"role": "user", "content": "9 1 6 = 3"}]
    sampling = SamplingParams(temperature=0, ignore_eos=True)
    config = EngineConfig(dtype=options.dtype, max_batch=options.streams, kv_memory="256MiB")
    body = {"model": "m", "messages": chat, "temperature": 0, "ignore_eos": True}
    body |= {"thinking_token_budget": budget.think, "solution_token_budget": budget.solve}

    with Engine.from_pretrained(options.model, config) as engine:
        listener = socket.create_server(("127.0.0.1", 0))
        app = create_app(engine, ServerOptions(model_name="m"))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_until_complete, args=(server.serve([listener]),))
        thread.start()
        call = [sys.executable, "-c", _CLIENT, str(listener.getsockname()[1]), str(options.streams)]
        client = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        def inside(work: Callable[[Engine], Any]) -> float:
            def timed(owned: Engine) -> float:
                started = time.perf_counter()
                work(owned)
                return time.perf_counter() - started

            asked = app.state.engine_thread.ask(timed)
            return asyncio.run_coroutine_threadsafe(asked, loop).result()

        def served(**more: Any) -> float:
            assert client.stdin is not None
            assert client.stdout is not None
            client.stdin.write(json.dumps(body | more) + "\n")
            client.stdin.flush()
            return float(client.stdout.readline())

        prompts = [chat] * options.streams
        how: dict[str, Any] = {"budget": budget, "sampling": sampling}
        ways: dict[str, Callable[[], float]] = {
            "engine.generate": lambda: inside(lambda engine: engine.generate(prompts, **how)),
            "engine.stream": lambda: inside(lambda engine: list(engine.stream(prompts, **how))),
            "server, whole answers": lambda: served(),
            "server, streamed": lambda: served(stream=True),
        }
        served()  # the server has started when it answers; and what is done once is done
        inside(lambda engine: engine.generate(prompts, **how))
        rounds = [{name: way() for name, way in ways.items()} for _ in range(options.rounds)]
        client.communicate()
        server.should_exit = True
        thread.join()
    total = options.streams * (options.tokens + 1)  # the forced close, too
    for name in ways:
        microseconds = 1e6 * statistics.median(one[name] for one in rounds) / total
        ratios = [one[name] / one["engine.generate"] for one in rounds]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name:24} {microseconds:7.1f} us a token, x {statistics.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()
