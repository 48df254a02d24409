"""Ops compared with their references on small random inputs of a model's shapes, for a device met first.

`check` runs one op on one backend. What is compared is the op's own: `kernels/<op>/selfcheck.py` has
`checks(use, shapes, random, batch_invariant)`, which yields Findings; `use(name)` is the function under test.
Outputs are NaN beforehand, as is memory that must not be read, so that what is not written, or read in spite
of that, shows. Results are compared where they are; only the budget machine's reference needs the host.
"""

import importlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import registry
from .testing import error_bound

_PACKAGE = __name__.rpartition(".")[0]
FLOAT8_MAX = 448.0  # torch.float8_e4m3fn's largest; a cache in it saturates there


class Matrix(NamedTuple):
    """A weight [outputs, inputs] that `linear` is called with; float32_out: for logits."""

    outputs: int
    inputs: int
    bias: bool = False
    float32_out: bool = False


class Shapes(NamedTuple):
    """What the sizes and dtypes of every call come from. windows: the layers' sliding windows, each once."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    page_size: int
    matrices: tuple[Matrix, ...]
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype = torch.float32
    qk_norm: bool = False
    windows: tuple[int | None, ...] = (None,)
    eps: float = 1e-6


class Finding(NamedTuple):
    """One comparison: it holds where error <= bound. Of bits, the error counts the elements that differ."""

    what: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # not where the error is NaN

    @property
    def share(self) -> float:
        """Of the bound that was used up; infinite where it was 0 and an error is not."""
        if self.bound > 0:
            return self.error / self.bound
        return 0.0 if self.error == 0 else float("inf")


class Outcome(NamedTuple):
    """What came of an op on a backend. worst: of its findings, the one nearest to its bound or furthest past
    it. problem: the exception that ended the check. seconds: with the compilation of kernels not met before.
    """

    op: str
    backend: str
    ok: bool
    worst: Finding | None
    problem: str | None
    findings: int
    seconds: float

    def summary(self) -> str:
        """One line: what was worst, or what went wrong."""
        if self.problem is not None:
            return self.problem
        if self.worst is None:
            return "nothing was compared"
        return f"{self.worst.what}: error {self.worst.error:.3g}, bound {self.worst.bound:.3g}"


Use = Callable[..., Callable[..., Any]]


class Random:
    """Random tensors on a device, the same in every process that has the same kind of device."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._pool = torch.empty(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        empty = torch.empty(shape, dtype=torch.float32 if dtype.itemsize == 1 else dtype, device=self.device)
        return empty.normal_(generator=self._generator).to(dtype)

    def pooled(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Like `normal`, in memory that the next call uses again: for matrices too large to have many of."""
        if self._pool.numel() < rows * columns or self._pool.dtype != dtype:
            self._pool = self.normal(rows * columns, dtype=dtype)
        return self._pool[: rows * columns].view(rows, columns)

    def ints(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def nan(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, torch.nan, device=self.device).to(dtype)


def close(
    what: str,
    actual: torch.Tensor,
    exact: torch.Tensor,
    baseline: torch.Tensor,
    floor: float | None = None,
) -> Finding:
    """The largest error of `actual` beside what testing.error_bound allows; infinite where `actual` has a
    NaN, an infinity, a shape or a dtype that it should not."""
    bound = error_bound(exact, baseline, floor=floor)
    if actual.shape != baseline.shape or actual.dtype != baseline.dtype:
        return Finding(f"{what}: {tuple(actual.shape)} {actual.dtype}", float("inf"), bound)
    if actual.numel() == 0:
        return Finding(what, 0.0, bound)
    have, want = actual.double(), exact.double()
    agree = (have == want) | (have.isnan() & want.isnan())  # infinities, and NaN where NaN belongs
    error = torch.where(agree, 0.0, (have - want).abs()).nan_to_num(nan=torch.inf)
    return Finding(what, float(error.max()), bound)


def within(what: str, actual: torch.Tensor, exact: torch.Tensor, *, rtol: float, atol: float) -> Finding:
    """For values whose error does not come from a dtype alone: the largest |actual - exact| / (atol + rtol
    |exact|), which may be 1."""
    have, want = actual.double(), exact.double()
    agree = (have == want) | (have.isnan() & want.isnan())
    error = torch.where(agree, 0.0, (have - want).abs() / (atol + rtol * want.abs()))
    return Finding(what, float(error.nan_to_num(nan=torch.inf).max()) if error.numel() else 0.0, 1.0)


def same(what: str, actual: torch.Tensor, expected: torch.Tensor) -> Finding:
    """How many elements differ in any bit; infinite where the shapes or dtypes do."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return Finding(f"{what}: {tuple(actual.shape)} {actual.dtype}", float("inf"), 0.0)
    return Finding(what, float((bits(actual) != bits(expected)).sum()), 0.0)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(kind)


def to_cache(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `rope` writes them: rounded to nearest even, saturating in float8."""
    if dtype == torch.float8_e4m3fn:
        values = values.clamp(-FLOAT8_MAX, FLOAT8_MAX)
    return values.to(dtype)


@torch.no_grad()
def check(
    op: str, backend: str, shapes: Shapes, device: torch.device, *, batch_invariant: bool = True
) -> Outcome:
    """Runs `op` on `backend` with tensors on `device` and compares it with its reference.

    batch_invariant: also that the bits of a row do not depend on the other rows. Raises nothing: an exception
    of the op is its outcome's problem.
    """
    checks = importlib.import_module(f"{_PACKAGE}.{op}.selfcheck").checks
    findings: list[Finding] = []
    problem = None
    start = time.perf_counter()

    def use(name: str | None = None) -> Callable[..., Any]:
        return registry.implementation(op, backend, name)

    try:
        with torch.device(
            "cpu"
        ):  # what is made without a device is the host's, whatever the caller's default
            findings.extend(checks(use, shapes, Random(device), batch_invariant))
    except Exception as error:  # whatever it is, this op cannot be used here: the caller is told
        problem = f"{type(error).__name__}: {error}".split("\n")[0]
    worst = max(findings, key=lambda finding: (not finding.ok, finding.share), default=None)
    ok = problem is None and bool(findings) and all(finding.ok for finding in findings)
    return Outcome(op, backend, ok, worst, problem, len(findings), time.perf_counter() - start)
