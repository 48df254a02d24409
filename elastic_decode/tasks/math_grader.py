"""Answers compared by computer algebra where writing does not decide: math-verify, in processes that are
killed at a time limit.

math-verify's own limits are SIGALRM handlers: they need the main thread, and do not run inside one long
operation on a large integer. They are off here; a worker's limit is a timer whose signal ends the process.
What is seen to be too large is refused before it is parsed, and what slips through costs a process its life
and its answer a verdict, nothing else.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from pathlib import Path
from typing import Any

from elastic_decode.errors import ConfigError
from elastic_decode.tasks.math_answers import read, same, written_alike
from elastic_decode.tasks.workers import WorkerDied, WorkerPool, WorkerTimeout

_log = logging.getLogger(__name__)
LONGEST = 1000  # characters of an answer
DEEPEST = 30  # brackets inside one another
_MEMORY = 2**30  # bytes that a process may take beyond what it has when it starts
_PATIENCE = 10  # seconds on the clock for one of processor time: of a busy machine
_REMEMBERED = 500  # questions between two clearings of sympy's cache

Gold = str | int | float | Sequence[str | int | float] | None


class Grader:
    """Grades answers in `workers` processes. Close it, or use it in a `with`.

    The processes are forked here (see `tasks/workers.py`): make it before large models are in memory. limit:
    seconds of processor time for one answer (ten times as much on the clock); its process is killed then, and
    replaced. tolerance: how far a number may be from the gold number, relative to it; by default not at all.
    Raises ConfigError where math-verify is not installed, and for values that cannot be.
    """

    def __init__(self, *, workers: int = 2, limit: float = 5.0, tolerance: float = 0.0) -> None:
        require_math_verify()
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
            raise ConfigError(f"workers must be an int >= 1, got {workers!r}")
        if not 0 < limit < math.inf:
            raise ConfigError(f"limit must be a number of seconds > 0, got {limit!r}")
        if not 0 <= tolerance < 1:
            raise ConfigError(f"tolerance must be in [0, 1), got {tolerance!r}")
        self.failures: Counter[str] = Counter()  # reason -> answers that could not be graded
        self._limit, self._tolerance = limit, tolerance
        _warm_up()
        self._pool = WorkerPool(_work, workers=workers, timeout=_PATIENCE * limit)

    def grade(
        self, answers: Sequence[str | None], golds: Sequence[Gold], *, patience: float | None = None
    ) -> list[float | None]:
        """1.0 where an answer equals its gold answer, or one of several; 0.0 where it does not, is None
        (there is none), or is larger than any answer; None where that could not be found out.

        patience: seconds for all of them; what has not been compared by then is None. Equal questions are
        asked once. Raises ValueError for two lengths, TypeError for a gold answer that is no text or number.
        """
        if len(answers) != len(golds):
            raise ValueError(f"{len(answers)} answers, and {len(golds)} gold answers")
        end = math.inf if patience is None else time.monotonic() + patience
        asked: dict[bytes, Future[Any]] = {}
        verdicts: list[float | bytes | None] = []
        for answer, gold in zip(answers, golds, strict=True):
            texts = gold_texts(gold)
            verdict = None if not texts else compare(texts, answer, self._tolerance)
            if not texts:
                self._failed("no gold answer", "had no gold answer to compare it with")
                verdicts.append(None)
                continue
            if verdict is not None:
                verdicts.append(float(verdict))
                continue
            question = json.dumps([texts, answer, self._limit, self._tolerance]).encode()
            if question not in asked:
                asked[question] = self._pool.submit(question)
            verdicts.append(question)
        found = {question: self._result(future, end) for question, future in asked.items()}
        return [found[verdict] if isinstance(verdict, bytes) else verdict for verdict in verdicts]

    def _result(self, future: Future[Any], end: float) -> float | None:
        try:
            answer = future.result(timeout=None if end == math.inf else max(0.0, end - time.monotonic()))
            if not isinstance(answer, str):
                return float(answer)
            self._failed("error", f"raised\n{answer}")
        except WorkerTimeout:
            self._failed("limit", "took longer than its limit")
        except WorkerDied as death:
            if death.signal == signal.SIGPROF:
                self._failed("limit", "took longer than its limit")
            else:
                self._failed("died", "ended its process")
        except NotDone:
            future.cancel()
            self._failed("patience", "had to wait for longer than the caller's patience")
        return None

    def _failed(self, reason: str, what: str) -> None:
        self.failures[reason] += 1
        times = self.failures[reason]
        if times & (times - 1) == 0:  # the 1st, 2nd, 4th …
            _log.warning("comparing an answer %s: its grade is None (%d so far)", what, times)

    def close(self) -> None:
        """End the processes, at work or not."""
        self._pool.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def require_math_verify() -> None:
    """Raises ConfigError where math-verify cannot be imported."""
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"grading mathematics needs math-verify ({error}): pip install 'elastic-decode[math]'"
        ) from error


def gold_texts(gold: Gold) -> list[str]:
    """The acceptable answers as texts: of one or of several, strings or numbers (142.0 is `142`); empty for
    None, blank texts, NaN and infinities.
    """
    if gold is None:
        return []
    if isinstance(gold, str):
        return [gold] if gold.strip() else []
    if hasattr(gold, "tolist"):  # numpy
        gold = gold.tolist()
    if isinstance(gold, (int, float)) and not isinstance(gold, bool):
        if isinstance(gold, float) and not math.isfinite(gold):
            return []
        return [str(int(gold)) if gold == int(gold) and abs(gold) < 1e15 else str(gold)]
    if isinstance(gold, (list, tuple)):
        return [text for one in gold for text in gold_texts(one)]
    raise TypeError(f"a gold answer is a text, a number, or a list of them, got {gold!r:.80}")


def compare(golds: Sequence[str], answer: str | None, tolerance: float = 0.0) -> bool | None:
    """Whether an answer equals one of the gold answers, None if that takes algebra. Never long."""
    if answer is None or not answer.strip():
        return False
    if answer in golds:
        return True
    if oversized(answer):
        return False
    shape = read(answer)
    values = functools.partial(written_alike, tolerance=tolerance)
    found = [False if oversized(gold) else same(read(gold), shape, values) for gold in golds]
    if True in found:
        return True
    return None if None in found and not explosive(answer) else False


def oversized(text: str) -> bool:
    """Whether a text is too long or too deep to be read as an answer."""
    if len(text) > LONGEST:
        return True
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest > DEEPEST


_POWER = re.compile(r"(?:\^|\*\*)\s*(\{(?:[^{}]|\{[^{}]*\})*\}|\((?:[^()]|\([^()]*\))*\)|[-+]?\w+)")


def explosive(text: str) -> bool:
    """Whether evaluating an answer may take for ever: towers of powers, factorials of factorials or of large
    numbers, exponents beyond 10000, hundreds of digits. It finds what is usual; there is the limit for the
    rest.
    """
    if re.search(r"\d{401}|!\s*!|!\s*[)}\]]+\s*!|(?<!\d)0*[1-9]\d{4,}\s*[)}]*\s*!", text):
        return True
    for exponent in _POWER.findall(text):
        numeric = not re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", exponent))
        if numeric and ("^" in exponent or "**" in exponent or "!" in exponent):
            return True
        if any(int(digits) > 10_000 for digits in re.findall(r"\d+", exponent)):
            return True
    return bool(re.search(r"(?:\^|\*\*)\s*\w+\s*(?:\^|\*\*)", text))


def _work(payload: bytes) -> float | str:
    """In the worker: the verdict, or a traceback."""
    try:
        golds, answer, limit, tolerance = json.loads(payload)
        _settle_in()
        # The kernel ends the process, inside one long operation, too; a clock would punish a busy machine.
        signal.setitimer(signal.ITIMER_PROF, limit)
        shape, values = read(answer), functools.partial(_equal, tolerance=tolerance)
        return float(any(same(read(gold), shape, values) for gold in golds if not oversized(gold)))
    except Exception:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@functools.cache
def _warm_up() -> None:
    """Grammars read and first caches filled, for the processes that are forked from this one."""
    logger = logging.getLogger("math_verify")
    level = logger.level
    logger.setLevel(logging.ERROR)  # "Timeout is disabled": it is, on purpose
    try:
        _equal(r"2\sqrt{3}", r"\sqrt{12}", 0.0)
    finally:
        logger.setLevel(level)


_questions = 0  # that this process has been asked


def _settle_in() -> None:
    """At a process's first question a bound on its memory, so that a large expression ends it and not the
    machine (Linux only); now and then an empty cache.
    """
    global _questions
    if _questions == 0:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        if sys.platform == "linux":
            import resource

            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + _MEMORY
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    _questions += 1
    if _questions % _REMEMBERED == 0:
        from sympy.core.cache import clear_cache

        clear_cache()


def _equal(gold: str, answer: str, tolerance: float) -> bool:
    """Two values by math-verify. What cannot be parsed equals nothing."""
    verdict = written_alike(gold, answer, tolerance)
    if verdict is not None:
        return verdict
    from math_verify import LatexExtractionConfig, parse, verify

    def parsed(text: str) -> list[Any]:
        found: list[Any] = parse(
            f"${_exact(text)}$",
            extraction_config=[LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )
        return found

    left, right = parsed(gold), parsed(answer)
    if not left or not right:
        return False
    # Decimals are fractions by now: what is equal is equal to any precision, and 1.4142 is not √2.
    settings = {"float_rounding": 20, "numeric_precision": 30, "allow_set_relation_comp": True}
    if verify(left, right, timeout_seconds=None, **settings):
        return True
    return tolerance > 0 and _near(left[0], right[0], tolerance)


def _near(gold: Any, answer: Any, tolerance: float) -> bool:
    try:
        reference = complex(gold.evalf())
        return abs(complex(answer.evalf()) - reference) <= tolerance * abs(reference)
    except (TypeError, ValueError, AttributeError, OverflowError):  # no number
        return False


def _exact(text: str) -> str:
    r"""Decimals as fractions: 2.5 -> \frac{25}{10}, so that none is rounded to a binary one."""
    return re.sub(
        r"(?<![\d.])(\d*)\.(\d+)(?![\d.])",
        lambda match: rf"\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}}",
        text,
    )
