"""The gated activation of SwiGLU feed-forward layers (Shazeer, arXiv 2002.05202)."""

import torch

from ..checks import check_tensor
from ..dtypes import CODES
from ..registry import default_backend, implementation

_DTYPES = {"cpu": (torch.float32, torch.bfloat16)}
_DEVICES = {"cpu": torch.device("cpu")}


def silu_mul(
    gate_up: torch.Tensor, *, out: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """`out[t, i] = silu(gate_up[t, i]) * gate_up[t, I + i]`, with silu(g) = g / (1 + exp(-g)).

    gate_up [T, 2 I] (gates, then ups) and out [T, I], contiguous, of one dtype: float32, bfloat16 or
    float16 (not float16 on the CPU kernels). T may be 0. Computed in float32, rounded once; out must not
    overlap gate_up.

    Raises ValueError for shapes, strides and devices, TypeError for dtypes, RuntimeError for an absent
    backend.
    """
    if backend == "auto":
        backend = default_backend(gate_up.device.type)
    dtypes = _DTYPES.get(backend, tuple(CODES))
    check_tensor("gate_up", gate_up, (None, None), dtypes, _DEVICES.get(backend))
    rows, width = gate_up.shape
    if width % 2:
        raise ValueError(f"gate_up must have an even number of columns, got {width}")
    if out is not None:
        check_tensor("out", out, (rows, width // 2), gate_up.dtype, gate_up.device)
    if torch.compiler.is_compiling():
        result = _silu_mul(gate_up, backend)
        return result if out is None else out.copy_(result)
    return implementation("silu_mul", backend)(gate_up, out=out)


@torch.library.custom_op("elastic_decode::silu_mul", mutates_args=())
def _silu_mul(gate_up: torch.Tensor, backend: str) -> torch.Tensor:
    return implementation("silu_mul", backend)(gate_up)


@_silu_mul.register_fake
def _(gate_up: torch.Tensor, backend: str) -> torch.Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
