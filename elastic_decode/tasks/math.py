r"""Mathematics with a short answer: the sets people measure on, the prompt, and the reward.

The reward is Elastic Reasoning's (arXiv 2505.05315, in its verl): the thinking has to be closed, the answer
is in the last `\boxed{}` of the solution segment, it equals the gold answer or it does not: 1 or 0. How
answers are compared: `tasks/math_answers.py` and `tasks/math_grader.py`; docs/graders.md for the user. No
torch here.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from elastic_decode.errors import ConfigError
from elastic_decode.tasks.math_answers import WHERE, Where, boxed, extract
from elastic_decode.tasks.math_grader import Gold, Grader, gold_texts, require_math_verify

SUFFIX = " Let's think step by step and output the final answer within \\boxed{}."

GoldForm = Literal["as_is", "boxed", "hash"]
GOLD_FORMS: tuple[GoldForm, ...] = ("as_is", "boxed", "hash")


def gold_answers(value: Any, form: GoldForm = "as_is") -> list[str]:
    r"""The acceptable answers of a dataset's value, as texts: it is one or a list of them, strings or numbers
    ("as_is"), a worked solution whose last `\boxed{}` is the answer ("boxed"), or ends in `#### …` ("hash").
    Empty where there is none. TypeError for what is no text or number.
    """
    texts = gold_texts(value)
    if form == "as_is":
        return texts
    found = (boxed(text) if form == "boxed" else extract(text, ("hash",)) for text in texts)
    return [text for text in found if text is not None]


@dataclass(frozen=True, kw_only=True)
class MathSet:
    """How a dataset is written. source: its id on the Hugging Face hub, or its name where there are several.
    prompt, answer: the columns. gold: what the answer column holds (see `gold_answers`).
    """

    source: str
    prompt: str = "problem"
    answer: str = "answer"
    gold: GoldForm = "as_is"


# Files of the paper's repository have the columns problem and answer throughout; on the hub they differ.
SETS: dict[str, MathSet] = {
    "aime": MathSet(source="AIME"),
    "amc": MathSet(source="AMC"),
    "math500": MathSet(source="HuggingFaceH4/MATH-500"),
    "math": MathSet(source="EleutherAI/hendrycks_math", answer="solution", gold="boxed"),
    "minerva": MathSet(source="math-ai/minervamath", prompt="question"),
    "olympiadbench": MathSet(source="Hothan/OlympiadBench", prompt="question", answer="final_answer"),
    "gsm8k": MathSet(source="openai/gsm8k", prompt="question", gold="hash"),
    "deepscaler": MathSet(source="agentica-org/DeepScaleR-Preview-Dataset"),
}


@dataclass(frozen=True, kw_only=True)
class MathReward:
    """1.0 for a right answer in the solution, 0.0 for a wrong one, none, or thinking that was not closed;
    None where it could not be graded. A reward function in TRL's signature, `math` in a configuration.

    answer: the column of the gold answer. gold: what it holds (see `gold_answers`). where: where an answer
    may stand (see `extract`). limit: seconds of processor time for one answer; patience: seconds on the clock
    for those of a group, together: an answer that hangs costs its own sample its reward, and no group runs
    into its own time limit. tolerance: relative, of numbers. Needs the engine's `thinking`, `solution` and
    `think_end`.
    """

    __name__: ClassVar[str] = "math"
    answer: str = "answer"
    gold: GoldForm = "as_is"
    where: Sequence[Where] = ("boxed",)
    limit: float = 5.0
    patience: float = 30.0
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if self.gold not in GOLD_FORMS:
            raise ConfigError(f"gold must be one of {', '.join(GOLD_FORMS)}, got {self.gold!r}")
        where = (self.where,) if isinstance(self.where, str) else tuple(self.where)
        if not where or not set(where) <= set(WHERE):
            raise ConfigError(f"where must be of {', '.join(WHERE)}, got {self.where!r}")
        if not isinstance(self.answer, str) or not self.answer.isidentifier():
            raise ConfigError(f"answer must be the name of a column, got {self.answer!r}")
        for name in ("limit", "patience"):
            if not isinstance(getattr(self, name), (int, float)) or not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be a number of seconds > 0, got {getattr(self, name)!r}")
        if not isinstance(self.tolerance, (int, float)) or not 0 <= self.tolerance < 1:
            raise ConfigError(f"tolerance must be in [0, 1), got {self.tolerance!r}")
        require_math_verify()
        object.__setattr__(self, "where", where)
        # So that a dataset without the column is refused before the first step.
        parameters = [
            inspect.Parameter(self.answer, inspect.Parameter.KEYWORD_ONLY),
            inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD),
        ]
        object.__setattr__(self, "__signature__", inspect.Signature(parameters))

    def __call__(self, **columns: Any) -> list[float | None]:
        return self.graded_by(_grader(float(self.limit), float(self.tolerance)), columns)

    def graded_by(self, grader: Grader, columns: Mapping[str, Any]) -> list[float | None]:
        """The same by processes that somebody else makes and closes, and with their limit and tolerance."""
        solutions = _ours("solution", columns)
        rows = zip(solutions, _ours("thinking", columns), _ours("think_end", columns), strict=True)
        answers = [
            None if _unclosed(thinking, end) else extract(text, self.where) for text, thinking, end in rows
        ]
        golds: list[Gold] = [gold_answers(value, self.gold) for value in columns[self.answer]]
        return grader.grade(answers, golds, patience=self.patience)


@contextmanager
def grading(reward: MathReward, workers: int = 2) -> Iterator[Callable[..., list[float | None]]]:
    """`reward` as a function whose processes are made here and end with the `with`."""
    with Grader(workers=workers, limit=reward.limit, tolerance=reward.tolerance) as grader:
        yield lambda **columns: reward.graded_by(grader, columns)


def _ours(name: str, columns: Mapping[str, Any]) -> Sequence[Any]:
    """A column of the engine's, not the dataset's of the same name (`solution` often is a worked one)."""
    if "think_end" not in columns and "completion_think_end" not in columns:
        raise ConfigError(
            "the reward math grades the solution segment, and needs the engine's columns thinking, solution "
            f"and think_end; it was given {', '.join(columns)}"
        )
    found: Sequence[Any] = columns[f"completion_{name}" if f"completion_{name}" in columns else name]
    return found


def _unclosed(thinking: str, think_end: str) -> bool:
    """Thinking that never began (the prompt had closed it) is not unclosed."""
    return think_end == "none" and bool(thinking)


_graders: dict[tuple[int, float, float], Grader] = {}


def _grader(limit: float, tolerance: float) -> Grader:
    """One a process, forked when it is first needed; it goes when the process does."""
    key = os.getpid(), limit, tolerance
    if key not in _graders:
        _graders[key] = Grader(workers=1, limit=limit, tolerance=tolerance)
    return _graders[key]
