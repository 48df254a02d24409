"""The reproduction: trains the protocol's arms, measures every one of them, and reports.

    make reproduce            # base and main arm, one seed
    make reproduce-all        # everything in protocol.yaml

    OUT/arms/ARM-SEED/run/            a run of `elastic-decode train`: config, metrics, checkpoints
    OUT/arms/ARM-SEED/cells.jsonl     what measure.py found, a line a (policy, think budget)
    OUT/results.json, table.md, *.png, *.svg    report.py

Whatever is there already is not done again: a run that was stopped goes on where it was. Each job is a
process of one thread, so results do not depend on how many run side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
from measure import PROTOCOL, finished, load_protocol, policies_of, prompt_of, read
from rich.console import Console

from elastic_decode.rl.checkpoint import latest
from elastic_decode.tasks import countdown

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SAY = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One arm with one seed; seed None: the base, which is not trained."""

    arm: str
    seed: int | None
    folder: Path

    @property
    def name(self) -> str:
        return self.arm if self.seed is None else f"{self.arm}, seed {self.seed}"


def jobs_of(
    protocol: Mapping[str, Any], arms: Sequence[str], seeds: Sequence[int] | None, out: Path
) -> list[Job]:
    """The base, then every arm for every seed of its own; an arm before those that start from it."""
    found = [Job(arm="base", seed=None, folder=out / "arms" / "base")]
    for arm in arms:
        if arm not in protocol["arms"]:
            raise SystemExit(f"no arm {arm!r} in the protocol; there are {', '.join(protocol['arms'])}")
        source = protocol["arms"][arm].get("from")
        if source is not None and source not in arms:
            raise SystemExit(f"arm {arm} starts from {source}, which is not among the arms to run")
        found += [
            Job(arm=arm, seed=seed, folder=out / "arms" / f"{arm}-{seed}")
            for seed in report.seeds_of(protocol, arm)
            if seeds is None or seed in seeds
        ]
    return found


def trained(protocol: Mapping[str, Any], job: Job) -> Path:
    """The last checkpoint of a job's run. Raises RuntimeError where the run has not come to its end."""
    steps = protocol["arms"][job.arm].get("steps", protocol["steps"])
    found = latest(job.folder / "run" / "checkpoints")
    if found is None or found.name != f"step-{steps:06d}":
        raise RuntimeError(f"{job.name}: no checkpoint of step {steps} in {job.folder / 'run'}")
    return found


def train_command(protocol: Mapping[str, Any], job: Job, out: Path) -> list[str]:
    """`elastic-decode train` as a user would call it."""
    arm = protocol["arms"][job.arm]
    model = protocol["base"]
    if "from" in arm:
        source = Job(arm=arm["from"], seed=job.seed, folder=out / "arms" / f"{arm['from']}-{job.seed}")
        model = str(trained(protocol, source))
    overrides = [
        *arm["overrides"],
        f"model.path={model}",
        f"run.name={job.arm}",
        f"run.folder={job.folder / 'run'}",
        f"run.seed={job.seed}",
        f"run.steps={arm.get('steps', protocol['steps'])}",
        "run.save_every=100",
        "run.keep=1",
        "run.eval_every=0",
        "run.progress=false",
    ]
    if "wish" in arm:
        overrides += [
            f"data.source={wishes(protocol, arm['wish'], out)}",
            "data.split=train",
            "data.chat=true",
        ]
    command = Path(sys.executable).with_name("elastic-decode")
    return [str(command), "train", "--config", str(ROOT / protocol["train"]), *overrides]


def wishes(protocol: Mapping[str, Any], bounds: Sequence[int], out: Path) -> Path:
    """L1's training data: the task's problems, each with a wish of its own as the prompt's last word."""
    path = out / f"wishes-{bounds[0]}-{bounds[1]}.jsonl"
    draw = random.Random(protocol["evaluate"]["seed"])
    rows = []
    for problem in countdown.problems("train"):
        wish = draw.randint(*bounds)
        (message,) = prompt_of(problem, wish)
        numbers = {"x": problem.x, "y": problem.y, "z": problem.z, "target": problem.target}
        rows.append({"prompt": message["content"], **numbers, "target_tokens": wish})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path


