"""The host never waits for a step: PyTorch forbids it meanwhile, and the engine counts its own waits."""

import random

from elastic_decode import Budget, Request, SamplingParams, budgets


def varied(rng: random.Random, count: int) -> list[Request]:
    """Budgets that expire, closes that are forced or replaced, rows that end at any time."""
    made = []
    for index in range(count):
        prompt = [rng.randrange(200) for _ in range(rng.randint(1, 30))]
        policy = rng.choice(
            [
                Budget(think=rng.randint(0, 40), solve=rng.randint(1, 20)),
                budgets.truncate(rng.randint(10, 60)),
                budgets.soft_landing(think=rng.randint(5, 30), grace=6, solve=10),
                budgets.budget_forcing(think=rng.randint(9, 30), solve=8, waits=2),
            ]
        )
        sampling = SamplingParams(
            seed=index, temperature=rng.choice([0, 0.7, 1.0]), top_p=rng.choice([1.0, 0.9]), ignore_eos=True
        )
        made.append(Request(prompt, budget=policy, sampling=sampling))
    return made


def test_five_hundred_steps_without_a_wait(target, model):
    """Admission, prefill, phase changes, forcing, finishing: all of it under way while the host is ahead."""
    wanted = varied(random.Random(1), target.pick(120, 12))
    with target.engine(model, horizon=4, max_batch=4, max_model_len=128) as engine:
        engine.warmup()
        for request in wanted:  # whatever is compiled or recorded is so after this
            engine.submit(request)
        while engine.has_work:
            engine.step()
        before = engine.stats()
        for request in wanted:
            engine.submit(request)
        with target.waits_forbidden():
            while engine.has_work:
                engine.step()
        after = engine.stats()
    change = {name: after[name] - before[name] for name in after}
    assert change["decode_steps"] >= target.pick(500, 50)
    assert change["forced_tokens"] > 20
    assert change["sampled_tokens"] > 100
    # Each flight is read once; nothing is enqueued behind it only where no row has a token left to draw.
    assert 0 < change["host_waits"] <= change["decode_steps"]
    assert change["idle_host_waits"] * 10 <= change["host_waits"], change


def test_an_abort_and_an_end_of_thinking_wait_for_nothing(target, model):
    with target.engine(model, horizon=4, max_batch=4, max_model_len=128) as engine:
        sampling = SamplingParams(seed=1, ignore_eos=True)

        def start() -> list[str]:
            prompts = [[1, 2, 3], [4, 5], [6], [7, 8]]
            requests = [Request(p, budget=Budget(think=60, solve=30), sampling=sampling) for p in prompts]
            names = [engine.submit(request) for request in requests]
            for _ in range(3):
                engine.step()
            return names

        def drain(names: list[str]) -> dict[str, int]:
            """How many tokens each request got."""
            tokens = dict.fromkeys(names, 0)
            while engine.has_work:
                for event in engine.step():
                    tokens[event.request_id] += event.token_id is not None
            return tokens

        drain(start())
        names = start()
        with target.waits_forbidden():
            assert engine.end_thinking(names[0])
            assert engine.abort(names[1])
            got = drain(names)
        assert got[names[0]] < got[names[2]]
        assert got[names[1]] < got[names[0]]
