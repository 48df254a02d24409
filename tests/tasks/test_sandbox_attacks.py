"""What a hostile program can try: each is graded 0, and afterwards nothing of it is left."""

import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_decode.errors import ConfigError
from elastic_decode.tasks import sandbox as sandbox_module
from elastic_decode.tasks.code import Case, Cases, TestProgram
from elastic_decode.tasks.code_grader import judge
from elastic_decode.tasks.sandbox import Limits, Sandbox, SandboxFailure, Walls, find_walls
from elastic_decode.tasks.sandbox_walls import SCRATCH

SECRET = "the expected output 8c1f"
QUICK = Limits(cpu=1, wall=0.8, memory=2**29, output=2**20, scratch=2**22)
PATIENT = Limits(cpu=10, wall=20)


@pytest.fixture
def readable_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An interpreter that another user can run: this one may lie in root's home."""
    system = Path("/usr/bin/python3")
    if os.getuid() == 0:
        if not system.exists():
            pytest.skip("needs a Python that other users can read")
        monkeypatch.setattr(sys, "executable", str(system))
        monkeypatch.setattr(sys, "path", [])
        monkeypatch.setattr(sys, "base_prefix", "/usr")
    sandbox_module.readable.cache_clear()
    sandbox_module._site.cache_clear()
    yield
    sandbox_module.readable.cache_clear()
    sandbox_module._site.cache_clear()


@pytest.fixture(params=["root", "user"])
def walls(request: pytest.FixtureRequest) -> Walls:
    kind: Walls = request.param
    if kind == "root" and find_walls() != "root":
        pytest.skip("needs root")
    if kind == "user":
        request.getfixturevalue("readable_python")
    return kind


def below(pid: int) -> set[int]:
    children: set[int] = set()
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in listing.read_text().split():
            children |= {int(child), *below(int(child))}
    return children


def strangers() -> set[int]:
    """Processes of sandboxes of this test, wherever they have gone."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if MARK in (folder / "environ").read_bytes():
                found.add(int(folder.name))
        except OSError:
            continue
    return found


MARK = f"MARK=sandbox-of-{os.getpid()}".encode()


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch, isolation: str) -> Iterator[None]:
    assert isolation in ("root", "user", "bwrap")
    monkeypatch.setitem(sandbox_module._ENVIRONMENT, "MARK", MARK.decode().partition("=")[2])
    children, fds = below(os.getpid()), set(os.listdir("/proc/self/fd"))
    yield
    assert below(os.getpid()) <= children
    assert not strangers()
    assert len(set(os.listdir("/proc/self/fd"))) <= len(fds)


ATTACKS = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "endless loop": "while True: pass",
    "sleep forever": "import time\ntime.sleep(1e9)",
    "10 GB": "x = bytearray(10 * 2**30)\nprint(SECRET)",
    "infinite output": "import sys\nwhile True: sys.stdout.write('x' * 65536)",
    "huge file": "f = open('x', 'wb')\nwhile True: f.write(b'x' * 2**20); f.flush()",
    "exit before": "import sys\nsys.exit(0)",
    "right answer, then hangs": "print(input(), flush=True)\nimport time\ntime.sleep(1e9)",
    "right answer, then fails": "print(input(), flush=True)\nraise SystemExit(3)",
    "ignores signals": (
        "import signal\nfor n in range(1, 64):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    ),
    "segfault": "import ctypes\nctypes.string_at(0)",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: sorted([1], key=lambda _: f())\nf()",
    "kills its parents": "import os\nos.kill(os.getppid(), 9)\nos.kill(1, 9)\nos.kill(-1, 9)",
    "threads": (
        "import threading, time\nwhile True:\n"
        "    try: threading.Thread(target=time.sleep, args=(1e9,)).start()\n    except RuntimeError: pass"
    ),
    "zombies": (
        "import os, time\nend = time.time() + 1\nwhile time.time() < end:\n"
        "    try: os.fork() or os._exit(0)\n    except OSError: break\ntime.sleep(1e9)"
    ),
    "file descriptors": "import os\nkept = []\nwhile True: kept.append(os.dup(0))",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_graded_wrong(name: str) -> None:
    graded_wrong(name, find_walls())


@pytest.mark.usefixtures("readable_python")
@pytest.mark.parametrize("name", ["fork bomb", "kills its parents"])  # the limits are the same
def test_an_attack_is_graded_wrong_without_privilege(name: str) -> None:
    graded_wrong(name, "user")


def graded_wrong(name: str, walls: Walls) -> None:
    tests = Cases((Case(SECRET, SECRET),))
    code = ATTACKS[name].replace("SECRET", repr(SECRET))
    started = time.monotonic()
    assert judge(code, tests, walls, QUICK).score == 0.0
    assert time.monotonic() - started < 30
    assert not strangers()


def told(code: str, walls: Walls, text: str = "") -> str:
    with Sandbox(textwrap.dedent(code), walls, PATIENT) as box:
        outcome = box.run(text)
    assert outcome.end == "ok", outcome
    return outcome.output.decode().strip()


def test_nothing_of_the_host_is_there(walls: Walls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, /proc, the environment, other processes, the network, privileges."""
    monkeypatch.setenv("EXPECTED", SECRET)
    (tmp_path / "expected.txt").write_text(SECRET)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        code = f"""
        import os, socket
        def can(what):
            try: what()
            except OSError: return False
            return True
        def connect():
            with socket.socket() as s:
                s.settimeout(1)
                s.connect(("127.0.0.1", {server.getsockname()[1]}))
        import ctypes
        libc = ctypes.CDLL(None)
        print([
            can(lambda: open({str(tmp_path / "expected.txt")!r})),
            can(lambda: os.listdir("/proc")),
            can(lambda: os.listdir({str(Path(__file__).parent)!r})),
            can(connect),
            can(lambda: open("/usr/x", "w")),
            can(lambda: open("/x", "w")),
            can(lambda: os.mkdir("/dev/shm")),
            can(lambda: os.unlink(os.__file__)),
            can(lambda: os.setuid(0)) and os.getuid() != os.getuid(),
            libc.ptrace(16, 1, 0, 0) == 0,
            libc.unshare(0x10000000) == 0,
            libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0,
            len(os.listdir("/dev/fd")) > 0 if os.path.exists("/dev/fd") else False,
            any(can(lambda: os.fstat(fd)) for fd in range(3, 256)),
        ], dict(os.environ), os.getppid(), os.listdir("."))
        """
        said = told(code, walls)
    assert said.startswith(str([False] * 14)), said
    assert SECRET not in said
    assert "EXPECTED" not in said
    assert said.endswith(" 1 []"), said


