"""A task: where its problems are, how they are asked, how an answer is graded."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from elastic_decode.errors import ConfigError
from elastic_decode.tasks import countdown
from elastic_decode.tasks.code_grader import CodeGrader
from elastic_decode.tasks.data import DataOptions, Row, load_rows
from elastic_decode.tasks.math import SETS, SUFFIX, MathReward, grading

# A reward function in TRL's signature, with a list a column: scores, None where grading itself failed.
Grade = Callable[..., Sequence[float | None]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """data: where its own problems are; None where it brings none. columns: those that the grader reads.
    grader: makes what grades, for as long as it is needed. chat, suffix, column_of: how problems of another
    source are asked, and what its columns are called. starter: the column of the code that an answer has to
    begin with, where a row has any: the question ends with it.
    """

    name: str
    data: DataOptions | None
    columns: tuple[str, ...]
    grader: Callable[[], AbstractContextManager[Grade]]
    chat: bool = True
    suffix: str = ""
    column_of: Mapping[str, str] = field(default_factory=dict)
    starter: str | None = None

    def rows(
        self,
        source: str | None = None,
        *,
        columns: Mapping[str, str] | None = None,
        **options: Any,
    ) -> list[Row]:
        """The problems: of `source` (see DataOptions), or the task's own. columns: over the task's mapping.
        options: further fields of DataOptions. Raises ConfigError, naming those found, where a column is
        missing.
        """
        if source is None and self.data is None:
            raise ConfigError(f"task {self.name} brings no data; give a file or the id of a data set")
        if source is None:
            base = self.data
        else:
            base = DataOptions(source=source, chat=self.chat, suffix=self.suffix, columns=self.column_of)
        assert base is not None
        mapping = {**base.columns, **(columns or {})}
        rows = load_rows(replace(base, columns=mapping, **options))
        missing = [name for name in self.columns if name not in rows[0].columns]
        if missing:
            found = ", ".join(rows[0].columns) or "none"
            raise ConfigError(
                f"task {self.name} grades by the column {missing[0]!r}, which the data has not; there are: "
                f"{found}"
            )
        return [_with_starter(row, row.columns.get(self.starter)) for row in rows] if self.starter else rows


def _with_starter(row: Row, code: Any) -> Row:
    if not isinstance(code, str) or not code.strip() or not row.prompt:
        return row
    words = f"\n\nBegin with this code:\n```python\n{code.rstrip()}\n```"
    if isinstance(row.prompt, str):
        return replace(row, prompt=row.prompt + words)
    *before, last = row.prompt
    assert isinstance(last, Mapping)
    return replace(row, prompt=[*before, {**last, "content": f"{last['content']}{words}"}])


def _countdown() -> Task:
    return Task(
        name="countdown",
        data=DataOptions(source="countdown", split="test"),
        columns=("x", "y", "z", "target"),
        grader=lambda: nullcontext(countdown.reward),
    )


def _math(name: str) -> Task:
    known = SETS[name]
    reward = MathReward(answer=known.answer, gold=known.gold, patience=math.inf)
    return Task(
        name=name,
        data=None,
        columns=(known.answer,),
        grader=lambda: grading(reward),
        suffix=SUFFIX,
        column_of={"prompt": known.prompt},
    )


PROGRAM = (
    "\n\nRead from standard input and write to standard output. Give the whole program in Python as one "
    "block between ```python and ```."
)
ANY_PROGRAM = "\n\nGive the whole program in Python as one block between ```python and ```."
FUNCTION = "\n\nGive the whole function with its imports as one block between ```python and ```."


def _code(**options: Any) -> Callable[[], AbstractContextManager[Grade]]:
    return lambda: CodeGrader(workers=os.cpu_count() or 1, patience=math.inf, **options)


def _humaneval() -> Task:
    """HumanEval and HumanEval+: openai/openai_humaneval, evalplus/humanevalplus."""
    return Task(
        name="humaneval",
        data=None,
        columns=("test", "entry_point", "beginning"),
        grader=_code(program=True, tests="test", setup="beginning", entry_point="entry_point"),
        suffix=FUNCTION,
        column_of={"prompt": "prompt", "beginning": "prompt"},
    )


def _livecodebench() -> Task:
    """livecodebench/code_generation_lite: standard input, or a method of a class that a row begins."""
    tests = ("public_test_cases", "private_test_cases")
    return Task(
        name="livecodebench",
        data=None,
        columns=(*tests, "metadata", "starter_code"),
        grader=_code(tests=tests, function="metadata"),
        suffix=ANY_PROGRAM,
        column_of={"prompt": "question_content"},
        starter="starter_code",
    )


def _codeforces() -> Task:
    """Standard input: agentica-org/DeepCoder-Preview-Dataset, its part codeforces."""
    return Task(
        name="codeforces",
        data=None,
        columns=("tests",),
        grader=_code(),
        suffix=PROGRAM,
        column_of={"prompt": "problem"},
    )


TASKS: dict[str, Callable[[], Task]] = {
    "countdown": _countdown,
    **{name: functools.partial(_math, name) for name in SETS},
    "humaneval": _humaneval,
    "livecodebench": _livecodebench,
    "codeforces": _codeforces,
}


def task(name: str) -> Task:
    """The task `name`. Raises ConfigError for another."""
    if name not in TASKS:
        raise ConfigError(f"no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]()
