"""Training runs in processes that are forked with everything imported, killed, and looked at afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from spy import SCORING_SECONDS, Aim, Spy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from elastic_decode.assets import tiny_model_path
from elastic_decode.cli import main as command_line
from elastic_decode.errors import CheckpointError
from elastic_decode.rl import checkpoint
from elastic_decode.rl.metrics import FILE

__all__ = ["SCORING_SECONDS", "STEPS", "Life", "Wrong", "be_subreaper"]
RECIPE = Path(__file__).parents[2] / "recipes" / "toy.yaml"
STEPS = 8
KEEP = 2
OVERRIDES = (
    f"run.steps={STEPS}",
    "run.save_every=2",
    f"run.keep={KEEP}",
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "engine.max_batch=16",
    "optim.updates_per_step=2",
    "optim.schedule=cosine",
    "grading.workers=2",
    "rollout.budgets={plan: uniform, low: 5, high: 20, solve: 3}",
    "objective.dynamic_sampling=true",
    "run.eval_every=2",
    "evaluation={data: {source: countdown, split: test}, limit: 4, budgets: [{think: 10, solve: 3}]}",
)
PATIENCE = 60.0  # seconds until a run that says nothing counts as hanging
GONE_AFTER = 5.0  # seconds that what a killed run leaves has to end itself
_SUBREAPER, _DIE_WITH_PARENT = 36, 1  # prctl's PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG


class Wrong(Exception):
    """Something that a kill must not do was done."""


def be_subreaper() -> None:
    """What a killed run leaves behind becomes this process's child, so that none of it is overlooked."""
    _prctl(_SUBREAPER, 1)
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # else a thread
    disable_progress_bar()
    AutoModelForCausalLM.from_pretrained(tiny_model_path())  # imports the rest
    until = time.monotonic() + 10  # threads that loaded the weights may still be ending
    while (threads := len(os.listdir("/proc/self/task"))) != 1 and time.monotonic() < until:
        time.sleep(0.01)
    if threads != 1:
        raise RuntimeError(f"this process forks runs, and has {threads} threads")


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


class Life:
    """One run's folder, and the processes that work on it one after the other."""

    overrides: tuple[str, ...] = ()  # more of them, for every run

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.whole: list[Path] = []  # checkpoints, by step
        self.newest = 0
        (folder / "tmp").mkdir(parents=True)
        self._shm = shared_memory()

    def start(self, aim: Aim | None = None, *, count: bool = False, older: Path | None = None) -> Child:
        arguments = ["train", "--config", str(RECIPE), f"run.folder={self.run}", *OVERRIDES]
        arguments += Life.overrides
        if older is not None:
            arguments += ["--resume", str(older)]
            self.newest = checkpoint.step_of(older)
        return Child(self.folder, arguments, aim, count=count)

    def check_left_behind(self) -> None:
        """After a kill: raises Wrong where something is there that nothing will ever remove."""
        left = [path.name for path in (self.folder / "tmp").iterdir()]
        left += [path.name for path in self.folder.iterdir() if path.name not in ("run", "tmp", "log")]
        left += sorted(shared_memory() - self._shm)
        if left:
            raise Wrong(f"{self.folder}: left behind: {', '.join(left)}")

    def check_whole(self) -> None:
        """Every checkpoint that counts as whole loads; raises Wrong where not, or where the newest is older
        than it was.
        """
        folder = self.run / "checkpoints"
        self.whole = [Path(path) for path in forked(lambda: whole_checkpoints(folder))]
        newest = checkpoint.step_of(self.whole[-1]) if self.whole else 0
        if newest < self.newest:
            raise Wrong(f"{folder}: the newest whole checkpoint was step {self.newest}, and is {newest}")
        self.newest = newest

    def end(self) -> dict[str, Any]:
        """What a run comes to: metrics without what the clock says, weights, the optimizer's state."""
        lines = (self.run / FILE).read_text().splitlines()
        last = self.run / "checkpoints" / f"step-{STEPS:06}"
        return {
            "files": sorted(
                str(path.relative_to(self.run))
                for path in self.run.rglob("*")
                if not any(part.startswith(("superseded-", "tensorboard")) for part in path.parts)
            ),
            "metrics": [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines],
            "weights": [path.read_bytes() for path in sorted(last.glob("*.safetensors"))],
            "state": checkpoint.load_state(last),
        }

    def expect_end(self, wanted: dict[str, Any]) -> None:
        found = self.end()
        steps = [record["step"] for record in found["metrics"] if "reward" in record]
        if steps != list(range(STEPS)):
            raise Wrong(f"{self.run / FILE} has the steps {steps}")
        for name in wanted:
            if not same(wanted[name], found[name]):
                raise Wrong(f"{self.run}: its {name} are not those of the run that was not killed")


