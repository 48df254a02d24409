"""Shared by the tests of budgets, automata and delimiters: the tokenizers of `tokenizers_made.py`."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def made() -> ModuleType:
    """The module `tokenizers_made`; tests are no package, so it is loaded from its file."""
    spec = importlib.util.spec_from_file_location(
        "tokenizers_made", Path(__file__).with_name("tokenizers_made.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
