"""The README's examples run as they stand, one after the other, and its tables name what there is."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from elastic_decode import budgets, model_config

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text()
EXAMPLES = ("generate", "stream", "rollout", "fork")


def examples() -> list[tuple[str, int, str]]:
    """(name, line of the README, source) of each python block; its name is the bold word before it."""
    blocks = re.finditer(r"^\*\*(\w+)\*\*:.*?^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [(block[1], TEXT[: block.start(2)].count("\n"), block[2]) for block in blocks]


def column(header: str) -> list[str]:
    """The code names in the first column of the table whose first header is `header`."""
    table = TEXT.split(f"\n| {header} |", 1)[1].split("\n\n", 1)[0]
    return re.findall(r"^\| `(\w+)", table, re.MULTILINE)


def is_policy(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, budgets.Policy) and kind is not budgets.Policy


def test_every_python_block_is_an_example():
    assert [name for name, _, _ in examples()] == list(EXAMPLES)
    assert TEXT.count("```python") == len(EXAMPLES)
    for name, _, source in examples():
        assert len(source.splitlines()) <= 10, f"{name} has grown past ten lines"


def test_examples_run(capsys: pytest.CaptureFixture[str]):
    namespace: dict[str, Any] = {}
    for name, line, source in examples():
        # Newlines in front, so that a traceback shows the README's own line.
        exec(compile("\n" * line + source, str(README), "exec"), namespace)
        assert capsys.readouterr().out.strip(), f"{name} printed nothing"


def test_policies_are_those_there_are():
    classes = {kind.__name__ for kind in vars(budgets).values() if is_policy(kind)}
    functions = inspect.getmembers(budgets, inspect.isfunction)
    there = {name for name, function in functions if inspect.signature(function).return_annotation in classes}
    assert there
    assert set(column("policy")) == there


def test_families_are_those_there_are():
    assert set(column("architecture")) == set(model_config._ARCHITECTURES)
