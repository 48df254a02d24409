"""What follows the logits in a decode step: a token drawn for every row, the budget machine, the output ring.

`draw` is `sample` and `budget_step` as one op, so that a GPU does both in two launches and a captured step
needs nothing from the host.
"""

from typing import NamedTuple

import torch

from ..budget import check_machine, check_ring
from ..registry import default_backend, implementation
from ..sample import SamplingTable
from ..sample import check as check_sampling

__all__ = ["Machine", "Ring", "draw", "make_ring"]


class Machine(NamedTuple):
    """The budget machine's tables (kernels/budget/layout.py); S slots."""

    state: torch.Tensor  # int32 [S, STATE_WORDS]; changed in place
    programs: torch.Tensor  # int32 [S, PROGRAM_WORDS]
    automata: torch.Tensor  # int32 [any]


class Ring(NamedTuple):
    """Where steps leave what they emitted: a row a step, L of them in turn; a column a row of the batch."""

    tokens: torch.Tensor  # int32 [L, C]
    flags: torch.Tensor  # int32 [L, C]: layout.Flag bits
    logprobs: torch.Tensor  # float32 [L, C]
    sampling_logprobs: torch.Tensor  # float32 [L, C]
    # int32 [1]: the row last written; -1 before the first. (The tuple's method of this name is not missed.)
    index: torch.Tensor  # type: ignore[assignment]


def make_ring(length: int, width: int, device: torch.device | str = "cpu") -> Ring:
    """A ring of zeros, before its first step."""

    def zeros(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros((length, width), dtype=dtype, device=device)

    index = torch.full((1,), -1, dtype=torch.int32, device=device)
    return Ring(zeros(torch.int32), zeros(torch.int32), zeros(torch.float32), zeros(torch.float32), index)


def draw(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    machine: Machine,
    ring: Ring,
    *,
    backend: str = "auto",
) -> None:
    """One decode step of R rows from their logits: changes `machine.state`, `ring`, `table.output_counts`.

    logits float32 [R, V]; slots int32 [R]: each row's slot in `table` and `machine`, no slot twice, -1 for an
    idle row; positions int32 [R]: the position in prompt + output that the drawn token will have.

    1. `ring.index` becomes (index + 1) % L; L >= 1, C >= R.
    2. A token is drawn for every row that runs, as by `sample`.
    3. The machine is stepped with it, as by `budget_step`, which writes columns 0 … R-1 of ring row `index`.
    4. Where `table.output_counts` is given, [slot, token] is counted for each token emitted, the forced
       included; forced ids >= V are not.

    A row with slot -1, or whose slot's State.FINISH is not RUNNING, gets flags 0 and nothing else.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device, stride or backend name, and
    RuntimeError where the backend cannot run here.
    """
    check(logits, slots, positions, table, machine, ring)
    name = default_backend(logits.device.type) if backend == "auto" else backend
    if torch.compiler.is_compiling():
        torch.ops.elastic_decode.draw(logits, slots, positions, *table, *machine, *ring, name)
    else:
        implementation("draw", name)(logits, slots, positions, table, machine, ring)


def check(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    machine: Machine,
    ring: Ring,
) -> None:
    """Raises for shapes, dtypes or devices that break the contract of `draw`."""
    check_sampling(logits, slots, positions, table)
    check_machine(*machine)
    if machine.state.device != logits.device:
        raise ValueError(f"state is on {machine.state.device}, expected {logits.device}")
    if machine.state.shape[0] != table.temperature.shape[0]:
        raise ValueError(
            f"machine has {machine.state.shape[0]} slots, table has {table.temperature.shape[0]}"
        )
    check_ring(*ring, rows=logits.shape[0], device=logits.device)


_MUTATED = (
    "output_counts",
    "state",
    "ring_tokens",
    "ring_flags",
    "ring_logprobs",
    "ring_sampling_logprobs",
    "ring_index",
)


@torch.library.custom_op("elastic_decode::draw", mutates_args=_MUTATED)
def _draw_op(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    sample_index: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    ban_until: torch.Tensor,
    ban_ids: torch.Tensor,
    bias_ids: torch.Tensor,
    bias_values: torch.Tensor,
    output_counts: torch.Tensor | None,
    prompt_mask: torch.Tensor | None,
    state: torch.Tensor,
    programs: torch.Tensor,
    automata: torch.Tensor,
    ring_tokens: torch.Tensor,
    ring_flags: torch.Tensor,
    ring_logprobs: torch.Tensor,
    ring_sampling_logprobs: torch.Tensor,
    ring_index: torch.Tensor,
    backend: str,
) -> None:
    table = SamplingTable(
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        sample_index,
        repetition,
        presence,
        frequency,
        ban_until,
        ban_ids,
        bias_ids,
        bias_values,
        output_counts,
        prompt_mask,
    )
    ring = Ring(ring_tokens, ring_flags, ring_logprobs, ring_sampling_logprobs, ring_index)
    machine = Machine(state, programs, automata)
    implementation("draw", backend)(logits, slots, positions, table, machine, ring)


@_draw_op.register_fake
def _(*arguments: object) -> None:
    """Nothing to allocate: every result is written in place."""
