"""Compiles the CUDA sources for every target GPU without one: `make compile-check`.

Every csrc/cuda/*.cu is compiled alone, as it stands. Prints what each kernel takes of a multiprocessor and
fails on a spilled register, on a kernel without launch bounds, on any warning and, where there is a cuobjdump
(CUDA's or Triton's), on a kernel without the instructions that it is made of. Nothing is run. Where there is
no nvcc it says so and checks nothing.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TARGETS = (80, 90, 100)
FLAGS = ["-std=c++17", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Icsrc", "-Icsrc/cuda"]
ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
# A kernel's name and what its machine code must have: tensor cores, copies that nobody waits for, ldmatrix.
MADE_OF = {"attend_kernel": {"HMMA", "LDGSTS", "LDSM"}}


class Kernel(NamedTuple):
    name: str
    target: int
    registers: int
    shared: int  # bytes, static
    stack: int  # bytes a thread: arrays and arguments in local memory
    spilled: int  # bytes a thread, stores and loads


def number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def demangled(name: str) -> str:
    """namespace::kernel<arguments>, without its parameters, where there is a tool that knows."""
    tool = shutil.which("c++filt")
    if tool is None:
        return name
    full = subprocess.run([tool, name], capture_output=True, text=True).stdout.strip()
    plain = full.replace("(anonymous namespace)::", "").replace("elastic_decode::cuda::", "")
    return re.sub(r"\(.*", "", plain.replace("(bool)", "").replace("(int)", "")).removeprefix("void ")


def kernels_in(log: str) -> list[Kernel]:
    """What ptxas -v says of each kernel."""
    parts = ENTRY.split(log)[1:]
    found = []
    for name, target, text in zip(*(parts[i::3] for i in range(3)), strict=True):
        # A kernel's own figures come first; those of functions that it calls follow.
        stack, stores, loads = (
            number(rf"(\d+) bytes {what}", text) for what in ("stack frame", "spill stores", "spill loads")
        )
        registers, shared = number(r"Used (\d+) registers", text), number(r"(\d+) bytes smem", text)
        found.append(Kernel(demangled(name), int(target), registers, shared, stack, stores + loads))
    return found


def cuobjdump() -> str | None:
    """The disassembler of CUDA, or else the one that Triton ships, if there is either."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    return found


def lacking(binary: Path) -> list[str]:
    """What kernels of MADE_OF do not have, and local memory that they use."""
    tool = cuobjdump()
    if tool is None:
        return []
    sass = subprocess.run([tool, "-sass", str(binary)], capture_output=True, text=True, check=True).stdout
    wrong = []
    for target, code in zip(*[iter(re.split(r"code for sm_(\d+)", sass)[1:])] * 2, strict=True):
        for name, text in zip(*[iter(re.split(r"Function : (\w+)", code)[1:])] * 2, strict=True):
            wanted = next((made for kernel, made in MADE_OF.items() if kernel in name), None)
            if wanted is None:
                continue
            used = set(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", text, re.MULTILINE))
            wrong += [f"{demangled(name)} has no {what} on sm_{target}" for what in sorted(wanted - used)]
            wrong += [
                f"{demangled(name)} has {what} on sm_{target}" for what in sorted(used & {"LDL", "STL"})
            ]
    return wrong


def compile_one(source: Path) -> tuple[list[Kernel], list[str], float]:
    """The kernels of a source on every target, what is wrong with them, and how many seconds it took."""
    start = time.perf_counter()
    targets = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS]
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "out.fatbin"
        command = ["nvcc", *FLAGS, *targets, "-Xptxas", "-v", "-fatbin", str(source), "-o", str(binary)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        missing = lacking(binary) if done.returncode == 0 else []
    log = done.stdout + done.stderr
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        return [], [log.strip()], seconds
    kernels = kernels_in(log)
    wrong = missing + [f"{k.name} spills {k.spilled} bytes on sm_{k.target}" for k in kernels if k.spilled]
    if "__global__" in source.read_text() and {k.target for k in kernels} != set(TARGETS):
        wrong.append("it defines kernels, of which not all targets have one")
    return kernels, wrong, seconds


def without_launch_bounds(text: str) -> list[str]:
    """Kernels whose block size the compiler is not told: it must then keep registers for 1024 threads."""
    heads = re.findall(r"__global__\s+((?:[^;{(]|\((?:[^()]|\([^()]*\))*\))*)[;{]", text)
    return [head.strip() for head in heads if "__launch_bounds__" not in head]


def main() -> int:
    if shutil.which("nvcc") is None:
        print("compile-check: nvcc not found, so no CUDA source was compiled")
        return 0
    failures = 0
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    for path in sorted((ROOT / "csrc/cuda").glob("*.cu*")):
        for head in without_launch_bounds(path.read_text()):
            failures += 1
            print(f"{path.relative_to(ROOT)}: FAILED: without __launch_bounds__: {head}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(compile_one, sources)
        for source, (kernels, wrong, seconds) in zip(sources, results, strict=True):
            failures += len(wrong)
            print(f"{source.relative_to(ROOT)}: {'FAILED' if wrong else 'ok'} in {seconds:.1f} s")
            for name in dict.fromkeys(kernel.name for kernel in kernels):
                used = [k for k in kernels if k.name == name]
                registers = "/".join(str(k.registers) for k in used)
                targets = "/".join(str(k.target) for k in used)
                shared, stack = max(k.shared for k in used), max(k.stack for k in used)
                print(
                    f"  {name}: sm_{targets}: {registers} registers, {shared} bytes shared, {stack} of stack"
                )
            for each in wrong:
                print(f"  {each}")
    print(f"compile-check: {len(sources)} CUDA sources for {len(TARGETS)} targets, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
