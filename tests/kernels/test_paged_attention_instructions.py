"""Tiles of decode, of prefill and of shared prefixes are compiled to one tensor core instruction: what the
equality of their bits rests on, as far as a compiler can say. Needs no GPU."""

import os
import re

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter takes the compiler's place", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from elastic_decode.kernels.paged_attention.triton_cases import compile_cases  # noqa: E402

PRODUCT = re.compile(r"((?:wgmma\.mma|mma\.|tcgen05\.mma|wmma\.)\S*)")


# sm_90 and sm_100 have wider instructions, which tiles of 16 and of 32 rows must not get.
@pytest.mark.parametrize("arch", [90, 100])
def test_one_instruction_for_tiles_of_any_height(arch: int) -> None:
    found = {}
    for name, kernel, signature, constants, options in compile_cases():
        variant, dtypes, shape = name.removesuffix(f" on sm_{arch}").split(" ", 2)
        if (variant, dtypes, shape) not in [
            (v, "bf16-bf16", "12/2x128") for v in ("walk", "shared", "prefill")
        ]:
            continue
        types, hints = {}, {}
        for place, argument in enumerate(kernel.arg_names):
            types[argument] = signature.get(argument, "constexpr")
            if types[argument].startswith("*"):
                hints[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=hints)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        found[variant, constants["BLOCK_M"]] = set(PRODUCT.findall(compiled.asm["ptx"]))
    assert set(found) == {("walk", 16), ("shared", 32), ("prefill", 32)}
    one = {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"}
    assert all(instructions == one for instructions in found.values()), found
