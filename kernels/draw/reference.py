"""`draw` as its parts, one after the other."""

import torch

from ..budget import reference as budget
from ..budget.layout import Finish, Flag, State
from ..sample import SamplingTable
from ..sample import reference as sampling
from . import Machine, Ring


def draw(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    machine: Machine,
    ring: Ring,
) -> None:
    """See `kernels.draw.draw`; unchecked."""
    at = (int(ring.index) + 1) % len(ring.tokens)
    ring.index.fill_(at)
    runs = (slots >= 0) & (machine.state[slots.clamp(min=0).long(), State.FINISH] == Finish.RUNNING)
    running = torch.where(runs, slots, -1)
    sampled = sampling.sample(logits, running, positions, table)
    budget.budget_step(
        *machine, running, sampled.token, logits, sampled.lse, sampled.sampling_logprob, table.temperature,
        *ring,
    )  # fmt: skip
    if table.output_counts is None:
        return
    entries = zip(running.tolist(), ring.tokens[at].tolist(), ring.flags[at].tolist(), strict=False)
    for slot, token, flags in entries:
        if flags & Flag.VALID and 0 <= token < logits.shape[1]:
            table.output_counts[slot, token] += 1
