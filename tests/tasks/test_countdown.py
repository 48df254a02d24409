"""Countdown-lite: the split, the oracle's thoughts, the parser and the grader."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_decode.tasks import countdown
from elastic_decode.tasks.countdown import (
    CANDIDATES,
    Problem,
    Style,
    found_in,
    grade,
    parse,
    word,
    write_thought,
)

EVERY = countdown.problems("train") + countdown.problems("test")


def test_every_problem_is_in_range_and_has_a_solution():
    assert len(EVERY) == len(set(EVERY))
    for p in EVERY:
        assert all(1 <= n <= 9 for n in (p.x, p.y, p.z))
        assert 0 <= p.target <= 99
        assert p.solutions()


def test_splits_share_no_triple():
    triples = [{(p.x, p.y, p.z) for p in countdown.problems(s)} for s in ("train", "test")]
    assert not triples[0] & triples[1]
    assert len(triples[0] | triples[1]) == 9**3 - sum(
        not any(0 <= Problem(x, y, z, 0).results(c)[1] <= 99 for c in CANDIDATES)
        for x in range(1, 10)
        for y in range(1, 10)
        for z in range(1, 10)
    )
    assert len(countdown.problems("test")) >= 500


def test_unknown_split():
    with pytest.raises(ValueError, match="'dev'"):
        countdown.problems("dev")


def test_sample_is_reproducible_and_without_replacement():
    first = countdown.sample("test", 500, seed=3)
    assert first == countdown.sample("test", 500, seed=3)
    assert first != countdown.sample("test", 500, seed=4)
    assert len(set(first)) == 500
    assert len(countdown.sample("test", 2000, seed=0)) == 2000
    assert countdown.sample("test", 0, seed=0) == []


def test_prompt_and_chat():
    p = Problem(3, 5, 2, 16)
    assert p.prompt == "3 5 2 = 16"
    assert p.chat == [{"role": "user", "content": "3 5 2 = 16"}]


def test_known_solutions():
    assert Problem(3, 5, 2, 16).solutions() == [("+", "×")]
    assert Problem(2, 2, 1, 4).solutions() == [("+", "×"), ("×", "×")]
    assert Problem(3, 5, 2, 16).results(("-", "×")) == (-2, -4)


@pytest.mark.parametrize(
    ("number", "expected"), [(-20, "-20"), (99, "99"), (-21, "out"), (100, "out"), (0, "0")]
)
def test_word(number, expected):
    assert word(number) == expected
    assert expected in countdown.WORDS


def attempts(thought: list[str]) -> list[list[str]]:
    """Splits a thought into attempts, each with its check if it has one."""
    found: list[list[str]] = []
    i = 0
    while i < len(thought):
        length = 9 if thought[i + 5 : i + 6] == ["check"] else 5
        found.append(thought[i : i + length])
        i += length
    return found


@given(
    st.sampled_from(EVERY),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 1.0]),
)
def test_thoughts_are_correct(problem, seed, check, exhaust):
    thought = write_thought(problem, random.Random(seed), Style(check=check, exhaust=exhaust))
    assert set(thought) <= set(countdown.WORDS)
    tried = []
    for attempt in attempts(thought):
        candidate = (attempt[0], attempt[1])
        first, second = problem.results(candidate)
        verdict = "ok" if second == problem.target else "no"
        assert attempt[2:5] == [word(first), word(second), verdict]
        assert attempt[5:] in ([], ["check", *attempt[2:5]])
        tried.append(candidate)
    checked = sum(len(a) == 9 for a in attempts(thought))
    assert checked == {0.0: 0, 0.5: checked, 1.0: len(tried)}[check]
    assert len(tried) == len(set(tried))
    right = [c for c in tried if c in problem.solutions()]
    assert right
    assert found_in(thought) == right[0]
    if exhaust:
        assert len(tried) == len(CANDIDATES)
    else:
        assert tried[-1] == right[0]


@given(st.sampled_from(EVERY), st.integers(0, 2**32), st.data())
def test_a_cut_thought_still_gets_a_right_solution(problem, seed, data):
    rng = random.Random(seed)
    thought = write_thought(problem, rng, Style(check=0.5, exhaust=0.5))
    cut = thought[: data.draw(st.integers(0, len(thought)))]
    solution = countdown.write_solution(problem, cut, rng)
    assert grade(problem, " ".join(solution)) == 1.0
    if found_in(cut) is not None:
        assert tuple(solution) == found_in(thought)


def test_found_in_waits_for_the_verdict():
    thought = [
        "+",
        "+",
        "8",
        "10",
        "no",
        "check",
        "8",
        "10",
        "no",
        "+",
        "×",
        "8",
        "16",
        "ok",
        "check",
        "8",
        "16",
        "ok",
    ]
    assert [found_in(thought[:n]) for n in (0, 9, 13)] == [None] * 3
    assert found_in(thought[:14]) == found_in(thought) == ("+", "×")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("+ ×", ("+", "×")),
        ("  - \n + ", ("-", "+")),
        ("", None),
        ("+", None),
        ("+ × +", None),
        ("+×", None),
        ("+ *", None),
        ("+ × <eos>", None),
        ("8 16", None),
    ],
)
def test_parse(text, expected):
    assert parse(text) == expected


def test_grade_is_exact():
    p = Problem(2, 2, 1, 4)
    assert {c: grade(p, " ".join(c)) for c in CANDIDATES} == {
        c: float(c in p.solutions()) for c in CANDIDATES
    }
    assert grade(p, "") == grade(p, "+ × ok") == 0.0


def test_unknown_operator():
    with pytest.raises(ValueError, match="unknown operator"):
        Problem(1, 1, 1, 1).results(("+", "/"))
