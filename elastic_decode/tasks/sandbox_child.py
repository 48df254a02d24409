"""The sandbox from inside: one process that puts up the walls, its *init* that starts a fresh process for
each test, and those processes, which run what a stranger wrote. Standard library only; see `sandbox.py`.

Messages come through a socket that only these trusted processes have. What a test gives comes out of a pipe:
standard output, the result of a call, or, of a test program, a word that only that program was told. The
stranger's process for a test program is forked before the program and the word are read, holds neither, and
answers calls through a socket; it never runs in the process that decides.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import resource
import signal
import socket
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from elastic_decode.tasks import sandbox_walls as walls
from elastic_decode.tasks.sandbox_values import Stub, pack, receive, send, unpack

Job = dict[str, Any]
Todo = Callable[[], None]
# What programs for judges often use without importing it, as LiveCodeBench's own runner allows.
_STARS = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics",
    "itertools", "functools", "operator", "io", "json", "typing",
)  # fmt: skip
_MODULES = (*_STARS, "sys", "os", "time", "queue", "array", "decimal", "fractions")
_RECURSION = 50_000


def main(control_fd: int, out_fd: int, parent: int) -> Todo | None:
    """Serves tests until the other end closes. In the process of a test: returns what is left to do there,
    so that no frame of this module stands above a stranger's.
    """
    walls.die_with_parent()
    if parent and os.getppid() != parent:
        os._exit(1)  # it died before it could take this one along
    control = socket.socket(fileno=control_fd)
    job = receive(control)
    kind = job["walls"]
    try:
        uid = walls.own_id(kind)
        walls.enclose(kind, uid, job["readable"], job["limits"]["scratch"])
        walls.adopt_orphans()
        init = 0 if kind == "bwrap" else os.fork()
        if init == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if kind == "none":
                os.chdir(job["scratch"])
                os.chown(".", uid, -1)
            walls.drop(kind, uid)
    except OSError as error:
        send(control, {"failed": str(error)})
        os._exit(1)
    if init:
        control.close()
        os.close(out_fd)
        _wait_for(init, alone=kind != "none")
    return _serve(control, out_fd, job, own=kind != "none" or uid >= walls.FIRST_ID)


def _wait_for(init: int, *, alone: bool) -> NoReturn:
    """Until init and with it all of its process namespace are gone; a SIGTERM ends them at once."""

    def end(*_: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(init, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    os.waitpid(init, 0)
    if not alone:
        walls.kill_all(alone=False)
    os._exit(0)


def _serve(control: socket.socket, out: int, job: Job, *, own: bool) -> Todo | None:
    """Init: a process a test, and nobody left after it."""
    alone = job["walls"] != "none"
    walls.adopt_orphans()
    try:
        _get_ready(job)
    except ImportError as error:
        send(control, {"failed": f"user {os.getuid()} cannot read Python's own modules: {error}"})
        os._exit(1)
    send(control, {"ready": True})
    channel: socket.socket | None = None
    while True:
        try:
            message = receive(control)
        except (EOFError, OSError):
            if not alone:
                walls.kill_all(alone=False)
            os._exit(0)
        what = message["do"]
        try:
            if what == "begin program":
                channel, theirs = socket.socketpair()
                if os.fork() == 0:
                    channel.close()
                    _leave(control, job, own, message, keep=(theirs.fileno(),))
                    return partial(_answer_calls, theirs, job["code"])
                theirs.close()
                continue
            pid = os.fork()
            if pid == 0:
                _leave(
                    control, job, own, message, keep=(out,) if channel is None else (out, channel.fileno())
                )
                if what == "stdin":
                    return partial(_run_stdin, out, job["code"])
                if what == "call":
                    return partial(_run_call, out, job["code"], message["name"], message["args"])
                assert channel is not None
                return partial(_run_program, out, channel, message)
        except OSError as error:
            send(control, {"failed": f"fork: {error}"})
            os._exit(1)
        status, used = _reap(pid)
        walls.kill_all(alone=alone)
        if channel is not None:
            channel.close()
            channel = None
        send(control, {"status": status, "cpu": used})


def _reap(pid: int) -> tuple[int, float]:
    """Waits for a process, and buries whatever else dies meanwhile. Its exit status, negative a signal."""
    while True:
        found, status, used = os.wait4(-1, 0)
        if found == pid:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def _get_ready(job: Job) -> None:
    """What every test would do again: imports."""
    sys.path[:] = [*(path for path in sys.path if path not in ("", job["here"])), *job["site"]]
    sys.set_int_max_str_digits(0)
    sys.setrecursionlimit(_RECURSION)
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # else the module site's
    for name in _MODULES:
        __import__(name)


def _leave(control: socket.socket, job: Job, own: bool, message: Job, keep: tuple[int, ...]) -> None:
    """From init's ways to a program's: its own input, no way to whoever asks, limits."""
    control.close()
    source = os.open(os.devnull, os.O_RDONLY)
    if "input" in message:
        source = os.memfd_create("stdin", 0)
        with open(source, "wb", closefd=False) as file:
            file.write(message["input"].encode(errors="surrogatepass"))
        os.lseek(source, 0, os.SEEK_SET)
    os.dup2(source, 0)
    kept = sorted({0, 1, 2, *keep})
    for low, high in zip(kept, [*kept[1:], resource.getrlimit(resource.RLIMIT_NOFILE)[0]], strict=True):
        os.closerange(low + 1, min(high, 1 << 16))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    walls.limit(job["limits"], count_processes=own)


def _namespace(name: str, *, prelude: bool = True) -> dict[str, Any]:
    """A module for a program, entered where programs look for it."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    names = module.__dict__
    names["__builtins__"] = builtins
    if prelude:
        for star in _STARS:
            found = sys.modules[star]
            public = getattr(found, "__all__", None) or [key for key in vars(found) if key[0] != "_"]
            names |= {key: getattr(found, key) for key in public if not hasattr(builtins, key)}
        names |= {key: sys.modules[key] for key in _MODULES}
    return names


