"""A Codeforces rating from graded attempts, by the procedure of CodeElo (arXiv 2501.01257).

In each contest a problem is worth what it was worth to its contestants, less 50 points for every attempt
before the first right one; the sum has a rank among the official contestants, and the contest's rating is the
one at which that rank is expected, with Elo's probabilities; the mean over contests is the rating. The
contests come as a JSON file, a list of

    {"contest": "1999", "problems": {"A": 500, "B": 1000},
     "standings": [{"rating": 1523, "score": 1430.0}, …]}

where a rating is a contestant's before the contest and a score is in points (scoring by solved problems and
penalties is another procedure).
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_decode.errors import ConfigError

PENALTY = 50.0  # points for an attempt before the first right one
ABOVE = 100.0  # who is better than all cannot be rated further above the best

Attempts = Mapping[str, Sequence[float | bool | None]]  # problem -> what its attempts, in order, were graded


@dataclass(frozen=True, slots=True)
class Contest:
    """problems: name -> points. ratings, scores: of the official contestants, in the same order."""

    name: str
    problems: Mapping[str, float]
    ratings: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class CodeforcesRating:
    """rating: the mean over contests. contests: name -> (rating, score, rank)."""

    rating: float
    contests: Mapping[str, tuple[float, float, int]]


def load_contests(path: str | Path) -> tuple[Contest, ...]:
    """Contests of a file. Raises ConfigError, naming the contest, for what is missing or no number."""
    path = Path(path).expanduser()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no table of contests: {error}") from None
    if not isinstance(found, list) or not found:
        raise ConfigError(f"{path} must hold a list of contests that is not empty")
    contests = tuple(_contest(one, f"{path}, contest {place}") for place, one in enumerate(found))
    names = [contest.name for contest in contests]
    if len(set(names)) != len(names):
        raise ConfigError(f"{path}: a contest comes twice: {', '.join(sorted(names))}")
    return contests


def _contest(found: Any, where: str) -> Contest:
    if not isinstance(found, Mapping) or not {"contest", "problems", "standings"} <= found.keys():
        raise ConfigError(f"{where}: expected contest, problems and standings, got {found!r:.80}")
    problems, standings = found["problems"], found["standings"]
    if not isinstance(problems, Mapping) or not problems:
        raise ConfigError(f"{where}: problems must map names to points, got {problems!r:.80}")
    if not isinstance(standings, list) or not standings:
        raise ConfigError(f"{where}: standings must list the official contestants, got {standings!r:.80}")
    for row in standings:
        if not isinstance(row, Mapping) or not {"rating", "score"} <= row.keys():
            raise ConfigError(f"{where}: a contestant must have rating and score, got {row!r:.80}")
    points = {str(name): _number(value, f"{where}, problem {name}") for name, value in problems.items()}
    ratings = tuple(_number(row["rating"], f"{where}, a rating") for row in standings)
    scores = tuple(_number(row["score"], f"{where}, a score") for row in standings)
    return Contest(str(found["contest"]), points, ratings, scores)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{where} must be a number, got {value!r}")
    return float(value)


def score_of(contest: Contest, attempts: Attempts) -> float:
    """Points: of each problem with a right attempt max(0, points - 50 wrong ones before it). An attempt that
    could not be graded (None) counts neither way; problems without attempts are 0. ConfigError for a problem
    that the contest has not.
    """
    total = 0.0
    for problem, grades in attempts.items():
        if problem not in contest.problems:
            there = ", ".join(contest.problems)
            raise ConfigError(f"contest {contest.name} has no problem {problem!r}; there are {there}")
        right = [grade == 1 for grade in grades if grade is not None]
        if any(right):
            total += max(0.0, contest.problems[problem] - PENALTY * right.index(True))
    return total


def rank_of(contest: Contest, score: float) -> int:
    """1 + how many official contestants have more points."""
    return 1 + sum(other > score for other in contest.scores)


def expected_rank(contest: Contest, rating: float) -> float:
    """1 + the sum of the probabilities 1 / (1 + 10^((rating - other) / 400)) of being beaten."""
    return 1.0 + sum(1.0 / (1.0 + 10.0 ** ((rating - other) / 400.0)) for other in contest.ratings)


def rating_at(contest: Contest, rank: float) -> float:
    """The rating whose expected rank this is, between 0 and the best contestant's plus 100."""
    highest = round((max(contest.ratings) + ABOVE) * 16)
    # The expected rank falls with the rating; sixteenths of a point are searched, as exact numbers.
    place = bisect.bisect_left(range(highest + 1), -rank, key=lambda step: -expected_rank(contest, step / 16))
    return min(place, highest) / 16


def rating(contests: Sequence[Contest], attempts: Mapping[str, Attempts]) -> CodeforcesRating:
    """The rating over the contests that were attempted. attempts: contest -> problem -> grades in order.
    ConfigError where a contest is not in the table, or none was attempted.
    """
    known = {contest.name: contest for contest in contests}
    unknown = sorted(attempts.keys() - known.keys())
    if unknown or not attempts:
        raise ConfigError(
            f"no contest {unknown[0]!r} in the table; there are {', '.join(known)}"
            if unknown
            else "a rating needs attempts in one contest or more"
        )
    found = {}
    for name, tried in attempts.items():
        score = score_of(known[name], tried)
        rank = rank_of(known[name], score)
        found[name] = (rating_at(known[name], rank), score, rank)
    return CodeforcesRating(sum(one[0] for one in found.values()) / len(found), found)
