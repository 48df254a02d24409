"""Programs in answers, tests in rows, outputs compared; and programs graded through the public face."""

import base64
import inspect
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from elastic_decode.errors import ConfigError
from elastic_decode.tasks import code_grader
from elastic_decode.tasks.code import (
    Case,
    Cases,
    TestProgram,
    program_in,
    read_tests,
    right_output,
    right_result,
)
from elastic_decode.tasks.code_grader import CodeGrader
from elastic_decode.tasks.data import Row
from elastic_decode.tasks.sandbox import Limits, SandboxFailure
from elastic_decode.tasks.task import task


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("So:\n```python\nprint(1)\n```\nDone.", "print(1)\n"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("```py\na = 1\n```\nno, better:\n```python\nb = 1\n```", "b = 1\n"),
        ("```python\nprint(1)", "print(1)"),  # out of budget
        ("```python\na = 1\n```python\nb = 1\n```", "b = 1\n"),
        ("```python\nprint(1)\n```\nand\n```\n", "print(1)\n"),
        ("~~~python\nprint(1)\n~~~", "print(1)\n"),
        ("````python\ns = '```'\n```\nx\n````", "s = '```'\n```\nx\n"),
        ("1. so\n   ```python\n   for i in x:\n       f(i)\n   ```", "for i in x:\n    f(i)\n"),
        ("print(1)", None),
        ("```python\n```", None),
        ("inline ```python print(1)``` is none", None),
        ("", None),
    ],
)
def test_the_last_fenced_block_is_the_program(text: str, program: str | None) -> None:
    assert program_in(text) == program


STDIN = [{"input": "1 2\n", "output": "3\n"}, {"input": "2 2\n", "output": "4\n"}]
PACKED = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(STDIN)))).decode()


@pytest.mark.parametrize(
    "value",
    [
        STDIN,
        json.dumps(STDIN),
        [dict(test, testtype="stdin", metadata={"func_name": None}) for test in STDIN],
        [dict(test, type="stdin_stdout") for test in STDIN],
        {"inputs": ["1 2\n", "2 2\n"], "outputs": ["3\n", "4\n"]},
        PACKED,
    ],
    ids=["list", "json", "livecodebench", "primeintellect", "taco", "packed"],
)
def test_forms_of_tests_by_standard_input(value: Any) -> None:
    assert read_tests(value) == Cases((Case("1 2\n", "3\n"), Case("2 2\n", "4\n")))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            [{"input": "[1, 2]\n3", "output": "6", "testtype": "functional", "metadata": {"func_name": "f"}}],
            (6,),
        ),
        ([{"input": [[1, 2], 3], "output": [6], "type": "function_call", "fn_name": "f"}], ([6], 6)),
        ({"inputs": [[[1, 2], 3]], "outputs": [6], "fn_name": "f"}, (6,)),
    ],
    ids=["livecodebench", "primeintellect", "taco"],
)
def test_forms_of_tests_by_call(value: Any, expected: tuple[Any, ...]) -> None:
    tests = read_tests(value)
    assert tests.function == "f"
    assert tests.cases[0].expected == expected
    assert [json.loads(text) for text in tests.cases[0].input] == [[1, 2], 3]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "not empty"),
        ("[", "not JSON"),
        ("zzz", "neither JSON nor packed"),
        (3, "list of inputs and outputs"),
        ([{"input": "1"}], "must have input and output"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs of tests, and 0 outputs"),
        ([{"input": "1", "output": "1", "testtype": "functional"}], "nothing names the function"),
        (base64.b64encode(zlib.compress(pickle.dumps((1, 2)))).decode(), "hold 0 strings"),
    ],
)
def test_tests_that_are_none_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_tests(value)


def test_packed_tests_are_not_executed() -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, ("/nonexistent/folder",)

    value = base64.b64encode(zlib.compress(pickle.dumps(Bomb()))).decode()
    with pytest.raises(ConfigError):
        read_tests(value)


