"""The official client is the judge: sync and async, streamed and whole."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import openai
import pytest

from elastic_decode import Budget, Engine, SamplingParams, budgets

PROBLEMS = ["9 1 6 = 3", "9 3 7 = 20", "4 4 8 = 24", "3 5 2 = 16", "1 1 1 = 3", "7 2 5 = 9"]
GREEDY = SamplingParams(temperature=0)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def asked(text: str, think: int = 15, solve: int = 4, **more: Any) -> dict[str, Any]:
    budget = {"thinking_token_budget": think, "solution_token_budget": solve}
    return {
        "model": "tiny",
        "messages": chat(text),
        "temperature": 0,
        "extra_body": budget | more.pop("body", {}),
    } | more


def expected(reference: Engine, text: str, think: int = 15, solve: int = 4, **how: Any) -> Any:
    [generation] = reference.generate(chat(text), budget=Budget(think, solve), sampling=GREEDY, **how)
    return generation


@pytest.mark.parametrize("think", [0, 7, 15, 400])
def test_thinking_apart_from_the_solution(server, reference, think):
    answer = server.client.chat.completions.create(**asked(PROBLEMS[0], think))
    generation = expected(reference, PROBLEMS[0], think)
    want = generation.completions[0]
    [choice] = answer.choices
    assert (choice.message.reasoning_content or "") == want.thinking
    assert choice.message.content == want.solution
    assert choice.message.role == "assistant"
    assert choice.finish_reason == ("stop" if want.finish_reason == "eos" else "length")
    assert choice.elastic == {
        "finish_reason": want.finish_reason,
        "think_end": want.think_end,
        "think_tokens": want.think_tokens,
        "solve_tokens": want.solve_tokens,
        "forced_tokens": sum(want.forced),
        "seed": want.seed,
    } | {"seed": choice.elastic["seed"]}  # drawn, greedy or not
    usage = answer.usage
    assert usage.prompt_tokens == len(generation.prompt_token_ids)
    assert usage.completion_tokens == len(want.token_ids) == usage.total_tokens - usage.prompt_tokens
    assert usage.completion_tokens_details.reasoning_tokens == want.phases.count("think")
    assert (usage.think_tokens, usage.solve_tokens) == (want.think_tokens, want.solve_tokens)
    assert usage.forced_tokens == sum(want.forced) == (1 if want.think_end == "forced" else 0)


@pytest.mark.parametrize("think", [0, 7, 400])
def test_a_stream_joined_is_the_whole_answer(server, reference, think):
    generation = expected(reference, PROBLEMS[1], think)
    want = generation.completions[0]
    thinking, solution, reasons, last_usage, roles = "", "", [], None, []
    stream = server.client.chat.completions.create(
        **asked(PROBLEMS[1], think, stream=True, stream_options={"include_usage": True})
    )
    for chunk in stream:
        last_usage = chunk.usage
        for choice in chunk.choices:
            assert chunk.usage is None
            thinking += getattr(choice.delta, "reasoning_content", None) or ""
            solution += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            if choice.finish_reason:
                reasons.append((choice.finish_reason, choice.elastic["think_end"]))
    assert (thinking, solution) == (want.thinking, want.solution)
    assert roles == ["assistant"]
    assert reasons == [("stop" if want.finish_reason == "eos" else "length", want.think_end)]
    assert last_usage.completion_tokens == len(want.token_ids)
    assert last_usage.prompt_tokens == len(generation.prompt_token_ids)
    assert last_usage.forced_tokens == sum(want.forced)


def test_thirty_two_at_once_are_what_generate_gives(server, reference):
    wanted = [(PROBLEMS[i % len(PROBLEMS)], 2 + i) for i in range(32)]
    prompts = [chat(text) for text, _ in wanted]
    generations = reference.generate(
        prompts, budget=[Budget(think, 4) for _, think in wanted], sampling=GREEDY
    )

    async def whole(client: openai.AsyncOpenAI, text: str, think: int) -> list[int]:
        answer = await client.chat.completions.create(**asked(text, think, logprobs=True))
        logprobs = answer.choices[0].logprobs
        return [entry["token_id"] for entry in logprobs.reasoning_content] + [
            entry.token_id for entry in logprobs.content
        ]

    async def streamed(client: openai.AsyncOpenAI, text: str, think: int) -> list[int]:
        ids = []
        request = asked(text, think, logprobs=True, stream=True)
        async for chunk in await client.chat.completions.create(**request):
            for choice in chunk.choices:
                if choice.logprobs is not None:
                    ids += [entry["token_id"] for entry in choice.logprobs.reasoning_content]
                    ids += [entry.token_id for entry in choice.logprobs.content]
        return ids

    async def all_of_them() -> list[list[int]]:
        async with server.async_client() as client:
            kinds = (whole, streamed)
            return await asyncio.gather(
                *[kinds[i % 2](client, text, think) for i, (text, think) in enumerate(wanted)]
            )

    got = asyncio.run(all_of_them())
    assert got == [generation.completions[0].token_ids for generation in generations]
    assert server.stats()["reserved_pages"] == 0


def test_samples_and_seeds(server, reference):
    sampling = SamplingParams(temperature=1.0, seed=11)
    [generation] = reference.generate(chat(PROBLEMS[2]), budget=Budget(10, 4), sampling=sampling, n=3)
    request = asked(PROBLEMS[2], 10, n=3, seed=11) | {"temperature": 1.0}
    answer = server.client.chat.completions.create(**request)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == [
        completion.solution for completion in generation.completions
    ]
    assert len({choice.message.reasoning_content for choice in answer.choices}) > 1
    assert {choice.elastic["seed"] for choice in answer.choices} == {11}
    thinking = {0: "", 1: "", 2: ""}
    for chunk in server.client.chat.completions.create(**request, stream=True):
        for choice in chunk.choices:
            thinking[choice.index] += getattr(choice.delta, "reasoning_content", None) or ""
    assert list(thinking.values()) == [completion.thinking for completion in generation.completions]


def test_completions_of_strings_and_ids(server, reference):
    ids = reference.encode(chat(PROBLEMS[0]))
    [generation] = reference.generate([ids], budget=Budget(9, 4), sampling=GREEDY)
    want = generation.completions[0]
    how = {
        "model": "tiny",
        "temperature": 0,
        "extra_body": {"thinking_token_budget": 9, "solution_token_budget": 4},
    }
    answer = server.client.completions.create(prompt=ids, logprobs=0, **how)
    assert answer.choices[0].text == want.text
    assert answer.choices[0].logprobs.token_ids == want.token_ids
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(want.logprobs)
    assert answer.choices[0].logprobs.forced == want.forced
    assert answer.usage.prompt_tokens == len(ids)
    streamed = server.client.completions.create(prompt=ids, stream=True, **how)
    assert "".join(choice.text for chunk in streamed for choice in chunk.choices) == want.text

    text = reference.tokenizer.decode(ids)
    both = reference.generate([text, text + " "], budget=Budget(9, 4), sampling=GREEDY)
    answer = server.client.completions.create(prompt=[text, text + " "], n=2, **how)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [
        generation.completions[0].text for generation in both for _ in range(2)
    ]
    assert answer.usage.prompt_tokens == sum(len(generation.prompt_token_ids) for generation in both)


def test_max_tokens_alone_is_a_total(server, reference):
    [generation] = reference.generate(chat(PROBLEMS[0]), budget=budgets.truncate(6), sampling=GREEDY)
    want = generation.completions[0]
    for name in ("max_tokens", "max_completion_tokens"):
        answer = server.client.chat.completions.create(
            model="tiny", messages=chat(PROBLEMS[0]), temperature=0, **{name: 6}
        )
        assert answer.usage.completion_tokens == 6
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].message.reasoning_content == want.thinking
        assert answer.choices[0].message.content == want.solution == ""


def test_stops_penalties_and_the_rest_reach_the_engine(server, reference):
    said = {
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.25,
        "stop": ["-"],
        "logit_bias": {"5": -3.5},
    }
    ours = {"top_k": 7, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 2, "stop_in_thinking": True}
    params = SamplingParams(temperature=0.8, seed=3, **said | ours | {"logit_bias": {5: -3.5}})
    [generation] = reference.generate(chat(PROBLEMS[3]), budget=Budget(12, 4), sampling=params)
    want = generation.completions[0]
    request = asked(PROBLEMS[3], 12, body=ours, seed=3, logprobs=True, **said) | {"temperature": 0.8}
    [choice] = server.client.chat.completions.create(**request).choices
    entries = choice.logprobs.reasoning_content
    assert [entry["token_id"] for entry in entries] + [e.token_id for e in choice.logprobs.content] == (
        want.token_ids
    )
    assert [entry["logprob"] for entry in entries] == pytest.approx(want.logprobs[: len(entries)])
    assert bytes(entries[0]["bytes"]).decode() == entries[0]["token"]
    assert choice.message.reasoning_content == want.thinking
    assert choice.elastic["finish_reason"] == want.finish_reason


def test_ignore_eos_and_an_opened_answer(server, reference):
    """A chat that ends in an assistant's turn is continued."""
    turns = [*chat(PROBLEMS[0]), {"role": "assistant", "content": "</think>"}]
    [generation] = reference.generate(
        [turns], budget=Budget(5, 20), sampling=SamplingParams(temperature=0, ignore_eos=True)
    )
    request = asked(PROBLEMS[0], 5, 20, body={"ignore_eos": True}) | {"messages": turns}
    answer = server.client.chat.completions.create(**request)
    assert answer.choices[0].message.content == generation.completions[0].solution
    assert answer.choices[0].message.reasoning_content is None
    assert (answer.usage.think_tokens, answer.usage.solve_tokens) == (0, 20)


