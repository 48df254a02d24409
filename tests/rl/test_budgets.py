"""Budget plans are pure functions of (run seed, step, prompt)."""

from collections import Counter

import pytest

from elastic_decode.errors import ConfigError
from elastic_decode.rl.budgets import Choice, Fixed, Fork, GroupBudget, Ramp, Schedule, Uniform, plan_of
from elastic_decode.rl.seeds import derive


def test_fixed_and_fork_are_the_same_everywhere():
    assert Fixed(think=None, solve=3).at(1, 2, 3) == GroupBudget((None,), 3)
    assert Fork(think_at=[8, 2], solve=None).at(1, 2, 3) == GroupBudget((8, 2), None)


@pytest.mark.parametrize(
    "plan", [Choice(think=(0, 5, 10, None), solve=3), Uniform(low=0, high=30, solve=3)], ids=type
)
def test_random_plans_depend_on_all_three_and_on_nothing_else(plan):
    def table(run, step):
        return [plan.at(run, step, prompt) for prompt in range(100)]

    assert table(0, 0) == table(0, 0)
    assert len({tuple(table(0, 0)), tuple(table(0, 1)), tuple(table(1, 0))}) == 3
    assert len(set(table(0, 0))) > 3


def test_choice_keeps_to_its_weights():
    plan = Choice(think=(1, 2, 3), solve=0, weights=(1, 0, 3))
    drawn = Counter(plan.at(7, step, prompt).think_at[0] for step in range(40) for prompt in range(50))
    assert set(drawn) == {1, 3}
    assert abs(drawn[3] / 2000 - 0.75) < 0.04  # four standard errors


def test_uniform_reaches_both_ends():
    plan = Uniform(low=2, high=4, solve=0)
    assert {plan.at(0, 0, prompt).think_at for prompt in range(60)} == {(2,), (3,), (4,)}


def test_ramp_and_schedule():
    ramp = Ramp(first=100, last=200, steps=4, solve=1)
    assert [ramp.at(0, step, 0).think_at[0] for step in range(6)] == [100, 125, 150, 175, 200, 200]
    plan = Schedule([(0, Fixed(think=1, solve=1)), (3, ramp), (5, Fork(think_at=(1, 2), solve=1))])
    assert [plan.at(0, step, 0).think_at for step in (0, 2, 3, 5, 9)] == [(1,), (1,), (175,), (1, 2), (1, 2)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fixed(think=-1, solve=1),
        lambda: Fixed(think=True, solve=1),
        lambda: Choice(think=(), solve=1),
        lambda: Choice(think=(1, 2), solve=1, weights=(1,)),
        lambda: Choice(think=(1, 2), solve=1, weights=(0, 0)),
        lambda: Choice(think=(1, 2), solve=1, weights=(1, float("nan"))),
        lambda: Uniform(low=3, high=2, solve=1),
        lambda: Uniform(low=None, high=2, solve=1),
        lambda: Ramp(first=1, last=2, steps=0, solve=1),
        lambda: Schedule([]),
        lambda: Schedule([(1, Fixed(think=1, solve=1))]),
        lambda: Schedule([(0, Fixed(think=1, solve=1)), (0, Fixed(think=1, solve=1))]),
        lambda: Schedule([(0, 5)]),
        lambda: Fork(think_at=(4, 4), solve=1),
        lambda: Fork(think_at=(4, None), solve=1),
        lambda: Fork(think_at=(), solve=1),
    ],
)
def test_what_is_no_plan_raises(make):
    with pytest.raises(ConfigError):
        make()


def test_plans_as_configurations_write_them():
    uniform = {"plan": "uniform", "low": 0, "high": 30, "solve": 3}
    assert plan_of(uniform) == Uniform(low=0, high=30, solve=3)
    stages = [{"start": 0, **uniform}, {"start": 9, "plan": "fork", "think_at": [1, 2], "solve": None}]
    schedule = plan_of({"plan": "schedule", "stages": stages})
    assert schedule == Schedule([(0, plan_of(uniform)), (9, Fork(think_at=(1, 2), solve=None))])
    for wrong in ({}, {"plan": "fxied"}, {"plan": "fixed", "think": 1}, {**uniform, "middle": 2}):
        with pytest.raises(ConfigError):
            plan_of(wrong)


def test_seeds_are_known_numbers_and_purposes_are_apart():
    assert (
        derive("sample", 1, 2, 3) == 1136197093325585104
    )  # a run that is resumed by a later version samples alike
    assert len({derive("sample", 1, 23), derive("sample", 12, 3), derive("budget", 1, 23)}) == 3
