"""Strangers' Python programs run where they can harm nothing: a `Sandbox` for one program, many tests.

Behind it is a process with namespaces of its own (`sandbox_child.py`, `sandbox_walls.py`): no network, no
process but its own, no file but the interpreter and the system's libraries, and those read-only; an empty
folder in memory to write to; limits on time, memory, files, processes. Each test runs in a fresh process, and
when it is over every process that it left is killed. docs/graders.md says what is guaranteed.
"""

from __future__ import annotations

import functools
import os
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from elastic_decode.errors import ConfigError
from elastic_decode.tasks.sandbox_values import receive, send
from elastic_decode.tasks.sandbox_walls import MEMORY, SCRATCH

Walls = Literal["root", "user", "bwrap", "none"]
NOT_ISOLATED = (
    "the network can be reached",
    "files can be read, and written where this user may write",
    "other processes of this user can be seen and signalled, this one among them",
    "a program that forks all the time may outrun the killing of its processes",
    "programs are not kept from reading the memory of processes of this user, expected results in it",
)
_HERE = Path(__file__).parent.parent
_BOOT = (
    "import sys; sys.path.append({root!r})\n"
    "from elastic_decode.tasks.sandbox_child import main\n"
    "todo = main({control}, {out}, {parent})\n"
    "if todo: todo()\n"
)
_NEEDED = ("__init__", "tasks/__init__", "tasks/sandbox_child", "tasks/sandbox_walls", "tasks/sandbox_values")
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/alternatives")
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "HOME": SCRATCH, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip
_START = 60.0  # seconds for the process to be ready; past it something else is wrong than the program
_END = 10.0  # seconds for the kernel to take down what was killed


class SandboxFailure(Exception):
    """The sandbox did not work (no process, no memory for one): nothing is known of the program."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a test may use. cpu: seconds of processor time, of each process, rounded up. wall: seconds until
    everything is killed. memory: bytes of address space, of each process. output: bytes that are read of it.
    scratch: bytes in its folder, which is memory. stack: bytes of the main thread's. processes: at a time,
    threads counted.
    """

    cpu: float = 6.0
    wall: float = 18.0
    memory: int = 2**30
    output: int = 2**24
    scratch: int = 2**26
    stack: int = 2**27
    processes: int = 16
    open_files: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value < 2**62 or (name not in ("cpu", "wall") and int(value) != value):
                raise ConfigError(f"limits.{name} must be a positive number, got {value!r}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a test. end: "ok" (exit status 0), "crash" (another one, or a signal), "time" (killed at
    the wall limit), "output" (killed for writing too much). output: what it wrote. cpu: seconds, of the
    process and those it waited for. status: negative for a signal; None where it was killed from here.
    """

    end: Literal["ok", "crash", "time", "output"]
    output: bytes = b""
    cpu: float = 0.0
    status: int | None = None


class Sandbox:
    """One program behind walls. Close it, or use it in a `with`. Not for several threads at a time.

    Raises SandboxFailure, here and in every method, where that did not work.
    """

    def __init__(self, code: str, walls: Walls, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._walls = walls
        self._scratch: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._out = -1
        self._control, theirs = _or_failure(socket.socketpair)
        try:
            self._out, end = _or_failure(os.pipe)
            try:
                os.set_blocking(self._out, False)
                self._start(code, theirs.fileno(), end)
            finally:
                os.close(end)
                theirs.close()
            self._ready()
        except BaseException:
            theirs.close()
            self.close()
            raise

    def _start(self, code: str, control: int, out: int) -> None:
        if self._walls == "none":
            self._scratch = _or_failure(lambda: tempfile.mkdtemp(prefix="elastic-decode-"))
        inner = self._walls == "bwrap"
        boot = _BOOT.format(
            root=str(_HERE.parent), control=control, out=out, parent=0 if inner else os.getpid()
        )
        command = [os.path.realpath(sys.executable), "-SsPB", "-c", boot]
        if inner:
            command = [*_bubblewrap(self._limits), *command]
        self._process = _or_failure(
            lambda: subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_ENVIRONMENT if self._scratch is None else _ENVIRONMENT | {"HOME": self._scratch},
                cwd="/",
                pass_fds=(control, out),
                start_new_session=True,
            )
        )
        job = {
            "code": code,
            "walls": self._walls,
            "readable": readable(),
            "site": _site(),
            "here": str(_HERE.parent),
            "limits": asdict(self._limits),
            "scratch": self._scratch,
        }
        self._control.settimeout(_START)
        self._tell(job)

    def _ready(self) -> None:
        try:
            answer = receive(self._control)
        except (OSError, EOFError, ValueError) as error:
            raise SandboxFailure(f"the sandbox's process did not start: {error!r}") from None
        if "failed" in answer:
            raise SandboxFailure(answer["failed"])

    def run(self, text: str) -> Outcome:
        """The program with `text` as its standard input; its standard output."""
        return self._do({"do": "stdin", "input": text})

    def call(self, name: str, args: Sequence[str]) -> Outcome:
        """The program's function `name` (or method of its class Solution) with arguments that are JSON; what
        it returned, as JSON.
        """
        return self._do({"do": "call", "name": name, "args": list(args)})

    def check(self, test: str, *, setup: str = "", entry_point: str | None = None) -> bool:
        """Whether a test program runs to its end with the names it does not know taken from the program. It
        runs in a process of its own: calls cross over, arguments and results as plain data. setup: run
        before it, if it is Python. entry_point: given to the test program's `check`, if it has one.
        """
        self._tell({"do": "begin program"})
        word = secrets.token_hex(16)
        outcome = self._do(
            {"do": "program", "test": test, "setup": setup, "entry_point": entry_point, "word": word}
        )
        return outcome.end == "ok" and outcome.output == word.encode()

    def _tell(self, message: Mapping[str, Any]) -> None:
        try:
            send(self._control, message)
        except OSError as error:
            raise SandboxFailure(f"the sandbox's process is gone: {error!r}") from None

    def _do(self, message: Mapping[str, Any]) -> Outcome:
        if self._process is None:
            raise SandboxFailure("this sandbox is closed: a test before this one was killed")
        self._tell(message)
        end = time.monotonic() + self._limits.wall
        parts: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._out, selectors.EVENT_READ)
            room = self._limits.output
            while True:
                ready = {key.fileobj for key, _ in selector.select(max(0.0, end - time.monotonic()))}
                room -= self._read(parts, room)
                if room < 0 or not ready:
                    self._stop()
                    return Outcome("time" if room >= 0 else "output", b"".join(parts))
                if self._control in ready:
                    break
        try:
            answer = receive(self._control)
        except (OSError, EOFError, ValueError) as error:
            self._stop()
            if self._walls == "none":  # the program can have done this
                return Outcome("crash", b"".join(parts))
            raise SandboxFailure(f"the sandbox's process died: {error!r}") from None
        if "failed" in answer:
            raise SandboxFailure(answer["failed"])
        if self._read(parts, room) > room:  # all that wrote to it are dead: this is the rest
            return Outcome("output", b"".join(parts))
        status = answer["status"]
        return Outcome("crash" if status else "ok", b"".join(parts), answer["cpu"], status)

    def _read(self, parts: list[bytes], room: int) -> int:
        """What is in the pipe now, up to a little more than there is room for."""
        count = 0
        with suppress(BlockingIOError):
            while count <= room and (part := os.read(self._out, 1 << 16)):
                parts.append(part)
                count += len(part)
        return count

    def _stop(self) -> None:
        """Every process gone; returns when they are."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.send_signal(signal.SIGKILL if self._walls == "bwrap" else signal.SIGTERM)
            process.wait(_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if self._walls == "bwrap":  # its children die after it: the pipe ends with the last of them
            with suppress(OSError):
                os.set_blocking(self._out, True)
                with selectors.DefaultSelector() as selector:
                    selector.register(self._out, selectors.EVENT_READ)
                    while selector.select(_END) and os.read(self._out, 1 << 16):
                        pass

    def close(self) -> None:
        """End everything, and remove the scratch folder where there is one on disk."""
        self._stop()
        self._control.close()
        if self._out >= 0:
            os.close(self._out)
            self._out = -1
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _or_failure(make: Any) -> Any:
    try:
        return make()
    except OSError as error:
        raise SandboxFailure(f"no process for a sandbox: {error}") from error


@functools.cache
def readable() -> tuple[str, ...]:
    """What a program sees of the file system: libraries of the system and the interpreter, packages."""
    own = [sys.base_prefix, sysconfig.get_path("stdlib"), *_site()]
    found: list[str] = []
    for path in sorted({*_SYSTEM, *own, *map(os.path.realpath, own)}):
        inside = any(path.startswith(f"{other}/") for other in found if not os.path.islink(other))
        if path != "/" and os.path.exists(path) and not inside:
            found.append(path)
    return tuple(found)


@functools.cache
def _site() -> tuple[str, ...]:
    """The folders of installed packages that this process imports from."""
    return tuple(path for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))


