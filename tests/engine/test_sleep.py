"""sleep() and wake(): the engine's memory around an optimizer's step."""

import gc
import os
from pathlib import Path

import pytest

from elastic_decode import Budget, Engine, EngineConfig, Request, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.errors import EngineAsleep, EngineBusy, EngineClosed
from elastic_decode.tasks import countdown

PROMPTS = [problem.chat for problem in countdown.sample("test", 6, 1)]


@pytest.fixture
def engine():
    config = EngineConfig(dtype="float32", max_batch=8, max_model_len=64, page_size=4, kv_memory="8MiB")
    with Engine.from_pretrained(tiny_model_path(), config) as made:
        yield made


def decoded(engine: Engine) -> list:
    generations = engine.generate(
        PROMPTS, n=3, budget=Budget(12, 3), sampling=SamplingParams(seed=4, temperature=0.8)
    )
    return [(c.token_ids, c.logprobs) for generation in generations for c in generation.completions]


def test_results_after_wake_are_the_same_and_prefixes_are_forgotten(engine):
    before = decoded(engine)
    assert engine.stats()["indexed_pages"] > 0
    held = engine._loop._kv_pages.nbytes
    for _ in range(2):
        engine.sleep()
        engine.sleep()
        assert engine._loop._kv_pages.nbytes == 0
        stats = engine.stats()
        assert stats["indexed_pages"] == 0
        assert stats["free_pages"] == stats["num_pages"]
        engine.wake()
        engine.wake()
        assert engine._loop._kv_pages.nbytes == held
        # What is left in fresh memory is never read: fill it with what would show.
        for keys, values in engine._loop._kv_pages.layers:
            keys.fill_(float("nan"))
            values.fill_(float("nan"))
        hits = engine.stats()["prefix_hit_tokens"]
        assert decoded(engine) == before
        assert engine.stats()["prefix_hit_tokens"] == hits


def test_requests_in_flight_are_refused(engine):
    generations = engine.rollout(PROMPTS, n=3, budget=Budget(12, 3), sampling=SamplingParams(seed=4))
    first = next(generations)
    with pytest.raises(EngineBusy, match="request-"):
        engine.sleep()
    rest = list(generations)  # refusing did it no harm
    assert len([first, *rest]) == len(PROMPTS)
    name = engine.submit(Request(PROMPTS[0], budget=Budget(5, 2)))
    with pytest.raises(EngineBusy, match=name):
        engine.sleep()
    assert engine.abort(name)
    engine.sleep()


def test_a_generator_that_was_closed_or_forgotten_does_not_keep_it_awake(engine):
    generations = engine.rollout(PROMPTS, n=3, budget=Budget(12, 3))
    next(generations)
    assert engine.has_work
    del generations
    gc.collect()
    engine.sleep()


def test_what_would_decode_raises_while_asleep(engine):
    begun_later = engine.rollout(PROMPTS[:1], budget=Budget(5, 2), sampling=SamplingParams(seed=1))
    engine.sleep()
    for call in (
        lambda: engine.generate(PROMPTS),
        lambda: engine.rollout(PROMPTS),
        lambda: engine.stream(PROMPTS),
        lambda: engine.fork(PROMPTS, think_at=[2], solve=1),
        lambda: engine.submit(Request(PROMPTS[0])),
        lambda: engine.step(),
        lambda: engine.end_thinking("request-0"),
        lambda: engine.warmup(),
        lambda: next(begun_later),
    ):
        with pytest.raises(EngineAsleep, match=r"call wake\(\) first"):
            call()
    assert not engine.has_work
    assert not engine.abort("request-0")
    assert engine.sync_weights() == 1  # after the optimizer's step, before memory is wanted again
    engine.wake()
    engine.warmup()
    assert engine.generate(PROMPTS[:1], budget=Budget(5, 2))[0].completions[0].weight_epoch == 1


def test_a_closed_engine_neither_sleeps_nor_wakes(engine):
    engine.sleep()
    engine.close()
    for call in (engine.sleep, engine.wake):
        with pytest.raises(EngineClosed):
            call()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_resident_memory_goes_down():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    config = EngineConfig(dtype="float32", max_batch=256, max_model_len=96, kv_memory="64MiB")
    with Engine.from_pretrained(tiny_model_path(), config) as engine:
        pages = engine._loop._kv_pages
        size = pages.nbytes
        assert size > 20 << 20
        for keys, values in pages.layers:  # touched, so that it is resident
            keys.zero_()
            values.zero_()
        del keys, values
        full = resident()
        engine.sleep()
        assert full - resident() > 0.9 * size
        engine.wake()
        assert engine.generate(PROMPTS[:1], budget=Budget(5, 2))
