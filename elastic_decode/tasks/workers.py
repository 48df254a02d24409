"""Processes that graders and reward functions run in: they can hang, crash or leak, and are killed and
replaced.

All of them are forked by one *nursery*, a process that is itself forked once, when the pool is made, and does
nothing else. Forked, so that functions need not be picklable (closures, lambdas, what a notebook defines)
and no script is run again; from a nursery, so that a worker replaced in the middle of training is a child of
a small process without threads or work, not of the trainer. CUDA in the parent is not touched: the children
inherit no thread of it, never release what the parent had (collection of inherited objects is off, and they
leave by `_exit`), and torch refuses its use in them with an error. What the parent's memory held when the
pool was made stays shared, page by page, until the parent changes it: make the pool before large CPU models
are trained, or count their size once more.

A worker leads a process group, which is killed with it: a function's own subprocesses go, too. When the
parent dies, however it dies, the nursery notices and ends them all; on Linux they go with the nursery, too.

Work whose process was killed from outside (as Linux does where memory runs out) is done once more.
"""

from __future__ import annotations

import ctypes
import gc
import os
import queue
import signal
import socket
import struct
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from elastic_decode.errors import ConfigError, RewardError

Work = Callable[[bytes], Any]  # in the worker: a payload into a picklable result; should not raise
_MESSAGE = struct.Struct("=cq")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal that a process gets when its parent dies
_SPAWN, _KILL, _QUIT = b"S", b"K", b"Q"


class WorkerTimeout(Exception):
    """The work took longer than its limit; its process has been killed."""


class WorkerDied(Exception):
    """The process ended before its work did, or was killed from outside twice. signal: what ended it, or
    0.
    """

    def __init__(self, message: str, signal: int = 0) -> None:
        super().__init__(message)
        self.signal = signal


class WorkerPool:
    """`workers` processes that do `work`, each piece for at most `timeout` seconds of wall time.

    Raises ConfigError where processes cannot be forked (Windows).
    """

    def __init__(self, work: Work, *, workers: int, timeout: float) -> None:
        self._nursery = _Nursery(work)  # before there are threads of ours
        self._timeout = timeout
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(_Worker(self._nursery))
        # A thread a worker: it waits for the answer, and for the limit, whatever the caller does meanwhile.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")
        self.closed = False

    def submit(self, payload: bytes) -> Future[Any]:
        """The result of `work(payload)`, in the future; or WorkerTimeout, or WorkerDied."""
        return self._threads.submit(self._do, payload)

    def _do(self, payload: bytes) -> Any:
        worker = self._idle.get()
        try:
            return worker.do(payload, self._timeout)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all processes now, at work or not, and wait until they are gone."""
        if self.closed:
            return
        self.closed = True
        self._nursery.close()  # workers go, so threads that wait for one wake up
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().hang_up()


class _Worker:
    """The parent's end of one worker; the process is made when there is work, and made again after it was
    killed.
    """

    def __init__(self, nursery: _Nursery) -> None:
        self._nursery = nursery
        self._pid = 0
        self._pipe: Connection | None = None

    def do(self, payload: bytes, timeout: float, *, once_more: bool = True) -> Any:
        try:
            pipe = self._connected()
            pipe.send_bytes(payload)
        except (BrokenPipeError, ConnectionResetError):
            # It died with nothing to do (killed for memory, say): no reason to give up this piece of work.
            self._kill()
            pipe = self._connected()
            pipe.send_bytes(payload)
        try:
            if not pipe.poll(timeout):
                self._kill()
                raise WorkerTimeout(f"no answer within {timeout:g} s")
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            status = self._kill()
            ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            if once_more and ended_by == signal.SIGKILL:
                return self.do(payload, timeout, once_more=False)
            raise WorkerDied(
                "its process ended: it crashed, was killed, or called os._exit", signal=ended_by
            ) from None

    def hang_up(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def _connected(self) -> Connection:
        if self._pipe is None:
            ours, theirs = socket.socketpair()
            try:
                self._pid = self._nursery.spawn(theirs.fileno())
            except BaseException:
                ours.close()
                raise
            finally:
                theirs.close()
            self._pipe = Connection(ours.detach())
        return self._pipe

    def _kill(self) -> int:
        self.hang_up()
        return self._nursery.kill(self._pid)


class _Nursery:
    """The parent's end of the nursery."""

    def __init__(self, work: Work) -> None:
        if not hasattr(os, "fork"):
            raise ConfigError("reward workers are forked, which this system cannot do; use workers=0")
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # Python 3.12 warns of threads; the child takes no lock that one of them could hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            ours.close()
            _be_nursery(theirs, work)
        theirs.close()
        self._control = ours
        self._finalizer = weakref.finalize(self, _end, ours, pid, os.getpid())

    def spawn(self, pipe: int) -> int:
        """A new worker at the other end of a socket; its process id."""
        return self._ask(_SPAWN, 0, pipe)

    def kill(self, pid: int) -> int:
        """End a worker and its process group; returns when it is gone, with its exit status as wait(2) says
        it: what ended it, if that was not this.
        """
        return self._ask(_KILL, pid)

    def close(self) -> None:
        with self._lock:
            self._finalizer()

    def _ask(self, kind: bytes, number: int, *pipes: int) -> int:
        with self._lock:
            if not self._finalizer.alive:
                raise WorkerDied("the reward workers have been closed")
            try:
                socket.send_fds(self._control, [_MESSAGE.pack(kind, number)], list(pipes))
                return int(_MESSAGE.unpack(_read(self._control))[1])
            except (OSError, struct.error) as error:
                raise RewardError(
                    "the process that reward workers come from is gone (killed for memory?); make the "
                    "reward functions' pool anew"
                ) from error


