"""The extension: its functions take addresses and sizes; kernels/<op>/cpu.py alone calls them."""

from typing import Any

cpu: Any
