"""Compiles every Triton kernel for sm_80, sm_90 and sm_100, without a GPU: `make compile-check`.

Prints a table of registers a thread, shared memory and spilled bytes. Exits with 1 where a kernel does not
compile, needs more shared memory than the GPU gives a block, or spills registers in decode. Nothing is run.

    python benchmarks/compile_triton.py [--ops paged_attention …] [--arch 80 90 100] [--only TEXT] [--jobs N]

An op takes part by offering, in kernels/<op>/triton.py,

    def compile_cases() -> Iterator[tuple[str, JITFunction, dict[str, str], dict[str, Any], dict[str, Any]]]

which yields (name, kernel, signature, constexprs, options) for each variant worth compiling:
    name        unique within the op. A name with "prefill" in it may spill; all others run in decode and
                may not. A name that ends in " on sm_90" is compiled for that one
    kernel      the function under @triton.jit
    signature   {argument: type} for every argument that is no constexpr, in any order: "*bf16" (a pointer),
                "i32", "fp32". Pointers count as divisible by 16, as torch allocates them; ":16" after an
                integer's type says the same of it. Triton takes both from the arguments when it runs
    constexprs  {argument: value} for the others
    options     num_warps, num_stages, … as at launch; enable_fp_fusion too: its default changes in 3.10
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from elastic_decode.kernels import registry

# Bytes of shared memory that a block may have, by compute capability.
SHARED_LIMITS = {80: 166_912, 90: 232_448, 100: 232_448}


class Row(NamedTuple):
    op: str
    name: str
    arch: int
    registers: int = 0
    shared: int = 0
    spilled: int = 0
    error: str = ""

    @property
    def fault(self) -> str:
        """Why the check fails, or nothing."""
        if self.error:
            return self.error
        if self.shared > SHARED_LIMITS[self.arch]:
            return (
                f"needs {self.shared} bytes of shared memory, sm_{self.arch} has {SHARED_LIMITS[self.arch]}"
            )
        if self.spilled and "prefill" not in self.name:
            return f"spills {self.spilled} bytes in decode"
        return ""


def cases(op: str) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """The op's compile_cases; none where it has no Triton implementation. One that does not import raises."""
    package = f"elastic_decode.kernels.{op}"
    if importlib.util.find_spec(package) and importlib.util.find_spec(f"{package}.triton"):
        yield from importlib.import_module(f"{package}.triton").compile_cases()


def compile_case(op: str, index: int, arch: int) -> Row:
    """Case `index` of the op for one GPU. Takes an index because kernels do not travel between processes."""
    name, kernel, signature, constexprs, options = list(cases(op))[index]
    known = set(signature) | set(constexprs)
    if known != set(kernel.arg_names):
        wrong = sorted(known ^ set(kernel.arg_names))
        return Row(
            op, name, arch, error=f"signature and constexprs do not match the kernel's arguments: {wrong}"
        )
    types, hints = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        kind, _, divisor = signature.get(argument, "constexpr").partition(":")
        types[argument] = kind
        if divisor == "16" or kind.startswith("*"):
            hints[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=types, constexprs=constexprs, attrs=hints)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # whatever the compiler raises is the finding
        text = str(error).strip().splitlines()
        return Row(op, name, arch, error=f"{type(error).__name__}: {text[-1] if text else ''}")
    registers, spilled = usage(compiled.asm["cubin"])
    return Row(op, name, arch, registers, compiled.metadata.shared, spilled)


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory (where spills go), as cuobjdump reads them off a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--ops", nargs="+", choices=registry.OPS, default=registry.OPS)
    parser.add_argument("--arch", nargs="+", type=int, choices=SHARED_LIMITS, default=list(SHARED_LIMITS))
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("unset TRITON_INTERPRET: the interpreter takes the compiler's place")

    work = [
        (op, index, arch)
        for op in arguments.ops
        for index, case in enumerate(cases(op))
        if arguments.only in case[0]
        for arch in arguments.arch
        if " on sm_" not in case[0] or case[0].endswith(f" on sm_{arch}")
    ]
    print(f"{'op':16} {'kernel':44} {'arch':7} {'registers':>9} {'shared':>7} {'spilled':>7}")
    faults = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(compile_case, *zip(*work, strict=True)) if work else ():
            figures = "-" if row.error else f"{row.registers:9} {row.shared:7} {row.spilled:7}"
            print(f"{row.op:16} {row.name:44} sm_{row.arch:<4} {figures}", flush=True)
            if row.fault:
                faults.append(f"{row.op} {row.name} sm_{row.arch}: {row.fault}")
    print(f"{len(work)} compiled, {len(faults)} at fault")
    for fault in faults:
        print(f"  {fault}")
    return 1 if faults or not work else 0


if __name__ == "__main__":
    sys.exit(main())
