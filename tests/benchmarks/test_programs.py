"""Every benchmark for a GPU runs here from end to end, over tiny sizes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(program: str, *arguments: str, out: Path) -> tuple[list[dict], str]:
    """The rows that a program appends, and what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS), "OUT": str(out), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / program), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for path in out.glob("*.jsonl") for line in path.read_text().splitlines()]
    return rows, done.stdout


def test_ops(tmp_path):
    arguments = ("--device", "cpu", "--seconds", "0.002", "--batch", "2")
    rows, output = run("bench_ops.py", *arguments, out=tmp_path)
    assert "0 cases failed" in output
    ceilings, *measured = rows
    assert ceilings["copy_bytes_per_s"] > 1e8
    assert {row["op"] for row in measured} == {
        "draw",
        "linear",
        "rms_norm",
        "silu_mul",
        "rope",
        "paged_attention",
    }
    for row in measured:
        assert row["us_low"] <= row["us"] <= row["us_high"]
        assert row["floor_us"] > 0
        assert {"device", "torch", "commit"} <= set(row)
    backends = {row["backend"] for row in measured if row["op"] == "draw"}
    assert {"cpu", "cpu sample", "cpu budget alone", "torch softmax"} <= backends


def test_a_case_that_fails_is_a_row_and_costs_no_other(tmp_path, monkeypatch, capsys):
    import bench_ops
    import op_cases

    def broken() -> op_cases.Contestants:
        raise ValueError("no such size")

    made = op_cases.draws
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(
        op_cases,
        "draws",
        lambda *arguments: [
            op_cases.Case("draw", {"batch": 0}, op_cases.floors.draw(1, 1), broken),
            *list(made([1], 64, torch.device("cpu"), ["greedy"])),
        ],
    )
    assert bench_ops.main(["--device", "cpu", "--only", "draw", "--seconds", "0.001"]) == 1
    rows = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert [row.get("error") for row in rows if "error" in row] == ["ValueError: no such size"]
    assert any(row.get("backend") == "cpu" for row in rows)
    assert "1 cases failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"), [(["--batch", "1"], "for which of"), (["ops", "decode", "-x"], "-x")]
)
def test_arguments_are_for_one_program(words, said):
    command = [sys.executable, str(BENCHMARKS / "bench_gpu.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert said in done.stderr
