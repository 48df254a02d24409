"""Closeness to a reference, for the tests of every float kernel and for the engine's check of a new device.

A kernel is held to what PyTorch itself loses: run the operation in float32 (or float64) on the same inputs
for the exact result, and in the kernel's dtype with plain PyTorch for the baseline. The kernel's error may be
at most twice the baseline's, plus a floor of one unit in the last place of the output's dtype at the largest
exact value.
"""

import os

import torch

from . import registry


def error_bound(exact: torch.Tensor, baseline: torch.Tensor, *, floor: float | None = None) -> float:
    """The largest error allowed of a result in `baseline`'s dtype: 2 * max |baseline - exact| + floor.

    `exact` is float32 or float64; both have the same shape. `floor`, in absolute terms, defaults to
    eps(baseline.dtype) times the largest finite |exact|; pass a larger one, with its reason, only where
    terms much larger than the result cancel.
    """
    if exact.shape != baseline.shape:
        raise ValueError(f"exact has shape {tuple(exact.shape)}, baseline {tuple(baseline.shape)}")
    if exact.numel() == 0:
        return 0.0
    want = exact.double()
    finite = want.isfinite() & baseline.double().isfinite()  # float8 has no isfinite
    if floor is None:
        floor = torch.finfo(baseline.dtype).eps * want[finite].abs().max().item() if finite.any() else 0.0
    error = (baseline.double() - want)[finite].abs().max().item() if finite.any() else 0.0
    return 2.0 * error + floor


def assert_close(
    actual: torch.Tensor,
    exact: torch.Tensor,
    baseline: torch.Tensor,
    *,
    floor: float | None = None,
    what: str = "result",
) -> None:
    """Raises AssertionError unless `actual` is as close to `exact` as `error_bound` demands.

    `actual` must have `baseline`'s shape and dtype, NaN exactly where `exact` has NaN, and its infinities.
    """
    if actual.shape != baseline.shape or actual.dtype != baseline.dtype:
        raise AssertionError(
            f"{what}: {tuple(actual.shape)} {actual.dtype}, expected {tuple(baseline.shape)} {baseline.dtype}"
        )
    actual, exact, baseline = actual.detach().cpu(), exact.detach().cpu(), baseline.detach().cpu()
    have, want = actual.double(), exact.double()
    if not torch.equal(have.isnan(), want.isnan()):
        raise AssertionError(f"{what}: {int(have.isnan().sum())} NaN, expected {int(want.isnan().sum())}")
    infinite = want.isinf()
    if not torch.equal(have[infinite], want[infinite]):
        raise AssertionError(f"{what}: infinities differ from the exact result's")
    finite = want.isfinite()
    if not finite.any():
        return
    bound = error_bound(exact, baseline, floor=floor)
    error = torch.where(finite, (have - want).abs(), 0.0)
    worst = int(error.argmax())
    if not error.max().item() <= bound:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
        raise AssertionError(
            f"{what}: error {error.max().item():.3e} at {index} exceeds {bound:.3e} "
            f"(got {have[index].item():.9g}, exact {want[index].item():.9g}, "
            f"PyTorch {baseline[index].item():.9g}; "
            f"{int((error > bound).sum())} of {error.numel()} elements exceed it)"
        )


def runnable(op: str) -> list[str]:
    """The backends on which `op` can run in this process; not those that are there for comparison only."""
    others = registry.COMPARISON_ONLY.get(op, ())
    found = registry.available(op).items()
    return [backend for backend, reason in found if reason is None and backend not in others]


def device_of(backend: str) -> torch.device:
    """Where tensors for `backend` live in a test: a GPU for the GPU's backends, but the CPU where Triton's
    interpreter takes its place; a GPU for "torch" if there is one. A variant's name ("cpu-avx2") counts as
    its backend's."""
    name = backend.partition("-")[0]
    if name == "torch":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return torch.device("cpu" if name in ("reference", "cpu") or interpreted else "cuda")
