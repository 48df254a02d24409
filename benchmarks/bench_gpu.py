"""Everything to be measured on a GPU, a process each, one after the other: `make gpu-bench`.

    python benchmarks/bench_gpu.py [ops] [decode] [peers] [arguments of that one program]

A process that crashes, hangs or loses its CUDA context costs its own rows only: rows are written as they are
known. Further arguments go to the program named, so name one.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from processes import run_for, stop_when_asked

HERE = Path(__file__).parent
MINUTES = 8.0  # for each of the three

PROGRAMS: dict[str, list[list[str]]] = {
    "ops": [["bench_ops.py", "--only", kind] for kind in ("draw", "linear", "small", "attention")],
    "decode": [["bench_decode.py", "--device", "cuda"]],
    "peers": [["bench_peers.py"]],
}


def main(argv: list[str]) -> int:
    names = [name for name in argv if name in PROGRAMS]
    options = [word for word in argv if word not in PROGRAMS]
    if options and len(names) != 1:
        sys.exit(f"{' '.join(options)}: for which of {', '.join(PROGRAMS)}? name one (WHAT=…)")
    failed = False
    stop_when_asked()
    for name in names or list(PROGRAMS):
        until = time.monotonic() + 60 * MINUTES
        programs = PROGRAMS[name]
        if "--only" in options:  # ops in one process, as told
            programs = [programs[0][:1]]
        for program in programs:
            print(f"#### {' '.join(program + options)}", flush=True)
            command = [sys.executable, "-u", str(HERE / program[0]), *program[1:], *options]
            began = time.monotonic()
            code = run_for(command, max(1.0, until - began))
            how = "stopped: out of time" if code is None else f"exit status {code}"
            print(f"#### {how}, after {time.monotonic() - began:.0f} s", flush=True)
            failed |= code != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
