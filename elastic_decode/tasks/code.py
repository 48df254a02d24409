"""Programming problems: the program in an answer, the tests in a dataset's row, and when an output is right.

Tests come in three forms, told apart by what a row has:

- standard input and output: `{"input": "…", "output": "…"}`, a list of them (LiveCodeBench, Codeforces), or
  `{"inputs": […], "outputs": […]}` (TACO, APPS);
- calls: the same with a function's name, as `fn_name` (TACO, PrimeIntellect) or in a test's `metadata` as
  `func_name` (LiveCodeBench); an input is a line of JSON an argument, or a list of arguments;
- a test program (HumanEval+, MBPP+), which defines `check(candidate)` or calls the program's functions.

The first two may be JSON in a string, and LiveCodeBench's compressed one. No torch here.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import pickletools
import re
import textwrap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from elastic_decode.errors import ConfigError

LONGEST_TESTS = 1 << 30  # bytes of a row's tests when unpacked
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\n`]*)$", re.MULTILINE)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\Z", re.ASCII)
_LONGEST_NUMBER = 64  # characters of a token that is compared by value
_MOST_DIGITS = 4000  # of an integer that is read as one


def program_in(solution: str) -> str | None:
    """The last fenced block of a text, None where there is none. A fence that is never closed goes to the
    end: the answer ran out of budget, or forgot it.
    """
    found: str | None = None
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(solution):
        marks, label = fence.groups()
        # A fence with a language opens a block, also where the one before was never closed.
        if opened is None or label.strip():
            opened = fence
        elif marks[0] == opened[1][0] and len(marks) >= len(opened[1]):
            found, opened = _block(solution, opened, fence.start()) or found, None
    return found if opened is None else _block(solution, opened, len(solution)) or found


def _block(text: str, fence: re.Match[str], end: int) -> str | None:
    """What is behind a fence, less the indentation of a fence in a list; None where that is nothing."""
    block = text[fence.end() + 1 : end]
    if fence[0][0] in " \t":
        block = textwrap.dedent(block)
    return block if block.strip() else None


@dataclass(frozen=True, slots=True)
class Case:
    """input: standard input; for a call its arguments as JSON, each a text. expected: what must come out: a
    text; for a call, values of which one must be returned.
    """

    input: str | tuple[str, ...]
    expected: Any


@dataclass(frozen=True, slots=True)
class Cases:
    """Tests by input and output. function: the name of what is called, None for standard input."""

    cases: tuple[Case, ...]
    function: str | None = None


@dataclass(frozen=True, slots=True)
class TestProgram:
    """Tests as a program; see `Sandbox.check`."""

    __test__ = False  # nothing for pytest
    source: str
    setup: str = ""
    entry_point: str | None = None


def read_tests(value: Any, function: str | None = None) -> Cases:
    """The tests of a row. function: its name, where the row has it elsewhere. ConfigError for what is none of
    the forms above, or empty.
    """
    value = _decoded(value)
    if isinstance(value, Mapping):
        inputs, outputs = value.get("inputs"), value.get("outputs")
        if not isinstance(inputs, Sequence) or not isinstance(outputs, Sequence):
            raise ConfigError(f"tests have neither inputs and outputs nor are they a list: {value!r:.120}")
        if len(inputs) != len(outputs):
            raise ConfigError(f"{len(inputs)} inputs of tests, and {len(outputs)} outputs")
        function = value.get("fn_name") or function
        value = [{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ConfigError(f"tests must be a list of inputs and outputs that is not empty, got {value!r:.120}")
    for test in value:
        if not isinstance(test, Mapping) or "input" not in test or "output" not in test:
            raise ConfigError(f"a test must have input and output, got {test!r:.120}")
    first = value[0]
    kind = first.get("testtype") or first.get("type")
    metadata = _decoded(first.get("metadata")) if first.get("metadata") else {}
    named = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    function = first.get("fn_name") or named or function
    if kind in ("functional", "function_call") and not function:
        raise ConfigError(f"tests are calls and nothing names the function: {first!r:.120}")
    if kind in ("stdin", "stdin_stdout"):
        function = None
    make = _stdin_case if function is None else _call_case
    return Cases(tuple(make(test["input"], test["output"]) for test in value), function)


def _decoded(value: Any) -> Any:
    """What a string of JSON holds, compressed or not; anything else as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text[:1] not in ("[", "{"):
        text = _unpacked(text)
    try:
        return json.loads(text, parse_int=_integer)
    except ValueError as error:
        raise ConfigError(f"tests are a string that is not JSON ({error}): {value!r:.120}") from None


def _unpacked(text: str) -> str:
    """LiveCodeBench's private tests: JSON, pickled as one string, compressed, in base64. The pickle is read
    for that string; nothing of it is executed.
    """
    try:
        unzip = zlib.decompressobj()
        data = unzip.decompress(base64.b64decode(text, validate=True), LONGEST_TESTS)
        if unzip.unconsumed_tail:
            raise ConfigError(f"tests are larger than {LONGEST_TESTS} bytes")
        strings = [argument for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)]
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ConfigError(f"tests are a string that is neither JSON nor packed JSON: {error}") from None
    if len(strings) != 1:
        raise ConfigError(f"packed tests hold {len(strings)} strings, expected one of JSON")
    return strings[0]


