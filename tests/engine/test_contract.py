"""The public contract: generators, groups, forks, stops, aborts, errors; on the scripted model."""

from __future__ import annotations

import gc
import random
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch

from elastic_decode import Budget, EngineConfig, Phase, Request, SamplingParams, budgets
from elastic_decode.errors import (
    BudgetError,
    CapacityError,
    ConfigError,
    EngineClosed,
    NonFiniteLogits,
)

EOS, OPEN, CLOSE = 256, 257, 258
VOCAB = 259
GREEDY = SamplingParams(temperature=0)
PROMPT = [ord(c) for c in "ab"]


def dots(history):
    return ord(".")


def noisy(history):
    """A full row of logits that depends on the whole history: what a wrong page or position would change."""
    generator = torch.Generator().manual_seed(hash(tuple(history)) % (1 << 31))
    logits = torch.randn(VOCAB, generator=generator)
    logits[EOS] -= 1.0
    return logits


def lists_of(generation):
    return [(c.token_ids, c.forced, c.phases, c.finish_reason, c.think_end) for c in generation.completions]


# ---- the four calls agree ----


def test_stream_generate_rollout_and_submit_give_the_same_tokens(scripted):
    prompts = [PROMPT, [7, 8, 9, 10, 11, 12], "hello there", [1] * 9]
    sampling = [SamplingParams(temperature=0.8, seed=seed) for seed in (1, 2, 3, 4)]
    budget = Budget(think=12, solve=7)
    engine = scripted(noisy).engine
    whole = engine.generate(prompts, budget=budget, sampling=sampling, n=2)
    assert [generation.index for generation in whole] == [0, 1, 2, 3]

    rolled = {
        generation.index: generation
        for generation in engine.rollout(prompts, budget=budget, sampling=sampling, n=2)
    }
    assert [lists_of(rolled[i]) for i in range(4)] == [lists_of(generation) for generation in whole]

    streamed: dict[tuple[int, int], list] = {}
    texts: dict[tuple[int, int], str] = {}
    for event in engine.stream(prompts, budget=budget, sampling=sampling, n=2):
        streamed.setdefault((event.index, event.sample), []).append(event)
        texts[event.index, event.sample] = texts.get((event.index, event.sample), "") + event.text
    for (index, sample), events in streamed.items():
        completion = whole[index].completions[sample]
        assert [event.token_id for event in events] == completion.token_ids
        assert [event.logprob for event in events] == completion.logprobs
        assert [event.phase for event in events] == completion.phases
        assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [
            completion.finish_reason
        ]
        assert texts[index, sample] == completion.text

    for prompt, params, generation in zip(prompts, sampling, whole, strict=True):
        request_id = engine.submit(Request(prompt, budget=budget, sampling=params))
        events = []
        while engine.has_work:
            events += engine.step()
        assert {event.request_id for event in events} == {request_id}
        assert [event.token_id for event in events] == generation.completions[0].token_ids


def test_sample_zero_of_many_equals_one_and_samples_differ(scripted):
    engine = scripted(noisy).engine
    sampling = SamplingParams(seed=11)
    (one,) = engine.generate(PROMPT, budget=Budget(think=8, solve=8), sampling=sampling)
    (many,) = engine.generate(PROMPT, budget=Budget(think=8, solve=8), sampling=sampling, n=5)
    assert lists_of(many)[0] == lists_of(one)[0]
    assert len({tuple(c.token_ids) for c in many.completions}) == 5
    assert {c.seed for c in many.completions} == {11}


def test_a_drawn_seed_is_reported_and_repeats_the_run(scripted):
    engine = scripted(noisy).engine
    (first,) = engine.generate(PROMPT, budget=Budget(think=8, solve=8))
    seed = first.completions[0].seed
    (again,) = engine.generate(PROMPT, budget=Budget(think=8, solve=8), sampling=SamplingParams(seed=seed))
    assert lists_of(first) == lists_of(again)
    (other,) = engine.generate(PROMPT, budget=Budget(think=8, solve=8))
    assert other.completions[0].seed != seed


