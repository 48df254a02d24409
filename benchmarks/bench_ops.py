"""Each op of a decode step beside its floor and beside PyTorch (and FlashInfer, where it is installed).

    make gpu-bench WHAT=ops
    make gpu-bench WHAT=ops ARGS="--only attention --batch 1 64"

Both ceilings of the device (a copy, a large matrix product) are measured first; floors and predictions are
those of benchmarks/floors.py at these rates. Times are medians over replays of a CUDA graph that goes through
inputs larger than the cache, contestants in turn. A row is appended as soon as it is known. `--device cpu`
runs the same on the CPU over tiny sizes: a check of this program, no measurement.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import attention_cases
import floors
import harness
import op_cases
import shapes
import torch
from timing import Replayable, Timing, ceilings, samples_in_turn, summary

from elastic_decode.kernels import registry

KINDS = ("linear", "small", "draw", "attention")


def selected(arguments: argparse.Namespace, device: torch.device) -> Iterator[op_cases.Case]:
    dtype = torch.bfloat16
    tiny = device.type == "cpu"
    shape = "tiny" if tiny else "1.5B"
    batches = arguments.batch or ([1, 3] if tiny else [1, 8, 64, 256])
    contexts = arguments.context or ([40, 300] if tiny else [512, 2048, 16384])
    ratios = arguments.ratio or ([6] if tiny else list(shapes.HEADS))
    if "draw" in arguments.only:
        few = [rows for rows in batches if rows != 8] or batches
        yield from op_cases.draws(few, shapes.config(shape).vocab_size, device)
    if "linear" in arguments.only:
        yield from op_cases.linears(shape, batches, dtype, device)
    if "small" in arguments.only:
        yield from op_cases.small_ops(shape, batches, dtype, device)
    if "attention" in arguments.only:
        sizes = {"head_dim": 32, "group": 2, "chunk": 20} if tiny else {}
        yield from attention_cases.cases(batches, contexts, ratios, dtype, device, **sizes)


def rows_of(
    case: op_cases.Case, rates: floors.Rates, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """A row a contestant, and for `draw` one a backend that says what the budget machine adds."""
    ready: dict[str, Replayable] = {}
    rows: list[dict[str, Any]] = []
    for name, calls in case.make().items():
        try:
            ready[name] = Replayable(calls, device)
        except Exception as error:  # one contestant, whatever it raises, must not cost the others
            rows.append({"bench": "ops", "op": case.op, **case.size, "backend": name, "error": words(error)})
    if not ready:
        return rows
    samples = dict(zip(ready, samples_in_turn(list(ready.values()), seconds=seconds), strict=True))
    floor = floors.floor_us(case.work, rates)

    def row(name: str, timing: Timing, **more: Any) -> dict[str, Any]:
        return {
            "bench": "ops",
            "op": case.op,
            **case.size,
            "backend": name,
            "us": round(timing.us, 2),
            "us_low": round(timing.low, 2),
            "us_high": round(timing.high, 2),
            "replays": timing.replays,
            "floor_us": round(floor, 3),
            "of_floor": round(floor / timing.us, 3),
            "datasheet_floor_us": round(floors.floor_us(case.work, floors.H100_DATASHEET), 3),
            "predicted_us": round(floors.predicted_us(case.work, rates), 2),
            **more,
        }

    rows += [row(name, summary(each)) for name, each in samples.items()]
    for name in samples if case.op == "draw" else ():
        alone = samples.get(f"{name} sample")
        if alone is not None:
            added = summary([a - b for a, b in zip(samples[name], alone, strict=True)])
            rows.append({**row(f"{name} budget alone", added), "of_floor": None, "predicted_us": None})
    return rows


def words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def table_line(row: dict[str, Any], size: str) -> str:
    if "error" in row:
        return f"{row['op']:16} {row.get('backend', ''):20} FAILED: {row['error']}  {size}"
    spread = f"{row['us_low']:.1f}-{row['us_high']:.1f}"
    share = "" if row["of_floor"] is None else f"{row['of_floor']:.0%}"
    predicted = "" if row["predicted_us"] is None else f"{row['predicted_us']:.1f}"
    return (
        f"{row['op']:16} {row['backend']:20} {row['us']:9.2f} {spread:>15} {row['floor_us']:8.2f} "
        f"{share:>6} {predicted:>9}  {size}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--batch", nargs="+", type=int)
    parser.add_argument("--context", nargs="+", type=int, help="attention")
    parser.add_argument("--ratio", nargs="+", type=int, choices=list(shapes.HEADS), help="attention's GQA")
    parser.add_argument("--seconds", type=float, default=0.05, help="of replays a contestant (0.05)")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no case after that (8)")
    parser.add_argument("--dry", action="store_true", help="print only; append nothing")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    if device.type == "cpu":
        torch.set_num_threads(1)
    began = time.monotonic()
    facts = harness.facts(arguments.device)

    def emit(row: dict[str, Any]) -> None:
        if not arguments.dry:
            harness.append({**row, **facts})

    bandwidth, matmul = ceilings(device)
    rates = floors.Rates(bandwidth, matmul, "measured")
    print(
        f"{facts['device']}: copy {bandwidth / 1e12:.3f} TB/s, product {matmul / 1e12:.1f} TFLOP/s",
        flush=True,
    )
    emit({"bench": "ceilings", "copy_bytes_per_s": bandwidth, "matmul_flop_per_s": matmul})
    for op in registry.OPS:
        print(f"  {op}: {', '.join(op_cases.ours(op, device)) or 'nothing here'}")
    print(
        f"{'op':16} {'backend':20} {'us':>9} {'spread':>15} {'floor':>8} {'of it':>6} {'predicted':>9}  size"
    )
    failed = 0
    for case in selected(arguments, device):
        size = " ".join(f"{key}={value}" for key, value in case.size.items())
        if case.skipped or time.monotonic() - began > 60 * arguments.minutes:
            print(f"{case.op:16} not measured: {case.skipped or 'out of time'}  {size}", flush=True)
            continue
        try:
            rows = rows_of(case, rates, device, arguments.seconds)
        except Exception as error:  # nor must one case: it may not even fit into memory
            rows = [{"bench": "ops", "op": case.op, **case.size, "error": words(error)}]
        for row in rows:
            emit(row)
            failed += "error" in row
            print(table_line(row, size), flush=True)
        if device.type == "cuda":
            torch.cuda.synchronize()  # raises where a kernel has ended the CUDA context: no more to be had
            torch.cuda.empty_cache()
    print(f"{time.monotonic() - began:.0f} s, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
