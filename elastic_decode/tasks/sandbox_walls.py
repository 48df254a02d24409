"""Walls around a stranger's program, put up from inside by the process that will run it. Linux, standard
library only: this runs in the sandbox's own interpreter.

`enclose` gives the calling process namespaces of its own (mounts, network, IPC, host name, and the
processes that it forks) and a root folder in which there are only the interpreter and the system's libraries,
read-only, a few devices and an empty /tmp in memory: no /proc, no /sys, no home, nothing of the caller's.
`drop` gives up every privilege; `limit` sets what a process may use. All raise OSError where the kernel says
no.

Kinds of walls: "root" needs CAP_SYS_ADMIN and gives the program a user id that nobody else has; "user" makes
a user namespace first and needs no privilege; "bwrap" was put up by bubblewrap before this process began;
"none" are no walls at all, only limits.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

MEMORY = "/tmp"  # in memory; an interpreter that lies below it is shown there
SCRATCH = f"{MEMORY}/scratch"  # where a program begins, empty
DEVICES = ("null", "zero", "full", "random", "urandom")
FIRST_ID = 0x70000000  # user ids from here on, one a process: their processes are counted one by one
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE, _MNT_DETACH = -100, 0x8000, 2
_SYS_MOUNT_SETATTR = 442  # on every architecture
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def enclose(kind: str, uid: int, readable: Sequence[str], scratch_bytes: int) -> None:
    """Namespaces and a root folder of its own for this process; processes it forks from now on are in a
    process namespace of their own, the first being its init. uid: see `own_id`. readable: paths that are
    there, read-only.
    """
    if kind not in ("root", "user"):
        return
    if kind == "user" and uid != os.getuid():
        _become(uid)
        _check(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")  # else its own /proc/self is closed to it
    gid = os.getgid()
    spaces = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET | (_NEWUSER if kind == "user" else 0)
    _check(_libc.unshare(spaces), "unshare")
    if kind == "user":
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            Path("/proc/self", name).write_text(line)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
    for name in ("old", "new"):
        os.mkdir(f"/tmp/{name}")
    _syscall(_SYS_PIVOT_ROOT, "pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    os.mkdir(f"/new{MEMORY}")
    options = f"mode=1777,size={scratch_bytes},nr_inodes=4096"
    _mount("tmpfs", f"/new{MEMORY}", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    os.mkdir(f"/new{SCRATCH}")
    os.chmod(f"/new{SCRATCH}", 0o1777)
    for path in readable:
        _show(path)
    os.makedirs("/new/dev")
    for name in DEVICES:
        Path("/new/dev", name).touch()
        _mount(f"/old/dev/{name}", f"/new/dev/{name}", None, _MS_BIND)
    _check(_libc.umount2(b"/old", _MNT_DETACH), "umount2")
    _set_attributes("/", _ATTR_RDONLY, 0)
    os.chroot("/new")  # and in a chroot the kernel makes no further user namespaces
    os.chdir(SCRATCH)


def _show(path: str) -> None:
    """The same path in the new root, read-only. What is not there is left out."""
    old, new = f"/old{path}", f"/new{path}"
    if os.path.islink(old):
        os.makedirs(os.path.dirname(new), exist_ok=True)
        os.symlink(os.readlink(old), new)
    elif os.path.isdir(old):
        os.makedirs(new, exist_ok=True)
        _mount(old, new, None, _MS_BIND | _MS_REC)
        _set_attributes(new, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, _AT_RECURSIVE)
    elif os.path.isfile(old):
        os.makedirs(os.path.dirname(new), exist_ok=True)
        Path(new).touch()
        _mount(old, new, None, _MS_BIND)
        _set_attributes(new, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0)


def own_id(kind: str) -> int:
    """The user id that programs of this process get: a new one where there is the privilege, else its own."""
    return FIRST_ID + os.getpid() if os.getuid() == 0 and kind != "bwrap" else os.getuid()


def _become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def drop(kind: str, uid: int) -> None:
    """No privilege any more, nor a way to get one; nobody of the same user can look into this process; it
    goes when its parent does.
    """
    if uid != os.getuid():
        _become(uid)
    if kind == "user":
        for capability in range(64):
            if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
                break
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # linux/capability.h: version 3, this process
        _syscall(_SYS_CAPSET, "capset", header, (ctypes.c_uint32 * 6)())
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")
    die_with_parent()


def die_with_parent() -> None:
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def adopt_orphans() -> None:
    """Descendants whose parent has died become children of this process."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def limit(limits: Mapping[str, Any], *, count_processes: bool) -> None:
    """Limits of this process and of those it starts, each for itself; processes are counted together."""
    cpu = max(1, int(-(-limits["cpu"] // 1)))
    wanted = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: (limits["memory"],) * 2,
        resource.RLIMIT_FSIZE: (limits["scratch"],) * 2,
        resource.RLIMIT_NOFILE: (limits["open_files"],) * 2,
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_STACK: (limits["stack"],) * 2,
    }
    if count_processes:
        wanted[resource.RLIMIT_NPROC] = (limits["processes"] + 2,) * 2  # init, and who waits for it
    for what, (soft, hard) in wanted.items():
        most = resource.getrlimit(what)[1]
        if most != resource.RLIM_INFINITY:  # a limit that is stricter already stays
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(what, (soft, hard))


def kill_all(*, alone: bool) -> None:
    """Kills every process but this one and waits for them. alone: this is the init of a process namespace, so
    they are all there are; else all descendants, found through /proc, which a program that forks all the time
    may outrun.
    """
    for _ in range(100):
        if alone:
            with suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        else:
            for step in (signal.SIGSTOP, signal.SIGKILL):
                for pid in _descendants(os.getpid()):
                    with suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, step)
        try:
            while True:
                os.waitpid(-1, 0)
        except ChildProcessError:
            if alone or not _descendants(os.getpid()):
                return


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    queue = [pid]
    while queue:
        for listing in Path(f"/proc/{queue.pop()}/task").glob("*/children"):
            with suppress(OSError):
                children = [int(child) for child in listing.read_text().split()]
                found += children
                queue += children
    return found


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind, data)]
    result = _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])
    _check(result, f"mount on {target}")


def _set_attributes(path: str, attributes: int, flags: int) -> None:
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)  # linux/mount.h: struct mount_attr
    result = _libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR), _AT_FDCWD, path.encode(), flags, wanted, ctypes.c_size_t(32)
    )
    _check(result, f"mount_setattr of {path}")


def _syscall(numbers: Mapping[str, int], name: str, *arguments: Any) -> None:
    machine = os.uname().machine
    if machine not in numbers:
        raise OSError(0, f"{name} has no known number on {machine}")
    _check(_libc.syscall(ctypes.c_long(numbers[machine]), *arguments), name)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
