"""Linear in C++ (csrc/cpu/linear*.cpp), unchecked."""

import torch

from .. import _C
from ..dtypes import CODES

_linear = _C.cpu.linear


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    tokens, inputs = x.shape
    outputs = weight.shape[0]
    dtype = x.dtype
    if out is None:
        out = torch.empty((tokens, outputs), dtype=out_dtype or dtype)
    _linear(
        out.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        tokens,
        outputs,
        inputs,
        weight.stride(0),
        CODES[dtype],
        CODES[out.dtype],
    )
    return out
