"""Which backends an op has, and why one of them cannot be used here.

A backend of op `x` is the module `kernels/x/<backend>.py`; it defines a function `x` with the public op's
signature (without `backend`), and may define `why_unavailable() -> str | None`. Modules are imported on first
use, so an absent package costs nothing.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

# "torch" is PyTorch's own operators (on a GPU cuBLAS), where they do as they are.
BACKENDS: tuple[str, ...] = ("reference", "cpu", "triton", "cuda", "flashinfer", "torch")
# What one name for all ops may be; CHOSEN_FOR says for which ops a name stands where it has not all of them.
CHOICES: tuple[str, ...] = ("auto", "reference", "cpu", "triton", "cuda", "flashinfer")
CHOSEN_FOR: dict[str, tuple[str, ...]] = {
    "cuda": ("paged_attention", "sample", "budget", "draw"),
    "flashinfer": ("paged_attention",),
}
# A row's bits depend on the other rows there: these libraries pick their algorithm by the batch.
NOT_BATCH_INVARIANT: dict[str, tuple[str, ...]] = {
    "linear": ("torch",),
    "paged_attention": ("flashinfer",),
}
# Other contracts than the op's, to measure beside: an engine is never given them.
COMPARISON_ONLY: dict[str, tuple[str, ...]] = {"sample": ("flashinfer",)}
OPS: tuple[str, ...] = (
    "linear",
    "rms_norm",
    "rope",
    "silu_mul",
    "paged_attention",
    "sample",
    "budget",
    "draw",
)

_PACKAGE = __name__.rpartition(".")[0]


def why_unavailable(op: str, backend: str) -> str | None:
    """None where `op` can run on `backend` in this process, otherwise the reason in one line."""
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; the ops are {', '.join(OPS)}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}")
    if importlib.util.find_spec(f"{_PACKAGE}.{op}.{backend}") is None:
        return f"{op} has no {backend} implementation"
    try:
        module = importlib.import_module(f"{_PACKAGE}.{op}.{backend}")
    except ImportError as error:
        return f"{error}"
    reason: Callable[[], str | None] | None = getattr(module, "why_unavailable", None)
    return reason() if reason is not None else None


def implementation(op: str, backend: str | Mapping[str, str], name: str | None = None) -> Callable[..., Any]:
    """The function of `op` on `backend`, or on backend[op], without the public op's checks; `name` picks a
    sibling function.

    Raises ValueError for unknown names and RuntimeError, with the reason, where the backend cannot be used
    here.
    """
    return _implementation(op, backend if isinstance(backend, str) else backend[op], name)


@cache
def _implementation(op: str, backend: str, name: str | None) -> Callable[..., Any]:
    reason = why_unavailable(op, backend)
    if reason is not None:
        raise RuntimeError(f"{op} cannot run on backend {backend!r}: {reason}")
    module = importlib.import_module(f"{_PACKAGE}.{op}.{backend}")
    return getattr(module, name or op)


def available(op: str) -> dict[str, str | None]:
    """Every backend, with None where `op` can run on it here, otherwise the reason why not."""
    return {backend: why_unavailable(op, backend) for backend in BACKENDS}


def default_backend(device_type: str) -> str:
    """What `auto` means on a device type: `cpu` (C++) on the CPU, `triton` on CUDA."""
    defaults = {"cpu": "cpu", "cuda": "triton"}
    if device_type not in defaults:
        raise ValueError(f"no kernels for device type {device_type!r}; supported: {', '.join(defaults)}")
    return defaults[device_type]


def check_choice(choice: object) -> None:
    """Raises ValueError unless `choice` is one of CHOICES or maps some OPS to BACKENDS or "auto"."""
    if isinstance(choice, str):
        if choice not in CHOICES:
            part = f"; it has some ops only, name them: {{op: {choice!r}}}" if choice in BACKENDS else ""
            raise ValueError(f"unknown backend {choice!r}; a name for all ops is {', '.join(CHOICES)}{part}")
        return
    if not isinstance(choice, Mapping):
        raise ValueError(f"a backend is a name or a mapping of ops to names, got {choice!r}")
    for op, backend in choice.items():
        if op not in OPS:
            raise ValueError(f"unknown op {op!r}; the ops are {', '.join(OPS)}")
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(
                f"unknown backend {backend!r} for {op}; the backends are auto, {', '.join(BACKENDS)}"
            )


def choose(
    choice: str | Mapping[str, str], device_type: str, *, batch_invariant: bool = True
) -> dict[str, str]:
    """The backend that `choice` means for each op on tensors of `device_type`, whether it can run or not.

    "auto": "cpu" on the CPU; on CUDA "triton", but "torch" for linear where results need not be
    batch-invariant. "cuda" and "flashinfer" name themselves for the ops in CHOSEN_FOR and triton for the
    others; "reference", "cpu" and "triton" stand for every op. A mapping names single ops, the rest is auto.

    Raises ValueError for an unknown name, op or device type.
    """
    check_choice(choice)
    default = default_backend(device_type)
    chosen = dict.fromkeys(OPS, default)
    if device_type == "cuda" and not batch_invariant:
        chosen["linear"] = "torch"
    if isinstance(choice, Mapping):
        return chosen | {op: backend for op, backend in choice.items() if backend != "auto"}
    if choice == "auto":
        return chosen
    own = CHOSEN_FOR.get(choice, OPS)
    return {op: choice if op in own else "triton" for op in OPS}


def why_not_on(op: str, backend: str, device_type: str) -> str | None:
    """None where `op` can run on `backend` with tensors of `device_type`, otherwise the reason in a line."""
    interpreting = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend in ("reference", "cpu") and device_type != "cpu":
        return f"it works on CPU tensors, not on {device_type} tensors"
    if backend in ("triton", "cuda", "flashinfer") and device_type != "cuda" and not interpreting:
        return why_unavailable(op, backend) or f"it works on CUDA tensors, not on {device_type} tensors"
    return why_unavailable(op, backend)


def resolve(
    choice: str | Mapping[str, str], device_type: str, *, batch_invariant: bool = True
) -> dict[str, str]:
    """`choose`, and every op can run on its backend here: nothing else takes the place of one that cannot.

    Raises ValueError as `choose` does and where a backend's results depend on the batch but must not, and
    RuntimeError, with the op, the backend, the reason and what to do, where one cannot run.
    """
    chosen = choose(choice, device_type, batch_invariant=batch_invariant)
    for op, backend in chosen.items():
        meant = f"backend {choice!r} means {backend!r} for {op} on {device_type}"
        reason = why_not_on(op, backend, device_type)
        if reason is not None:
            others = [name for name in BACKENDS if why_not_on(op, name, device_type) is None]
            raise RuntimeError(
                f"{meant}, which cannot run here: {reason}; what can is {', '.join(others) or 'nothing'} "
                "(`elastic-decode info` says why not the others)"
            )
        if backend in COMPARISON_ONLY.get(op, ()):
            raise ValueError(
                f"{meant}, which draws otherwise than {op} must and is there for comparison only"
            )
        if batch_invariant and backend in NOT_BATCH_INVARIANT.get(op, ()):
            raise ValueError(
                f"{meant}, whose results depend on the batch; choose another, or accept that with "
                "batch_invariant=False"
            )
    return chosen
