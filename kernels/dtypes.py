"""The element types of the compiled kernels, numbered as `DType` in csrc/cpu/ops.h."""

import torch

CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
