"""What every benchmark shares: random checkpoints of real shapes, rows as data, machine facts, paired timing.

A row is one JSON object a line in benchmarks/results/<device>.jsonl. Machines are shared and noisy, so
engines are timed in pairs, alternating within one run, and what is quoted is the median of the ratios within
a pair.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import shapes
import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def random_qwen2(
    shape: str, dtype: torch.dtype, device: str = "cpu", max_positions: int = 4096
) -> transformers.PreTrainedModel:
    """A Hugging Face module of one of `shapes.SHAPES`, made where it is to run."""
    torch.manual_seed(0)
    settings = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.Qwen2Config(
        **shapes.SHAPES[shape], **settings, max_position_embeddings=max_positions
    )
    with torch.no_grad(), torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def cpu_name() -> str:
    """The processor's model name, for the results' file name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is measured, with a mark where the tree has changes. $ELASTIC_DECODE_COMMIT says it for
    a copy of the tree without its history.
    """
    said = os.environ.get("ELASTIC_DECODE_COMMIT")
    if said:
        return said
    here = Path(__file__).parent
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def cpu_facts() -> dict[str, Any]:
    return {"device": cpu_name(), "threads": torch.get_num_threads()}


def cuda_facts() -> dict[str, Any]:
    import triton

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "driver": driver,
        "triton": triton.__version__,
    }


@cache
def facts(device: str = "cpu") -> dict[str, Any]:
    """What a row says of the machine it was measured on."""
    return {
        **(cpu_facts() if device == "cpu" else cuda_facts()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def synchronize(device: str) -> None:
    """Wait until a GPU has done all it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def append(row: dict[str, Any]) -> None:
    """Write a row as soon as it is known, so that a run cut short keeps what it has. $OUT, if set, gets it
    instead.
    """
    device = re.sub(r"[^a-z0-9]+", "-", row["device"].lower()).strip("-")
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{device}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def paired(
    first: Callable[[], float], second: Callable[[], float], rounds: int
) -> tuple[list[float], list[float]]:
    """Run both in turn, `rounds` times, changing who goes first; what each returned."""
    ours: list[float] = []
    theirs: list[float] = []
    for index in range(rounds):
        for run, out in ((first, ours), (second, theirs))[:: 1 if index % 2 == 0 else -1]:
            out.append(run())
    return ours, theirs


def median(values: list[float]) -> float:
    return statistics.median(values)
