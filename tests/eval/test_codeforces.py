"""A rating from attempts, on tables made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_decode.errors import ConfigError
from elastic_decode.eval.codeforces import (
    Contest,
    expected_rank,
    load_contests,
    rank_of,
    rating,
    rating_at,
    score_of,
)

TABLE = [
    {
        "contest": 1,
        "problems": {"A": 500, "B": 1000, "C": 60},
        "standings": [
            {"rating": 2000, "score": 1500},
            {"rating": 1600, "score": 950},
            {"rating": 1200, "score": 500},
        ],
    },
    {"contest": "2", "problems": {"A": 500}, "standings": [{"rating": 1500, "score": 400}]},
]


@pytest.fixture
def contests(tmp_path: Path) -> tuple[Contest, ...]:
    (tmp_path / "table.json").write_text(json.dumps(TABLE))
    return load_contests(tmp_path / "table.json")


@pytest.mark.parametrize(
    ("attempts", "score"),
    [
        ({}, 0),
        ({"A": [1.0]}, 500),
        ({"A": [0.0, 0.0, 1.0, 0.0]}, 400),
        ({"A": [None, 0.0, None, 1.0]}, 450),
        ({"A": [0.0], "B": [False, True]}, 950),
        ({"C": [0.0, 0.0, 1.0]}, 0),  # never below nothing
        ({"A": []}, 0),
        ({"A": [0.5, 1]}, 450),
    ],
)
def test_a_score(contests: tuple[Contest, ...], attempts: Any, score: float) -> None:
    assert score_of(contests[0], attempts) == score


def test_a_rank_is_one_more_than_those_with_more_points(contests: tuple[Contest, ...]) -> None:
    assert [rank_of(contests[0], score) for score in (0, 500, 949, 950, 1500, 9999)] == [4, 3, 3, 2, 1, 1]


def test_one_against_one() -> None:
    """An expected rank of 1.5 is a draw: the same rating. 1 + 1/11: ten to one, 400 points above."""
    alone = Contest("x", {"A": 1.0}, (1500.0,), (1.0,))
    assert expected_rank(alone, 1500) == 1.5
    assert rating_at(alone, 1.5) == 1500
    assert expected_rank(alone, 1900) == pytest.approx(1 + 1 / 11)
    assert rating_at(Contest("x", {"A": 1.0}, (1500.0, 2500.0), (1.0, 1.0)), 2) == pytest.approx(
        2000, abs=0.1
    )


def test_first_and_last_stay_in_the_range(contests: tuple[Contest, ...]) -> None:
    assert rating_at(contests[0], 1) == 2100
    assert rating_at(contests[0], 4) == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3500), min_size=2, max_size=30), st.data())
def test_the_rating_has_the_rank(ratings: list[int], data: st.DataObject) -> None:
    contest = Contest("x", {"A": 1.0}, tuple(map(float, ratings)), tuple(0.0 for _ in ratings))
    rank = data.draw(st.integers(1, len(ratings) + 1))
    found = rating_at(contest, rank)
    assert 0 <= found <= max(ratings) + 100
    if 0 < found < max(ratings) + 100:
        assert expected_rank(contest, found) <= rank <= expected_rank(contest, found - 1 / 16)


def test_the_mean_over_contests(contests: tuple[Contest, ...]) -> None:
    found = rating(contests, {"1": {"B": [0.0, 1.0]}, "2": {"A": [0.0]}})
    assert found.contests["1"][1:] == (950, 2)
    assert found.contests["2"] == (0, 0, 2)
    assert found.rating == found.contests["1"][0] / 2
    # Second of four by expectation: between the best and the next.
    assert 1600 < found.contests["1"][0] < 2000


@pytest.mark.parametrize(
    ("attempts", "message"),
    [({}, "needs attempts"), ({"3": {}}, "no contest '3'"), ({"1": {"Z": [1]}}, "no problem 'Z'")],
)
def test_attempts_that_fit_no_contest(contests: tuple[Contest, ...], attempts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rating(contests, attempts)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "not empty"),
        ([{"contest": 1}], "contest 0: expected contest, problems and standings"),
        ([{**TABLE[1], "problems": {}}], "problems must map"),
        ([{**TABLE[1], "problems": {"A": "500"}}], "problem A must be a number"),
        ([{**TABLE[1], "standings": []}], "standings must list"),
        ([{**TABLE[1], "standings": [{"rating": 1}]}], "must have rating and score"),
        ([{**TABLE[1], "standings": [{"rating": None, "score": 1}]}], "a rating must be a number"),
        ([TABLE[1], TABLE[1]], "comes twice"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, table: Any, message: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=message):
        load_contests(path)
    with pytest.raises(ConfigError, match="no table"):
        load_contests(tmp_path / "missing.json")
