"""`elastic-decode info`: versions, which kernels run here and why each other one does not, and --check."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import elastic_decode
from elastic_decode.cli import check, options
from elastic_decode.kernels import registry

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "flashinfer-python")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="versions, devices and which kernels can run here",
        description="Show versions, devices, and for each op the backends that can run here, or why not.",
    )
    parser.add_argument(
        "--model", default=None, help="a checkpoint folder or hub id: show its shape and delimiters, too"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare each op that can run on the device with its reference; exit code 1 where one disagrees",
    )
    check.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _instruction_set() -> str | None:
    from elastic_decode.kernels import _C

    return _C.cpu.isa().name


def collect(model: str | None) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "elastic_decode": elastic_decode.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _instruction_set(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": {op: registry.available(op) for op in registry.OPS},
        "auto": {device: registry.choose("auto", device) for device in ("cpu", "cuda")},
    }
    if model is not None:
        found["model"] = _describe(model)
    return found


def _describe(name: str) -> dict[str, Any]:
    from elastic_decode.config import ModelConfig
    from elastic_decode.delimiters import resolve
    from elastic_decode.models import hub

    folder = hub.resolve(options.checkpoint(name))
    shape = ModelConfig.from_hf(folder)
    tokenizer = hub.tokenizer(folder)
    delimiters = resolve(tokenizer, generation_config=hub.generation_config(folder))

    def marker(value: Any) -> Any:
        return (
            None
            if value is None
            else {"ids": list(value.ids), "text": value.text or tokenizer.decode(list(value.ids))}
        )

    return {
        "architecture": shape.architecture,
        "layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "heads": f"{shape.num_heads} query, {shape.num_kv_heads} key/value, of {shape.head_dim}",
        "vocab_size": shape.vocab_size,
        "positions": shape.max_position_embeddings,
        "dtype": shape.dtype,
        "think_open": marker(delimiters.open),
        "think_close": marker(delimiters.close),
        "eos_ids": list(delimiters.eos_ids),
    }


def _summed_up(chosen: dict[str, str]) -> str:
    """`cpu` where all ops have one backend, else the commonest, then the rest: `triton; linear torch`."""
    names = list(chosen.values())
    common = max(names, key=names.count)
    rest = [f"{op} {backend}" for op, backend in chosen.items() if backend != common]
    return "; ".join([common, *rest])


def run(arguments: argparse.Namespace) -> int:
    if arguments.check:
        return check.run(arguments)
    found = collect(arguments.model)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    console = Console()
    console.print(
        f"elastic_decode {found['elastic_decode']}, Python {found['python']}, {found['platform']}",
        highlight=False,
    )
    console.print(
        f"{found['cpus']} CPUs, {found['threads']} threads, {found['instruction_set']}", highlight=False
    )
    console.print(
        ", ".join(f"{k} {v or 'not installed'}" for k, v in found["packages"].items()), highlight=False
    )
    console.print(f"CUDA devices: {', '.join(found['cuda']) or 'none'}", highlight=False)
    table = Table("op", "backend", "here", title="Kernels", title_justify="left")
    for op, backends in found["backends"].items():
        for backend, reason in backends.items():
            table.add_row(op, backend, "[green]yes" if reason is None else f"[dim]no: {escape(reason)}")
            op = ""
    console.print(table)
    chosen = ", ".join(f"on {device} {_summed_up(backends)}" for device, backends in found["auto"].items())
    console.print(f"backend auto: {chosen}", highlight=False)
    if "model" in found:
        for key, value in found["model"].items():
            console.print(f"{key}: {value}", highlight=False, markup=False)
    return 0
