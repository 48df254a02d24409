"""Rewards that look at length: the rivals of budget-constrained training, so that one trainer has them all.

Each is a reward function in TRL's signature, f(prompts, completions, completion_ids, **columns) ->
list[float | None], made with its settings; a dataclass, so that it can be sent to a worker process. Where
correctness matters it comes from `correct`, another reward function, called with the same arguments: above
`threshold` counts as correct, and None stays None. Length is the number of a completion's tokens, delimiters,
forced tokens and EOS included, or a column (`length="think_tokens"`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from elastic_decode.errors import ConfigError
from elastic_decode.tasks.l1 import l1_suffix as l1_suffix
from elastic_decode.tasks.l1 import with_l1_suffix as with_l1_suffix


class RewardFunction(Protocol):
    def __call__(self, **kwargs: Any) -> Sequence[float | None]: ...


@dataclass(frozen=True, kw_only=True)
class L1Exact:
    """1[correct] - alpha |n - y| for a wish of n tokens and y written. L1-Exact, arXiv 2503.04697.

    target: the column that says n, or one n for all. The reward contains correctness: add no other for it.
    """

    __name__: ClassVar[str] = "l1_exact"
    correct: RewardFunction
    target: str | int = "target_tokens"
    alpha: float = 0.0003
    threshold: float = 0.5
    length: str | None = None

    @property
    def needs(self) -> list[str]:
        """Columns that the data must have."""
        return _named(self.target, self.length)

    def __call__(self, **kwargs: Any) -> list[float | None]:
        right = _right(self.correct, self.threshold, kwargs)
        lengths, targets = _lengths(self.length, kwargs), _numbers(self.target, "target", kwargs)
        return [
            None if ok is None else float(ok) - self.alpha * abs(n - y)
            for ok, y, n in zip(right, lengths, targets, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class L1Max:
    """1[correct] · clip(alpha (n - y) + delta, 0, 1) for at most n tokens, y written. L1-Max, arXiv
    2503.04697.

    With delta = 0.5 a right answer slightly over n still beats a wrong one. target: as for L1Exact. The
    reward contains correctness: add no other for it.
    """

    __name__: ClassVar[str] = "l1_max"
    correct: RewardFunction
    target: str | int = "target_tokens"
    alpha: float = 0.0003
    delta: float = 0.5
    threshold: float = 0.5
    length: str | None = None

    @property
    def needs(self) -> list[str]:
        """Columns that the data must have."""
        return _named(self.target, self.length)

    def __call__(self, **kwargs: Any) -> list[float | None]:
        right = _right(self.correct, self.threshold, kwargs)
        lengths, targets = _lengths(self.length, kwargs), _numbers(self.target, "target", kwargs)
        return [
            None if ok is None else float(ok) * min(1.0, max(0.0, self.alpha * (n - y) + self.delta))
            for ok, y, n in zip(right, lengths, targets, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Long2Short:
    """Short among the samples of its prompt is good, long is bad: the length penalty of Kimi k1.5's
    long2short, arXiv 2501.12599.

    With lambda = 1/2 - (y - shortest) / (longest - shortest): lambda where correct, min(0, lambda) where not,
    0 where all are of one length. To be added to a reward for correctness, with a weight (the paper warms it
    up). Samples of one prompt are those whose prompts are equal; unscorable ones are left out.
    """

    __name__: ClassVar[str] = "long2short"
    correct: RewardFunction
    threshold: float = 0.5
    length: str | None = None

    @property
    def needs(self) -> list[str]:
        """Columns that the data must have."""
        return _named(self.length)

    def __call__(self, **kwargs: Any) -> list[float | None]:
        right, lengths = _right(self.correct, self.threshold, kwargs), _lengths(self.length, kwargs)
        groups: dict[str, list[int]] = {}
        for index, (prompt, ok) in enumerate(zip(_column("prompts", kwargs), right, strict=True)):
            if ok is not None:
                groups.setdefault(json.dumps(prompt, default=str), []).append(index)
        rewards: list[float | None] = [None] * len(right)
        for members in groups.values():
            shortest = min(lengths[index] for index in members)
            longest = max(lengths[index] for index in members)
            for index in members:
                if longest == shortest:
                    rewards[index] = 0.0
                    continue
                value = 0.5 - (lengths[index] - shortest) / (longest - shortest)
                rewards[index] = value if right[index] else min(0.0, value)
        return rewards


@dataclass(frozen=True, kw_only=True)
class SoftOverlong:
    """0 up to longest - margin tokens, from there linearly down to -1 at `longest`, -1 past it. DAPO's soft
    overlong punishment, arXiv 2503.14476, section 3.4 (there 20480 and 4096). To be added to a reward for
    correctness.
    """

    __name__: ClassVar[str] = "soft_overlong"
    longest: int
    margin: int
    length: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.margin <= self.longest:
            raise ConfigError(
                f"SoftOverlong needs 0 < margin <= longest, got margin={self.margin}, longest={self.longest}"
            )

    @property
    def needs(self) -> list[str]:
        """Columns that the data must have."""
        return _named(self.length)

    def __call__(self, **kwargs: Any) -> list[float | None]:
        free = self.longest - self.margin
        return [max(-1.0, min(0.0, (free - y) / self.margin)) for y in _lengths(self.length, kwargs)]


def _named(*sources: str | int | None) -> list[str]:
    return [source for source in sources if isinstance(source, str)]


def _column(name: str, kwargs: Mapping[str, Any]) -> Sequence[Any]:
    if name not in kwargs:
        raise ConfigError(
            f"a length reward reads the column {name!r}, which is not there; there are {', '.join(kwargs)}"
        )
    return kwargs[name]


def _right(correct: RewardFunction, threshold: float, kwargs: Mapping[str, Any]) -> list[bool | None]:
    scores = list(correct(**kwargs))
    expected = len(_column("completion_ids", kwargs))
    if len(scores) != expected:
        raise ConfigError(f"`correct` gave {len(scores)} scores for {expected} completions")
    return [None if score is None else score > threshold for score in scores]


def _numbers(source: str | int, name: str, kwargs: Mapping[str, Any]) -> list[int]:
    if not isinstance(source, str):
        return [source] * len(_column("completion_ids", kwargs))
    values = list(_column(source, kwargs))
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{name}: the column {source!r} must hold numbers of tokens, got {value!r}")
    return values


def _lengths(length: str | None, kwargs: Mapping[str, Any]) -> list[int]:
    if length is not None:
        return _numbers(length, "length", kwargs)
    return [len(ids) for ids in _column("completion_ids", kwargs)]
