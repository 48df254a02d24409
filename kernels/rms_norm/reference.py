"""RMS norm in plain PyTorch."""

import torch


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if residual is not None:
        residual.add_(x)
        x = residual
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)
    result = normed * weight
    return result if out is None else out.copy_(result)
