"""Whether FlashInfer, an optional package, can be used in this process.

Written against the interfaces of flashinfer-python 0.6.4 and 0.7.2, read, not run: nothing here has run on a
GPU.
"""

import importlib
import importlib.metadata
import os
import re
import shutil
from functools import cache
from pathlib import Path

import torch

OLDEST, TOO_NEW = (0, 6, 4), (0, 8)


@cache
def why_no_flashinfer(capabilities: tuple[int, ...]) -> str | None:
    """None where it can run on the current GPU, whose compute capability must have its major number in
    `capabilities`; otherwise the reason in one line."""
    return (
        _why_not_installed()
        or _why_not_on_this_gpu(capabilities)
        or _why_not_compiled()
        or _why_not_imported()
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _why_not_installed() -> str | None:
    own = _version("flashinfer-python")
    if own is None:
        return "FlashInfer is not installed; pip install 'elastic-decode[flashinfer]'"
    numbers = tuple(int(part) for part in re.findall(r"\d+", own)[:3])
    if not OLDEST <= numbers < TOO_NEW:
        oldest, newest = (".".join(map(str, each)) for each in (OLDEST, TOO_NEW))
        return (
            f"flashinfer-python {own} is installed; this code is for {oldest} up to, not including, {newest}"
        )
    for part in ("flashinfer-cubin", "flashinfer-jit-cache"):
        version = _version(part)
        # The compiled kernels' version ends with that of CUDA: 0.6.4+cu129.
        if version is not None and version.partition("+")[0] != own.partition("+")[0]:
            return (
                f"{part} {version} does not match flashinfer-python {own}; install the same version of both"
            )
    return None


def _why_not_on_this_gpu(capabilities: tuple[int, ...]) -> str | None:
    if not torch.cuda.is_available():
        return "FlashInfer needs a CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major not in capabilities:
        wanted = ", ".join(f"{each}.x" for each in capabilities)
        return (
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}; what is used of "
            f"FlashInfer here needs {wanted}"
        )
    return None


def _why_not_compiled() -> str | None:
    if _version("flashinfer-jit-cache") is not None:
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    compilers = [os.environ.get("FLASHINFER_NVCC"), shutil.which("nvcc")]
    compilers += [f"{home}/bin/nvcc" for home in homes if home]
    cure = "or install flashinfer-jit-cache of the same version"
    if not any(path and Path(path).is_file() for path in compilers):
        return f"FlashInfer compiles its kernels at their first use, and there is no nvcc; install it, {cure}"
    if shutil.which("ninja") is None:
        return f"FlashInfer compiles its kernels with ninja, which is not on the PATH; install it, {cure}"
    return None


def _why_not_imported() -> str | None:
    try:
        importlib.import_module("flashinfer")
    except (ImportError, RuntimeError, OSError) as error:
        return f"FlashInfer cannot be imported: {error}".split("\n")[0]
    return None
