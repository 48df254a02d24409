"""Thousands of requests of every kind, aborted, cut short, forked: pages return, and nobody is disturbed."""

import contextlib
import random
import time

import pytest

from elastic_decode import SamplingParams, budgets
from elastic_decode.errors import BudgetError

MOST_SECONDS = 110


@pytest.mark.slow
def test_two_thousand_requests(target, flights, model):
    rng = random.Random(11)
    count = target.pick(2000, 200)
    wanted = flights.requests(rng, count)
    untouched = set(range(0, count, target.pick(40, 10)))
    sizes = {"max_batch": target.pick(48, 8), "max_model_len": 96, "prefix_cache": True}
    with target.engine(model, horizon=1, **{**sizes, "max_batch": 1}) as engine:
        alone = {index: flights.tokens_of(engine, [wanted[index]])[0] for index in sorted(untouched)}
    began = time.monotonic()
    with target.engine(model, horizon=8, kv_memory="8MiB", **sizes) as engine:
        names: dict[str, int] = {}
        running: list[str] = []
        got: dict[tuple[int, int], list] = {}
        queue = list(range(count))
        forks = closed = aborted = ended = 0
        while queue or engine.has_work:
            assert time.monotonic() - began < MOST_SECONDS, f"{len(queue)} requests not yet submitted"
            while queue and len(running) < 3 * sizes["max_batch"]:
                index = queue.pop(0)
                name = engine.submit(wanted[index])
                names[name] = index
                running.append(name)
            touchable = [name for name in running if names[name] not in untouched]
            if touchable and rng.random() < 0.2:
                aborted += engine.abort(rng.choice(touchable))
            if touchable and rng.random() < 0.2:
                with contextlib.suppress(BudgetError):  # its policy never forces a close
                    ended += engine.end_thinking(rng.choice(touchable))
            if rng.random() < 0.02:
                thoughts = sorted(rng.sample(range(20), 3))
                [curve] = engine.fork([1, 2, rng.randrange(200)], think_at=thoughts, solve=4)
                assert len(curve.completions) == 3
                forks += 1
            if rng.random() < 0.02:  # a consumer that goes away
                stream = engine.stream([3, rng.randrange(200)], budget=budgets.truncate(30), n=2)
                next(stream)
                stream.close()
                closed += 1
            for event in engine.step():
                key = (names[event.request_id], event.sample)
                got.setdefault(key, []).append(
                    (event.token_id, event.logprob, event.forced, event.phase, event.finish_reason)
                )
            running = [name for name in running if name in engine._runner.groups]
        stats = engine.stats()
        assert stats["free_pages"] == stats["num_pages"]
        assert stats["running"] == stats["waiting"] == 0
    assert min(aborted, ended) >= target.pick(20, 2)
    assert forks + closed >= target.pick(10, 1)
    for index in untouched:
        for sample in range(wanted[index].n):
            assert got[index, sample] == alone[index][sample], index


def test_a_close_in_the_middle_gives_everything_back(target, model):
    """An engine closed under way leaves nothing behind, and the next one works."""
    for _ in range(2):
        with target.engine(model, horizon=8, max_batch=4) as engine:
            stream = engine.stream(
                [[1, 2], [3]], budget=budgets.truncate(60), sampling=SamplingParams(ignore_eos=True)
            )
            assert next(stream).token_id is not None
