"""Rollouts of the bundled model: what is sampled, in which order groups come, what is refused."""

import logging
import time

import pytest

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.errors import BudgetError, CapacityError, ConfigError, RewardError
from elastic_decode.rl.batch import Group, Row
from elastic_decode.rl.budgets import Choice, Fixed, Fork
from elastic_decode.rl.rewards import Rewards
from elastic_decode.rl.rollout import RolloutStats, rollout
from elastic_decode.tasks import countdown

FIXED = Fixed(think=15, solve=3)
ROWS = [
    Row(40 + place, problem.chat, {"problem": problem})
    for place, problem in enumerate(countdown.sample("train", 12, 0))
]


def right(solution, problem):
    return [countdown.grade(p, text) for p, text in zip(problem, solution, strict=True)]


def make_engine(**changes) -> Engine:
    fields = {"dtype": "float32", "max_batch": 16, "max_model_len": 96, "kv_memory": "16MiB"}
    return Engine.from_pretrained(tiny_model_path(), EngineConfig(**{**fields, **changes}))


@pytest.fixture(scope="module")
def engine():
    with make_engine() as made:
        yield made


@pytest.fixture(scope="module")
def rewards():
    with Rewards(right, workers=0) as made:
        yield made


def run(engine, rewards, rows=ROWS, **changes) -> list[Group]:
    fields = {"step": 3, "group_size": 4, "budgets": FIXED, "run_seed": 5}
    return list(rollout(engine, rows, rewards=rewards, **{**fields, **changes}))


def by_row(groups: list[Group]) -> dict[int, list[tuple]]:
    return {
        group.index: [(s.token_ids, s.logprobs, s.seed, s.think_budget, s.reward) for s in group.samples]
        for group in groups
    }


def test_groups_are_what_generate_gives_scored(engine, rewards):
    groups = run(engine, rewards)
    assert sorted(group.index for group in groups) == [row.index for row in ROWS]
    for group in groups:
        row = ROWS[group.index - 40]
        assert group.step == 3
        assert group.columns == row.columns
        assert len(group.samples) == 4
        seed = group.samples[0].seed
        (generation,) = engine.generate(
            [row.prompt], budget=Budget(15, 3), sampling=SamplingParams(seed=seed), n=4
        )
        for made, sample in zip(generation.completions, group.samples, strict=True):
            assert sample.prompt_ids == tuple(generation.prompt_token_ids)
            for name in ("token_ids", "logprobs", "sampling_logprobs", "forced"):
                assert getattr(sample, name) == tuple(getattr(made, name)), name
            for name in ("text", "thinking", "solution", "think_tokens", "solve_tokens", "think_end"):
                assert getattr(sample, name) == getattr(made, name), name
            assert (sample.think_budget, sample.solve_budget) == (15, 3)
            assert sample.loss_mask == tuple(not forced for forced in made.forced)
            assert sample.reward == countdown.grade(row.columns["problem"], made.solution)
    assert any(any(sample.forced) for group in groups for sample in group.samples)


def test_forced_tokens_are_trained_on_where_asked(engine, rewards):
    groups = run(engine, rewards, train_on_forced=True)
    assert all(all(sample.loss_mask) for group in groups for sample in group.samples)


@pytest.mark.parametrize(
    "budgets", [FIXED, Choice(think=(2, 9, 20), solve=3), Fork(think_at=(0, 8), solve=3)], ids=type
)
def test_samples_depend_on_run_step_and_row_alone(engine, rewards, budgets):
    expected = by_row(run(engine, rewards, budgets=budgets))
    mixed = ROWS[::-1][3:] + ROWS[::-1][:3]
    changes = {"max_batch": 3, "page_size": 8, "prefill_tokens": 16, "prefix_cache": False}
    with make_engine(**changes) as other, Rewards(right, workers=2) as elsewhere:
        halves = [run(other, elsewhere, half, budgets=budgets) for half in (mixed[:5], mixed[5:])]
    assert by_row(halves[0] + halves[1]) == expected
    assert by_row(run(engine, rewards, budgets=budgets, step=4)) != expected
    assert by_row(run(engine, rewards, budgets=budgets, run_seed=6)) != expected


def test_one_budget_a_group(engine, rewards):
    plan = Choice(think=(2, 9, 20), solve=3)
    groups = run(engine, rewards, budgets=plan)
    for group in groups:
        (wanted,) = plan.at(5, 3, group.index).think_at
        assert {sample.think_budget for sample in group.samples} == {wanted}
        assert all(sample.think_tokens <= wanted for sample in group.samples)
    assert len({group.samples[0].think_budget for group in groups}) == 3


def test_forked_groups_are_branches_of_thoughts(engine, rewards):
    groups = run(engine, rewards, budgets=Fork(think_at=(10, 0, 4), solve=3), group_size=6)
    for group in groups:
        assert [sample.think_budget for sample in group.samples] == [10, 0, 4] * 2
        seeds = [sample.seed for sample in group.samples]
        assert seeds[:3] == [seeds[0]] * 3
        assert seeds[3:] == [seeds[3]] * 3
        assert seeds[0] != seeds[3]
        for sample in group.samples:
            (generation,) = engine.generate(
                [ROWS[group.index - 40].prompt],
                budget=Budget(sample.think_budget, 3),
                sampling=SamplingParams(seed=sample.seed),
            )
            assert sample.token_ids == tuple(generation.completions[0].token_ids)
    with pytest.raises(ConfigError, match="4 is not a multiple of the 3 budgets"):
        run(engine, rewards, budgets=Fork(think_at=(10, 0, 4), solve=3))


def test_a_row_that_comes_twice_is_sampled_twice(engine, rewards):
    first, second = run(engine, rewards, [ROWS[0], ROWS[0]])
    assert first.index == second.index
    assert {s.token_ids for s in first.samples} != {s.token_ids for s in second.samples}


