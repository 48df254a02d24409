"""The GPU a Triton or CUDA kernel is launched on: its architecture, its processors, why there is none."""

from __future__ import annotations

from functools import cache

import torch

ARCHITECTURES: tuple[int, ...] = (80, 90, 100)  # what configuration tables are keyed by


@cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    known = [arch for arch in ARCHITECTURES if arch <= 10 * major + minor]
    if not known:
        raise RuntimeError(
            f"{torch.cuda.get_device_name(index)} is sm_{major}{minor}; these kernels need sm_80 or newer"
        )
    return known[-1]


def architecture(device: torch.device) -> int:
    """80, 90 or 100: the newest architecture in the tables that `device` is not older than.

    On the CPU (Triton's interpreter) 90. Raises RuntimeError on a GPU older than sm_80.
    """
    if device.type != "cuda":
        return 90
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _num_processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; 4 on the CPU, so that small tests meet a full grid."""
    if device.type != "cuda":
        return 4
    return _num_processors(torch.cuda.current_device() if device.index is None else device.index)


def why_no_triton() -> str | None:
    """None where Triton kernels can run in this process, otherwise the reason."""
    import triton

    if triton.knobs.runtime.interpret:
        return None
    if not torch.cuda.is_available():
        return "Triton needs a CUDA device (or TRITON_INTERPRET=1, to run slowly on the CPU)"
    try:
        architecture(torch.device("cuda"))
    except RuntimeError as error:
        return str(error)
    return None