@pytest.mark.parametrize(
    ("expected", "output", "right"),
    [
        ("3\n", "3", True),
        ("3", "3 \r\n\n", True),
        ("1 2\n3", "1  2\n3\n", True),
        ("1 2", "1\n2", False),
        ("3.0000", "3", True),
        ("3", "3.0", True),
        ("3", "3.0000001", False),
        ("0.333333", "0.3333333333", True),
        ("0.333333", "0.3334", False),
        ("1e6", "1000000.0", True),
        ("1000000000000000000000.5", "1000000000000000000000.4999", True),
        ("12345678901234567890", "12345678901234567891", False),
        ("12345678901234567890", "12345678901234567890.0", True),
        ("007", "7", True),
        ("YES", "Yes", False),
        ("nan", "nan", True),
        ("", "", True),
        ("", "0", False),
        ("1", "", False),
        ("9" * 5000, "9" * 5000 + "\n", True),
        ("9" * 5000, "9" * 4999 + "8", False),
        ("³", "3", False),
    ],
)
def test_outputs_compared(expected: str, output: str, right: bool) -> None:
    assert right_output(expected, output.encode()) is right


@pytest.mark.parametrize(
    ("expected", "output", "right"),
    [
        ([1, 2], "[1, 2]", True),
        ([0.33333, [2.0]], "[0.333333333, [2]]", True),
        ([0.5], "[0.51]", False),
        (3, "3.0", True),
        (3, "3.000001", False),
        ({"1": [2.5]}, '{"1": [2.5]}', True),
        ({"1": 2}, '{"1": 2, "2": 3}', False),
        (True, "true", True),
        ("1", "1", False),
        (None, "null", True),
        ([], "[[]]", False),
        (float("inf"), "Infinity", True),
        (2.5, "1" * 5000, False),
        (1, "[" * 100_000, False),
        (1, "", False),
        (1, "nonsense", False),
    ],
)
def test_results_compared(expected: Any, output: str, right: bool) -> None:
    assert right_result((expected,), output.encode()) is right


@pytest.fixture(scope="module")
def grader(isolation: str) -> Any:
    with CodeGrader(workers=2, limits={"cpu": 10, "wall": 20}) as grader:
        yield grader


def score(grader: CodeGrader, code: str, tests: Cases | TestProgram) -> float | None:
    (verdict,) = grader.grade([code], [tests])
    return verdict.score