def test_the_scratch_folder_can_be_written_and_is_gone_afterwards(walls: Walls) -> None:
    before = set(os.listdir("/tmp"))
    code = """
    import os, tempfile
    open("mine", "w").write("x" * 1000)
    with tempfile.TemporaryFile() as f: f.write(b"y")
    for name in os.listdir("."): os.unlink(name)
    open("a", "w").write("1")
    print(open("a").read(), os.getcwd())
    """
    assert told(code, walls) == f"1 {SCRATCH}"
    assert told("import os\nprint(os.listdir('.'))", walls) == "[]"
    assert not {name for name in set(os.listdir("/tmp")) - before if name.startswith("elastic-decode-")}


def test_grandchildren_do_not_outlive_a_test(walls: Walls) -> None:
    """A daemon, in its own session, its parent gone; the next test and the caller see nothing of it."""
    code = """
    import os, sys, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            open("daemon", "w").write("here")
            while True:
                time.sleep(0.01)
                os.write(1, b"")
        os._exit(0)
    while not os.path.exists("daemon"): time.sleep(0.01)
    os.unlink("daemon")
    print(input())
    """
    with Sandbox(textwrap.dedent(code), walls, PATIENT) as box:
        assert box.run("one").output == b"one\n"
        assert box.run("two").output == b"two\n"
        assert len(strangers()) <= 2  # init, and who waits for it


def test_a_process_limit_counts_this_sandbox_alone(walls: Walls) -> None:
    code = """
    import os, time
    made = 0
    try:
        while made < 100:
            if os.fork() == 0: time.sleep(100)
            made += 1
    except OSError: pass
    print(made)
    """
    assert 8 <= int(told(code, walls)) <= 20


