"""Builds the extension only (metadata is in pyproject.toml): C++, and CUDA where ELASTIC_DECODE_CUDA=1.

CUDA needs nvcc, not a GPU. ELASTIC_DECODE_CUDA_ARCHS names the architectures, "80 90 100" unless set; PTX of
the last serves newer ones. The CUDA runtime is linked statically, so the extension loads without one, too.
"""

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError

openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
sources = ["csrc/bindings.cpp", *glob.glob("csrc/cpu/*.cpp")]
macros: list[tuple[str, str | None]] = []
link = [*openmp]
nvcc: list[str] = []

if os.environ.get("ELASTIC_DECODE_CUDA") == "1":
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if found is None:
        sys.exit("ELASTIC_DECODE_CUDA=1 needs nvcc, which is neither on the PATH nor in $CUDA_HOME/bin")
    archs = os.environ.get("ELASTIC_DECODE_CUDA_ARCHS", "80 90 100").split()
    # No fast-math: sampling relies on inf, NaN and correctly rounded division.
    nvcc = [found, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    nvcc += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    nvcc += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
    # nvcc knows where its libraries are. Their symbols stay inside, apart from another CUDA runtime's.
    said = subprocess.run(
        [found, "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null"], capture_output=True, text=True
    ).stderr
    folders = re.search(r"LIBRARIES=(.*)", said)
    link += shlex.split(folders[1]) if folders else []
    link += ["-lcudart_static", "-lrt", "-lpthread", "-ldl", "-Wl,--exclude-libs,ALL"]
    sources += ["csrc/cuda/bindings.cpp", *glob.glob("csrc/cuda/*.cu")]
    macros = [("ELASTIC_DECODE_CUDA", "1")]

extension = Pybind11Extension(
    "elastic_decode.kernels._C",
    sorted(sources),
    include_dirs=["csrc", "csrc/cuda"],
    define_macros=macros,
    depends=glob.glob("csrc/**/*.*h", recursive=True),
    cxx_std=17,
    # -fno-math-errno and friends are safe; -ffast-math is not: sampling relies on inf and NaN.
    extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", *openmp],
    extra_link_args=link,
)


class Build(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # link anew (is_stale judges the objects): the file may be of a build without CUDA
        if nvcc:  # bindings.cpp comes to another object with CUDA than without
            self.build_temp += "-cuda"

    def build_extensions(self) -> None:
        self.compiler.src_extensions.append(".cu")
        compile_cpp = self.compiler._compile

        def compile_one(obj: str, src: str, ext: str, cc_args: list, postargs: list, pp_opts: list) -> None:
            if ext == ".cu":
                includes = [option for option in pp_opts if option.startswith("-Icsrc")]
                if subprocess.run([*nvcc, *includes, "-c", src, "-o", obj]).returncode:
                    raise CompileError(f"nvcc refused {src}")
            else:
                compile_cpp(obj, src, ext, cc_args, postargs, pp_opts)

        self.compiler._compile = compile_one
        super().build_extensions()


def is_stale(obj: str, source: str) -> bool:
    inputs = [source, __file__, *glob.glob("csrc/**/*.*h", recursive=True)]
    return os.path.getmtime(obj) < max(os.path.getmtime(path) for path in inputs)


# A compiler a core, or MAX_JOBS of them; an object newer than its source and every header is kept.
ParallelCompile("MAX_JOBS", needs_recompile=is_stale).install()
setup(ext_modules=[extension], cmdclass={"build_ext": Build})
