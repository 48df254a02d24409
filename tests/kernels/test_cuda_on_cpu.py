"""The emulation that runs CUDA sources on the CPU gives right results, and catches what it says it does."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "cuda_on_cpu" / "example.cu"
SEEDS = range(12)


@pytest.fixture(scope="module")
def example(build_cuda_on_cpu):
    library = ctypes.CDLL(str(build_cuda_on_cpu([EXAMPLE])))
    library.set_schedule.argtypes = [ctypes.c_uint64]
    for run in (library.run_sum, library.run_reverse):
        run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        run.restype = ctypes.c_char_p
    return library


def run(library, name: str, seed: int, fault: int = 0, blocks: int = 3) -> tuple[bool, str]:
    """Whether the result is right, and the error."""
    width = 256 if name == "sum" else 64
    x = torch.randint(-9, 9, (blocks, width)).float()
    out = torch.full((blocks,) if name == "sum" else (blocks, width), float("nan"))
    library.set_schedule(seed)
    error = getattr(library, f"run_{name}")(x.data_ptr(), out.data_ptr(), blocks, fault).decode()
    return torch.equal(out, 2 * x.sum(1) if name == "sum" else x.flip(1)), error


@pytest.mark.parametrize("name", ["sum", "reverse"])
def test_right_kernels_are_right_under_every_schedule(example, name):
    assert {run(example, name, seed) for seed in SEEDS} == {(True, "")}


@pytest.mark.parametrize(
    ("name", "fault", "what"),
    [
        ("sum", 1, "a barrier between write and read"),
        ("sum", 7, "a barrier between read and write"),
        ("reverse", 1, "a wait for copies"),
    ],
)
def test_a_missing_wait_gives_wrong_results(example, name, fault, what):
    results = [run(example, name, seed, fault) for seed in SEEDS]
    assert any(not right for right, _ in results), f"{what} was missing, and nothing showed it"
    assert all(not error for _, error in results)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (2, "deadlock:.*threads wait in a barrier at .*example.cu"),
        (3, "is in a barrier, others in a barrier at .*example.cu"),
        (4, "is not in the mask that it names"),
        (5, "is in __(syncwarp|ballot_sync), others in __(syncwarp|ballot_sync) at .*example.cu"),
        (6, "wrote past its dynamic shared memory"),
    ],
)
def test_faults_are_errors_with_their_place(example, fault, message):
    for seed in SEEDS:
        right, error = run(example, "sum", seed, fault)
        assert not right
        assert re.search(message, error, re.DOTALL), error
        assert run(example, "sum", seed) == (True, ""), "an error must not spoil the next launch"


def test_shared_memory_is_poisoned_in_every_block(example):
    width = 64
    x, out = torch.ones(5, width), torch.zeros(5, width)
    example.set_schedule(0)
    assert example.run_reverse(x.data_ptr(), out.data_ptr(), 5, 2) == b""
    assert out[:, 0].isnan().all()
    assert (out[:, 1:] == 1).all()


def test_bindings_stand_in_for_the_extension(cuda_on_cpu):
    from elastic_decode.kernels import _C

    assert _C.cuda is cuda_on_cpu
    assert _C.cuda.device_count() == 1