def test_results_do_not_depend_on_batch_order_pages_chunks_or_horizon(scripted):
    prompts = [[random.Random(i).randrange(250) for _ in range(1 + 7 * i % 23)] for i in range(12)]
    sampling = [SamplingParams(temperature=0.9, top_p=0.9, seed=i) for i in range(12)]
    budget = Budget(think=9, solve=6)
    expected = [
        lists_of(generation)
        for generation in scripted(noisy, prefix_cache=False).engine.generate(
            prompts, budget=budget, sampling=sampling
        )
    ]
    for options in (
        {"max_batch": 1},
        {"max_batch": 3, "page_size": 1},
        {"page_size": 7, "prefill_tokens": 3},
        {"page_size": 64, "prefill_tokens": 1, "max_batch": 12},
        {"horizon": 2},
        {"horizon": 32, "page_size": 16},
    ):
        engine = scripted(noisy, **options).engine
        order = list(range(12))
        random.Random(str(options)).shuffle(order)
        generations = engine.generate(
            [prompts[i] for i in order], budget=budget, sampling=[sampling[i] for i in order]
        )
        assert [lists_of(generations[order.index(i)]) for i in range(12)] == expected, options


def test_prefix_hits_save_prefill_and_change_nothing(scripted):
    shared = list(range(40))
    prompts = [[*shared, 100 + i] for i in range(4)]
    made = scripted(noisy)
    fresh = scripted(noisy, prefix_cache=False)
    plain = fresh.engine.generate(prompts, budget=Budget(think=4, solve=4), sampling=GREEDY)
    first = made.engine.generate(prompts[:1], budget=Budget(think=4, solve=4), sampling=GREEDY)
    computed = made.decoder.prefill_tokens
    rest = made.engine.generate(prompts[1:], budget=Budget(think=4, solve=4), sampling=GREEDY)
    assert made.engine.stats()["prefix_hit_tokens"] == 3 * 40
    assert made.decoder.prefill_tokens - computed < 40
    assert [lists_of(g) for g in first + rest] == [lists_of(g) for g in plain]


def test_a_prompt_of_exactly_full_pages_still_computes_its_last_position(scripted):
    engine = scripted(noisy).engine
    prompt = list(range(16))
    first = engine.generate([prompt], budget=Budget(think=3, solve=3), sampling=GREEDY)
    second = engine.generate([prompt], budget=Budget(think=3, solve=3), sampling=GREEDY)
    assert lists_of(first[0]) == lists_of(second[0])
    assert engine.stats()["prefix_hit_tokens"] == 12


def test_new_weights_forget_old_prefixes(scripted):
    made = scripted(noisy)
    prompt = list(range(40))
    made.engine.generate([prompt], budget=Budget(think=2, solve=2), sampling=GREEDY)
    assert made.engine.sync_weights() == 1
    (generation,) = made.engine.generate([prompt], budget=Budget(think=2, solve=2), sampling=GREEDY)
    assert made.engine.stats()["prefix_hit_tokens"] == 0
    assert generation.completions[0].weight_epoch == 1


def test_a_group_computes_its_prompt_once(scripted):
    made = scripted(noisy, prefix_cache=False)
    prompt = list(range(30))
    (generation,) = made.engine.generate(
        prompt, budget=Budget(think=5, solve=5), sampling=SamplingParams(seed=3), n=6
    )
    rows = sum(len(c.token_ids) for c in generation.completions)
    assert made.decoder.prefill_tokens <= 30 + rows + 6
    for sample, completion in enumerate(generation.completions):
        assert completion.token_ids, sample


def test_groups_larger_than_the_batch_and_the_pool_still_finish(scripted):
    engine = scripted(
        noisy, max_batch=2, page_size=4, kv_memory=256 * 12, prefix_cache=False, max_model_len=40
    ).engine
    assert engine.stats()["num_pages"] <= 20
    sampling = SamplingParams(seed=5)
    small = [
        lists_of(g)
        for g in engine.generate([[1] * 9, [2] * 17], budget=Budget(think=5, solve=5), sampling=sampling, n=7)
    ]
    wide = scripted(noisy, max_batch=16).engine
    assert small == [
        lists_of(g)
        for g in wide.generate([[1] * 9, [2] * 17], budget=Budget(think=5, solve=5), sampling=sampling, n=7)
    ]
    assert engine.stats()["free_pages"] == engine.stats()["num_pages"]


# ---- fork ----