def test_content_in_parts_is_one_text(server):
    whole = server.client.chat.completions.create(**asked("9 1 6 = 3"))
    parts = [{"type": "text", "text": "9 1 "}, {"type": "text", "text": "6 = 3"}]
    split = server.client.chat.completions.create(
        **asked("") | {"messages": [{"role": "user", "content": parts, "name": None}]}
    )
    assert split.choices[0].message == whole.choices[0].message


def test_models(server):
    [model] = server.client.models.list().data
    assert (model.id, model.object, model.max_model_len) == ("tiny", "model", 512)
    assert server.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        server.client.models.retrieve("other")


def test_errors_are_the_clients_own(server):
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.chat.completions.create(**asked("1 1 1 = 3", body={"wishes": 3}))
    assert caught.value.code == "unknown_field"
    assert caught.value.param == "wishes"
    with pytest.raises(openai.NotFoundError):
        server.client.chat.completions.create(**asked("1 1 1 = 3") | {"model": "gpt"})


def test_api_key(serving):
    with serving(api_key="secret") as running:
        assert running.client.models.list().data[0].id == "tiny"
        assert running.http.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = running.http.get("/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(**running.how | {"api_key": "wrong"}).models.list()


def test_the_operators_defaults_hold_where_a_request_is_silent(serving, reference):
    defaults = {"policy": budgets.elastic(10, 3), "sampling": GREEDY, "model_name": "mine"}
    want = expected(reference, PROBLEMS[1], 10, 3).completions[0]
    less = expected(reference, PROBLEMS[1], 4, 3).completions[0]
    with serving(**defaults) as running:
        answer = running.client.chat.completions.create(model="mine", messages=chat(PROBLEMS[1]))
        assert answer.choices[0].message.reasoning_content == want.thinking
        assert answer.choices[0].message.content == want.solution
        answer = running.client.chat.completions.create(
            model="mine", messages=chat(PROBLEMS[1]), max_completion_tokens=7
        )
        assert answer.choices[0].message.reasoning_content == less.thinking
        assert answer.choices[0].message.content == less.solution


def test_several_tokens_at_a_time(serving, reference):
    """With a horizon several tokens of a sample come at once, and its end may be among them."""
    want = expected(reference, PROBLEMS[0], 9).completions[0]
    with serving(dataclasses.replace(reference.config, horizon=4)) as running:
        chunks = list(running.client.chat.completions.create(**asked(PROBLEMS[0], 9, stream=True)))
        deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
        assert "".join(delta.content or "" for delta in deltas) == want.solution
        thinking = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
        assert "".join(thinking) == want.thinking
        assert len(chunks) < len(want.token_ids)
        counted = "elastic_decode_inter_token_latency_seconds_count"
        assert running.metric(counted) == len(want.token_ids) - 1
