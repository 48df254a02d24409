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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    """A decoder's size; weights are random, so speed is real and text is not."""

    name: str
    config: dict[str, Any]


SMALL = Shape(
    "small",
    {
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 1024,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
    },
)
HALF_B = Shape(
    "0.5B",
    {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
)
SHAPES = {shape.name: shape for shape in (SMALL, HALF_B)}


def random_qwen2(shape: Shape, dtype: torch.dtype) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        **shape.config, max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def cpu_name() -> str:
    """The processor's model name, for the results' file name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is measured, with a mark where the tree has changes."""
    here = Path(__file__).parent
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def facts(device: str = "cpu") -> dict[str, Any]:
    """What a row says of the machine it was measured on."""
    return {
        "device": cpu_name() if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


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