LONG = "7" * 5000
RIGHT = {
    "buffer": ("import sys\nsys.stdout.buffer.write(sys.stdin.buffer.read())", "some text", "some text"),
    "readline": ("import sys\nfor line in sys.stdin: print(int(line) + 1)", "1\n2", "2\n3"),
    "open(0)": ("print(sum(map(int, open(0).read().split())))", "1 2\n3", "6"),
    "os.read": ("import os\nos.write(1, os.read(0, 100))", "abc", "abc"),
    "main": ("def main():\n    print(input())\nif __name__ == '__main__': main()", "x", "x"),
    "exit 0": ("print(input())\nexit()", "x", "x"),
    "long integers": ("print(int(input()) + 1)", LONG, LONG[:-1] + "8"),
    "unicode": ("print(input()[::-1])", "äöü", "üöä"),
    "recursion": ("def f(n): return n and 1 + f(n - 1)\nprint(f(int(input())))", "20000", "20000"),
    "threads": (
        "import threading\nthreading.stack_size(2**26)\n"
        "threading.Thread(target=lambda: print(input())).start()",
        "x",
        "x",
    ),
    "forgotten import": ("print(math.gcd(*map(int, input().split())))", "4 6", "2"),
    "own module": (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint(A(1))",
        "",
        "A(x=1)",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_pass(name: str, grader: CodeGrader) -> None:
    code, given, expected = RIGHT[name]
    assert score(grader, code, Cases((Case(given, expected),))) == 1.0


CALLS = {
    "function": "def f(a, b): return [x * b for x in a]",
    "Solution": (
        "class Solution:\n    def f(self, a: List[int], b: int) -> List[int]:\n"
        "        return [x * b for x in a]"
    ),
    "tuple": "def f(a, b): return tuple(x * b for x in a)",
    "floats": "def f(a, b): return [x * b + 1e-9 for x in a]",
    "main is not run": "def f(a, b): return [x * b for x in a]\nif __name__ == '__main__': input()",
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_pass(name: str, grader: CodeGrader) -> None:
    tests = read_tests(
        [{"input": "[1, 2]\n3", "output": "[3.0, 6.0]"}, {"input": "[]\n1", "output": "[]"}], "f"
    )
    assert score(grader, CALLS[name], tests) == 1.0


def test_calls_of_what_is_wrong_or_missing_fail(grader: CodeGrader) -> None:
    tests = read_tests([{"input": "2", "output": "4"}], "f")
    for code in ("def f(n): return 5", "def g(n): return 4", "f = 4", "def f(n): return f", "1 +", "\0"):
        assert score(grader, code, tests) == 0.0


def test_programs_of_humaneval_and_mbpp(grader: CodeGrader) -> None:
    """A helper of the prompt's, a class of the program's, sets and tuples, an exception."""
    encode = TestProgram(
        "METADATA = {}\ndef check(candidate):\n"
        "    for s in ('abc', 'xyz'):\n        assert candidate(shift(s)) == s\n",
        "def shift(s):\n    return ''.join(chr(ord(c) + 1) for c in s)\n\n"
        "def back(s: str) -> str:\n    '''Undo.'''\n",
        "back",
    )
    assert score(grader, "def back(s): return ''.join(chr(ord(c) - 1) for c in s)", encode) == 1.0
    assert score(grader, "def back(s): return s", encode) == 0.0
    mbpp = TestProgram(
        "assert set(similar((1, 2), (2, 3))) == {2}\nassert longest([Pair(1, 2), Pair(3, 4)]) == 2\n"
        "assert similar((1,), (1,)) == (1,)\n"
        "try:\n    similar(1, 2)\n    assert False\nexcept TypeError: pass\n"
    )
    code = (
        "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n"
        "def similar(a, b): return tuple(set(a) & set(b))\ndef longest(p): return len([x.a for x in p])\n"
    )
    assert score(grader, code, mbpp) == 1.0
    assert score(grader, code.replace("&", "|"), mbpp) == 0.0


def test_as_a_reward(grader: CodeGrader) -> None:
    """TRL's signature; equal programs run once, the engine's solution is graded, not the dataset's."""
    right, wrong = "```python\nprint(sum(map(int, input().split())))\n```", "```python\nprint(3)\n```"
    rewards = grader(solution=[right, wrong, right, "no block"], tests=[json.dumps(STDIN)] * 4, other=[1] * 4)
    assert rewards == [1.0, 0.0, 1.0, 0.0]
    assert grader(solution=["gold"], completion_solution=[right], tests=[STDIN]) == [1.0]
    assert list(inspect.signature(grader).parameters) == ["tests", "columns"]
    with pytest.raises(ConfigError, match="needs the engine's column solution"):
        grader(completions=["x"], tests=[STDIN])


def test_columns_of_other_sets(isolation: str) -> None:
    options: dict[str, Any] = {"tests": ["public", "private"], "function": "metadata", "max_tests": 1}
    with CodeGrader(**options) as grader:
        call = {"input": "12", "output": "13", "testtype": "functional"}
        row = {
            "public": [json.dumps([{**call, "input": "1", "output": "-"}])],
            "private": [json.dumps([call])],
            "metadata": [json.dumps({"func_name": "f"})],
        }
        assert grader(solution=["```\ndef f(n): return n + 1\n```"], **row) == [
            1.0
        ]  # the longest input alone
        with pytest.raises(ConfigError, match="no tests in public, private"):
            grader(solution=["```\nx\n```"], public=["[]"], private=[None], metadata=["{}"])
    with CodeGrader(program=True, tests="test", setup="starter", entry_point="entry_point") as grader:
        columns = {
            "test": ["def check(c): assert c(1) == 2"],
            "starter": ["def f(n):\n"],
            "entry_point": ["f"],
        }
        assert grader(solution=["```\ndef f(n): return n + 1\n```"], **columns) == [1.0]


def test_what_fails_for_want_of_a_sandbox_is_none(
    monkeypatch: pytest.MonkeyPatch, grader: CodeGrader
) -> None:
    """Tried twice; then unscorable, and counted."""
    tries = []

    def refuse(*args: object, **kwargs: object) -> None:
        tries.append(1)
        raise SandboxFailure("fork: Resource temporarily unavailable")

    monkeypatch.setattr(code_grader, "Sandbox", refuse)
    before = grader.failures["sandbox"]
    assert score(grader, "print(1)", Cases((Case("", "1"),))) is None
    assert len(tries) == 2
    assert grader.failures["sandbox"] == before + 1


def test_patience_ends(isolation: str) -> None:
    with CodeGrader(workers=1, patience=0.6, limits={"wall": 1.5, "cpu": 5}) as grader:
        tests = Cases((Case("", "x"),))
        verdicts = grader.grade([f"import time\ntime.sleep({n}00)" for n in (1, 2, 3)], [tests] * 3)
    assert [verdict.reason for verdict in verdicts] == ["patience"] * 3
    assert grader.failures["patience"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers"),
        ({"max_tests": 0}, "max_tests"),
        ({"patience": 0}, "patience"),
        ({"float_tolerance": 1.5}, "float_tolerance"),
        ({"limits": {"walls": 3}}, "walls"),
        ({"limits": {"memory": -1}}, "limits.memory"),
        ({"setup": "prompt"}, "set program"),
        ({"tests": []}, "name a column"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CodeGrader(**options)


def test_nothing_accumulates(isolation: str) -> None:
    """Descriptors and processes, over many gradings."""

    def state() -> tuple[int, int]:
        lists = Path("/proc/self/task").glob("*/children")
        return len(os.listdir("/proc/self/fd")), sum(len(one.read_text().split()) for one in lists)

    tests = Cases((Case("1", "1"), Case("2", "2")))
    codes = [f"print(input()) # {n}" for n in range(12)] + [
        f"import os; os.fork(); os.abort() # {n}" for n in range(6)
    ]
    with CodeGrader(workers=2, limits=Limits(wall=20)) as grader:
        grader.grade(codes[:2], [tests] * 2)
        before = state()
        verdicts = grader.grade(codes, [tests] * len(codes))
        assert [verdict.score for verdict in verdicts] == [1.0] * 12 + [0.0] * 6
        assert state() == before
    assert grader.walls == isolation


def in_file(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def question(row: Row) -> str:
    (message,) = row.prompt
    assert isinstance(message, dict)
    return str(message["content"])


def test_humaneval_as_a_task(tmp_path: Path, isolation: str) -> None:
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def double(n):\n    '''Twice n.'''\n",
        "entry_point": "double",
        "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    }
    it = task("humaneval")
    (found,) = it.rows(in_file(tmp_path, row))
    assert question(found).startswith(row["prompt"])
    columns = {name: [value] * 2 for name, value in found.columns.items()}
    with it.grader() as grade:
        answers = ["```python\n    return n * 2\n```", "```\ndouble = len\n```"]
        assert grade(solution=answers, **columns) == [1, 0]


def test_livecodebench_as_a_task(tmp_path: Path, isolation: str) -> None:
    """The code to begin with is part of the question; the tests are in two columns, one of them packed."""
    case = {"input": "4", "output": "5", "testtype": "functional"}
    row = {
        "question_content": "Add one.",
        "starter_code": "class Solution:\n    def add(self, n: int) -> int:\n        ",
        "public_test_cases": json.dumps([case]),
        "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(json.dumps([case])))).decode(),
        "metadata": json.dumps({"func_name": "add"}),
    }
    other = {**row, "question_content": "Another.", "starter_code": ""}
    it = task("livecodebench")
    found, plain = it.rows(in_file(tmp_path, row, other))
    assert "Begin with this code:\n```python\nclass Solution" in question(found)
    assert "Begin with" not in question(plain)
    columns = {name: [value] for name, value in found.columns.items()}
    with it.grader() as grade:
        answer = "```python\nclass Solution:\n    def add(self, n: int) -> int:\n        return n + 1\n```"
        assert grade(solution=[answer], **columns) == [1]


def test_codeforces_as_a_task(tmp_path: Path) -> None:
    it = task("codeforces")
    (found,) = it.rows(in_file(tmp_path, {"problem": "Add.", "tests": STDIN}))
    assert dict(found.columns) == {"tests": STDIN}
    with pytest.raises(ConfigError, match="'tests'"):
        it.rows(in_file(tmp_path, {"problem": "Add."}))