def _run(code: str, names: dict[str, Any]) -> None:
    sys.argv = ["solution.py"]
    exec(compile(code, "solution.py", "exec"), names)


def _run_stdin(out: int, code: str) -> None:
    os.dup2(out, 1)
    os.close(out)
    # As files of their own: those of this interpreter were made for what it had at its start.
    read = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    write = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    vars(sys).update(stdin=read, __stdin__=read, stdout=write, __stdout__=write)
    _run(code, _namespace("__main__"))


def _run_call(out: int, code: str, name: str, args: list[str]) -> None:
    names = _namespace("solution")
    _run(code, names)
    result = _find(names, name)(*(json.loads(text) for text in args))
    data = json.dumps(_plain(result)).encode()
    while data:
        data = data[os.write(out, data) :]


def _plain(value: Any) -> Any:
    """Tuples are lists, as the tests write them; numpy's values are Python's."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def _find(names: dict[str, Any], name: str) -> Any:
    """The function, or the method of the class Solution, as LeetCode has it."""
    solution = names.get("Solution")
    if isinstance(solution, type) and hasattr(solution, name):
        return getattr(solution(), name)
    return names[name]


def _answer_calls(channel: socket.socket, code: str) -> None:
    """The stranger's side of a test program."""
    kept: list[Any] = []

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    names = _namespace("solution")
    _run(code, names)
    while True:
        call = receive(channel)
        try:
            args = unpack(call["args"], kept.__getitem__)
            value = _find(names, call["call"])(*args, **unpack(call["kwargs"], kept.__getitem__))
            answer = {"value": pack(value, keep)}
        except Exception as error:
            answer = {"raised": type(error).__name__, "said": str(error)[:1000]}
        send(channel, answer)


def _run_program(out: int, channel: socket.socket, message: Job) -> None:
    """The test program: trusted, in a process where the stranger's code never was."""
    names = _namespace("tests", prelude=False)
    if message["setup"]:
        with suppress(SyntaxError):  # half a function, for the stranger to go on with
            exec(compile(message["setup"], "setup.py", "exec"), names)
    test, entry = message["test"], message["entry_point"]
    own = {
        node.name for node in ast.walk(ast.parse(test)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    wanted = {node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    for name in wanted - own:
        if name not in names and not hasattr(builtins, name):
            names[name] = Stub(name, channel)
    if entry:
        names[entry] = Stub(entry, channel)
    exec(compile(test, "tests.py", "exec"), names)
    if entry and "check" in own:
        names["check"](names[entry])
    os.write(out, message["word"].encode())
    os._exit(0)
