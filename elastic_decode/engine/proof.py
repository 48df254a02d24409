"""No GPU on trust: each op is compared with its reference on a device before an engine uses it there.

What was found good is remembered on disk, by everything it may depend on: the device, its driver, the
versions, the kernels' own files, and the shapes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from elastic_decode import __version__, kernels
from elastic_decode.errors import BackendUnproven
from elastic_decode.kernels import gpu, registry, selfcheck
from elastic_decode.kernels.selfcheck import Matrix, Outcome, Shapes
from elastic_decode.model_config import ModelConfig

# What a step calls; it draws through `draw`, never through `sample`.
USED: tuple[str, ...] = tuple(op for op in registry.OPS if op != "sample")
_DRIVER = Path("/proc/driver/nvidia/version")


def shapes_of(model: ModelConfig, dtype: torch.dtype, kv_dtype: torch.dtype, page_size: int) -> Shapes:
    """The sizes with which an engine over `model` calls the ops."""
    c, heads = model, model.num_heads * model.head_dim
    return Shapes(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        vocab_size=c.vocab_size,
        page_size=page_size,
        matrices=(
            Matrix(c.qkv_rows, c.hidden_size, bias=c.attention_bias),
            Matrix(c.hidden_size, heads, bias=c.o_bias),
            Matrix(2 * c.intermediate_size, c.hidden_size, bias=c.mlp_bias),
            Matrix(c.hidden_size, c.intermediate_size, bias=c.mlp_bias),
            Matrix(c.vocab_size, c.hidden_size, float32_out=True),
        ),
        dtype=dtype,
        kv_dtype=kv_dtype,
        qk_norm=c.qk_norm,
        windows=tuple(dict.fromkeys(c.sliding_window)),
        eps=c.rms_norm_eps,
    )


def must_be_proven(device: torch.device) -> bool:
    """The CPU's own kernels are tested on CPUs; no GPU's kernels are believed because they compile."""
    return device.type != "cpu"


def prove(
    backends: Mapping[str, str], shapes: Shapes, device: torch.device, *, batch_invariant: bool
) -> list[Outcome]:
    """Checks each op of USED on its backend, unless that was found good before; returns what was run.

    Raises BackendUnproven where an op disagrees with its reference or cannot be checked.
    """
    key = _key({op: backends[op] for op in USED}, shapes, device, batch_invariant)
    path = cache_folder() / "proofs" / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:32]}.json"
    if _is_remembered(path, key):
        return []
    with on_device(device):
        outcomes = [
            selfcheck.check(op, backends[op], shapes, device, batch_invariant=batch_invariant) for op in USED
        ]
    wrong = [outcome for outcome in outcomes if not outcome.ok]
    if wrong:
        raise BackendUnproven(_complaint(wrong, device))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the pages come next
    _remember(path, key, outcomes)
    return outcomes


def _complaint(wrong: list[Outcome], device: torch.device) -> str:
    lines = []
    for outcome in wrong:
        fault = "disagrees with its reference" if outcome.problem is None else "could not be checked"
        lines.append(f"{outcome.op} on backend {outcome.backend!r} {fault}: {outcome.summary()}")
    others = {
        outcome.op: [
            name
            for name in registry.BACKENDS
            if name != outcome.backend and registry.why_not_on(outcome.op, name, device.type) is None
        ]
        for outcome in wrong
    }
    choices = "; ".join(f"{op}: {', '.join(names) or 'none'}" for op, names in others.items())
    return (
        f"on {device_name(device)} ({device}): {'; '.join(lines)}. It will not be used. Choose another with "
        f"EngineConfig(backend={{{wrong[0].op!r}: ...}}) (here there are: {choices}), or device='cpu'; "
        "`elastic-decode info --check` shows every op"
    )


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current CUDA device: makes `device` that."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


# ---- what a proof depends on ----


def _key(
    backends: dict[str, str], shapes: Shapes, device: torch.device, batch_invariant: bool
) -> dict[str, Any]:
    """As JSON can say it: lists, not tuples."""
    versions = {name: _version(name) for name in ("torch", "triton", "flashinfer-python")}
    about: dict[str, Any] = {"name": device_name(device)}
    if device.type == "cuda":
        about["capability"] = list(torch.cuda.get_device_capability(device))
        about["driver"] = _DRIVER.read_text() if _DRIVER.is_file() else None
        about["cuda"] = torch.version.cuda
    key = {
        "device": about,
        "versions": versions | {"elastic_decode": __version__},
        "kernels": source_hash(),
        "dependent_launch": gpu.DEPENDENT_LAUNCH,
        "interpreter": os.environ.get("TRITON_INTERPRET") == "1",
        "backends": backends,
        "shapes": {name: str(value) for name, value in shapes._asdict().items()},
        "batch_invariant": batch_invariant,
    }
    return json.loads(_text(key))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def source_hash() -> str:
    """Of every file of the kernels, compiled or not."""
    found = hashlib.sha256()
    root = Path(kernels.__path__[0])
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".so", ".pyd"):
            found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


# ---- the memory of it ----


def cache_folder() -> Path:
    """ELASTIC_DECODE_CACHE, else elastic_decode in XDG_CACHE_HOME or ~/.cache; for a user without a home in
    the folder for temporary files.
    """
    own = os.environ.get("ELASTIC_DECODE_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = str(Path.home() / ".cache")
        except RuntimeError:  # no HOME, and no entry in the list of users: containers
            base = tempfile.gettempdir()
    return Path(base) / "elastic_decode"


def _is_remembered(path: Path, key: Mapping[str, Any]) -> bool:
    """Whether the file says that all ops of `key` were found good; a damaged one says nothing."""
    try:
        found = json.loads(path.read_text())
        proven = {entry["op"] for entry in found["proven"]}
        return found["key"] == key and proven == set(key["backends"])
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _remember(path: Path, key: Mapping[str, Any], outcomes: list[Outcome]) -> None:
    proven = [
        {"op": each.op, "backend": each.backend, "findings": each.findings, "worst": each.summary()}
        for each in outcomes
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as own:
            (Path(own) / path.name).write_text(json.dumps({"key": key, "proven": proven}, indent=1))
            os.replace(Path(own) / path.name, path)  # a reader sees the old file or the new one, whole
    except OSError as error:
        warnings.warn(
            f"the check of this device cannot be remembered and will be run at every start: {error}; set "
            "ELASTIC_DECODE_CACHE to a folder that can be written to"
        )