class Child:
    """A run at work."""

    def __init__(self, folder: Path, arguments: list[str], aim: Aim | None, *, count: bool) -> None:
        self.folder = folder
        self.aim = aim
        self.status: int | None = None
        self._started = time.monotonic()
        self.seconds = 0.0
        self.outlived = 0.0  # seconds from its death to that of the last process it had started
        ours, theirs = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(ours)
            _be_run(folder, arguments, Spy(theirs, aim, count=count))
        os.close(theirs)
        self._pipe = ours
        self._unread = b""

    def kill_at(self, whom: str, delay: float) -> bool:
        """Kill so many seconds after the child says that it is there; whether that hit. whom: run, worker or
        nursery.
        """
        at = self._next()
        while at is not None and at["what"] != "at":
            at = self._next()
        if at is None:
            self.reap()
            return False
        until = time.perf_counter() + delay
        while time.perf_counter() < until:
            pass
        victim = {"run": self.pid, "worker": at["pid"], "nursery": at["parent"]}[whom]
        self._kill(victim)
        said = [] if whom == "run" else self._rest()  # it goes on
        self.reap()
        said += self._rest()
        return not any(m["what"] == "past" and m["pid"] == at["pid"] for m in said)

    def kill_after(self, seconds: float) -> None:
        time.sleep(seconds)
        self._kill(self.pid)
        self.reap()

    def finish(self) -> list[dict[str, Any]]:
        """Let it come to its end; what it said."""
        said = self._rest()
        self.reap()
        self.seconds = time.monotonic() - self._started
        return said

    def reap(self) -> None:
        """Wait until it and all it has started are gone. Raises Wrong where those stay."""
        self._wait()
        started = time.monotonic()
        while time.monotonic() - started < GONE_AFTER:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.outlived = time.monotonic() - started
                return
            if not pid:
                time.sleep(0.002)
        left = children()
        for pid in left:
            self._kill(pid)
        raise Wrong(f"{self.folder}: {len(left)} processes were left behind after {GONE_AFTER:g} s")

    def expect_success(self) -> None:
        if self.status != 0:
            raise Wrong(f"{self.folder}: exit status {self.status}\n{self.log()}")

    def expect_failure(self, message: str) -> None:
        """A clear end: exit status 1, a message, no traceback (TensorBoard's thread prints its own)."""
        log = self.log()
        if self.status != 1 or message not in log or 'elastic_decode/cli/__init__.py", line' in log:
            raise Wrong(f"{self.folder}: exit status {self.status}, expected 1 and {message!r}\n{log}")

    def log(self) -> str:
        """What it has printed, the end of it."""
        return (self.folder / "log").read_text(errors="replace")[-4000:]

    def _kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _wait(self) -> None:
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _next(self) -> dict[str, Any] | None:
        """Its next message; None where there will be no more."""
        while b"\n" not in self._unread:
            if not select.select([self._pipe], [], [], PATIENCE)[0]:
                self._kill(self.pid)
                raise Wrong(f"{self.folder}: nothing was heard for {PATIENCE:g} s ({self.aim})\n{self.log()}")
            more = os.read(self._pipe, 1 << 16)
            if not more:
                return None  # everyone who had the other end is gone
            self._unread += more
        line, self._unread = self._unread.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def _rest(self) -> list[dict[str, Any]]:
        said = []
        while (message := self._next()) is not None:
            said.append(message)
        return said


def _be_run(folder: Path, arguments: list[str], spy: Spy) -> None:
    status = 70
    try:
        _prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        _prctl(_SUBREAPER, 0)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        tempfile.tempdir = str(folder / "tmp")
        spy.install()
        status = command_line(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def forked(work: Any) -> Any:
    """What `work` returns (as JSON), done in a process of its own: it may start threads, this one may not.
    Raises Wrong with what it raises.
    """
    ours, theirs = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            said = {"value": work()}
        except BaseException:
            said = {"error": traceback.format_exc()}
        os.write(theirs, json.dumps(said).encode())
        os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        told = json.loads(pipe.read() or b'{"error": "it crashed"}')
    os.waitpid(pid, 0)
    if "error" in told:
        raise Wrong(told["error"])
    return told["value"]


def whole_checkpoints(folder: Path) -> list[str]:
    """Those that count as whole, by step, once each has been loaded. Raises what loading raises."""
    found = []
    for path in sorted(folder.glob("step-*")):
        try:
            state = checkpoint.load_state(path)
        except CheckpointError:
            continue  # it does not count
        if state["step"] != checkpoint.step_of(path):
            raise Wrong(f"{path} is of step {state['step']}")
        AutoModelForCausalLM.from_pretrained(path)
        AutoTokenizer.from_pretrained(path)
        found.append(str(path))
    return found


def children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def shared_memory() -> set[str]:
    """Files of shared memory that no process has open or mapped any more."""
    return {name for name in os.listdir("/dev/shm") if not in_use(f"/dev/shm/{name}")}


def in_use(path: str) -> bool:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if path in Path(f"/proc/{pid}/maps").read_text(errors="replace"):
                return True
            if any(os.readlink(link) == path for link in Path(f"/proc/{pid}/fd").iterdir()):
                return True
    return False


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit; tensors and NaN, too."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
