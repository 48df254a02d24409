"""Shared by the tests of budgets, automata and delimiters. Tests are no package, so helpers are fixtures."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def made() -> ModuleType:
    """tokenizers_made.py: small real tokenizers."""
    return load("tokenizers_made")


@pytest.fixture(scope="session")
def runs() -> ModuleType:
    """budget_runs.py: programs run over given draws, and the same by the laws."""
    return load("budget_runs")