@pytest.mark.parametrize("script", ["noisy", "dots", "closes", "eos"])
def test_fork_equals_a_fresh_run_at_every_budget(scripted, script):
    say = {
        "noisy": noisy,
        "dots": dots,
        "closes": lambda history: CLOSE if len(history) == 9 else noisy(history),
        "eos": lambda history: EOS if len(history) == 9 else noisy(history),
    }[script]
    prompts = [[5, 6, 7], [5, 6, 7, 8, 9], PROMPT]
    sampling = [SamplingParams(temperature=0.7, seed=i) for i in range(3)]
    think_at = [6, 0, 12, 1, 5, 6, 7]
    engine = scripted(say).engine
    forked = engine.fork(prompts, think_at=think_at, solve=5, sampling=sampling)
    for place, budget in enumerate(think_at):
        fresh = engine.generate(prompts, budget=Budget(think=budget, solve=5), sampling=sampling)
        for generation, expected in zip(forked, fresh, strict=True):
            ours, theirs = generation.completions[place], expected.completions[0]
            assert ours.token_ids == theirs.token_ids, (budget, generation.index)
            assert ours.logprobs == theirs.logprobs
            assert ours.forced == theirs.forced
            assert (ours.think_end, ours.finish_reason) == (theirs.think_end, theirs.finish_reason)
            assert (ours.think_tokens, ours.solve_tokens) == (theirs.think_tokens, theirs.solve_tokens)
            assert (ours.text, ours.thinking, ours.solution) == (
                theirs.text,
                theirs.thinking,
                theirs.solution,
            )


def test_fork_thinks_once(scripted):
    made = scripted(dots, max_batch=16)
    made.engine.fork(PROMPT, think_at=[10, 20, 30, 40], solve=5)
    assert made.engine.stats()["decode_steps"] < 60
    assert made.engine.stats()["free_pages"] == made.engine.stats()["num_pages"]


def test_fork_with_one_slot_and_closed_thinking(scripted):
    engine = scripted(noisy, max_batch=1).engine
    forked = engine.fork([PROMPT], think_at=[3, 6, 9], solve=4, sampling=SamplingParams(seed=1))
    wide = scripted(noisy, max_batch=8).engine
    assert lists_of(forked[0]) == lists_of(
        wide.fork([PROMPT], think_at=[3, 6, 9], solve=4, sampling=SamplingParams(seed=1))[0]
    )
    (closed,) = engine.fork([[*PROMPT, OPEN, CLOSE]], think_at=[3, 6], solve=4, sampling=GREEDY)
    assert lists_of(closed)[0] == lists_of(closed)[1]
    with pytest.raises(BudgetError, match="think_at"):
        engine.fork(PROMPT, think_at=[], solve=4)


# ---- stops ----


def say(text):
    def script(history):
        index = len(history) - len(PROMPT)
        return text[index] if index < len(text) else EOS

    return script


def test_stop_strings_act_in_the_solution_only(scripted):
    tokens = [*b"aENDb", CLOSE, *b"xxENDyy"]
    engine = scripted(say(tokens)).engine
    (generation,) = engine.generate([PROMPT], sampling=SamplingParams(temperature=0, stop="END"))
    c = generation.completions[0]
    assert c.token_ids == [*b"aENDb", CLOSE, *b"xxEND"]
    assert (c.finish_reason, c.text, c.solution) == ("stop", "aENDb</think>xx", "xx")
    pieces = [
        event.text
        for event in engine.stream([PROMPT], sampling=SamplingParams(temperature=0, stop=["END", "zzz"]))
    ]
    assert "".join(pieces) == "aENDb</think>xx"
    (inside,) = engine.generate(
        [PROMPT], sampling=SamplingParams(temperature=0, stop="END", stop_in_thinking=True)
    )
    assert (inside.completions[0].text, inside.completions[0].think_end) == ("a", "none")


def test_a_stop_that_never_completes_is_shown_in_the_end(scripted):
    engine = scripted(say([CLOSE, *b"xxEN"])).engine
    pieces = [e.text for e in engine.stream([PROMPT], sampling=SamplingParams(temperature=0, stop="END"))]
    assert "".join(pieces) == "</think>xxEN"


