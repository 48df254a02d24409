"""Runs the tests that need a GPU in several processes over the one GPU: `make gpu-check`.

    python tests/gpu/run.py [--processes N] [--minutes M] [--backend cuda] [--under "TOOL …"] [-- PYTEST ARGS]

Compiling Triton kernels takes a core, not the GPU, so a process a core is several times faster than one. Each
process takes its share of the tests, by the hash of their names, and notes each as it starts and ends: what
was done is kept when the time is up, and where a test takes its process with it (a crash, a hang, a CUDA
context that an illegal access has ended) only that test fails and another process goes on with the rest.

Exit status: 0 where every test ran and passed, otherwise 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTEXT_LOST = 70  # what a worker exits with once its CUDA context is of no use any more
HANGS_AFTER = 150.0  # seconds in one test; a process that is stuck in the driver ignores pytest's own limit
STARTS = 25  # processes that a share may use up


class Worker:
    """A pytest plugin: this process's share of the tests, less what is done, and a line of record each."""

    def __init__(self, share: str, record: Path, backend: str) -> None:
        index, _, count = share.partition("/")
        self._index, self._count = int(index), int(count)
        self._record, self._backend = record, backend
        self._done = {line["test"] for line in read(record) if "test" in line}
        self._seconds = 0.0
        self._broken = False

    def _write(self, **line: Any) -> None:
        with self._record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @pytest.hookimpl(trylast=True)  # after -m and -k have chosen
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        wanted = [item for item in items if not self._backend or self._backend in backends(item)]
        by_hash = sorted(wanted, key=lambda item: hashlib.sha1(item.nodeid.encode()).digest())
        share = {item.nodeid for item in by_hash[self._index :: self._count]}
        self._write(share=len(share))
        items[:] = [item for item in wanted if item.nodeid in share and item.nodeid not in self._done]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:  # a file that does not import: its tests are unknown, the other files' run
            self._broken = True
            self._write(outcome="failed", of=report.nodeid, text=report.longreprtext[-4000:])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._seconds = 0.0
        self._write(test=nodeid, at=time.time())

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._seconds += report.duration
        if report.failed or report.skipped:
            text = report.longreprtext if report.failed else str(report.longrepr)
            self._write(outcome=report.outcome, of=report.nodeid, text=text[-4000:])

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._write(finished=nodeid, seconds=round(self._seconds, 3))
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                text = f"the CUDA context is lost: {error}"
                self._write(outcome="failed", of=nodeid, text=text)
                pytest.exit(text, returncode=CONTEXT_LOST)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        # All that was asked for has run: passed, some failed, nothing was left.
        if exitstatus in (0, 1, 5) or (self._broken and exitstatus == 2):
            self._write(end=int(exitstatus))


def backends(item: Any) -> set[str]:
    """The backends among a test's parameters, as tests/conftest.py reads them."""
    callspec = getattr(item, "callspec", None)
    values = callspec.params.values() if callspec is not None else ()
    return {value.partition("-")[0] for value in values if isinstance(value, str)}


def read(record: Path) -> list[dict[str, Any]]:
    """A record's lines; the last may be half written where its process was killed."""
    lines = []
    for line in record.read_text(encoding="utf-8").splitlines() if record.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


@dataclass
class Share:
    """One process's part of the tests, over as many processes as it takes."""

    command: list[str]
    record: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    hangs_after: float = HANGS_AFTER
    started: int = 0
    over: bool = False
    problems: list[str] = field(default_factory=list)

    def start(self) -> None:
        self.started += 1
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a tool's own processes end with it
            )

    def running(self) -> tuple[str, float] | None:
        """The test that has started and not ended, and when it started."""
        now = None
        for line in read(self.record):
            if "test" in line:
                now = (line["test"], line["at"])
            elif "finished" in line:
                now = None
        return now

    def poll(self) -> None:
        """Look after the process: kill one that hangs, put another in the place of one that died."""
        if self.process is None or self.over:
            return
        code, test = self.process.poll(), self.running()
        if code is None:
            if test is not None and time.time() - test[1] > self.hangs_after:
                self.stop()
                self._fail(test[0], f"still running after {self.hangs_after:.0f} s; its process was killed")
                self._again()
            return
        if any("end" in line for line in read(self.record)):
            self.over = True
            if code not in (
                0,
                1,
                2,
                5,
            ):  # a tool that ran the tests, compute-sanitizer for one, found something
                self.problems.append(f"exit status {code}; the end of {self.log}:\n{tail(self.log, 40)}")
            return
        if test is not None:
            self._fail(test[0], f"its process died (exit status {code}):\n{tail(self.log, 15)}")
        elif code != CONTEXT_LOST:
            self.problems.append(f"exit status {code} between tests:\n{tail(self.log, 25)}")
            self.over = True
            return
        self._again()

    def _again(self) -> None:
        if self.started < STARTS:
            self.start()
        else:
            self.problems.append(f"gave up after {STARTS} processes")
            self.over = True

    def _fail(self, test: str, text: str) -> None:
        with self.record.open("a", encoding="utf-8") as file:
            # the line before may have been cut off with its process
            file.write("\n" + json.dumps({"outcome": "failed", "of": test, "text": text}) + "\n")
            file.write(json.dumps({"finished": test, "seconds": 0.0}) + "\n")

    def look_for(self, pattern: re.Pattern[str]) -> None:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [number for number, line in enumerate(lines) if pattern.search(line)]
        if found:
            text = "\n".join(f"    {line}" for line in lines[found[0] : found[0] + 12])
            self.problems.append(f"{len(found)} lines match {pattern.pattern!r}; the first:\n{text}")

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # none is left
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def tail(path: Path, lines: int) -> str:
    text = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return "\n".join(f"    {line}" for line in text[-lines:])


