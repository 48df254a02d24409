"""Compiles the CUDA sources for every target GPU without one: `make compile-check`.

csrc/budget.h and csrc/philox.h are one source for the CPU and the GPU, so each is compiled here inside a
small kernel that calls it; every csrc/cuda/*.cu is compiled alone, as it stands. Prints registers and spills.
Nothing is run. Where there is no nvcc it says so and checks nothing.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100")
FLAGS = ["-std=c++17", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Icsrc", "-Icsrc/cuda"]

# What a GPU kernel will call of each header: the compiler drops, unchecked, device code that nothing calls.
CALLERS = {
    "csrc/budget.h": """
__global__ void budget_row(int32_t* state, const int32_t* program, const int32_t* automata, int32_t draw,
                           int32_t* out) {
  elastic_decode::budget::Machine machine(state, program, automata);
  if (draw == -2) machine.enter_start(0);
  const elastic_decode::budget::Emitted emitted = machine.step(draw);
  out[0] = emitted.token;
  out[1] = emitted.flags;
}
""",
    "csrc/philox.h": """
__global__ void noise_row(uint32_t* words, float* noise, int64_t seed, int32_t position, int32_t vocab_size) {
  const int32_t id = blockIdx.x * blockDim.x + threadIdx.x;
  if (id >= vocab_size) return;
  words[id] = elastic_decode::philox_word(seed, 0, position, id);
  noise[id] = elastic_decode::gumbel(words[id]);
}
""",
}


def compile_one(source: Path, target: str) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.cubin"
        command = [
            "nvcc",
            *FLAGS,
            f"-arch={target}",
            "-Xptxas",
            "-v",
            "-cubin",
            str(source),
            "-o",
            str(output),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    log = done.stdout + done.stderr
    if done.returncode != 0:
        return False, log.strip()
    used = re.findall(r"Used (\d+) registers", log)
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", log))
    return (
        True,
        f"{len(used)} kernels, at most {max(map(int, used), default=0)} registers, {spilled} bytes spilled",
    )


def main() -> int:
    if shutil.which("nvcc") is None:
        print("compile-check: nvcc not found, so no CUDA source was compiled")
        return 0
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        sources = {}
        for header, caller in CALLERS.items():
            path = Path(folder) / f"{Path(header).stem}_caller.cu"
            path.write_text(f'#include "{Path(header).relative_to("csrc")}"\n{caller}')
            sources[header] = path
        sources |= {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))}
        for name, path in sources.items():
            for target in TARGETS:
                start = time.perf_counter()
                ok, report = compile_one(path, target)
                failures += not ok
                seconds = time.perf_counter() - start
                print(f"{name} {target}: {'ok' if ok else 'FAILED'} in {seconds:.1f} s, {report}")
    print(
        f"compile-check: {len(sources) * len(TARGETS) - failures} CUDA compilations passed, {failures} failed"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
