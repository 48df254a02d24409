"""Linear as PyTorch has it: cuBLAS on a GPU. Not batch-invariant: it picks its algorithm by the batch."""

from functools import cache

import torch

__all__ = ["linear", "why_unavailable"]


def why_unavailable() -> str | None:
    return None


@cache
def _widens(device_type: str) -> bool:
    """Whether this PyTorch multiplies 16-bit matrices into float32 on such a device."""
    return device_type == "cuda" and "dtype_out" in torch.ops.aten.mm.overloads()


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See the package's `linear`, but a row's bits may depend on the other rows. float32 results of 16-bit
    inputs cost a float32 copy of the weight where PyTorch cannot multiply into float32 (on the CPU)."""
    if out is not None:
        out_dtype = out.dtype
    if out_dtype in (None, x.dtype):
        if out is None:
            return torch.nn.functional.linear(x, weight, bias)
        if bias is None:
            return torch.mm(x, weight.T, out=out)
        return torch.addmm(bias, x, weight.T, out=out)
    if _widens(x.device.type):
        if out is None:
            out = x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)
        torch.mm(x, weight.T, out_dtype=out_dtype, out=out)
        return out if bias is None else out.add_(bias)
    wide_bias = None if bias is None else bias.to(out_dtype)
    result = torch.nn.functional.linear(x.to(out_dtype), weight.to(out_dtype), wide_bias)
    return result if out is None else out.copy_(result)