def _bubblewrap(limits: Limits) -> list[str]:
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--as-pid-1",
        "--cap-drop",
        "ALL",
        "--size",
        str(limits.scratch),
        "--tmpfs",
        MEMORY,
        "--dir",
        SCRATCH,
    ]
    for path in readable():
        here = ["--symlink", os.readlink(path)] if os.path.islink(path) else ["--ro-bind", path]
        command += [*here, path]
    for name in _NEEDED:
        command += ["--ro-bind", f"{_HERE}/{name}.py", f"{_HERE}/{name}.py"]
    for device in ("null", "zero", "full", "random", "urandom"):
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    return [*command, "--remount-ro", "/", "--chdir", SCRATCH]


@functools.cache
def find_walls(allow_unisolated: bool = False) -> Walls:
    """The walls that work here, found by running a program behind them. ConfigError where none do, with what
    the kernel said; or, where that is allowed, "none".
    """
    if not sys.platform.startswith("linux"):
        raise ConfigError("code is graded behind walls that only Linux has (namespaces)")
    # Bubblewrap may be allowed what others are not, by a setuid bit or a profile; to root it adds nothing.
    wanted: list[Walls] = ["root", "user"] if os.getuid() == 0 else ["user"]
    if os.getuid() != 0 and shutil.which("bwrap"):
        wanted.append("bwrap")
    if allow_unisolated:
        wanted.append("none")
    said = []
    for walls in wanted:
        try:
            with Sandbox("import zipfile; print(input())", walls) as sandbox:
                outcome = sandbox.run("ready")
            if outcome.output.strip() == b"ready":
                return walls
            said.append(f"{walls}: a program that prints a word ended with {outcome}")
        except SandboxFailure as failure:
            said.append(f"{walls}: {failure}")
    raise ConfigError(
        f"programs cannot be isolated here ({'; '.join(said)}). Without walls: {'; '.join(NOT_ISOLATED)}. "
        "Install bubblewrap or allow user namespaces; to run strangers' programs all the same (inside a "
        "machine that holds nothing else, say), set allow_unisolated"
    )
