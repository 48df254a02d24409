"""What every test shares: skips for what this process cannot run."""

import os

import pytest
import torch


def pytest_configure() -> None:
    # Tests work on small tensors, where a thread more costs more than it gives: on a busy machine, far more.
    # Those that are about threads set their number themselves.
    torch.set_num_threads(1)


GPU_BACKENDS = ("triton", "cuda", "flashinfer")


def backends_of(item: pytest.Item) -> set[str]:
    """The GPU backends among a test's parameters; "triton-split" is Triton's, too."""
    callspec = getattr(item, "callspec", None)
    values = callspec.params.values() if callspec is not None else ()
    names = {value.partition("-")[0] for value in values if isinstance(value, str)}
    return names.intersection(GPU_BACKENDS)


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
