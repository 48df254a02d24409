"""Linear in plain PyTorch: float32 throughout, rounded once at the end."""

import torch


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    # A product and a sum, not a matrix product: torch picks the order of a matrix product's sums by its
    # shape.
    rows = [(row.float() * weight.float()).sum(dim=1) for row in x]
    result = torch.stack(rows) if rows else x.new_empty((0, weight.shape[0]), dtype=torch.float32)
    if bias is not None:
        result = result + bias.float()
    if out is None:
        return result.to(out_dtype or x.dtype)
    return out.copy_(result)
