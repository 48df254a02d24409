"""SwiGLU's activation in plain PyTorch: float32 throughout, rounded once at the end."""

import torch


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    result = torch.nn.functional.silu(gate) * up
    return result.to(gate_up.dtype) if out is None else out.copy_(result)
