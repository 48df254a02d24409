"""Countdown-lite, the bundled model's task: reach a target with three numbers and two operators.

Given x, y, z in 1..9 and a target T in 0..99, find operators o1, o2 in {+, -, ×} with (x o1 y) o2 z = T. Nine
candidates, an exact verifier, and a thought that tries candidates one after the other: thinking for longer is
worth something, and a thought can hold redundancy. Everything is words between spaces, one word a token of
the tokenizer.

    prompt    3 5 2 = 16
    thought   + + 8 10 no check 8 10 no - × -2 -4 no + × 8 16 ok
    solution  + ×

An attempt is five words: both operators, both results (`out` outside -20..99), the verdict. No torch here.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

OPERATORS = ("+", "-", "×")
CANDIDATES = tuple((first, second) for first in OPERATORS for second in OPERATORS)
OPEN, CLOSE = "<think>", "</think>"
LOWEST, HIGHEST = -20, 99  # integers that have a word; others are written OUT
OUT, OK, NO, CHECK, EQUALS = "out", "ok", "no", "check", "="
WORDS = (EQUALS, *OPERATORS, OK, NO, CHECK, OUT, *(str(n) for n in range(LOWEST, HIGHEST + 1)))

Split = Literal["train", "test"]
Operators = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Problem:
    """Numbers x, y, z (1..9) and a target (0..99) that at least one candidate reaches."""

    x: int
    y: int
    z: int
    target: int

    @property
    def prompt(self) -> str:
        """As plain text: `3 5 2 = 16`."""
        return f"{self.x} {self.y} {self.z} {EQUALS} {self.target}"

    @property
    def chat(self) -> list[dict[str, str]]:
        """As a chat of one user message."""
        return [{"role": "user", "content": self.prompt}]

    def results(self, operators: Operators) -> tuple[int, int]:
        """The intermediate and the final result of (x o1 y) o2 z."""
        first = _apply(operators[0], self.x, self.y)
        return first, _apply(operators[1], first, self.z)

    def solutions(self) -> list[Operators]:
        """Every pair of operators that reaches the target, in the order of CANDIDATES."""
        return [c for c in CANDIDATES if self.results(c)[1] == self.target]


@dataclass(frozen=True, slots=True)
class Style:
    """How the oracle writes: probabilities in [0, 1].

    check: an attempt is followed by a second look at it (`check r1 r2 verdict`), which never changes it.
    exhaust: the thought goes through all nine candidates even after a success, else it stops at the first.
    """

    check: float = 0.0
    exhaust: float = 0.0


def _apply(operator: str, a: int, b: int) -> int:
    if operator == "+":
        return a + b
    if operator == "-":
        return a - b
    if operator == "×":
        return a * b
    raise ValueError(f"unknown operator {operator!r}; expected one of {OPERATORS}")


def _held_out(x: int, y: int, z: int) -> bool:
    """Whole triples are held out, not targets: a test problem's numbers were never trained on together."""
    return zlib.crc32(f"{x} {y} {z}".encode()) % 8 == 0


@functools.cache
def problems(split: Split) -> tuple[Problem, ...]:
    """All problems of a split, in a fixed order. Raises ValueError for another name than train and test."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    found = []
    digits = range(1, 10)
    for x, y, z in ((x, y, z) for x in digits for y in digits for z in digits):
        if _held_out(x, y, z) != (split == "test"):
            continue
        reached = {Problem(x, y, z, 0).results(c)[1] for c in CANDIDATES}
        found += [Problem(x, y, z, target) for target in sorted(reached) if 0 <= target <= HIGHEST]
    return tuple(found)


def sample(split: Split, n: int, seed: int) -> list[Problem]:
    """n problems of a split, reproducible from the seed: without replacement until the split is used up."""
    rng = random.Random(seed)
    pool = problems(split)
    drawn: list[Problem] = []
    while len(drawn) < n:
        drawn += rng.sample(pool, min(len(pool), n - len(drawn)))
    return drawn


def word(number: int) -> str:
    """A number as a word, OUT where it has none."""
    return str(number) if LOWEST <= number <= HIGHEST else OUT


def write_thought(problem: Problem, rng: random.Random, style: Style) -> list[str]:
    """A correct thought as words, delimiters excluded: candidates in random order until the style stops."""
    words: list[str] = []
    stop_at_success = rng.random() >= style.exhaust
    for candidate in rng.sample(CANDIDATES, len(CANDIDATES)):
        first, second = problem.results(candidate)
        outcome = [word(first), word(second), OK if second == problem.target else NO]
        words += [*candidate, *outcome]
        if rng.random() < style.check:
            words += [CHECK, *outcome]
        if second == problem.target and stop_at_success:
            break
    return words


def found_in(thought: Sequence[str]) -> Operators | None:
    """The first candidate that a (possibly cut) thought has called `ok`; None if there is none yet."""
    for i in range(4, len(thought)):
        # Four words before a check's verdict stands the attempt's verdict, no operator: only attempts match.
        if thought[i] == OK and thought[i - 4] in OPERATORS and thought[i - 3] in OPERATORS:
            return thought[i - 4], thought[i - 3]
    return None


def write_solution(problem: Problem, thought: Sequence[str], rng: random.Random) -> list[str]:
    """A right answer to end a thought with: what the thought found, else any of the problem's solutions."""
    return list(found_in(thought) or rng.choice(problem.solutions()))


def parse(solution: str) -> Operators | None:
    """The two operators of a solution text, None unless it is exactly two operators and whitespace."""
    words = solution.split()
    if len(words) == 2 and all(w in OPERATORS for w in words):
        return words[0], words[1]
    return None


def grade(problem: Problem, solution: str) -> float:
    """1.0 if the solution text is two operators that reach the target exactly, else 0.0."""
    operators = parse(solution)
    return float(operators is not None and problem.results(operators)[1] == problem.target)


def reward(
    solution: Sequence[str],
    x: Sequence[int],
    y: Sequence[int],
    z: Sequence[int],
    target: Sequence[int],
    **columns: object,
) -> list[float]:
    """`grade` as a reward function in TRL's signature; the problem comes as columns, an entry a sample."""
    rows = zip(x, y, z, target, solution, strict=True)
    return [grade(Problem(*numbers), text) for *numbers, text in rows]
