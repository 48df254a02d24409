"""All tiles of the Triton linear are compiled to one kind of tensor core instruction: what its batch
invariance rests on, as far as a compiler can say. Needs no GPU."""

import os
import re

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter takes the compiler's place", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from elastic_decode.kernels.linear.triton import TILES, compile_cases, plan  # noqa: E402

# The tensor core's own name, and what may differ: the width of the side of the tokens.
KINDS = {
    80: r"mma\.sync\.aligned\.m16n8k16\S*",
    90: r"wgmma\.mma_async\S*m64n\d+k16\S*",
    100: r"tcgen05\.mma\S*",
}
ANY = re.compile(r"^\s*(?:@\S+ )?((?:wgmma\.mma|mma\.|tcgen05\.mma|wmma\.|fma\.rn)\S*)", re.MULTILINE)


@pytest.mark.parametrize("arch", TILES)
def test_one_kind_of_instruction_for_any_batch(arch: int) -> None:
    seen = set()
    for name, kernel, signature, constants, options in compile_cases():
        if not name.endswith(f"on sm_{arch}") or "bf16" not in name or "dependent" in name:
            continue
        tile = (constants["BLOCK_N"], constants["BLOCK_T"])
        if tile in seen:
            continue
        types, hints = {}, {}
        for place, argument in enumerate(kernel.arg_names):
            types[argument], _, divisor = signature.get(argument, "constexpr").partition(":")
            if divisor or types[argument].startswith("*"):
                hints[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=hints)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        ptx = compiled.asm["ptx"]
        found = set(ANY.findall(ptx))
        assert found, name
        assert all(re.fullmatch(KINDS[arch], one) for one in found), (name, found)
        seen.add(tile)
        if constants["SPREAD"]:
            # Every thread has stored its sums when one counts the program in; none reads before that.
            before, _, after = ptx.partition("atom.global.gpu.acq_rel.add")
            assert "bar.sync" in before[before.rindex("st.global") :], name
            assert "bar.sync" in after[: after.index("ld.global.cg")], name
            assert "atom." not in after
    tokens = (1, 17, 65, 256, 257, 2048)
    tiles = [plan(n, rows, 1536, torch.bfloat16, arch).tile for n in tokens for rows in (1536, 17920)]
    assert seen == {tile[:2] for tile in tiles}
