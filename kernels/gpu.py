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


# Whether linear, attention and the small ops in Triton are launched while the kernel before them still runs,
# and wait there for its results (programmatic dependent launch, sm_90 on). Off until a GPU has shown it right
# and quicker.
DEPENDENT_LAUNCH = False


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """What such a kernel's launch takes: its constant PDL, and Triton's option where that is true."""
    if DEPENDENT_LAUNCH and device.type == "cuda" and architecture(device) >= 90:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


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


def why_no_cuda() -> str | None:
    """None where the CUDA C++ kernels can run in this process, otherwise the reason."""
    from . import _C

    if not hasattr(_C, "cuda"):
        return "built without CUDA: set ELASTIC_DECODE_CUDA=1 and rebuild"
    if not torch.cuda.is_available() or _C.cuda.device_count() == 0:
        return "no CUDA device"
    try:
        architecture(torch.device("cuda"))
    except RuntimeError as error:
        return str(error)
    return None


def stream(device: torch.device) -> int:
    """PyTorch's current stream on `device`, for the extension; 0 on the CPU, where tests emulate a device."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
