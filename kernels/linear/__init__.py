"""The dense layer of decoding: out = x @ weight.T + bias, bit for bit the same whatever else is in the
batch."""

import torch as pytorch  # the name `torch` is the backend's, once that is imported

from ..checks import check_tensor
from ..dtypes import CODES
from ..registry import default_backend, implementation

_DTYPES = {"cpu": (pytorch.float32, pytorch.bfloat16)}
_DEVICES = {"cpu": pytorch.device("cpu")}


def linear(
    x: pytorch.Tensor,
    weight: pytorch.Tensor,
    bias: pytorch.Tensor | None = None,
    *,
    out: pytorch.Tensor | None = None,
    out_dtype: pytorch.dtype | None = None,
    backend: str = "auto",
) -> pytorch.Tensor:
    """`out[t, n] = sum_k x[t, k] * weight[n, k] + bias[n]`, as torch.nn.functional.linear.

    x [T, K] contiguous; weight [N, K] whose rows are contiguous (a slice of rows or columns of a larger
    matrix will do); bias [N] or None; all of one dtype: float32, bfloat16 or float16 (not float16 on the
    CPU kernels). out [T, N] in `out_dtype`, which is x's dtype or float32 (the logits of a bfloat16 model).
    T may be 0.

    Products are summed in float32, in an order that depends on K alone (in Triton on N and the GPU's
    architecture, too): a row of the result has the same bits for every T, whatever the other rows are and
    however many threads there are. Not so with backend "torch". On x86 processors with AVX512_BF16, its dot
    products treat subnormal bfloat16 values as 0.

    Raises ValueError for shapes, strides and devices, TypeError for dtypes, RuntimeError for an absent
    backend.
    """
    if backend == "auto":
        backend = default_backend(x.device.type)
    check_tensor("x", x, (None, None), _DTYPES.get(backend, tuple(CODES)), _DEVICES.get(backend))
    check_tensor("weight", weight, (None, x.shape[1]), x.dtype, x.device, contiguous=False)
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        raise ValueError(f"weight must have contiguous rows, got strides {weight.stride()}")
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), x.dtype, x.device)
    if out_dtype not in (None, x.dtype, pytorch.float32):
        raise TypeError(f"out_dtype must be {x.dtype} or torch.float32, got {out_dtype}")
    if out is not None:
        wanted = out_dtype or ((x.dtype, pytorch.float32) if x.dtype != pytorch.float32 else x.dtype)
        check_tensor("out", out, (x.shape[0], weight.shape[0]), wanted, x.device)
        out_dtype = out.dtype
    if pytorch.compiler.is_compiling():
        result = _linear(x, weight, bias, out_dtype or x.dtype, backend)
        return result if out is None else out.copy_(result)
    return implementation("linear", backend)(x, weight, bias, out=out, out_dtype=out_dtype)


@pytorch.library.custom_op("elastic_decode::linear", mutates_args=())
def _linear(
    x: pytorch.Tensor,
    weight: pytorch.Tensor,
    bias: pytorch.Tensor | None,
    out_dtype: pytorch.dtype,
    backend: str,
) -> pytorch.Tensor:
    return implementation("linear", backend)(x, weight, bias, out_dtype=out_dtype)


@_linear.register_fake
def _(
    x: pytorch.Tensor,
    weight: pytorch.Tensor,
    bias: pytorch.Tensor | None,
    out_dtype: pytorch.dtype,
    backend: str,
) -> pytorch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)
