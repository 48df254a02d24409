"""The extension: its functions take addresses and sizes; kernels/<op>/cpu.py and cuda.py alone call them."""

from typing import Any

cpu: Any
cuda: Any  # absent from a build without CUDA
