"""Decode tokens/s of this engine and of others over the same shape and prompts, in one run, a process each.

    make gpu-bench WHAT=peers
    make gpu-bench WHAT=peers ARGS="--peers ours hf_static --batch 1 8"

A peer that is not installed says so in a line and is left out. A row is appended as soon as it is known.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import harness
import peers
from processes import run_for, stop_when_asked


def run_one(name: str, setting: peers.Setting, dry: bool) -> int:
    """This process: one peer over every batch."""
    peer = peers.peer(name)
    reason = peer.why_unavailable(setting)
    if reason:
        print(f"{peer.NAME}: not here: {reason}", flush=True)
        return 0
    began = time.monotonic()
    for batch, tokens_per_s in peer.decode(setting):
        row: dict[str, Any] = {
            "bench": "peers",
            "peer": peer.NAME,
            "shape": setting.shape,
            "dtype": setting.dtype,
            "batch": batch,
            "prompt": setting.prompt,
            "new": setting.new,
            "tokens_per_s": round(tokens_per_s, 1),
            **harness.facts(setting.device),
        }
        if not dry:
            harness.append(row)
        print(
            f"{peer.NAME:46} batch {batch:4} {tokens_per_s:12,.1f} tokens/s   "
            f"(known after {time.monotonic() - began:.0f} s)",
            flush=True,
        )
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--peers", nargs="+", choices=peers.NAMES, default=list(peers.NAMES))
    parser.add_argument("--shape", help="of benchmarks/shapes.py; default: 1.5B, on the CPU tiny")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=7.5, help="for all; a peer gets what is left (7.5)")
    parser.add_argument("--dry", action="store_true", help="print only; append nothing")
    parser.add_argument("--one", choices=peers.NAMES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    setting = peers.Setting(
        shape=arguments.shape or ("tiny" if arguments.device == "cpu" else "1.5B"),
        dtype=arguments.dtype,
        device=arguments.device,
        batches=tuple(arguments.batch),
        prompt=arguments.prompt,
        new=arguments.new,
    )
    if arguments.one:
        return run_one(arguments.one, setting, arguments.dry)
    stop_when_asked()
    until = time.monotonic() + 60 * arguments.minutes
    options = sys.argv[1:] if argv is None else argv
    failed = []
    for index, name in enumerate(arguments.peers):
        # A peer may use twice its part of what is left, so that one that compiles for long starves no other.
        left = until - time.monotonic()
        seconds = max(30.0, min(left, 2 * left / (len(arguments.peers) - index)))
        command = [sys.executable, "-u", str(Path(__file__)), *options, "--one", name]
        code = run_for(command, seconds)
        if code is None:
            print(f"{name}: stopped after {seconds:.0f} s", flush=True)
        elif code:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
