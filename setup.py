"""Builds the C++ extension only (metadata is in pyproject.toml); CUDA joins it when csrc/cuda has kernels."""

import glob
import os
import sys

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

openmp = [] if sys.platform == "darwin" else ["-fopenmp"]

extension = Pybind11Extension(
    "elastic_decode.kernels._C",
    sorted(["csrc/bindings.cpp", *glob.glob("csrc/cpu/*.cpp")]),
    include_dirs=["csrc"],
    depends=glob.glob("csrc/**/*.h", recursive=True),
    cxx_std=17,
    # -fno-math-errno and friends are safe; -ffast-math is not: sampling relies on inf and NaN.
    extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall", *openmp],
    extra_link_args=openmp,
)


def is_stale(obj: str, source: str) -> bool:
    inputs = [source, __file__, *glob.glob("csrc/**/*.h", recursive=True)]
    return os.path.getmtime(obj) < max(os.path.getmtime(path) for path in inputs)


# A compiler a core, or MAX_JOBS of them; an object newer than its source and every header is kept.
ParallelCompile("MAX_JOBS", needs_recompile=is_stale).install()
setup(ext_modules=[extension], cmdclass={"build_ext": build_ext})
