"""Reward functions: called in TRL's signature, in worker processes, with a hard time limit and clear errors.

    def right(prompts, completions, completion_ids, answer, **columns) -> list[float | None]: ...

Each call is about the samples of one group; every argument is a list with an entry a sample:

- `prompts`, `completions`: strings; where the dataset's prompts are chats, chats (completions then are
  `[{"role": "assistant", "content": text}]`, as in TRL); `completion_ids`: token ids, a final EOS included;
- the dataset's other columns under their names, the row's value once a sample;
- and what only this engine knows: `thinking`, `solution` (texts without delimiters), `think_end`,
  `finish_reason`, `think_tokens`, `solve_tokens` (sampled tokens), `think_budget`, `solve_budget` (None =
  unlimited), `forced_share` (of the output tokens). Where the dataset has a column of that name (often
  `solution`) the column keeps it; ours is then called `completion_solution`, and so on.

A function without `**columns` gets just the arguments it names; one that has an attribute `needs` needs the
columns named there, too. It may be async. None for a sample means that
this function has nothing to say about it.

What can go wrong, and what comes of it:

- it returns the wrong number of rewards, or something that is no number: a bug; RewardError, always;
- it raises, or returns NaN or an infinity: RewardError, or with `on_error="none"` None for that call (for
  those samples);
- it takes too long, its process dies, or it raises ConnectionError or TimeoutError: None for that call (a
  process that is killed from outside is replaced and the call made once more, before it counts as dead).

Every such None is counted (`failures`) and logged, and makes the sample's whole reward None: a sample that
some function could not be asked about is unscorable, never worth 0. A function of weight 0, which is only
recorded, has no part in that.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import pickle
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal

from elastic_decode.core import Prompt
from elastic_decode.errors import ConfigError, RewardError
from elastic_decode.rl.batch import Sample
from elastic_decode.tasks.workers import WorkerDied, WorkerPool, WorkerTimeout

RewardFunction = Callable[..., Any]
_log = logging.getLogger(__name__)
_STANDARD = ("prompts", "completions", "completion_ids")


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came of one call. rewards: where kind is "ok"; NaN and infinities still among them."""

    kind: Literal["ok", "invalid", "raised", "unreachable", "timeout", "died"]
    rewards: tuple[float | None, ...] = ()
    detail: str = ""


