"""The floors of the house: a room imports only from floors below it. Read from the syntax tree, nothing is
run.

Imports anywhere in a module count, inside functions too, and so do `importlib.import_module("a.literal")`
calls. Imports under `if TYPE_CHECKING:` exist for the type checker alone, so they may point upward; they may
still not name a forbidden package (tests, benchmarks, recipes), and kernels may not name the rest of the
library even there.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "elastic_decode"

# The floor of plain data is one room.
DATA = [
    "core",
    "config",
    "model_config",
    "errors",
    "budgets",
    "phases",
    "automata",
    "delimiters",
    "vocabulary",
]
# Lowest first; the rooms of one floor never import each other. A room is one or several top modules.
FLOORS: list[list[frozenset[str]]] = [
    [frozenset({"kernels"})],
    [frozenset({*DATA, "assets"})],
    [frozenset({"models"})],
    [frozenset({"engine"})],
    [frozenset({"llm"}), frozenset({"tasks"})],
    [frozenset({"eval"}), frozenset({"rl"}), frozenset({"integrations"}), frozenset({"server"})],
    [frozenset({"cli"})],
]
ROOMS = {module: (floor, room) for floor, rooms in enumerate(FLOORS) for room in rooms for module in room}

# Nothing in the library imports these; `kernels` is the name of somebody else's package.
NEVER = {"tests", "benchmarks", "recipes", "kernels"}
# The kernels know tensors only: no model, no tokenizer, no file format.
NOT_IN_KERNELS = {"transformers", "tokenizers", "safetensors", "huggingface_hub"}


@dataclass(frozen=True)
class Import:
    name: str  # absolute dotted name of the module
    line: int
    typing_only: bool


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def walk(node: ast.AST, typing_only: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    yield node, typing_only
    for field, value in ast.iter_fields(node):
        guarded = isinstance(node, ast.If) and field == "body" and is_type_checking(node.test)
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from walk(child, typing_only or guarded)


def imports(module: str, is_package: bool, source: str) -> list[Import]:
    """Every import of `module`; `from a import b` gives a.b, whether b is a module of a or a name in it."""

    def absolute(dots: int, name: str) -> str:
        parents = package.split(".")
        return ".".join([*parents[: len(parents) - dots + 1], name]).rstrip(".") if dots else name

    package = module if is_package else module.rpartition(".")[0]
    found = []
    for node, typing_only in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, typing_only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.level, node.module or "")
            found += [Import(f"{base}.{alias.name}", node.lineno, typing_only) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args:
            function, argument = node.func, node.args[0]
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            literal = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            if called in ("import_module", "__import__") and literal:
                name = argument.value.lstrip(".")
                dots = len(argument.value) - len(name)
                found.append(Import(absolute(dots, name), node.lineno, typing_only))
    return found


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """Why `module` (its absolute dotted name) breaks the floors; empty where it does not."""
    parts = module.split(".")
    own = parts[1] if len(parts) > 1 else None
    if own is not None and own not in ROOMS:
        return [f"{module}: {own!r} is on no floor; add it to FLOORS here and to docs/structure.md"]
    wrong = []
    for found in imports(module, is_package, source):
        where = f"{module}:{found.line} imports {found.name}"
        top, _, rest = found.name.partition(".")
        if top in NEVER:
            wrong.append(f"{where}: nothing in the library may")
        elif own == "kernels" and top in NOT_IN_KERNELS:
            wrong.append(f"{where}: kernels know tensors only")
        elif top == PACKAGE and own is not None:
            wrong += [f"{where}: {why}" for why in climbs(own, rest.split(".")[0], found.typing_only)]
    return wrong


def climbs(own: str, other: str, typing_only: bool) -> list[str]:
    """Why a module of room `own` may not import `elastic_decode.<other>`."""
    floor, room = ROOMS[own]
    if other in room or other == "__version__":
        return []
    if other not in ROOMS:
        if floor == len(FLOORS) - 1:
            return []  # the top floor is a user of the package like any other
        return ["import a name from the module that defines it, not through the package's lazy exports"]
    if typing_only and own != "kernels":
        return []
    other_floor, _ = ROOMS[other]
    if other_floor < floor:
        return []
    relation = "on the same floor" if other_floor == floor else "above it"
    return [f"{other} is {relation} ({own} is on floor {floor})"]


def modules() -> list[tuple[str, Path]]:
    """(dotted name, file) of every module; the link elastic_decode/kernels is walked where it points."""
    found = []
    for folder, prefix in ((ROOT / "elastic_decode", PACKAGE), (ROOT / "kernels", f"{PACKAGE}.kernels")):
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if folder.name == "elastic_decode" and inside.parts[0] == "kernels":
                continue
            dotted = [prefix, *inside.with_suffix("").parts]
            if dotted[-1] == "__init__":
                dotted.pop()
            found.append((".".join(dotted), path))
    return found


MODULES = modules()


def test_every_module_is_found():
    names = {name for name, _ in MODULES}
    assert {"elastic_decode", "elastic_decode.core", "elastic_decode.kernels.registry"} <= names
    assert (ROOT / "elastic_decode" / "kernels").resolve() == ROOT / "kernels"


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_floors(name: str, path: Path):
    assert violations(name, path.read_text(), is_package=path.name == "__init__.py") == []


BREAKS = {
    "upward": ("elastic_decode.engine.scheduler", "from elastic_decode.llm import Engine"),
    "upward, submodule form": ("elastic_decode.models.decoder", "from elastic_decode import engine"),
    "upward, plain": ("elastic_decode.models.decoder", "import elastic_decode.engine.scheduler as s"),
    "upward, relative": ("elastic_decode.engine.scheduler", "from ..llm import Engine"),
    "upward, relative, from a package": ("elastic_decode.engine", "from .. import llm"),
    "inside a function": ("elastic_decode.core", "def f():\n    from elastic_decode.models import decoder"),
    "inside a method, under try": (
        "elastic_decode.core",
        "class A:\n    def f(self):\n        try:\n            import elastic_decode.cli\n"
        "        except ImportError:\n            raise",
    ),
    "else of TYPE_CHECKING": (
        "elastic_decode.core",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import elastic_decode.llm",
    ),
    "import_module": (
        "elastic_decode.core",
        'import importlib\nimportlib.import_module("elastic_decode.llm")',
    ),
    "import_module, relative": (
        "elastic_decode.engine.scheduler",
        'from importlib import import_module\nimport_module("..llm", __package__)',
    ),
    "eval imports rl": ("elastic_decode.eval.sweep", "from elastic_decode.rl.loss import grpo"),
    "rl imports eval": ("elastic_decode.rl.trainer", "import elastic_decode.eval"),
    "server imports integrations": ("elastic_decode.server.app", "from elastic_decode import integrations"),
    "llm imports tasks": ("elastic_decode.llm", "from elastic_decode.tasks import countdown"),
    "kernels import the library": ("elastic_decode.kernels.sample", "from elastic_decode.core import Budget"),
    "kernels name a type of the library": (
        "elastic_decode.kernels.sample",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from elastic_decode.core import Budget",
    ),
    "kernels know a model": ("elastic_decode.kernels.rope.cpu", "def f():\n    import transformers"),
    "the wrong kernels package": ("elastic_decode.engine.loop", "from kernels import registry"),
    "tests": ("elastic_decode.cli", "from tests.engine import helpers"),
    "tests, for a type": (
        "elastic_decode.cli",
        "import typing\nif typing.TYPE_CHECKING:\n    import tests",
    ),
    "benchmarks": ("elastic_decode.cli", "def bench():\n    from benchmarks import harness"),
    "recipes": ("elastic_decode.rl.trainer", "import recipes.grpo"),
    "a lazy export": ("elastic_decode.rl.trainer", "from elastic_decode import Engine"),
    "the package itself": ("elastic_decode.rl.trainer", "import elastic_decode"),
    "an unknown room": ("elastic_decode.helpers", "import os"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_the_check_finds(case: str):
    module, source = BREAKS[case]
    is_package = module in ("elastic_decode.engine", "elastic_decode.kernels.sample")
    assert len(violations(module, source, is_package)) == 1


KEEPS = {
    "downward": ("elastic_decode.llm", "from elastic_decode.engine.scheduler import Scheduler\nimport torch"),
    "two floors down": ("elastic_decode.rl.trainer", "from elastic_decode.models import decoder"),
    "the same room": ("elastic_decode.core", "from elastic_decode.errors import ConfigError"),
    "inside a room, relative": (
        "elastic_decode.engine.scheduler",
        "from .kv_cache import Pages\nfrom . import x",
    ),
    "kernels among themselves": (
        "elastic_decode.kernels.sample.cpu",
        "from elastic_decode.kernels import _C\nfrom ..checks import check_tensor\nimport triton, torch",
    ),
    "a type from above": (
        "elastic_decode.core",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from elastic_decode.llm import Engine",
    ),
    "the version": ("elastic_decode.server.app", "from elastic_decode import __version__"),
    "the package, from the top": ("elastic_decode.cli.info", "import elastic_decode"),
    "another's module of the same name": ("elastic_decode.core", "import transformers.models.llama as llm"),
}


@pytest.mark.parametrize("case", KEEPS)
def test_the_check_lets_pass(case: str):
    module, source = KEEPS[case]
    assert violations(module, source) == []


def test_csrc_includes_no_torch_and_nothing_from_outside():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    assert sources
    for path in sources:
        included = [line for line in path.read_text().splitlines() if line.lstrip().startswith("#include")]
        wrong = [line for line in included if "torch/" in line or "ATen" in line or "c10/" in line]
        assert not wrong, f"{path.relative_to(ROOT)}: {wrong} would tie the extension to one torch build"
        if path.name != "bindings.cpp":
            assert not any("pybind11" in line for line in included), f"{path}: only bindings.cpp may"