def test_prompts_of_ids_and_strings(engine, rewards):
    ids = engine.generate([ROWS[0].prompt], budget=Budget(0, 0))[0].prompt_token_ids
    said = []

    def record(prompts, completions):
        said.append((prompts[0], completions[0]))
        return [0.0] * len(prompts)

    rows = [Row(0, ids, {}), Row(1, "1 2 3 = 6", {})]
    with Rewards(record, workers=0) as recorded:
        run(engine, recorded, rows)
    assert {type(text) for pair in said for text in pair} == {str}
    assert "1 2 3 = 6" in dict(said)
    assert engine.tokenizer.decode(ids) in dict(said)


def test_a_group_comes_when_it_is_scored_while_others_decode(engine):
    """The first group to be decoded is slow to score: the others overtake it."""

    def slow(problem):
        if problem[0] == ROWS[0].columns["problem"]:
            time.sleep(0.6)
        return [0.0] * len(problem)

    with Rewards(slow, workers=2) as rewards:
        order = [group.index for group in run(engine, rewards, group_size=2)]
    assert order[-1] == ROWS[0].index
    assert sorted(order) == [row.index for row in ROWS]


def test_what_rewards_cost_the_caller_is_counted(engine):
    """The last group's scoring overlaps with nothing."""

    def slow(solution, **columns):
        time.sleep(0.15)
        return [0.0, 1.0, *[0.0] * (len(solution) - 2)]

    stats = RolloutStats()
    with Rewards(slow, workers=2, timeout=20) as rewards:
        run(engine, rewards, ROWS[:2], stats=stats)
    assert 0.1 < stats.reward_wait_seconds <= stats.reward_seconds
    waited = stats.reward_wait_seconds
    with Rewards(slow, workers=0) as rewards:  # in the caller's own time, and no waiting
        run(engine, rewards, ROWS[:2], stats=stats)
    assert stats.reward_wait_seconds == waited
    assert stats.reward_seconds >= waited + 0.3


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_aborts_what_runs(engine, workers):
    with Rewards(right, workers=workers) as rewards:
        groups = rollout(engine, ROWS, step=0, group_size=4, budgets=FIXED, rewards=rewards, run_seed=0)
        next(groups)
        # With workers, the first may have been scored only when all were decoded.
        assert engine.has_work or workers
        groups.close()
    assert not engine.has_work
    assert engine.stats()["reserved_pages"] == 0


def test_an_error_of_a_reward_aborts_what_runs(engine):
    message = r"'mine', step 3, dataset row \d+: returned 1 rewards"
    with (
        Rewards({"mine": lambda **_: [1.0]}, workers=0) as rewards,
        pytest.raises(RewardError, match=message),
    ):
        run(engine, rewards)
    assert not engine.has_work


def test_prompts_that_do_not_fit(engine, rewards, caplog):
    long = [Row(7, " ".join(["1"] * 80), {"problem": None}), Row(8, " ".join(["1"] * 200), {"problem": None})]
    stats = RolloutStats()
    groups = run(engine, rewards, [long[0], *ROWS[:2], long[1]], stats=stats)
    assert by_row(groups) == by_row(run(engine, rewards, ROWS[:2]))
    assert stats.skipped_prompts == 2
    assert "2 of 4 prompts skipped" in caplog.text
    assert "dataset rows 7, 8" in caplog.text
    with pytest.raises(BudgetError):
        run(engine, rewards, [*ROWS[:2], long[0]], too_long="raise")
    with pytest.raises(BudgetError):  # nothing fits: the budgets are wrong, not the prompts
        run(engine, rewards, budgets=Fixed(think=900, solve=3))
    assert not engine.has_work


def test_a_limit_of_prompt_tokens(engine, rewards):
    rows = [*ROWS[:2], Row(7, [8] * 20, {"problem": ROWS[0].columns["problem"]})]
    assert (
        engine.encode(ROWS[0].prompt)
        == engine.generate([ROWS[0].prompt], budget=Budget(0, 0))[0].prompt_token_ids
    )
    stats = RolloutStats()
    groups = run(engine, rewards, rows, max_prompt_tokens=20, stats=stats)
    assert len(groups) == 3
    assert by_row(run(engine, rewards, rows, max_prompt_tokens=19, stats=stats)) == by_row(
        [group for group in groups if group.index != 7]
    )
    assert stats.skipped_prompts == 1
    with pytest.raises(CapacityError, match="row 7: the prompt has 20 tokens, max_prompt_tokens is 19"):
        run(engine, rewards, rows, max_prompt_tokens=19, too_long="raise")


def test_no_spread_warns_once(engine, caplog):
    with Rewards(lambda prompts: [1.0] * len(prompts), workers=0) as same, caplog.at_level(logging.WARNING):
        stats = RolloutStats()
        for step in range(2):
            run(engine, same, step=step, stats=stats)
        assert [record.message.startswith("step 0: 0 of 12 groups") for record in caplog.records] == [True]
        assert (stats.groups, stats.groups_with_spread, stats.samples, stats.unscorable_samples) == (
            24,
            0,
            96,
            0,
        )
        caplog.clear()
        with Rewards(lambda completion_ids: [float(len(ids)) for ids in completion_ids], workers=0) as spread:
            run(engine, spread, stats=(more := RolloutStats()))
        assert not caplog.records
        assert more.groups_with_spread > 3


def test_what_cannot_be_is_refused(engine, rewards):
    for changes in (
        {"rows": []},
        {"group_size": 0},
        {"sampling": SamplingParams(seed=1)},
        {"too_long": "cut"},
    ):
        with pytest.raises(ConfigError):
            run(engine, rewards, **changes)