def _stdin_case(given: Any, expected: Any) -> Case:
    return Case(_text(given), _text(expected))


def _text(value: Any) -> str:
    """Lines; some sets have a list of them."""
    if isinstance(value, (list, tuple)):
        return "\n".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value)


def _call_case(given: Any, expected: Any) -> Case:
    if isinstance(given, str):
        args = tuple(line for line in given.split("\n") if line.strip())
        return Case(args, (_json_or_text(expected),))
    if not isinstance(given, (list, tuple)):
        raise ConfigError(f"arguments of a call must be lines of JSON or a list, got {given!r:.120}")
    # TACO and APPS wrap what is returned in a list, most of the time.
    wrapped = isinstance(expected, list) and len(expected) == 1
    return Case(tuple(map(_dump, given)), (expected, expected[0]) if wrapped else (expected,))


def _dump(value: Any) -> str:
    """As JSON, long integers in full."""
    if isinstance(value, Digits):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_dump, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{json.dumps(key)}:{_dump(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def _json_or_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_int=_integer)
    except ValueError:
        return value


class Digits(str):
    """An integer with more digits than are worth converting; equal to itself."""

    __slots__ = ()


def _integer(text: str) -> int | Digits:
    return int(text) if len(text) <= _MOST_DIGITS else Digits(text)


def program_of(code: str, tests: Cases | TestProgram) -> str:
    """What is run: the code, behind the beginning that the prompt gave where there is one. An answer that is
    the rest of that beginning goes on with it.
    """
    if isinstance(tests, Cases) or not tests.setup:
        return code
    name = re.escape(tests.entry_point or "")
    if name and not re.search(rf"^[ \t]*(async[ \t]+)?(def|class)[ \t]+{name}\b|^{name}[ \t]*=", code, re.M):
        return f"{tests.setup.rstrip()}\n{code}"
    try:
        compile(tests.setup, "prompt", "exec")
    except (SyntaxError, ValueError):
        return code
    return f"{tests.setup}\n{code}"


def right_output(expected: str, output: bytes, tolerance: float = 1e-6) -> bool:
    """Whether what a program wrote is what was expected. Blank lines and white space around words do not
    count, lines do. A number is compared by value: one that is expected with a point or exponent may be
    `tolerance` away, absolutely or relatively; one expected without must be equal (`3.0` is 3).
    """
    text = output.decode(errors="replace")
    if text == expected:
        return True
    wanted, got = _lines(expected), _lines(text)
    return len(wanted) == len(got) and all(
        len(a) == len(b) and all(_same_word(x, y, tolerance) for x, y in zip(a, b, strict=True))
        for a, b in zip(wanted, got, strict=True)
    )


def _lines(text: str) -> list[list[str]]:
    return [words for line in text.split("\n") if (words := line.split())]


def _same_word(expected: str, got: str, tolerance: float) -> bool:
    if expected == got:
        return True
    if max(len(expected), len(got)) > _LONGEST_NUMBER:
        return False
    if not _NUMBER.match(expected) or not _NUMBER.match(got):
        return False
    plain = [word.lstrip("+-").isdigit() for word in (expected, got)]
    if all(plain):
        return int(expected) == int(got)
    if plain[0]:  # the value must be this integer, of whatever size
        return _is_integer(got, int(expected))
    return close(float(expected), float(got), tolerance)


def _is_integer(text: str, wanted: int) -> bool:
    return Decimal(text) == wanted


def close(expected: float, got: float, tolerance: float) -> bool:
    if math.isnan(expected) or math.isnan(got):
        return math.isnan(expected) and math.isnan(got)
    return math.isclose(expected, got, rel_tol=tolerance, abs_tol=tolerance)


def right_result(expected: Sequence[Any], output: bytes, tolerance: float = 1e-5) -> bool:
    """Whether what a call returned, as JSON, equals one of the values. Floats in it, however deep, may be
    `tolerance` away (LeetCode's); lists and tuples are the same.
    """
    try:
        got = json.loads(output, parse_int=_integer)
        return any(_same_value(value, got, tolerance) for value in expected)
    except (ValueError, RecursionError):
        return False


def _same_value(expected: Any, got: Any, tolerance: float) -> bool:
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(got, list)
            and len(expected) == len(got)
            and all(_same_value(a, b, tolerance) for a, b in zip(expected, got, strict=True))
        )
    if isinstance(expected, Mapping):
        return (
            isinstance(got, dict)
            and expected.keys() == got.keys()
            and all(_same_value(value, got[key], tolerance) for key, value in expected.items())
        )
    if isinstance(expected, float) or (isinstance(got, float) and isinstance(expected, int)):
        if not isinstance(got, (int, float)) or isinstance(got, Digits):
            return False
        try:
            return close(float(expected), float(got), tolerance if isinstance(expected, float) else 0.0)
        except OverflowError:  # an integer beyond every float
            return False
    if isinstance(expected, Digits) != isinstance(got, Digits):
        return False
    return bool(expected == got)