def measure_command(protocol: Mapping[str, Any], job: Job, path: Path) -> list[str]:
    arm = protocol["arms"].get(job.arm, {})
    checkpoint = protocol["base"] if job.seed is None else str(trained(protocol, job))
    wish = ["--wish", *map(str, arm["wish"])] if "wish" in arm else []
    policies = ",".join(policies_of(protocol, job.arm))
    return [
        *(sys.executable, str(HERE / "measure.py"), checkpoint, "--out", str(job.folder / "cells.jsonl")),
        *("--policies", policies, *wish, "--protocol", str(path)),
    ]


def call(command: Sequence[str], log: Path) -> None:
    """A process of one thread, its output in a file. Raises RuntimeError with the file's end."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(command, env={**os.environ, **threads}, stdout=file, stderr=file, cwd=ROOT)
    if done.returncode:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise RuntimeError(f"exit status {done.returncode}, see {log}:\n{end}")


def do(protocol: Mapping[str, Any], job: Job, out: Path, path: Path) -> str:
    """Trains and measures; what to say of it."""
    started = time.perf_counter()
    if finished(protocol, job.arm, read(job.folder / "cells.jsonl")):
        return "was there"
    job.folder.mkdir(parents=True, exist_ok=True)
    log = job.folder / "log.txt"
    if job.seed is not None:
        call(train_command(protocol, job, out), log)
    between = time.perf_counter()
    call(measure_command(protocol, job, path), log)
    return f"trained {between - started:.0f} s, measured {time.perf_counter() - between:.0f} s"


def run_all(
    protocol: Mapping[str, Any], jobs: Sequence[Job], out: Path, path: Path, side_by_side: int
) -> list[str]:
    """Every job once those it starts from are done; the names of those that failed."""
    waiting, failed = list(jobs), []
    running: dict[Future[str], Job] = {}
    done: set[str] = set()
    with ThreadPoolExecutor(side_by_side) as pool:
        while waiting or running:
            for job in list(waiting):
                source = protocol["arms"].get(job.arm, {}).get("from")
                needed = None if source is None else f"{source}, seed {job.seed}"
                if needed in failed:
                    waiting.remove(job)
                    failed.append(job.name)
                    SAY.print(f"{job.name}: left out, {needed} failed")
                elif len(running) < side_by_side and (needed is None or needed in done):
                    waiting.remove(job)
                    running[pool.submit(do, protocol, job, out, path)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    SAY.print(f"{job.name}: {future.result()}")
                    done.add(job.name)
                except (RuntimeError, OSError) as error:
                    failed.append(job.name)
                    SAY.print(f"{job.name}: FAILED: {error}", markup=False)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    parser.add_argument(
        "--all", action="store_true", help="every arm and seed (default: main arm, first seed)"
    )
    parser.add_argument("--arms", help="of the protocol, with commas between them")
    parser.add_argument("--seeds", help="likewise")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)"
    )
    parser.add_argument("--protocol", type=Path, default=PROTOCOL)
    args = parser.parse_args()
    protocol = load_protocol(args.protocol)
    arms = list(protocol["arms"]) if args.all else list(protocol["arms"])[:1]
    seeds = None if args.all else protocol["seeds"][:1]
    arms = args.arms.split(",") if args.arms else arms
    seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else seeds
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "protocol.yaml"
    if kept.exists() and load_protocol(kept) != protocol:
        raise SystemExit(f"{out} holds results of another protocol; give another --out, or remove it")
    shutil.copyfile(args.protocol, kept)
    failed = run_all(protocol, jobs_of(protocol, arms, seeds, out), out, kept, max(1, args.jobs))
    report.write(protocol, out)
    SAY.print((out / "table.md").read_text(encoding="utf-8"), markup=False)
    SAY.print(f"table, plots and figures: {out}")
    if failed:
        raise SystemExit(f"not done: {', '.join(failed)}")


if __name__ == "__main__":
    main()
