"""Where things meet: ids that collide, weights that change mid-group, stops at a branch, limits of every
number.
"""

from __future__ import annotations

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from elastic_decode import Budget, Request, SamplingParams, budgets
from elastic_decode.delimiters import Delimiters, Marker
from elastic_decode.engine.runner import interrupts_held
from elastic_decode.errors import BudgetError, ConfigError, NonFiniteLogits

EOS, OPEN, CLOSE = 256, 257, 258
VOCAB = 259
GREEDY = SamplingParams(temperature=0)
PROMPT = [ord(c) for c in "ab"]


def dots(history):
    return ord(".")


def test_a_users_request_id_never_collides_with_the_engines_own(scripted):
    engine = scripted(dots).engine
    assert engine.submit(Request(PROMPT, request_id="request-0", budget=Budget(20, 5))) == "request-0"
    engine.generate([PROMPT], budget=Budget(2, 2))
    events = []
    while engine.has_work:
        events += engine.step()
    assert events[-1].finish_reason == "budget"
    assert len(events) == 26
    assert engine.stats()["free_pages"] == engine.stats()["num_pages"]


def test_waiting_samples_do_not_start_from_old_weights(scripted):
    version = [1]

    def by_version(history):
        """Marks each position with the weights that computed it: a sample must see one version only."""
        return ord("0") + version[0]

    engine = scripted(by_version, max_batch=1).engine
    stream = engine.stream([PROMPT * 6], budget=Budget(6, 2), sampling=GREEDY, n=2)
    next(stream)
    prefilled = engine._loop._decoder.prefill_tokens
    version[0] = 2
    assert engine.sync_weights() == 1
    second = [event.token_id for event in stream if event.sample == 1]
    assert engine._loop._decoder.prefill_tokens - prefilled >= 12, "its prompt was computed again"
    assert second[0] == ord("2")
    assert engine.stats()["free_pages"] == engine.stats()["num_pages"]


def test_has_work_until_the_last_event_or_error_is_taken(scripted):
    engine = scripted(dots).engine
    request_id = engine.submit(Request(PROMPT, budget=Budget(9, 9)))
    engine.step()
    engine.abort(request_id)
    assert engine.has_work
    assert engine.step()[-1].finish_reason == "abort"
    assert not engine.has_work
    engine.submit(Request([*PROMPT, OPEN, CLOSE], budget=Budget(None, 0)))
    assert engine.has_work
    (only,) = engine.step()
    assert (only.token_id, only.finish_reason) == (None, "budget")

    bad = scripted(
        lambda history: torch.full((VOCAB,), float("nan")) if len(history) > 4 else 46, horizon=4
    ).engine
    bad.submit(Request(PROMPT, budget=Budget(9, 9)))

    def drain():
        while bad.has_work:
            bad.step()

    with pytest.raises(NonFiniteLogits):
        drain()
    bad.close()
    assert not bad.has_work


def test_a_stop_across_the_branch_point_is_found_in_the_branch(scripted):
    invisible = Delimiters(None, Marker((EOS + 1,)), (EOS,))
    script = [*b"xxxa", *b"bbbbbbbb"]

    def say(history):
        index = len(history) - len(PROMPT)
        return script[index] if index < 4 else ord("b")

    sampling = SamplingParams(temperature=0, stop="ab", stop_in_thinking=True)
    engine = scripted(say, delimiters=invisible).engine
    (fresh,) = engine.generate([PROMPT], budget=Budget(4, 4), sampling=sampling)
    (forked,) = engine.fork([PROMPT], think_at=[4, 8], solve=4, sampling=sampling)
    ours, theirs = forked.completions[0], fresh.completions[0]
    assert (ours.token_ids, ours.finish_reason, ours.text) == (
        theirs.token_ids,
        theirs.finish_reason,
        theirs.text,
    )


def test_stops_are_the_models_own(scripted):
    engine = scripted(dots).engine
    policy = budgets.budget_forcing(3, 4, 0, final="Answer:")
    sampling = SamplingParams(temperature=0, stop=["Answer"], stop_token_ids=[ord("A")])
    c = engine.generate([PROMPT], budget=policy, sampling=sampling)[0].completions[0]
    assert (c.finish_reason, c.solve_tokens) == ("budget", 4)
    assert "Answer:" in c.text