class Rewards:
    """Reward functions with their weights, and the processes they run in. Close it, or use it in a `with`.

    functions: one, a list, or a mapping of names to functions; names are otherwise the functions' own.
    weights: one a function, all 1 by default; a function of weight 0 is only recorded. workers: processes,
    forked here (see `tasks/workers.py` for what that means to memory and CUDA); 0 calls the functions in the
    caller's thread, without a time limit. timeout: seconds of wall time for one call on one group. on_error:
    see above. Raises ConfigError.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction] | Mapping[str, RewardFunction],
        *,
        weights: Sequence[float] | None = None,
        workers: int = 2,
        timeout: float = 60.0,
        on_error: Literal["raise", "none"] = "raise",
    ) -> None:
        self.functions = _named(functions)
        self.weights = dict(zip(self.functions, _weights(weights, self.functions), strict=True))
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise ConfigError(f"workers must be an int >= 0, got {workers!r}")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
            raise ConfigError(f"timeout must be a number of seconds > 0, got {timeout!r}")
        if on_error not in ("raise", "none"):
            raise ConfigError(f"on_error must be 'raise' or 'none', got {on_error!r}")
        self.failures: Counter[tuple[str, str]] = Counter()  # (function, reason) -> calls
        self._on_error = on_error
        self._wanted = {name: _wanted(name, function) for name, function in self.functions.items()}
        self._closed = False
        self._pool = WorkerPool(self._work, workers=workers, timeout=timeout) if workers else None

    def check_columns(self, columns: Iterable[str], *, of: str = "the dataset") -> None:
        """Raises ConfigError where a function needs an argument that these columns of `of` do not give."""
        there = {*_STANDARD, *_OURS, *columns}
        there |= {_renamed(name) for name in set(_OURS).intersection(columns)}
        for name, (_, required) in self._wanted.items():
            missing = sorted(set(required) - there)
            if missing:
                raise ConfigError(
                    f"reward function {name!r} needs the column{'s' * (len(missing) > 1)} "
                    f"{', '.join(missing)}; {of} and the engine give {', '.join(sorted(there))}"
                )

    def submit(
        self,
        prompt: Prompt,
        samples: Sequence[Sample],
        columns: Mapping[str, Any],
        *,
        step: int,
        index: int,
    ) -> Pending:
        """Start scoring the samples of a group. prompt: a string or a chat. columns: the dataset row without
        its prompt. step, index: for messages. Does not wait, unless workers=0. Raises ConfigError for a
        missing column, or one that cannot be sent to a process.
        """
        if self._closed:
            raise RewardError("these reward functions have been closed")
        self.check_columns(columns)
        arguments = _arguments(prompt, samples, columns)
        answers: dict[str, Future[_Answer]] = {}
        for name, (named, _) in self._wanted.items():
            given = arguments if named is None else {k: v for k, v in arguments.items() if k in named}
            if self._pool is None:
                done: Future[_Answer] = Future()
                done.set_result(_call(self.functions[name], given, len(samples)))
                answers[name] = done
            else:
                answers[name] = self._pool.submit(_pickled(name, given, len(samples)))
        return Pending(self, tuple(samples), answers, step, index)

    def close(self) -> None:
        """End the processes, at work or not."""
        self._closed = True
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _work(self, payload: bytes) -> _Answer:
        """In the worker: the functions came along when it was forked."""
        try:
            name, arguments, count = pickle.loads(payload)
        except Exception as error:
            return _Answer("invalid", detail=f"its arguments cannot be made in the worker: {error!r}")
        return _call(self.functions[name], arguments, count)

    def _settle(
        self, name: str, answer: _Answer, count: int, where: str
    ) -> tuple[list[float | None], set[int]]:
        """Rewards of one call, and the samples it failed for. Raises RewardError as the policy says."""
        what = f"reward function {name!r}, {where}"
        if answer.kind == "invalid":
            raise RewardError(f"{what}: {answer.detail}")
        if answer.kind == "raised" and self._on_error == "raise":
            raise RewardError(
                f"{what} raised\n{answer.detail}\nReturn None for what cannot be scored, or set "
                "on_error='none'"
            )
        if answer.kind != "ok":
            self._count(name, answer.kind, f"{what}: {answer.kind}: {answer.detail}; its rewards are None")
            return [None] * count, set(range(count))
        rewards = list(answer.rewards)
        bad = {place for place, value in enumerate(rewards) if value is not None and not math.isfinite(value)}
        if bad:
            said = (
                f"{what}, sample {min(bad)}: returned {rewards[min(bad)]}, expected a finite number or None"
            )
            if self._on_error == "raise":
                raise RewardError(said)
            self._count(name, "not finite", f"{said}; {len(bad)} of {count} samples have None")
        return [None if place in bad else value for place, value in enumerate(rewards)], bad

    def _count(self, name: str, reason: str, message: str) -> None:
        self.failures[name, reason] += 1
        times = self.failures[name, reason]
        if times & (times - 1) == 0:  # the 1st, 2nd, 4th …: a log that can be read
            _log.warning("%s (%d such failures so far)", message, times)


@dataclass(frozen=True, slots=True)
class Pending:
    """A group that is being scored."""

    rewards: Rewards
    samples: tuple[Sample, ...]
    answers: Mapping[str, Future[_Answer]]
    step: int
    index: int

    @property
    def done(self) -> bool:
        return all(answer.done() for answer in self.answers.values())

    @property
    def futures(self) -> Collection[Future[Any]]:
        """What to wait for."""
        return self.answers.values()

    def cancel(self) -> None:
        """Give up calls that have not begun."""
        for answer in self.answers.values():
            answer.cancel()

    def result(self) -> tuple[Sample, ...]:
        """The samples with their rewards, in order. Waits. Raises RewardError."""
        count = len(self.samples)
        where = f"step {self.step}, dataset row {self.index}"
        by_function: dict[str, list[float | None]] = {}
        failed: set[int] = set()
        weights = self.rewards.weights
        for name, future in self.answers.items():
            try:
                answer = future.result()
            except WorkerTimeout as error:
                answer = _Answer("timeout", detail=str(error))
            except WorkerDied as error:
                answer = _Answer("died", detail=str(error))
            by_function[name], unknown = self.rewards._settle(name, answer, count, where)
            if weights[name]:
                failed |= unknown
        scored = []
        for place, sample in enumerate(self.samples):
            own = {name: values[place] for name, values in by_function.items()}
            parts = [
                weights[name] * value for name, value in own.items() if value is not None and weights[name]
            ]
            total = sum(parts) if parts and place not in failed else None
            scored.append(replace(sample, rewards=own, reward=total))
        return tuple(scored)


_OURS: dict[str, Callable[[Sample], Any]] = {
    "thinking": lambda sample: sample.thinking,
    "solution": lambda sample: sample.solution,
    "think_end": lambda sample: sample.think_end,
    "finish_reason": lambda sample: sample.finish_reason,
    "think_tokens": lambda sample: sample.think_tokens,
    "solve_tokens": lambda sample: sample.solve_tokens,
    "think_budget": lambda sample: sample.think_budget,
    "solve_budget": lambda sample: sample.solve_budget,
    "forced_share": lambda sample: sum(sample.forced) / len(sample.forced) if sample.forced else 0.0,
}


def _renamed(name: str) -> str:
    return f"completion_{name}"


def _arguments(prompt: Prompt, samples: Sequence[Sample], columns: Mapping[str, Any]) -> dict[str, list[Any]]:
    taken = set(columns).intersection(_STANDARD)
    if taken:
        raise ConfigError(
            f"a dataset column may not be called {min(taken)!r}: rewards get that of the engine"
        )
    texts = [sample.text for sample in samples]
    chat = not isinstance(prompt, str)
    return {
        "prompts": [prompt] * len(samples),
        "completions": [[{"role": "assistant", "content": text}] for text in texts] if chat else texts,
        "completion_ids": [list(sample.token_ids) for sample in samples],
        **{
            _renamed(name) if name in columns else name: [of(sample) for sample in samples]
            for name, of in _OURS.items()
        },
        **{name: [value] * len(samples) for name, value in columns.items()},
    }


def _pickled(name: str, arguments: dict[str, list[Any]], count: int) -> bytes:
    try:
        return pickle.dumps((name, arguments, count), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raise ConfigError(
            f"the arguments of reward function {name!r} ({', '.join(arguments)}) cannot be sent to a worker "
            f"process: {error}; drop the column, or use workers=0"
        ) from error


def _call(function: RewardFunction, arguments: Mapping[str, list[Any]], count: int) -> _Answer:
    try:
        returned = function(**arguments)
        if inspect.isawaitable(returned):
            returned = _run(returned)
    except (ConnectionError, TimeoutError) as error:
        return _Answer("unreachable", detail=repr(error))
    except Exception:
        return _Answer("raised", detail=traceback.format_exc().rstrip())
    except SystemExit as error:
        return _Answer("raised", detail=f"SystemExit({error.code!r})")
    if hasattr(returned, "tolist"):  # an array or a tensor
        returned = returned.tolist()
    if not isinstance(returned, (list, tuple)):
        return _Answer(
            "invalid", detail=f"returned {_short(returned)}, expected a list of {count} numbers or None"
        )
    if len(returned) != count:
        return _Answer("invalid", detail=f"returned {len(returned)} rewards, expected {count}, one a sample")
    rewards: list[float | None] = []
    for place, value in enumerate(returned):
        given = value.item() if hasattr(value, "item") else value  # numpy's and torch's numbers
        if given is not None and not isinstance(given, Real):
            detail = f"sample {place}: returned {_short(value)}, expected a finite number or None"
            return _Answer("invalid", detail=detail)
        rewards.append(None if given is None else float(given))
    return _Answer("ok", tuple(rewards))


def _short(value: object) -> str:
    said = repr(value)
    return f"{said if len(said) < 80 else said[:77] + '...'} (a {type(value).__name__})"


def _run(awaitable: Any) -> Any:
    """What a coroutine returns; in a thread of its own where this one has a loop running (a notebook's)."""

    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(asyncio.run(wait()))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome.result()


def _named(functions: Any) -> dict[str, RewardFunction]:
    if isinstance(functions, Mapping):
        named = dict(functions)
    else:
        listed = [functions] if callable(functions) else list(functions)
        named = {}
        for place, function in enumerate(listed):
            name = getattr(getattr(function, "func", function), "__name__", type(function).__name__)
            name = f"reward_{place}" if name == "<lambda>" else name
            if name in named:
                raise ConfigError(
                    f"two reward functions are called {name!r}; give a mapping of names to functions"
                )
            named[name] = function
    if not named:
        raise ConfigError("at least one reward function is needed")
    for name, function in named.items():
        if not isinstance(name, str) or not callable(function):
            raise ConfigError(
                f"reward {name!r} must be a function with a string for a name, got {function!r}"
            )
    return named


def _weights(weights: Sequence[float] | None, functions: Mapping[str, Any]) -> list[float]:
    given = [1.0] * len(functions) if weights is None else list(weights)
    good = all(isinstance(w, Real) and not isinstance(w, bool) and math.isfinite(w) for w in given)
    if len(given) != len(functions) or not good or not any(given):
        raise ConfigError(
            f"weights must be {len(functions)} finite numbers, not all 0, one each for "
            f"{', '.join(functions)}; got {weights!r}"
        )
    return [float(weight) for weight in given]


def _wanted(name: str, function: RewardFunction) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """(the arguments a function takes, None = any; those it cannot do without)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None, ()
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
        raise ConfigError(f"reward function {name!r} has positional-only arguments; rewards go by keyword")
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return (
        None if takes_any else tuple(p.name for p in by_name),
        tuple(p.name for p in by_name if p.default is p.empty) + tuple(getattr(function, "needs", ())),
    )
