"""What every test shares: skips for what this process cannot run."""

import importlib.util
import os
import signal
from collections.abc import Generator

import pytest
import torch

# GPU backends that must be there; with "triton,cuda", one that is not, and a GPU test that skips, are errors.
REQUIRED = set(filter(None, os.environ.get("ELASTIC_DECODE_REQUIRE", "").replace(" ", "").split(",")))


def pytest_configure() -> None:
    lacking = [reason for backend in sorted(REQUIRED) for reason in why_lacking(backend)]
    if lacking:
        raise pytest.UsageError("ELASTIC_DECODE_REQUIRE: " + "; ".join(lacking))
    # Tests work on small tensors, where a thread more costs more than it gives: on a busy machine, far more.
    # Those that are about threads set their number themselves.
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell starts what runs in its background
        signal.signal(signal.SIGINT, signal.default_int_handler)


GPU_BACKENDS = ("triton", "cuda", "flashinfer")


def why_lacking(backend: str) -> list[str]:
    """Why tests of `backend` could not all run here; nothing where they can."""
    from elastic_decode.kernels import registry

    if backend not in GPU_BACKENDS:
        return [f"{backend!r} is none of {', '.join(GPU_BACKENDS)}"]
    if not torch.cuda.is_available():
        return [f"{backend}: torch sees no CUDA device"]
    package = registry.__name__.rpartition(".")[0]
    ops = [op for op in registry.OPS if importlib.util.find_spec(f"{package}.{op}.{backend}")]
    reasons = {op: registry.why_unavailable(op, backend) for op in ops}
    return [f"{backend} {op}: {reason}" for op, reason in reasons.items() if reason is not None] or (
        [] if ops else [f"no op has a {backend} implementation"]
    )


def backends_of(item: pytest.Item) -> set[str]:
    """The GPU backends among a test's parameters; "triton-split" is Triton's, too. "torch" is one where there
    is a GPU.
    """
    callspec = getattr(item, "callspec", None)
    values = callspec.params.values() if callspec is not None else ()
    names = {value.partition("-")[0] for value in values if isinstance(value, str)}
    return names.intersection((*GPU_BACKENDS, "torch") if torch.cuda.is_available() else GPU_BACKENDS)


@pytest.hookimpl(tryfirst=True)  # before -m selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        for name in backends_of(item):
            item.add_marker("interpret" if interpreting and name == "triton" else "gpu")
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    not_interpreted = pytest.mark.skip(reason="needs TRITON_INTERPRET=1, in a process of its own")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("interpret") and os.environ.get("TRITON_INTERPRET") != "1":
            item.add_marker(not_interpreted)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    needs = backends_of(item)
    required = item.get_closest_marker("gpu") and (not needs or needs & REQUIRED)
    if REQUIRED and required and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"a GPU test may not skip here: {reason}"
    return report


@pytest.fixture(scope="session")
def isolation() -> str:
    """The walls that programs run behind here; without any, tests about them are skipped."""
    from elastic_decode.errors import ConfigError
    from elastic_decode.tasks.sandbox import find_walls

    try:
        return find_walls()
    except ConfigError as error:
        pytest.skip(str(error).partition(". Without")[0])