@dataclass
class Tally:
    total: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # of every test that ended
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, shares: list[Share]) -> Tally:
        tally = cls()
        for share in shares:
            lines = read(share.record)
            tally.total += next((line["share"] for line in lines if "share" in line), 0)
            for line in lines:
                if "finished" in line:
                    tally.seconds[line["finished"]] = line["seconds"]
                elif line.get("outcome") == "failed":
                    tally.failed.setdefault(line["of"], line["text"])
                elif line.get("outcome") == "skipped":
                    tally.skipped[line["of"]] = line["text"]
        return tally


def say(text: str) -> None:
    print(text, flush=True)


def report(shares: list[Share], seconds: float, in_time: bool, slowest: int) -> Tally:
    """Print failures, the slowest tests and the sum; the tally."""
    tally = Tally.of(shares)
    for test, text in tally.failed.items():
        say(f"\n==== FAILED {test}\n{text}")
    for share in shares:
        for problem in share.problems:
            say(f"\n==== PROBLEM in {share.log.name}\n{problem}")
    if tally.skipped:
        say(f"\n{len(tally.skipped)} skipped, for instance {next(iter(tally.skipped.items()))}")
    say("\nslowest tests:")
    for test, took in sorted(tally.seconds.items(), key=lambda pair: -pair[1])[:slowest]:
        say(f"  {took:7.1f} s  {test}")
    if not in_time:
        still = [test[0] for share in shares if (test := share.running()) is not None]
        say(f"\nOUT OF TIME, with {tally.total - len(tally.seconds)} tests not run; under way: {still}")
    passed = len(tally.seconds.keys() - tally.failed.keys() - tally.skipped.keys())
    say(
        f"\n== {len(tally.failed)} failed, {passed} passed, {len(tally.skipped)} skipped "
        f"of {tally.total} in {seconds:.0f}s =="
    )
    return tally


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=max(1, min(14, (os.cpu_count() or 4) - 2)))
    parser.add_argument("--minutes", type=float, default=5.5, help="stop then, with what is known (5.5)")
    parser.add_argument("--backend", default="", help="only tests with this backend among their parameters")
    parser.add_argument("--under", default="", help="a command to run the processes under")
    parser.add_argument("--finds", default="", help="a pattern that a line of a log must not have")
    parser.add_argument("--part", action="store_true", help="running out of time is no failure")
    parser.add_argument("--name", default="tests", help="of the files with what happened, in $OUT if set")
    parser.add_argument("--slowest", type=int, default=12)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("pytest", nargs="*", help="arguments for pytest (default: -m gpu tests)")
    return parser.parse_args(argv)


def work(arguments: argparse.Namespace) -> int:
    worker = Worker(arguments.worker, arguments.record, arguments.backend)
    options = ["-q", "--no-header", "--tb=short", "--continue-on-collection-errors"]
    options += ["-o", f"cache_dir={arguments.record.with_suffix('.cache')}"]  # one that nobody else writes
    return int(pytest.main([*options, *arguments.pytest], plugins=[worker]))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = arguments_of(argv)
    arguments.pytest = arguments.pytest or ["-m", "gpu", "tests"]
    if arguments.worker is not None:
        return work(arguments)
    folder = Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="gpu-tests-"))
    logs = Path(tempfile.mkdtemp(prefix="gpu-shares-"))
    shares = []
    for index in range(arguments.processes):
        record, log = logs / f"{index}.jsonl", logs / f"{index}.log"
        command = [*shlex.split(arguments.under), sys.executable, str(Path(__file__).resolve())]
        command += ["--worker", f"{index}/{arguments.processes}", "--record", str(record)]
        command += ["--backend", arguments.backend, "--", *arguments.pytest]
        # Under a tool every test is slow: there only the clock ends one.
        hangs_after = 60 * arguments.minutes if arguments.under else HANGS_AFTER
        shares.append(Share(command, record, log, hangs_after=hangs_after))
    began = said = time.monotonic()
    for share in shares:
        share.start()
    in_time = True
    try:
        while not all(share.over for share in shares):
            time.sleep(0.5)
            for share in shares:
                share.poll()
            now = time.monotonic()
            if now - began > 60 * arguments.minutes:
                in_time = False
                break
            if now - said > 15:
                said, tally = now, Tally.of(shares)
                done = f"{len(tally.seconds)} of {tally.total} tests, {len(tally.failed)} failed"
                say(f"{now - began:4.0f} s: {done}, {sum(not share.over for share in shares)} processes")
    finally:
        for share in shares:
            share.stop()
    if arguments.finds:  # a process that was stopped cannot say with its status what its tool has found
        for share in shares:
            share.look_for(re.compile(arguments.finds))
    tally = report(shares, time.monotonic() - began, in_time, arguments.slowest)
    with (folder / f"{arguments.name}.jsonl").open("w", encoding="utf-8") as file:
        for share in shares:
            file.writelines(json.dumps(line) + "\n" for line in read(share.record))
    with (folder / f"{arguments.name}.log").open("w", encoding="utf-8") as file:
        for share in shares:
            file.write(f"#### {share.log.name}\n{tail(share.log, 2000)}\n")
    say(f"records and logs: {folder}/{arguments.name}.jsonl, .log")
    bad = tally.failed or any(share.problems for share in shares) or not tally.seconds
    return 1 if bad or not (in_time or arguments.part) else 0


if __name__ == "__main__":
    sys.exit(main())
