"""SwiGLU's activation in C++ (csrc/cpu/silu_mul.cpp), unchecked."""

import torch

from .. import _C
from ..dtypes import CODES

_silu_mul = _C.cpu.silu_mul


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    rows, width = gate_up.shape
    dtype = gate_up.dtype
    if out is None:
        out = torch.empty((rows, width // 2), dtype=dtype)
    _silu_mul(out.data_ptr(), gate_up.data_ptr(), rows, width // 2, CODES[dtype])
    return out