def _read(control: socket.socket) -> bytes:
    got = b""
    while len(got) < _MESSAGE.size and (more := control.recv(_MESSAGE.size - len(got))):
        got += more
    return got


def _end(control: socket.socket, pid: int, parent: int) -> None:
    if os.getpid() == parent:  # a copy of the parent forked by someone else has nothing to end
        with suppress(OSError):
            control.sendall(_MESSAGE.pack(_QUIT, 0))
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
    control.close()


def _be_nursery(control: socket.socket, work: Work) -> NoReturn:
    children: set[int] = set()
    try:
        _detach()
        while True:
            message, pipes, _, _ = socket.recv_fds(control, _MESSAGE.size, 1)
            if len(message) < _MESSAGE.size:
                break  # the parent is gone
            kind, number = _MESSAGE.unpack(message)
            if kind == _SPAWN:
                number = os.fork()
                if number == 0:
                    control.close()
                    _be_worker(pipes[0], work)
                children.add(number)
                os.close(pipes[0])
            elif kind == _KILL:
                children.discard(number)
                number = _kill_group(number)
            else:
                break
            control.sendall(_MESSAGE.pack(kind, number))
    except OSError:
        pass  # the parent went in the middle of a message
    finally:
        for child in children:
            _kill_group(child)
        os._exit(0)


def _detach() -> None:
    """Off the parent's terminal and threads: Ctrl-C is the parent's business, and what it had is not ours to
    free.
    """
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    if "torch" in sys.modules:  # OpenMP's threads did not come along; waiting for them would never end
        sys.modules["torch"].set_num_threads(1)


def _kill_group(pid: int) -> int:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come to setsid yet
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        return os.waitpid(pid, 0)[1]
    return 0


def _be_worker(handle: int, work: Work) -> NoReturn:
    try:
        os.setsid()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        pipe = Connection(handle)
        while True:
            result = work(pipe.recv_bytes())
            sys.stdout.flush()
            sys.stderr.flush()
            pipe.send(result)
    except (EOFError, OSError):
        pass  # the parent has hung up
    finally:
        os._exit(0)
