"""Programs graded in bulk, right and hostile: what they come to, how long it takes, what is left behind.

.venv/bin/python benchmarks/bench_code_grader.py --rounds 4 --workers 2
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections import Counter
from pathlib import Path

from elastic_decode.tasks.code import Case, Cases
from elastic_decode.tasks.code_grader import CodeGrader

KINDS = {  # program -> how many in a round
    "print(input())": 70,
    "import os\nos.fork()\nos.abort()": 10,
    "print('x' * 10**8)": 10,
    "import sys\nsys.exit()": 8,
    "while True: pass": 2,
}
TESTS = Cases(tuple(Case(str(number), str(number)) for number in range(4)))


def held() -> dict[str, int]:
    """What this process holds: descriptors, children, threads, MiB of memory."""
    tasks = list(Path("/proc/self/task").iterdir())
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "children": sum(len((task / "children").read_text().split()) for task in tasks),
        "threads": len(tasks),
        "MiB": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with CodeGrader(workers=options.workers, limits={"cpu": 1, "wall": 1.5}, patience=600) as grader:
        print(f"walls: {grader.walls}; before: {held()}")
        for round_ in range(options.rounds):
            started = time.perf_counter()
            codes = [f"{code}  # {round_}.{n}" for code, count in KINDS.items() for n in range(count)]
            verdicts = grader.grade(codes, [TESTS] * len(codes))
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            print(
                f"{len(codes)} programs in {time.perf_counter() - started:.1f} s: "
                f"{dict(Counter(verdict.reason for verdict in verdicts))}; {held()}; "
                f"{used.ru_utime + used.ru_stime:.1f} s of CPU time so far"
            )
    print(f"closed: {held()}")


if __name__ == "__main__":
    main()