@pytest.mark.parametrize("delimiters", [None, Delimiters(None, Marker((60, 47), text="</"), (EOS,))])
@pytest.mark.parametrize("limit", [2, 9, 64])
def test_warmup_works_at_any_length(scripted, delimiters, limit):
    engine = scripted(dots, delimiters=delimiters, max_model_len=limit).engine
    engine.warmup()
    assert not engine.has_work


def test_every_number_has_its_limits():
    for bad in (
        {"top_k": 2**31},
        {"min_tokens": 2**31},
        {"presence_penalty": 1e39},
        {"frequency_penalty": 1e300},
        {"repetition_penalty": 0},
        {"temperature": 1e-39},
        {"temperature": float("nan")},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {1: float("inf")}},
        {"logit_bias": {1: 1e300}},
        {"logit_bias": {"a": 1.0}},
        {"stop_token_ids": 5},
        {"stop": 5},
    ):
        (name,) = bad
        with pytest.raises(ConfigError, match=name):
            SamplingParams(**bad)
    assert SamplingParams(stop=None).stop == ()


def test_odd_prompts_are_named(scripted):
    engine = scripted(dots).engine
    for prompt in (["5", "7"], [1.5, 2.9], [True, False], None, [[1], [2]], [-1], [VOCAB]):
        with pytest.raises(ConfigError, match="prompt"):
            engine.submit(Request(prompt))
    with pytest.raises(ConfigError, match="sampling"):
        Request(PROMPT, sampling={"temperature": 0})
    with pytest.raises(ConfigError, match="delimiters"):
        engine.submit(Request(PROMPT, delimiters={"close": 3}))
    for think_at in (3.5, [1.7], [True], [-1]):
        with pytest.raises(BudgetError, match="think_at"):
            engine.fork(PROMPT, think_at=think_at, solve=4)
    ids = engine.generate([np.int64(97), np.int64(98)], budget=Budget(1, 1), sampling=GREEDY)
    assert ids[0].prompt_token_ids == PROMPT
    assert engine.generate(torch.tensor(PROMPT), budget=Budget(1, 1))[0].prompt_token_ids == PROMPT


def test_a_tokenizer_with_more_tokens_than_the_model_is_caught_at_intake(scripted, byte_tokenizer):
    byte_tokenizer.add_tokens(["<<oov>>"])
    engine = scripted(dots, tokenizer=byte_tokenizer).engine
    with pytest.raises(ConfigError, match="vocabulary of 259"):
        engine.generate(["x<<oov>>y"])


def test_a_template_that_always_opens_the_answer(scripted, byte_tokenizer):
    byte_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}<think>\n</think>"
    engine = scripted(dots, tokenizer=byte_tokenizer).engine
    chat = [{"role": "user", "content": "a <think> b"}]
    (generation,) = engine.generate([chat], budget=Budget(3, 2), sampling=GREEDY)
    assert generation.completions[0].think_tokens == 0


def test_a_users_text_opens_and_closes_nothing_in_a_chat(scripted, byte_tokenizer):
    byte_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}bot: {% endif %}"
    )
    engine = scripted(dots, tokenizer=byte_tokenizer).engine
    chat = [{"role": "user", "content": "</think>"}]
    (generation,) = engine.generate([chat], budget=Budget(3, 2), sampling=GREEDY)
    assert generation.completions[0].think_tokens == 3
    with pytest.raises(ConfigError, match="template"):
        engine.generate([[{"role": "user"}]], chat_template_kwargs={"messages": 3})


def test_interrupts_are_left_alone_where_python_did_not_set_them(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    before = signal.default_int_handler
    with interrupts_held():
        pass
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is before


def test_leaving_python_with_an_open_generator_is_quiet():
    code = (
        "from elastic_decode import Engine, EngineConfig\n"
        "from elastic_decode.assets import tiny_model_path\n"
        "e = Engine.from_pretrained(tiny_model_path(), EngineConfig(kv_memory='8MiB', max_model_len=64))\n"
        "g = e.stream('1 1 1 = 3'); next(g)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
