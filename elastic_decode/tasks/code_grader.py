"""Programs graded by their tests, behind walls, several at a time: as a reward and for evaluation.

The reward is that of Elastic Reasoning and DeepCoder (arXiv 2505.05315): the last fenced block of the
solution segment passes all tests, or it does not: 1 or 0.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotDone
from dataclasses import dataclass
from typing import Any

from elastic_decode.errors import ConfigError
from elastic_decode.tasks.code import (
    Cases,
    TestProgram,
    program_in,
    program_of,
    read_tests,
    right_output,
    right_result,
)
from elastic_decode.tasks.sandbox import (
    NOT_ISOLATED,
    Limits,
    Outcome,
    Sandbox,
    SandboxFailure,
    Walls,
    find_walls,
)

ALLOW = "ELASTIC_DECODE_ALLOW_UNISOLATED"  # "1": without walls where there can be none
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """score: 1.0, 0.0, or None where it was not found out. reason: "right", "no program", "wrong", "crash",
    "time", "output", "sandbox" or "patience". test: the place of the first test that failed.
    """

    score: float | None
    reason: str
    test: int | None = None


class CodeGrader:
    """Grades programs by tests; a reward function in TRL's signature, `code` in a configuration.

    workers: programs at a time, a thread here and processes behind walls each; made when they are first
    needed, in the process that needs them. limits: of a test, fields of `Limits`. tests: the column of tests,
    or several whose tests are put together; see `tasks/code.py` for their forms. function: the column that
    names the function, where the tests do not. program: they are a test program's text; setup: the column of
    what runs before it (HumanEval's prompt); entry_point: the column of the name given to its `check`.
    max_tests: only so many, those of the longest inputs, as rllm does. patience: seconds for one call, less
    than the trainer's own limit for a group: what is not graded by then is None. float_tolerance: of outputs
    and of results, absolute or relative. allow_unisolated: grade where nothing can be isolated, too (also
    by ELASTIC_DECODE_ALLOW_UNISOLATED=1); otherwise that raises ConfigError, as do values that cannot be.

    Close it, or use it in a `with`.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        limits: Mapping[str, Any] | Limits | None = None,
        tests: str | Sequence[str] = "tests",
        function: str | None = None,
        program: bool = False,
        setup: str | None = None,
        entry_point: str | None = None,
        max_tests: int | None = None,
        patience: float = 90.0,
        float_tolerance: float | None = None,
        allow_unisolated: bool = False,
    ) -> None:
        for name, number in (("workers", workers), ("max_tests", 1 if max_tests is None else max_tests)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigError(f"{name} must be an int >= 1, got {number!r}")
        if not isinstance(patience, (int, float)) or not patience > 0:
            raise ConfigError(f"patience must be a number of seconds > 0, got {patience!r}")
        if float_tolerance is not None and not 0 <= float_tolerance < 1:
            raise ConfigError(f"float_tolerance must be in [0, 1), got {float_tolerance!r}")
        if (setup or entry_point) and not program:
            raise ConfigError("setup and entry_point are for tests that are a program: set program")
        self.__name__ = "code"
        self.failures: Counter[str] = Counter()  # reason -> programs that could not be graded
        self.limits = _limits(limits)
        self.columns = (tests,) if isinstance(tests, str) else tuple(tests)
        if not self.columns or (program and len(self.columns) > 1):
            raise ConfigError(f"tests must name a column, or several that are no programs, got {tests!r}")
        self._function, self._program, self._setup, self._entry = function, program, setup, entry_point
        self._workers, self._max_tests, self._patience = workers, max_tests, float(patience)
        tolerance = {} if float_tolerance is None else {"tolerance": float_tolerance}
        self._tolerance: dict[str, float] = tolerance
        self.walls: Walls = find_walls(allow_unisolated or os.environ.get(ALLOW) == "1")
        if self.walls == "none":
            _log.warning("programs are graded without isolation: %s", "; ".join(NOT_ISOLATED))
        # So that a dataset without the columns is refused before the first step.
        wanted = dict.fromkeys(name for name in (*self.columns, function, setup, entry_point) if name)
        keyword, rest = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD
        parameters = [inspect.Parameter(name, keyword) for name in wanted]
        self.__signature__ = inspect.Signature([*parameters, inspect.Parameter("columns", rest)])
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._owner = 0

    def __call__(self, **columns: Any) -> list[float | None]:
        """Scores of `solution` (the engine's; `completion_solution` where the dataset has such a column)."""
        key = "completion_solution" if "completion_solution" in columns else "solution"
        if key not in columns:
            raise ConfigError(
                f"the reward code grades the solution segment and needs the engine's column solution; it was "
                f"given {', '.join(columns)}"
            )
        programs = [program_in(text) for text in columns[key]]
        return [verdict.score for verdict in self.grade(programs, self._tests(columns, len(programs)))]

    def _tests(self, columns: Mapping[str, Any], count: int) -> list[Cases | TestProgram]:
        known: list[tuple[list[Any], Cases | TestProgram]] = []
        found = []
        for place in range(count):
            names = (*self.columns, self._function, self._setup, self._entry)
            row = [columns[name][place] if name else None for name in names]
            tests = next((tests for other, tests in known if other == row), None)
            if tests is None:
                tests = self._read(*row)
                known = [(row, tests)]  # the samples of a group have one row
            found.append(tests)
        return found

    def _read(self, *row: Any) -> Cases | TestProgram:
        *values, function, setup, entry = row
        if self._program:
            if not isinstance(values[0], str) or not values[0].strip():
                raise ConfigError(
                    f"column {self.columns[0]}: a test program is a text, got {values[0]!r:.80}"
                )
            return TestProgram(values[0], setup or "", entry)
        name = _name_in(function)
        parts = [read_tests(value, name) for value in values if value not in (None, "", "[]", [])]
        if not parts:
            raise ConfigError(f"a row has no tests in {', '.join(self.columns)}")
        cases = [case for part in parts for case in part.cases]
        if self._max_tests is not None and len(cases) > self._max_tests:
            cases = sorted(cases, key=lambda case: -sum(map(len, case.input)))[: self._max_tests]
        return Cases(tuple(cases), parts[0].function)

    def grade(self, programs: Sequence[str | None], tests: Sequence[Cases | TestProgram]) -> list[Verdict]:
        """A verdict a program, in order; None is no program. Equal ones with the same tests run once."""
        if len(programs) != len(tests):
            raise ValueError(f"{len(programs)} programs, and tests for {len(tests)}")
        end = time.monotonic() + self._patience
        asked: dict[tuple[str, int], Future[Verdict]] = {}
        for code, given in zip(programs, tests, strict=True):
            if code is not None and (code, id(given)) not in asked:
                asked[code, id(given)] = self._threads().submit(self._judge, code, given, end)
        done = {key: self._result(future, end) for key, future in asked.items()}
        return [
            Verdict(0.0, "no program") if code is None else done[code, id(given)]
            for code, given in zip(programs, tests, strict=True)
        ]

    def _threads(self) -> ThreadPoolExecutor:
        """Of this process: a fork has none of them."""
        with self._lock:
            if self._pool is None or self._owner != os.getpid():
                self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="code")
                self._owner = os.getpid()
            return self._pool

    def _result(self, future: Future[Verdict], end: float) -> Verdict:
        try:
            left = max(0.0, end - time.monotonic())
            verdict = future.result(timeout=None if math.isinf(left) else left)
        except (NotDone, CancelledError):
            future.cancel()
            verdict = Verdict(None, "patience")
        if verdict.score is None:
            self.failures[verdict.reason] += 1
            times = self.failures[verdict.reason]
            if times & (times - 1) == 0:  # the 1st, 2nd, 4th …
                _log.warning("a program could not be graded (%s): None (%d so far)", verdict.reason, times)
        return verdict

    def _judge(self, code: str, tests: Cases | TestProgram, end: float) -> Verdict:
        for last in (False, True):  # what fails for want of a process or memory may work a moment later
            try:
                return judge(code, tests, self.walls, self.limits, end=end, **self._tolerance)
            except SandboxFailure as failure:
                if last:
                    _log.warning("the sandbox: %s", failure)
        return Verdict(None, "sandbox")

    def close(self) -> None:
        """Waits for the tests that are running; what has not begun is not run."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None and self._owner == os.getpid():
            pool.shutdown(cancel_futures=True)

    def __enter__(self) -> CodeGrader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def judge(
    code: str,
    tests: Cases | TestProgram,
    walls: Walls,
    limits: Limits,
    *,
    end: float = math.inf,
    **tolerance: float,
) -> Verdict:
    """Runs a program on its tests until one fails. end: when to give up, by `time.monotonic`. Raises
    SandboxFailure.
    """
    if "\0" in code:
        return Verdict(0.0, "crash", 0)
    if time.monotonic() >= end:
        return Verdict(None, "patience")
    with Sandbox(program_of(code, tests), walls, limits) as sandbox:
        if isinstance(tests, TestProgram):
            right = sandbox.check(tests.source, setup=tests.setup, entry_point=tests.entry_point)
            return Verdict(1.0, "right") if right else Verdict(0.0, "wrong", 0)
        for place, case in enumerate(tests.cases):
            if time.monotonic() >= end:
                return Verdict(None, "patience")
            outcome: Outcome
            if tests.function is None:
                assert isinstance(case.input, str)
                outcome = sandbox.run(case.input)
                right = outcome.end == "ok" and right_output(case.expected, outcome.output, **tolerance)
            else:
                outcome = sandbox.call(tests.function, case.input)
                right = outcome.end == "ok" and right_result(case.expected, outcome.output, **tolerance)
            if not right:
                return Verdict(0.0, "wrong" if outcome.end == "ok" else outcome.end, place)
    return Verdict(1.0, "right")


def _limits(given: Mapping[str, Any] | Limits | None) -> Limits:
    if isinstance(given, Limits):
        return given
    try:
        return Limits(**(given or {}))
    except TypeError as error:
        raise ConfigError(f"limits {given!r}: {error}") from None


def _name_in(value: Any) -> str | None:
    """A function's name, or that in LiveCodeBench's metadata."""
    if isinstance(value, str) and value.strip().startswith("{"):
        value = json.loads(value)
    if isinstance(value, Mapping):
        value = value.get("func_name")
    return value or None
