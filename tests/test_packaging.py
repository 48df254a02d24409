"""The wheel holds what was meant, and importing the package costs nothing until something is used."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import elastic_decode

ROOT = Path(__file__).parent.parent


def python(code: str, **environment: str) -> str:
    """What `code` prints in a new interpreter, away from the repository."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = ("torch", "transformers", "numpy", "triton", "tokenizers")
LOADED = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"


def test_import_loads_nothing_heavy():
    assert python(f"import elastic_decode; elastic_decode.__version__; dir(elastic_decode); {LOADED}") == "[]"


def test_plain_data_loads_nothing_heavy():
    names = "Budget, EngineConfig, Phase, Request, SamplingParams"
    assert python(f"from elastic_decode import {names}; {LOADED}") == "[]"


@pytest.mark.parametrize("name", elastic_decode.__all__)
def test_every_export_is_there(name: str):
    assert getattr(elastic_decode, name) is not None
    assert name in dir(elastic_decode)


def test_unknown_attributes_raise():
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        elastic_decode.Engin  # noqa: B018


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of the sources: nothing is left in the tree, and objects that are fresh are used."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("csrc", "kernels", "elastic_decode", "build"):
        if (ROOT / name).exists():
            skip = shutil.ignore_patterns("__pycache__", "*.so", "lib*", "bdist*")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = folder.glob("elastic_decode-*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile):
    names = set(wheel.namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"elastic_decode", f"elastic_decode-{elastic_decode.__version__}.dist-info"}

    expected = {"elastic_decode/py.typed"}
    for folder, prefix in (
        (ROOT / "elastic_decode", "elastic_decode"),
        (ROOT / "kernels", "elastic_decode/kernels"),
    ):
        for path in folder.rglob("*"):
            inside = path.relative_to(folder)
            packed = path.suffix in (".py", ".pyi") or inside.parts[0] == "assets"
            if packed and path.is_file() and "__pycache__" not in inside.parts:
                expected.add(f"{prefix}/{inside}")
    assert expected <= names, f"not in the wheel: {sorted(expected - names)}"

    libraries = [name for name in names if name.endswith((".so", ".pyd"))]
    assert len(libraries) == 1
    assert libraries[0].startswith("elastic_decode/kernels/_C.")
    surplus = {name for name in names - expected if ".dist-info/" not in name} - set(libraries)
    assert not surplus, f"in the wheel for no reason: {sorted(surplus)}"


@pytest.mark.slow
def test_wheel_works_when_unpacked(wheel: zipfile.ZipFile, tmp_path: Path):
    wheel.extractall(tmp_path)
    code = "import elastic_decode as e; from elastic_decode.kernels import _C; print(e.__file__, _C.__file__)"
    for file in python(code, PYTHONPATH=str(tmp_path)).split():
        assert Path(file).is_relative_to(tmp_path), file


@pytest.mark.slow
def test_wheel_declares_what_it_needs(wheel: zipfile.ZipFile):
    [metadata] = [name for name in wheel.namelist() if name.endswith("METADATA")]
    [entry_points] = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    text = wheel.read(metadata).decode()
    needed = [
        line for line in text.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert any(line.startswith("Requires-Dist: torch>=") for line in needed)
    assert not any("triton" in line or "pytest" in line for line in needed)
    assert "elastic-decode = elastic_decode.cli:main" in wheel.read(entry_points).decode()


def test_a_build_with_cuda_needs_nvcc():
    """It is asked for, so its absence ends the build; nothing is built without it instead."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={"ELASTIC_DECODE_CUDA": "1", "PATH": "/nowhere", "CUDA_HOME": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "ELASTIC_DECODE_CUDA=1 needs nvcc" in done.stderr
