"""What the client library hides: bytes of a stream, clients that go, overload, refusals, failures, counts."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "9 1 6 = 3"}]
# Long enough that it cannot end while a test looks.
ENDLESS = {"ignore_eos": True, "solution_token_budget": 400, "thinking_token_budget": 0}


def body(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": MESSAGES, "temperature": 0, "thinking_token_budget": 9} | more


def chunks(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line and line != "data: [DONE]":
            assert line.startswith("data: ")
            yield json.loads(line.removeprefix("data: "))


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_the_bytes_of_a_stream(server):
    request = body(stream=True, solution_token_budget=4, stream_options={"include_usage": True})
    with server.http.stream("POST", CHAT, json=request) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    parsed = list(chunks(iter(events[:-2])))
    assert {chunk["object"] for chunk in parsed} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in parsed}) == 1
    assert parsed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [bool(chunk["choices"]) for chunk in parsed] == [True] * (len(parsed) - 1) + [False]
    assert parsed[-1]["usage"]["forced_tokens"] == 1
    kinds = [set(chunk["choices"][0]["delta"]) for chunk in parsed[1:-1] if chunk["choices"][0]["delta"]]
    first_content = next(at for at, kind in enumerate(kinds) if "content" in kind)
    assert all("reasoning_content" not in kind for kind in kinds[first_content + 1 :])
    assert first_content > 0
    assert parsed[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    assert parsed[-2]["choices"][0]["elastic"]["think_end"] == "forced"


def test_without_usage_asked_for_there_is_none(server):
    with server.http.stream("POST", CHAT, json=body(stream=True, max_tokens=12)) as answer:
        assert all("usage" not in chunk for chunk in chunks(answer.iter_lines()))


REFUSED = [
    (body(wishes=1, hopes=2), "wishes, hopes", "wishes"),
    (body(top_logprobs=3, logprobs=True), "only the drawn token's", "top_logprobs"),
    (body(tools=[{"type": "function"}]), "this server calls no tools", "body"),
    (body(response_format={"type": "json_object"}), "not supported", "body"),
    (body(reasoning_effort="low"), "thinking_token_budget", "body"),
    (body(temperature="hot"), "valid number", "temperature"),
    (body(temperature=-1), "temperature must be 0 (greedy) or", None),
    (body(top_p=0), "top_p must be in (0, 1]", None),
    (body(seed=-1), "seed must be in", None),
    (body(thinking_token_budget=-1), "greater than or equal to 0", "thinking_token_budget"),
    (body(thinking_token_budget=True), "valid integer", "thinking_token_budget"),
    (body(max_tokens=0), "greater than or equal to 1", "max_tokens"),
    (body(max_tokens=5, max_completion_tokens=6), "the same thing", "body"),
    (body(max_tokens=9), "leaves no token for the solution", None),
    (body(max_tokens=20, solution_token_budget=12), "less than the budgets within it", None),
    (body(solution_token_budget=5000), "5000", None),
    (body(n=0), "greater than or equal to 1", "n"),
    (body(n=129), "less than or equal to 128", "n"),
    (body(logit_bias={"x": 1}), "token ids", "logit_bias"),
    (body(logit_bias={"99999": 1}), "outside the model's vocabulary", None),
    (body(stop=""), "non-empty strings", None),
    (body(messages=[]), "at least 1 item", "messages"),
    (body(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "'text'", "messages[0]"),
    (body(messages=[{"role": "assistant", "tool_calls": [1]}]), "'tool_calls'", "messages[0]"),
    (body(messages=[{"content": "?"}]), "Field required", "messages[0].role"),
    (body(stream_options={"include_usage": True}), "stream: true", "body"),
    (body(chat_template_kwargs={"chat_template": "x"}), "chat_template", "chat_template_kwargs"),
    (body(messages=[{"role": "user", "content": "9 " * 600}]), "no room for an answer", None),
]


@pytest.mark.parametrize(("request_body", "says", "param"), REFUSED, ids=[says for _, says, _ in REFUSED])
def test_refused_chats(server, request_body, says, param):
    error = refused(server.http.post(CHAT, json=request_body))
    assert says in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"prompt": ""}, "none of them empty"),
        ({"prompt": []}, "none of them empty"),
        ({"prompt": [[1, 2], "x", 3]}, "none of them empty"),
        ({"prompt": [99999]}, "outside the model's vocabulary"),
        ({"prompt": "x", "echo": True}, "the prompt is not given back"),
        ({"prompt": "x", "logprobs": 2}, "only the drawn token's"),
        ({"prompt": "x", "best_of": 4}, "choose among the samples"),
        ({"prompt": "x", "messages": MESSAGES}, "messages"),
        ({}, "Field required"),
    ],
)
def test_refused_completions(server, more, says):
    assert says in refused(server.http.post(TEXT, json={"model": "tiny"} | more))["message"]


def test_what_is_no_request(server):
    broken = server.http.post(CHAT, content=b'{"model": ', headers={"content-type": "application/json"})
    assert refused(broken)["code"] == "invalid_json"
    assert "JSON object" in refused(server.http.post(CHAT, json=[1]))["message"]
    assert "/nowhere" in refused(server.http.get("/nowhere"), 404)["message"]
    assert "GET" in refused(server.http.get(CHAT), 405)["message"]
    assert refused(server.http.post(CHAT, json=body(model="x")), 404)["code"] == "model_not_found"


def test_harmless_fields_are_taken(server):
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "reasoning_effort": None,
        "top_logprobs": 0,
        "logit_bias": None,
        "max_tokens": 12,
        "chat_template_kwargs": {"enable_thinking": True},
    }
    plain = server.http.post(CHAT, json=body(max_tokens=12)).json()["choices"]
    more = server.http.post(CHAT, json=body(**harmless)).json()["choices"]
    plain[0]["elastic"].pop("seed"), more[0]["elastic"].pop("seed")
    assert more == plain


def test_a_request_that_is_over_before_it_begins(server, reference):
    turns = [*MESSAGES, {"role": "assistant", "content": "</think>"}]
    for stream in (False, True):
        answer = server.http.post(
            CHAT, json=body(messages=turns, solution_token_budget=0, stream=stream, n=2)
        )
        assert answer.status_code == 200, answer.text
    whole = server.http.post(CHAT, json=body(messages=turns, solution_token_budget=0)).json()
    assert whole["choices"][0]["message"]["content"] == ""
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["prompt_tokens"] == len(reference.encode(turns))
    assert whole["usage"]["completion_tokens"] == 0


def test_refusals_hold_nothing(server):
    """A list whose second prompt can never run: the first goes, too."""
    before = server.stats()
    prompts = {"model": "tiny", "prompt": [[1, 2], [99999]], "max_tokens": 5}
    assert "vocabulary" in refused(server.http.post(TEXT, json=prompts))["message"]
    server.until(lambda: server.thread.open_samples == 0)
    after = server.stats()
    assert (after["free_pages"], after["waiting"]) == (before["free_pages"], 0)


def test_a_client_that_goes_gives_its_pages_back(serving):
    with serving() as running:
        before = running.stats()["free_pages"]
        with running.http.stream("POST", CHAT, json=body(stream=True, **ENDLESS)) as answer:
            received = chunks(answer.iter_lines())
            for _ in range(4):
                assert next(received)["choices"]
            running.gate.close()  # so it cannot end by itself
            assert running.stats()["reserved_pages"] > 0
        running.until(running.all_cancelled)
        running.gate.open()
        running.until(lambda: running.thread.open_samples == 0)
        stats = running.stats()
        assert (stats["used_pages"], stats["reserved_pages"], stats["running"]) == (0, 0, 0)
        assert stats["free_pages"] == before
        assert running.metric('elastic_decode_requests_total{endpoint="chat",outcome="aborted"}') == 1
        assert running.metric('elastic_decode_samples_total{reason="abort"}') == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_while_it_waits(serving, stream):
    """Neither a request without an answer yet nor one without a row keeps anything."""
    with serving() as running:
        running.gate.close()
        hasty = [socket.create_connection((running.http.base_url.host, running.http.base_url.port))]
        hasty.append(socket.create_connection(hasty[0].getpeername()))
        content = json.dumps(body(n=20, stream=stream, **ENDLESS)).encode()
        for connection in hasty:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        running.until(lambda: running.thread.open_samples == 40)  # more than there are rows
        for connection in hasty:
            connection.close()
        running.until(running.all_cancelled)
        running.gate.open()
        running.until(lambda: running.thread.open_samples == 0)
        stats = running.stats()
        assert (stats["reserved_pages"], stats["running"], stats["waiting"]) == (0, 0, 0)
        aborted = 'elastic_decode_requests_total{endpoint="chat",outcome="aborted"}'
        running.until(lambda: running.metric(aborted) == 2)


def test_nothing_turns_while_there_is_nothing_to_do(serving):
    with serving() as running:
        assert running.http.post(CHAT, json=body(max_tokens=12)).status_code == 200
        before = running.gate.steps
        assert before > 0
        for _ in range(20):
            running.stats()
        assert running.gate.steps == before


def test_overload_is_answered_at_once(serving, reference):
    config = dataclasses.replace(reference.config, max_batch=2)
    with serving(config, max_waiting=1) as running:
        error = refused(running.http.post(CHAT, json=body(n=4)))
        assert error["code"] == "too_many_samples"
        running.gate.close()
        streams = [running.http.stream("POST", CHAT, json=body(stream=True, **ENDLESS, n=n)) for n in (1, 2)]
        received = [chunks(stream.__enter__().iter_lines()) for stream in streams]
        assert all(next(each) for each in received)  # the engine has them
        assert running.thread.open_samples == 3
        answer = running.http.post(CHAT, json=body(max_tokens=12))
        assert refused(answer, 429)["code"] == "queue_full"
        assert answer.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):
            running.client.completions.create(model="tiny", prompt="1 1 1 = 3", max_tokens=3)
        streams[0].__exit__(None, None, None)
        running.gate.open()
        running.until(lambda: running.thread.open_samples <= 2)
        assert running.http.post(CHAT, json=body(max_tokens=12)).status_code == 200
        streams[1].__exit__(None, None, None)
        running.until(lambda: running.thread.open_samples == 0)
        overloaded = 'elastic_decode_requests_total{{endpoint="{}",outcome="overloaded"}}'
        assert running.metric(overloaded.format("chat")) == 1
        assert running.metric(overloaded.format("completions")) == 1


def test_an_engine_that_fails_is_told_of(serving):
    with serving() as running:
        assert running.http.get("/health").json() == {"status": "ok"}
        running.gate.close()
        with running.http.stream("POST", CHAT, json=body(stream=True, **ENDLESS)) as answer:
            received = chunks(answer.iter_lines())
            assert next(received)["choices"]
            running.gate.failure = RuntimeError("a wire came loose")
            [last] = list(received)
        assert last["error"]["code"] == "engine_failed"
        assert "a wire came loose" in last["error"]["message"]
        error = refused(running.http.post(CHAT, json=body(max_tokens=12)), 500)
        assert "a wire came loose" in error["message"]
        assert error["type"] == "server_error"
        with pytest.raises(openai.InternalServerError):
            running.client.completions.create(model="tiny", prompt="1 1 1 = 3")
        health = running.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert running.metric('elastic_decode_requests_total{endpoint="chat",outcome="failed"}') == 2


def test_a_request_that_waits_when_the_engine_fails(serving):
    with serving() as running:
        running.gate.failure = RuntimeError("a wire came loose")
        error = refused(running.http.post(CHAT, json=body(max_tokens=12)), 500)
        assert "a wire came loose" in error["message"]


def test_logits_without_a_candidate_end_one_request_only(serving, reference):
    nothing = {str(token): float("-inf") for token in range(reference.model_config.vocab_size)}
    with serving() as running:
        running.gate.close()
        with running.http.stream("POST", CHAT, json=body(stream=True, max_tokens=30)) as answer:
            received = chunks(answer.iter_lines())
            next(received)
            content = json.dumps(body(max_tokens=20, logit_bias=nothing))
            running.gate.open()
            headers = {"content-type": "application/json"}
            error = refused(running.http.post(CHAT, content=content, headers=headers), 500)
            assert "NonFiniteLogits" in error["message"]
            assert list(received)[-1]["choices"][0]["finish_reason"]
        assert running.http.get("/health").status_code == 200
        assert running.http.post(CHAT, json=body(max_tokens=12)).status_code == 200
        assert running.thread.open_samples == 0


def test_what_is_under_way_when_the_server_ends(serving):
    with serving() as running:
        running.gate.close()
        with running.http.stream("POST", CHAT, json=body(stream=True, **ENDLESS)) as answer:
            received = chunks(answer.iter_lines())
            next(received)
            running.loop.call_soon_threadsafe(lambda: running.loop.create_task(running.thread.stop()))
            [last] = list(received)
        assert last["error"]["code"] == "stopping"
        assert refused(running.http.post(CHAT, json=body()), 503)["code"] == "stopping"


def test_what_does_not_end_in_time_is_cut_off(serving):
    with serving(grace=0) as running:
        running.gate.close()
        with running.http.stream("POST", CHAT, json=body(stream=True, **ENDLESS)) as answer:
            received = chunks(answer.iter_lines())
            next(received)
            running.quit()
            with pytest.raises(httpx.RemoteProtocolError):
                list(received)
    assert (running.left["reserved_pages"], running.left["running"], running.left["waiting"]) == (0, 0, 0)


def test_metrics(serving):
    with serving() as running:
        assert running.metric('elastic_decode_tokens_total{phase="think",provenance="forced"}') == 0
        answers = [
            running.http.post(CHAT, json=body(thinking_token_budget=think, solution_token_budget=4)).json()
            for think in (3, 9, 300)
        ]
        usages = [answer["usage"] for answer in answers]
        ends = [answer["choices"][0]["elastic"]["think_end"] for answer in answers]
        assert ends == ["forced", "forced", "natural"]
        running.http.post(CHAT, json=body(wishes=1))

        page = running.http.get("/metrics")
        assert page.headers["content-type"].startswith("text/plain")
        value = running.metric
        tokens = 'elastic_decode_tokens_total{{phase="{}",provenance="{}"}}'
        assert value(tokens.format("think", "sampled")) == sum(usage["think_tokens"] for usage in usages)
        assert value(tokens.format("solve", "sampled")) == sum(usage["solve_tokens"] for usage in usages)
        assert value(tokens.format("think", "forced")) == sum(usage["forced_tokens"] for usage in usages) == 2
        assert value("elastic_decode_prompt_tokens_total") == sum(u["prompt_tokens"] for u in usages)
        assert value('elastic_decode_think_ends_total{end="forced"}') == 2
        assert value('elastic_decode_think_ends_total{end="natural"}') == 1
        assert value('elastic_decode_requests_total{endpoint="chat",outcome="completed"}') == 3
        assert value('elastic_decode_requests_total{endpoint="chat",outcome="refused"}') == 1
        assert value("elastic_decode_time_to_first_token_seconds_count") == 3
        emitted = sum(usage["completion_tokens"] for usage in usages)
        assert value("elastic_decode_inter_token_latency_seconds_count") == emitted - 3
        assert value("elastic_decode_request_duration_seconds_count") == 3
        assert value("elastic_decode_kv_pages_total") == running.stats()["num_pages"]
        assert value("elastic_decode_samples_limit") == 32 + 128
        for gauge in ("rows_running", "rows_waiting", "kv_pages_reserved", "kv_pages_used", "samples_open"):
            assert value(f"elastic_decode_{gauge}") == 0

        running.gate.close()
        with running.http.stream("POST", CHAT, json=body(stream=True, **ENDLESS)) as answer:
            received = chunks(answer.iter_lines())
            assert next(received)
            assert value("elastic_decode_samples_open") == 1
            assert value("elastic_decode_rows_waiting") == 1
            running.gate.open()
            assert [next(received)["object"] for _ in range(3)] == ["chat.completion.chunk"] * 3
            running.gate.close()
            assert value("elastic_decode_rows_running") == 1
            assert value("elastic_decode_kv_pages_reserved") > value("elastic_decode_kv_pages_used") > 0