def test_stop_token_ids(scripted):
    engine = scripted(say([*b"a!", CLOSE, *b"b!c"])).engine
    sampling = SamplingParams(temperature=0, stop_token_ids=[ord("!")], seed=0)
    c = engine.generate([PROMPT], sampling=sampling)[0].completions[0]
    assert (c.token_ids, c.finish_reason, c.text) == ([*b"a!", CLOSE, *b"b!"], "stop", "a!</think>b")
    for horizon in (1, 5):
        other = scripted(say([*b"a!", CLOSE, *b"b!c"]), horizon=horizon).engine
        assert other.generate([PROMPT], sampling=sampling)[0].completions[0] == c


def test_streamed_text_never_shows_half_a_character(scripted):
    text = "é€😀x日本"
    engine = scripted(say([*text.encode(), CLOSE, *text.encode()])).engine
    pieces = [event.text for event in engine.stream([PROMPT], sampling=GREEDY)]
    assert "".join(pieces) == f"{text}</think>{text}"
    assert all("\ufffd" not in piece for piece in pieces)
    cut = scripted(say([*text.encode()])).engine
    pieces = [e.text for e in cut.stream([PROMPT], budget=budgets.truncate(4), sampling=GREEDY)]
    assert "".join(pieces) == "é\ufffd", "what stays incomplete shows once the output has ended"


# ---- generators, aborts, exceptions ----


def test_several_generators_advance_together(scripted):
    engine = scripted(noisy).engine
    alone = [
        lists_of(engine.generate([p], budget=Budget(think=6, solve=6), sampling=GREEDY)[0])
        for p in ([1], [2])
    ]
    first = engine.rollout([[1]], budget=Budget(think=6, solve=6), sampling=GREEDY)
    second = engine.stream([[2]], budget=Budget(think=6, solve=6), sampling=GREEDY)
    head = next(second)
    assert lists_of(next(first)) == alone[0]
    assert [head.token_id, *(event.token_id for event in second)] == alone[1][0][0]
    assert not engine.has_work


def test_closing_a_generator_returns_its_pages(scripted):
    engine = scripted(dots).engine
    stream = engine.stream([PROMPT] * 3, budget=Budget(think=50, solve=5), n=2)
    next(stream)
    assert engine.stats()["running"] > 0
    stream.close()
    stats = engine.stats()
    assert (stats["running"], stats["waiting"], stats["free_pages"]) == (0, 0, stats["num_pages"])

    def fail_while_consuming():
        for _ in engine.stream([PROMPT], budget=Budget(think=50, solve=5)):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_while_consuming()
    assert not engine.has_work


def test_a_generator_that_is_never_started_does_nothing(scripted):
    engine = scripted(dots).engine
    engine.stream([PROMPT])
    assert not engine.has_work


def test_abort_and_end_thinking(scripted):
    engine = scripted(dots).engine
    request_id = engine.submit(Request(PROMPT, budget=Budget(think=100, solve=3), sampling=GREEDY))
    for _ in range(4):
        engine.step()
    assert engine.end_thinking(request_id)
    events = []
    while engine.has_work:
        events += engine.step()
    assert [e.token_id for e in events] == [CLOSE, *b"..."]
    assert events[0].forced
    assert not engine.end_thinking(request_id)

    request_id = engine.submit(Request(PROMPT, budget=Budget(think=100, solve=3), n=2))
    engine.step()
    assert engine.abort(request_id)
    last = [event for event in engine.step() if event.finish_reason]
    assert [(event.token_id, event.finish_reason) for event in last] == [(None, "abort")] * 2
    assert not engine.abort(request_id)
    assert engine.stats()["free_pages"] == engine.stats()["num_pages"]

    waiting = engine.submit(Request(PROMPT, budget=Budget(think=100, solve=3), sampling=GREEDY))
    assert engine.end_thinking(waiting), "before its first step, too"
    events = []
    while engine.has_work:
        events += engine.step()
    assert [e.token_id for e in events] == [CLOSE, *b"..."]

    truncating = engine.submit(Request(PROMPT, budget=budgets.truncate(50)))
    with pytest.raises(BudgetError, match="close"):
        engine.end_thinking(truncating)


def test_an_aborted_rollout_keeps_what_it_has(scripted):
    engine = scripted(dots).engine
    rollout = engine.rollout([PROMPT, [9]], budget=[Budget(think=100, solve=3), Budget(think=1, solve=1)])
    assert next(rollout).index == 1
    (request_id,) = engine._runner.groups
    engine.abort(request_id)
    (c,) = next(rollout).completions
    assert c.finish_reason == "abort"
    assert c.token_ids


