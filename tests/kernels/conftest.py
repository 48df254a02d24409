"""csrc/cuda on the CPU: compiled by g++ against tests/cuda_on_cpu and loaded in the extension's place."""

import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "cuda_on_cpu"
# Contraction is off and so is _FORTIFY_SOURCE, whose longjmp refuses to leave for another stack.
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-U_FORTIFY_SOURCE")
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-Wno-unused-function")
INCLUDES = (f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}")

Build = Callable[[Sequence[Path]], Path]


@pytest.fixture(scope="session")
def build_cuda_on_cpu(request: pytest.FixtureRequest) -> Build:
    """Compiles .cu sources with the emulator into a shared library: build(sources) -> its path.

    What was built before, from the same text, is kept in pytest's cache.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++").split()[0])
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("CUDA sources run on the CPU where there is g++ on Linux")
    cache = request.config.cache
    assert cache is not None
    folder = cache.mkdir("cuda_on_cpu")
    shared = [EMULATOR.glob("*"), (ROOT / "csrc").rglob("*.h"), (ROOT / "csrc").rglob("*.cuh")]
    read_by_all = b"".join(path.read_bytes() for some in shared for path in sorted(some))

    def build(sources: Sequence[Path]) -> Path:
        names = [str(path) for path in sources]
        text = read_by_all + b"".join(path.read_bytes() for path in sources)
        key = hashlib.sha256(repr((compiler, FLAGS, names, sys.version)).encode() + text).hexdigest()[:24]
        library = folder / f"lib{key}.so"
        if not library.exists():
            part = folder / f"lib{key}.{os.getpid()}.part"
            command = [compiler, *FLAGS, *WARNINGS, *INCLUDES, f"-Wl,-soname,{library.name}"]
            command += ["-x", "c++", str(EMULATOR / "emulator.cpp"), *names, "-o", str(part)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            part.replace(library)
        return library

    return build


@pytest.fixture(scope="session")
def cuda_module(build_cuda_on_cpu: Build) -> ModuleType:
    """The extension's `cuda` submodule on the emulator; also `set_schedule` and `launches` of emulator.h."""
    import pybind11

    kernels = build_cuda_on_cpu(sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
    bindings = [EMULATOR / "module.cpp", ROOT / "csrc" / "cuda" / "bindings.cpp"]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in bindings)).hexdigest()[:12]
    library = kernels.with_name(f"{kernels.stem}-{key}{sysconfig.get_config_var('EXT_SUFFIX')}")
    if not library.exists():
        part = library.with_name(f"{library.stem}.{os.getpid()}.part")
        command = [os.environ.get("CXX", "g++"), *FLAGS, "-O0", *INCLUDES, f"-I{pybind11.get_include()}"]
        command += [f"-I{sysconfig.get_path('include')}", *map(str, bindings), str(kernels)]
        done = subprocess.run(
            [*command, "-Wl,-rpath,$ORIGIN", "-o", str(part)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        part.replace(library)
    loader = importlib.machinery.ExtensionFileLoader("cuda_on_cpu", str(library))
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def cuda_on_cpu(cuda_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`cuda_module` as `elastic_decode.kernels._C.cuda` during a test; the schedule is in order.

    Backend "cuda" then works on CPU tensors, for every op that has it.
    """
    from elastic_decode.kernels import _C, registry

    real = registry.why_unavailable

    def why_unavailable(op: str, backend: str) -> str | None:
        there = importlib.util.find_spec(f"elastic_decode.kernels.{op}.{backend}") is not None
        return None if backend == "cuda" and there else real(op, backend)

    monkeypatch.setattr(_C, "cuda", cuda_module, raising=False)
    monkeypatch.setattr(registry, "why_unavailable", why_unavailable)
    registry._implementation.cache_clear()
    cuda_module.set_schedule(0)
    yield cuda_module
    cuda_module.set_schedule(0)
    registry._implementation.cache_clear()
