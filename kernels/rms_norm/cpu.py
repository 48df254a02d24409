"""RMS norm in C++ (csrc/cpu/rms_norm.cpp), unchecked."""

import torch

from .. import _C
from ..dtypes import CODES

_rms_norm = _C.cpu.rms_norm


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if out is None:
        out = torch.empty_like(x)
    rows, width = x.shape
    _rms_norm(
        out.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        rows,
        width,
        eps,
        CODES[x.dtype],
    )
    return out