def test_a_kernel_that_raises_leaves_a_usable_engine(scripted):
    calls = []

    def failing(history):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of order")
        return ord(".")

    engine = scripted(failing).engine
    with pytest.raises(RuntimeError, match="out of order"):
        engine.generate([PROMPT], budget=Budget(think=9, solve=2))
    assert engine.stats()["free_pages"] == engine.stats()["num_pages"]
    assert len(engine.generate([PROMPT], budget=Budget(think=9, solve=2))[0].completions[0].token_ids) == 12


def test_ctrl_c_waits_for_the_step_and_returns_the_pages(scripted):
    def interrupting(history):
        if len(history) == 6:
            signal.raise_signal(signal.SIGINT)
        return ord(".")

    engine = scripted(interrupting).engine
    with pytest.raises(KeyboardInterrupt):
        engine.generate([PROMPT], budget=Budget(think=9, solve=2))
    stats = engine.stats()
    assert (stats["running"], stats["free_pages"]) == (0, stats["num_pages"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nan_logits_fail_their_own_request_only(scripted):
    def script(history):
        return torch.full((VOCAB,), float("nan")) if history[0] == 1 and len(history) > 4 else ord(".")

    engine = scripted(script).engine
    bad = engine.stream([[1]], budget=Budget(think=9, solve=2))
    good = engine.stream([[2]], budget=Budget(think=9, solve=2))
    assert len(list(good)) == 12
    with pytest.raises(NonFiniteLogits, match="after 4 output tokens"):
        list(bad)
    assert engine.stats()["free_pages"] == engine.stats()["num_pages"]


def test_two_threads_at_once_are_refused(scripted):
    inside, leave = threading.Event(), threading.Event()

    def blocking(history):
        inside.set()
        leave.wait(10)
        return ord(".")

    engine = scripted(blocking).engine
    worker = threading.Thread(target=lambda: engine.generate([PROMPT], budget=Budget(think=1, solve=1)))
    worker.start()
    inside.wait(10)
    try:
        with pytest.raises(RuntimeError, match="thread"):
            engine.generate([PROMPT], budget=Budget(think=1, solve=1))
    finally:
        leave.set()
        worker.join()
    assert not engine.has_work


def test_close_and_context_manager(scripted):
    engine = scripted(dots).engine
    with engine as same:
        assert same is engine
        stream = engine.stream([PROMPT])
        next(stream)
    engine.close()
    for call in (lambda: engine.generate([PROMPT]), engine.stats, engine.warmup):
        with pytest.raises(EngineClosed):
            call()
    assert [event.finish_reason for event in stream][-1] == "abort", "an open generator ends"


# ---- bad input ----


def test_bad_input_names_what_is_wrong(scripted):
    engine = scripted(dots, max_model_len=64).engine
    assert engine.generate([]) == []
    for prompts, message in [
        ([[]], r"prompts\[0\]"),
        ([5.0], r"prompts\[0\]"),
        (5, "int"),
        ([[1, 999]], "999"),
        ([[{"role": "user", "content": "x"}]], "chat_template"),
        ([""], "no tokens"),
    ]:
        with pytest.raises(ConfigError, match=message):
            engine.generate(prompts)
    with pytest.raises(CapacityError, match="64"):
        engine.generate([[1] * 64])
    with pytest.raises(ConfigError, match="2 entries for 1"):
        engine.generate([PROMPT], budget=[Budget(), Budget()])
    with pytest.raises(ConfigError, match="budget"):
        engine.generate([PROMPT], budget=1024)
    with pytest.raises(ConfigError, match="stop_token_ids"):
        engine.generate([PROMPT], sampling=SamplingParams(stop_token_ids=[1000]))
    with pytest.raises(TypeError, match="unexpected keyword"):
        engine.generate([PROMPT], temperature=1)
    with pytest.raises(TypeError, match="unexpected keyword"):
        EngineConfig(pagesize=3)
    for bad in (
        {"temperature": -1},
        {"top_p": 0},
        {"min_p": 2},
        {"seed": -1},
        {"top_k": 1.5},
        {"stop": [""]},
    ):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            SamplingParams(**bad)
    for bad in ({"think": -1}, {"solve": 1.5}, {"think": True}):
        with pytest.raises(ConfigError):
            Budget(**bad)
    with pytest.raises(ConfigError, match="kv_memory"):
        scripted(dots, kv_memory="8B")
    assert not engine.has_work
    engine.submit(Request(PROMPT, request_id="x"))
    with pytest.raises(ConfigError, match="in use"):
        engine.submit(Request(PROMPT, request_id="x"))


def test_a_request_that_could_never_be_admitted_raises_at_once(scripted):
    engine = scripted(dots, kv_memory=256 * 16, page_size=4, max_model_len=40, prefix_cache=False).engine
    with pytest.raises(CapacityError, match="pages"):
        engine.fork([[1] * 10], think_at=list(range(20)), solve=8)


# ---- long runs ----


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_thousand_requests_with_random_aborts_leak_nothing(scripted):
    rng = random.Random(0)
    made = scripted(dots, max_batch=8, kv_memory=256 * 200, max_model_len=60)
    engine = made.engine
    start = engine.stats()["free_pages"]
    live: list[str] = []
    submitted = finished = resident = 0
    while submitted < 1000 or engine.has_work:
        if submitted >= 500 and not resident:
            resident = resident_bytes()
        while submitted < 1000 and len(live) < 20:
            prompt = [rng.randrange(8) for _ in range(rng.randint(1, 20))]
            budget = Budget(think=rng.randint(0, 12), solve=rng.randint(0, 12))
            live.append(engine.submit(Request(prompt, budget=budget, n=rng.choice([1, 1, 1, 3]))))
            submitted += 1
        if live and rng.random() < 0.15:
            engine.abort(rng.choice(live))
        if live and rng.random() < 0.1:
            engine.end_thinking(rng.choice(live))
        finished += sum(event.finish_reason is not None for event in engine.step())
        running = engine._runner.groups
        live = [request_id for request_id in live if request_id in running]
    stats = engine.stats()
    assert stats["free_pages"] == start == stats["num_pages"]
    assert stats["running"] == stats["waiting"] == stats["reserved_pages"] == 0
    assert finished >= 1000
    assert resident_bytes() - resident < 8 << 20, "memory is flat over the second half"
    assert len(engine._runner.scheduler._free_slots) == 8


def test_penalties_and_bias_act_per_request(scripted):
    def flat(history):
        logits = torch.zeros(VOCAB)
        logits[10], logits[11], logits[12] = 3.0, 2.5, 2.0
        return logits

    engine = scripted(flat).engine
    plain = SamplingParams(temperature=0)
    presence = SamplingParams(temperature=0, presence_penalty=0.7)
    frequency = SamplingParams(temperature=0, frequency_penalty=0.4)
    repetition = SamplingParams(temperature=0, repetition_penalty=2.0)
    bias = SamplingParams(temperature=0, logit_bias={12: 5.0})
    budget = Budget(think=5, solve=0)
    tokens = [
        generation.completions[0].token_ids[:5]
        for generation in engine.generate(
            [PROMPT] * 5 + [[10, 11]],
            budget=budget,
            sampling=[plain, presence, frequency, repetition, bias, repetition],
        )
    ]
    assert tokens[0] == [10] * 5
    assert tokens[1] == [10, 11, 10, 10, 10]
    assert tokens[2] == [10, 10, 11, 10, 11]
    assert tokens[3][:3] == [10, 11, 12]
    assert tokens[4] == [12] * 5
    assert tokens[5][0] == 12, "the prompt's tokens count for the repetition penalty"
    assert (
        engine.generate([PROMPT], budget=budget, sampling=plain)[0].completions[0].token_ids[:5] == [10] * 5
    )


def test_phase_is_a_string_enum():
    assert Phase("think") is Phase.THINK
    assert Phase.SOLVE == "solve"


def test_inference_mode_of_a_caller_is_not_the_engines(scripted):
    """What an engine makes under it must still be writable later, outside of it."""
    sampling = SamplingParams(seed=1, presence_penalty=0.5, logit_bias={3: 1.0})

    def tokens(engine):
        [generation] = engine.generate([[5, 6, 7]], budget=Budget(think=4, solve=3), sampling=sampling)
        return generation.completions[0].token_ids

    with torch.inference_mode():
        made_within = scripted(lambda history: 7 + len(history) % 3).engine
    made_outside = scripted(lambda history: 7 + len(history) % 3).engine
    with torch.inference_mode():
        first = tokens(made_outside)
    assert tokens(made_outside) == tokens(made_within) == first