HUMANEVAL = TestProgram(
    "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(7331) == 14662\n",
    "def double(n):\n    '''Twice n.'''\n",
    "double",
)
CHEATS = {
    "exit": "import sys\nsys.exit(0)",
    "_exit": "import os\nos._exit(0)",
    "exit in the call": "def double(n):\n    import os\n    os._exit(0)",
    "system exit in the call": "def double(n): raise SystemExit(0)",
    "always equal": (
        "class E(int):\n    def __eq__(self, other): return True\n    __ne__ = lambda s, o: False\n"
        "    def __hash__(self): return 0\ndef double(n): return E(0)"
    ),
    "equal list": "class L(list):\n    def __eq__(s, o): return True\ndef double(n): return L()",
    "object": "class O:\n    def __eq__(s, o): return True\ndef double(n): return O()",
    "replaces check": (
        "import builtins, sys\ndef check(candidate): pass\n"
        "for m in list(sys.modules.values()):\n    try: m.check = check\n    except Exception: pass\n"
        "def double(n):\n    for m in list(sys.modules.values()):\n        m.__dict__['check'] = check\n"
        "    return 0"
    ),
    "assertions off": "import builtins\nbuiltins.AssertionError = ValueError\ndef double(n): return 0",
    "builtins": (
        "import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.all = lambda *a: True\ndouble = len"
    ),
    "frames": (
        "import sys, gc, os\ndef double(n):\n    f = sys._getframe()\n    while f:\n"
        "        for v in list(f.f_locals.values()) + list(f.f_globals.values()):\n"
        "            if isinstance(v, dict) and 'word' in v: os.write(1, v['word'].encode())\n"
        "        f = f.f_back\n"
        "    for o in gc.get_objects():\n        if isinstance(o, dict) and 'word' in o:\n"
        "            for fd in range(64):\n                try: os.write(fd, o['word'].encode())\n"
        "                except OSError: pass\n    os._exit(0)"
    ),
    "ptrace": (
        "import ctypes, os, signal\nc = ctypes.CDLL(None)\ndef double(n):\n    for pid in range(1, 50):\n"
        "        if c.ptrace(16, pid, 0, 0) == 0: return 2 * n\n    return 0"
    ),
    "kills the checker": "import os\ndef double(n):\n    for p in range(1, 99):\n"
    "        if p != os.getpid():\n            try: os.kill(p, 9)\n            except OSError: pass\n"
    "    return 0",
    "raises quietly": "def double(n): raise StopIteration",
    "junk on every descriptor": (
        "import os\ndef double(n):\n    for fd in range(64):\n"
        "        try: os.write(fd, b'{\"value\": true}' * 9)\n"
        "        except OSError: pass\n    return 0"
    ),
    "deep": "def double(n):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_test_program_cannot_be_cheated(name: str) -> None:
    assert judge(CHEATS[name], HUMANEVAL, find_walls(), QUICK).score == 0.0


def test_a_test_program_passes_what_is_right() -> None:
    assert judge("def double(n): return 2 * n", HUMANEVAL, find_walls(), PATIENT).score == 1.0
    assert judge("    return n + n", HUMANEVAL, find_walls(), PATIENT).score == 1.0  # goes on with the prompt


def test_the_program_never_holds_the_tests() -> None:
    """Neither of a test program nor its word, wherever it looks: the memory of its process is searched."""
    code = """
    import ctypes, gc
    def double(n):
        found = [o for o in gc.get_objects() if isinstance(o, dict) and ("word" in o or "test" in o)]
        secret = "".join(["14", "662"])
        strings = [s for o in gc.get_objects() if isinstance(o, (dict, list, tuple))
                   for s in (o.values() if isinstance(o, dict) else o) if isinstance(s, str) and secret in s]
        return 2 * n if not found and not strings else 0
    """
    assert judge(textwrap.dedent(code), HUMANEVAL, find_walls(), PATIENT).score == 1.0


def test_a_caller_that_is_killed_takes_everything_along(tmp_path: Path) -> None:
    script = (
        "from elastic_decode.tasks.sandbox import *\n"
        "with Sandbox('import time\\ntime.sleep(1e9)', find_walls(), Limits(wall=1e6)) as box:\n"
        "    print('ready', flush=True)\n    box.run('')\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        assert caller.stdout.readline() == "ready\n"
        family = below(caller.pid)
        assert len(family) >= 2
        caller.kill()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in family) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in family)


def test_where_no_process_can_be_had_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    walls = find_walls()
    monkeypatch.setattr(sandbox_module.subprocess, "Popen", refuse)
    with pytest.raises(SandboxFailure, match="no process"):
        Sandbox("print(1)", walls)


def test_without_walls_it_refuses_and_says_what_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise SandboxFailure("unshare: Operation not permitted")

    monkeypatch.setattr(sandbox_module, "Sandbox", refuse)
    find_walls.cache_clear()
    try:
        with pytest.raises(
            ConfigError, match=r"unshare: Operation not permitted.*network can be reached.*allow_un"
        ):
            find_walls()
    finally:
        find_walls.cache_clear()


@pytest.mark.usefixtures("readable_python")
@pytest.mark.parametrize(
    "name", ["fork bomb", "sleep forever", "10 GB", "infinite output", "kills its parents"]
)
def test_without_walls_limits_hold(name: str) -> None:
    before = set(os.listdir("/tmp"))
    tests = Cases((Case(SECRET, SECRET),))
    if os.getuid() != 0 and name in ("fork bomb", "kills its parents"):
        pytest.skip("not without walls")
    assert judge(ATTACKS[name].replace("SECRET", repr(SECRET)), tests, "none", QUICK).score == 0.0
    assert judge("print(input())", tests, "none", PATIENT).score == 1.0
    assert not {name for name in set(os.listdir("/tmp")) - before if name.startswith("elastic-decode-")}


@pytest.mark.skipif(
    os.getuid() == 0 or shutil.which("bwrap") is None, reason="needs bubblewrap and a user who is not root"
)
@pytest.mark.parametrize("name", ["fork bomb", "sleep forever", "10 GB", "kills its parents"])
def test_bubblewrap_holds(name: str) -> None:
    graded_wrong(name, "bwrap")
    assert judge("print(input())", Cases((Case("a", "a"),)), "bwrap", PATIENT).score == 1.0
