"""docs/structure.md lists every module and nothing else; the documents' links and commands lead somewhere."""

import fnmatch
import re
from pathlib import Path

import pytest

from elastic_decode.kernels import registry

ROOT = Path(__file__).parent.parent
LINE = re.compile(r"^- `(?P<path>[^`]+)`: (?P<text>\S.*)$")
BACKENDS = {f"{name}.py" for name in (*registry.BACKENDS, "__init__")}
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def modules() -> set[str]:
    """What wants a line. A package stands for its `__init__.py`, an op's folder for its backends too."""
    found = set()
    for top, suffixes in {
        "elastic_decode": {".py"},
        "kernels": {".py"},
        "benchmarks": {".py"},
        "recipes": {".py", ".yaml"},
        "csrc": {".cpp", ".h", ".cu", ".cuh"},
    }.items():
        for path in (ROOT / top).rglob("*"):
            inside = path.relative_to(ROOT)
            if path.suffix not in suffixes or inside.parts[:2] == ("elastic_decode", "kernels"):
                continue
            in_op_folder = top == "kernels" and len(inside.parts) > 2
            if path.name == "__init__.py" or (in_op_folder and path.name in BACKENDS):
                found.add(f"{inside.parent}/")
            else:
                found.add(str(inside))
    return found


def listed() -> dict[str, str]:
    lines = (ROOT / "docs" / "structure.md").read_text().splitlines()
    matches = [LINE.match(line) for line in lines if line.startswith("- ")]
    assert all(matches), f"not of the form '- `path`: what it is': {lines[matches.index(None)]}"
    return {match["path"]: match["text"] for match in matches if match}


def problems(found: set[str], lines: dict[str, str]) -> list[str]:
    missing = [path for path in sorted(found) if not any(fnmatch.fnmatchcase(path, line) for line in lines)]
    surplus = [line for line in lines if not any(fnmatch.fnmatchcase(path, line) for path in found)]
    return [f"not listed: {path}" for path in missing] + [
        f"listed, but not there: {line}" for line in surplus
    ]


def test_every_module_is_listed_and_every_listed_one_exists():
    found = problems(modules(), listed())
    assert not found, "docs/structure.md:\n" + "\n".join(found)


def test_the_check_can_fail():
    found = {"a/b.py", "a/", "c/x_1.cpp", "c/x_2.cpp"}
    assert problems(found, {"a/b.py": "", "a/": "", "c/x*": ""}) == []
    assert problems(found, {"a/b.py": "", "c/x*": "", "d.py": ""}) == [
        "not listed: a/",
        "listed, but not there: d.py",
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_commands_of_documents(document: Path):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for command in re.findall(r"`make ([a-z-]+)", text):
        assert command in targets, f"{document.name} names `make {command}`"


def test_the_table_of_kernels_says_what_there_is():
    rows = re.findall(
        r"^\| `(\w+)` \|[^|]*\|([^\n]*)\|$", (ROOT / "docs" / "kernels.md").read_text(), re.MULTILINE
    )
    said = {op: [cell.strip() == "yes" for cell in cells.split("|")] for op, cells in rows}
    backends = ("reference", "cpu", "triton", "cuda")
    ops = sorted(folder for folder in (ROOT / "kernels").iterdir() if (folder / "reference.py").exists())
    there = {op.name: [(op / f"{backend}.py").exists() for backend in backends] for op in ops}
    assert said == there
