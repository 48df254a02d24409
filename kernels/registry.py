"""Which backends an op has, and why one of them cannot be used here.

A backend of op `x` is the module `kernels/x/<backend>.py`; it defines a function `x` with the public op's
signature (without `backend`), and may define `why_unavailable() -> str | None`. Modules are imported on first
use, so an absent package costs nothing.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

BACKENDS: tuple[str, ...] = ("reference", "cpu", "triton", "cuda", "flashinfer")
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


@cache
def implementation(op: str, backend: str, name: str | None = None) -> Callable[..., Any]:
    """The function of `op` on `backend`, without the public op's checks; `name` picks a sibling function.

    Raises ValueError for unknown names and RuntimeError, with the reason, where the backend cannot be used
    here.
    """
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
