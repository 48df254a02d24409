"""`elastic-decode serve`: started, asked, ended by a signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import httpx
import pytest

from elastic_decode.cli import main

FAST = ["--dtype", "float32", "--max-model-len", "512", "--kv-memory", "16MiB", "--max-batch", "4"]


def test_sigterm_lets_requests_end_and_is_no_failure():
    call = "import sys; from elastic_decode.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", call, "serve", "--model", "tiny", "--port", "0", *FAST]
    command += ["--served-model-name", "small", "--think", "9", "--temperature", "0", "--max-waiting", "7"]
    environment = os.environ | {"ELASTIC_DECODE_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        found = (re.search(r"running on (http://127\.0\.0\.1:\d+)", line) for line in process.stderr)
        url = next(match[1] for match in found if match)
        with httpx.Client(base_url=url, headers={"Authorization": "Bearer secret"}, timeout=60) as client:
            [model] = client.get("/v1/models").json()["data"]
            assert (model["id"], model["max_model_len"]) == ("small", 512)
            assert "elastic_decode_samples_limit 11.0" in client.get("/metrics").text
            body = {"model": "small", "messages": [{"role": "user", "content": "9 1 6 = 3"}], "stream": True}
            body |= {"ignore_eos": True, "solution_token_budget": 300}
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                lines = answer.iter_lines()
                assert '"role":"assistant"' in next(lines)
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"think_tokens":9' in rest[-2]
        assert '"solve_tokens":300' in rest[-2]
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "70000"], "--port must be in"),
        (["--shutdown-timeout", "-1"], "--shutdown-timeout must be"),
        (["--policy", "truncate"], "a think and a solve budget"),
        (["--max-waiting", "-1"], "max_waiting must be"),
        (["--api-key", ""], "api_key must not be empty"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_is_loaded(capsys, arguments, says):
    assert main(["serve", "--model", "/nowhere", *arguments]) == 1
    assert says in capsys.readouterr().err


def test_a_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--model", "tiny"]) == 1
    assert "needs the package uvicorn: pip install 'elastic-decode[serve]'" in capsys.readouterr().err
