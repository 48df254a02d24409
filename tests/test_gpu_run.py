"""The runner of the GPU's tests loses no test: not to a crash, not to a lost context, not to the clock."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
RUN = ROOT / "tests" / "gpu" / "run.py"

TESTS = """
import os, time, pytest

@pytest.mark.parametrize("number", range(6))
def test_passes(number):
    assert number >= 0

def test_fails():
    assert 1 == 2, "one is not two"

def test_skips():
    pytest.skip("for a reason")

def test_crashes():
    os._exit(3)

@pytest.mark.parametrize("name", ["cuda-split", "cudax", "triton"])
def test_backends(name):
    pass
"""


def run(tmp_path: Path, *options: str, tests: str = TESTS) -> tuple[int, str, list[dict]]:
    folder = tmp_path / "suite"
    folder.mkdir(exist_ok=True)
    (folder / "test_it.py").write_text(tests)
    command = [sys.executable, str(RUN), "--processes", "2", *options, "--", str(folder)]
    environment = {**os.environ, "OUT": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    lines = [json.loads(line) for path in tmp_path.glob("tests.jsonl") for line in path.open()]
    return done.returncode, done.stdout + done.stderr, lines


def test_every_test_runs_and_each_failure_is_named(tmp_path):
    code, output, lines = run(tmp_path)
    assert code == 1
    assert "== 2 failed, 9 passed, 1 skipped of 12 in" in output, output
    assert "one is not two" in output
    assert "test_crashes" in output
    assert "its process died (exit status 3)" in output
    assert len({line["finished"] for line in lines if "finished" in line}) == 12


def test_one_backend(tmp_path):
    code, output, _ = run(tmp_path, "--backend", "cuda", "--processes", "1")
    assert code == 0
    assert "== 0 failed, 1 passed, 0 skipped of 1 in" in output, output


def test_a_tool_that_finds_something_is_a_problem_though_all_tests_pass(tmp_path):
    """compute-sanitizer runs the program, prints what it found and ends with a status of its own."""
    tool = tmp_path / "tool.py"
    tool.write_text("import subprocess, sys\nsubprocess.run(sys.argv[1:])\nprint('a race')\nsys.exit(99)")
    under = ("--processes", "1", "--part", "--under", f"{sys.executable} {tool}")
    code, output, _ = run(tmp_path, *under, tests="def test_a(): pass")
    assert code == 1
    assert "exit status 99" in output
    assert "a race" in output
    assert "== 0 failed, 1 passed" in output
    tool.write_text("import subprocess, sys\nprint('==== Race', flush=True)\nsubprocess.run(sys.argv[1:])")
    slow = "import time\ndef test_a(): time.sleep(60)"
    code, output, _ = run(tmp_path, *under, "--minutes", "0.1", "--finds", "^==== Race", tests=slow)
    assert code == 1
    assert "1 lines match '^==== Race'" in output


def test_out_of_time_is_said_and_is_a_failure(tmp_path):
    slow = "import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)"
    options = ("--processes", "1", "--minutes", "0.12")
    code, output, _ = run(tmp_path, *options, tests=slow)
    assert code == 1
    assert "OUT OF TIME, with 1 tests not run; under way: ['" in output, output
    assert "test_b" in output


def test_a_file_that_does_not_import_costs_no_other(tmp_path):
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "test_other.py").write_text("def test_a(): pass")
    code, output, _ = run(tmp_path, "--processes", "1", tests="import no_such_module")
    assert code == 1
    assert "No module named 'no_such_module'" in output
    assert "== 1 failed, 1 passed, 0 skipped of 1 in" in output, output


def test_a_process_that_cannot_start_is_a_problem_with_its_words(tmp_path):
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "conftest.py").write_text("raise RuntimeError('no tests today')")
    code, output, _ = run(tmp_path, "--processes", "1")
    assert code == 1
    assert "no tests today" in output


def test_required_backends_that_are_not_there_are_named():
    spec = importlib.util.spec_from_file_location("repository_conftest", ROOT / "tests" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    assert conftest.why_lacking("rocm") == ["'rocm' is none of triton, cuda, flashinfer"]
    if not torch.cuda.is_available():
        assert conftest.why_lacking("triton") == ["triton: torch sees no CUDA device"]


def test_a_gpu_test_that_skips_is_an_error_where_its_backend_is_required(pytester_like):
    outcomes = pytester_like(
        """
import pytest

@pytest.mark.gpu
def test_skips():
    pytest.skip("not today")

@pytest.mark.parametrize("backend", ["flashinfer"])
def test_not_required(backend):
    pytest.skip("not installed")

def test_other():
    pytest.skip("no matter")
"""
    )
    assert "1 failed, 2 skipped" in outcomes
    assert "a GPU test may not skip here: Skipped: not today" in outcomes


@pytest.fixture
def pytester_like(tmp_path):
    """Runs tests under this repository's conftest as if a GPU were there."""

    def go(tests: str) -> str:
        text = (ROOT / "tests" / "conftest.py").read_text()
        pretend = "\nREQUIRED = {'triton', 'cuda'}\nwhy_lacking = lambda backend: []\n"
        pretend += "torch.cuda.is_available = lambda: True\n"
        (tmp_path / "conftest.py").write_text(text + pretend)
        (tmp_path / "test_it.py").write_text(tests)
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n    interpret: x\n")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfs", str(tmp_path)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout

    return go
