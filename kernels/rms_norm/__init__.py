"""Root-mean-square layer norm (Zhang & Sennrich, arXiv 1910.07467), with the residual addition before it."""

import torch

from ..checks import check_tensor
from ..dtypes import CODES
from ..registry import default_backend, implementation

_DTYPES = {"cpu": (torch.float32, torch.bfloat16)}
_DEVICES = {"cpu": torch.device("cpu")}


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`out = round(x / sqrt(mean(x**2) + eps)) * weight`, row by row.

    x [T, H], weight [H], residual and out [T, H], all contiguous and of one dtype: float32, bfloat16 or
    float16 (not float16 on the CPU kernels). T may be 0. With `residual`, `residual += x` happens first, IN
    PLACE and rounded to its dtype, and the norm is of that sum.

    As the Llama and Qwen models of transformers compute it: the mean in float32, the normalised value rounded
    to the dtype, then multiplied by weight. The order of the sum depends on H alone.

    Raises ValueError for shapes, strides and devices, TypeError for dtypes, RuntimeError for an absent
    backend.
    """
    if backend == "auto":
        backend = default_backend(x.device.type)
    check_tensor("x", x, (None, None), _DTYPES.get(backend, tuple(CODES)), _DEVICES.get(backend))
    check_tensor("weight", weight, (x.shape[1],), x.dtype, x.device)
    if residual is not None:
        check_tensor("residual", residual, x.shape, x.dtype, x.device)
    if out is not None:
        check_tensor("out", out, x.shape, x.dtype, x.device)
    if torch.compiler.is_compiling():
        result = _rms_norm(x, weight, eps, residual, backend)
        return result if out is None else out.copy_(result)
    return implementation("rms_norm", backend)(x, weight, eps, residual=residual, out=out)


@torch.library.custom_op("elastic_decode::rms_norm", mutates_args=("residual",))
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, backend: str
) -> torch.Tensor:
    return implementation("rms_norm", backend)(x, weight, eps, residual=residual)


@_rms_norm.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, backend: str
) -> torch.Tensor:
    return torch.empty_like(x)
