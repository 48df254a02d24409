"""The kernels' own threads: any number of them gives the same bits, and a forked child can use them, too."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch

from elastic_decode.kernels import registry
from elastic_decode.kernels.linear import linear

pytestmark = pytest.mark.skipif(
    registry.why_unavailable("linear", "cpu") is not None, reason="the extension is not built"
)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def product(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(9, 640, generator=generator), torch.randn(4000, 640, generator=generator)
    return linear(x, weight, backend="cpu")


def test_many_calls_with_changing_numbers_of_threads(set_threads):
    set_threads(1)
    expected = [product(seed) for seed in range(4)]
    for repeat in range(60):
        set_threads(1 + repeat % 5)
        assert torch.equal(product(repeat % 4), expected[repeat % 4])


def test_calls_from_several_python_threads(set_threads):
    set_threads(1)
    expected = [product(seed) for seed in range(4)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        torch.set_num_threads(2)
        wrong.extend(seed for _ in range(30) if not torch.equal(product(seed), expected[seed]))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong


def _in_child(queue, x: torch.Tensor, weight: torch.Tensor) -> None:
    # Only our kernel: torch's own OpenMP threads do not survive a fork.
    queue.put(linear(x, weight, backend="cpu").numpy().tobytes())


def test_a_forked_child_can_use_them(set_threads):
    set_threads(2)
    x, weight = torch.randn(9, 640), torch.randn(4000, 640)
    expected = linear(x, weight, backend="cpu").numpy().tobytes()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, x, weight))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.join(10)
        child.kill()
    assert linear(x, weight, backend="cpu").numpy().tobytes() == expected
