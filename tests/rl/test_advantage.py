"""Advantages on numbers worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_decode.errors import ConfigError
from elastic_decode.rl.advantage import ESTIMATORS, advantages, dr_grpo, grpo, rloo


def test_grpo_divides_by_the_unbiased_std():
    # mean 1/2, squares 4 · 1/4 = 1, unbiased variance 1/3
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    assert grpo([1.0, 0.0, 0.0, 1.0]) == pytest.approx([expected, -expected, -expected, expected], rel=1e-12)
    assert grpo([3.0, 1.0], eps=0.0) == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2)], rel=1e-12)
    assert grpo([3.0, 1.0], eps=1.0) == pytest.approx([1 / (math.sqrt(2) + 1), -1 / (math.sqrt(2) + 1)])


def test_dr_grpo_only_centres():
    assert dr_grpo([4.0, 1.0, 1.0, 2.0]) == [2.0, -1.0, -1.0, 0.0]


def test_rloo_compares_with_the_others():
    # 4 - (1 + 1)/2; 1 - (4 + 1)/2
    assert rloo([4.0, 1.0, 1.0]) == [3.0, -1.5, -1.5]


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9))
def test_the_estimators_agree_where_theory_says_so(rewards: list[float]):
    n = len(rewards)
    centred = dr_grpo(rewards)
    assert rloo(rewards) == pytest.approx([value * n / (n - 1) for value in centred], abs=1e-12)
    assert sum(centred) == pytest.approx(0, abs=1e-12)
    assert all(a * b >= 0 for a, b in zip(grpo(rewards), centred, strict=True))


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_none_is_in_no_mean_and_not_trained_on(kind: str):
    with_none = advantages([[1.0, None, 0.0, None, 0.5]], kind)
    without = advantages([[1.0, 0.0, 0.5]], kind)
    one, two, three = without.values[0]
    assert with_none.values == ((one, None, two, None, three),)
    assert (with_none.unscorable, with_none.samples, without.unscorable) == (2, 5, 0)
    as_zero = advantages([[1.0, 0.0, 0.0, 0.0, 0.5]], kind)
    assert as_zero.values[0][0] != pytest.approx(one)  # a None that became 0 would be seen


def test_groups_with_fewer_than_two_scorable_samples_give_none():
    found = advantages([[1.0, None, None], [None, None, None], [], [1.0], [1.0, 0.0]])
    assert found.values[:4] == ((None, None, None), (None, None, None), (), (None,))
    assert None not in found.values[4]
    assert (found.groups, found.too_few, found.flat, found.spread) == (5, 4, 0, 1)


def test_groups_without_a_spread_get_exactly_zero_or_are_dropped_and_counted():
    groups = [[0.1, 0.1, 0.1], [1.0, 0.0, None], [0.7, None, 0.7]]
    kept = advantages(groups)
    assert kept.values[0] == (0.0, 0.0, 0.0)
    assert kept.values[2] == (0.0, None, 0.0)
    assert (kept.flat, kept.dropped, kept.spread) == (2, 0, 1)
    dropped = advantages(groups, drop_flat=True)
    assert dropped.values == ((None,) * 3, kept.values[1], (None,) * 3)
    assert (dropped.flat, dropped.dropped, dropped.spread) == (2, 2, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_raises(bad: float):
    with pytest.raises(ValueError, match="group 1 has rewards"):
        advantages([[1.0, 0.0], [bad, 1.0]])


def test_unknown_names_raise_with_the_list():
    with pytest.raises(ConfigError, match="'grop'; there are grpo, dr_grpo, rloo"):
        advantages([[1.0, 0.0]], "grop")
