"""FlashInfer's top-k/top-p sampling behind the arguments of `sample`: for comparison in benchmarks only.

It is not `sample`: it draws from its own random stream, it knows no penalties, bias, bans or min-p, and it
gives no log-probability of the draw. No engine is ever given it (registry.COMPARISON_ONLY). It has never run
on a GPU here.
"""

import importlib

import torch

from ..flashinfer_support import why_no_flashinfer
from . import Sampled, SamplingTable, empty

CAPABILITIES = (8, 9, 10, 12)


def why_unavailable() -> str | None:
    return why_no_flashinfer(CAPABILITIES)


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    *,
    out: Sampled | None = None,
) -> Sampled:
    """Tokens by `top_k_top_p_sampling_from_logits`, one for a seed and position; sampling_logprob is NaN.

    Raises ValueError where the table has penalties, bias or bans; min_p is not looked at.
    """
    if table.output_counts is not None or table.ban_ids.shape[1] or table.bias_ids.shape[1]:
        raise ValueError("FlashInfer samples without penalties, bias and bans; give a table without them")
    out = empty(logits) if out is None else out
    rows = slots.clamp(min=0).long()
    temperature = table.temperature[rows]
    greedy = temperature <= 0
    scaled = logits / torch.where(greedy, 1.0, temperature)[:, None]
    vocab = logits.shape[1]
    top_k = table.top_k[rows]
    top_k = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab)
    sampling = importlib.import_module("flashinfer.sampling")
    tokens = sampling.top_k_top_p_sampling_from_logits(
        scaled,
        top_k=torch.where(greedy, 1, top_k).to(torch.int32),
        top_p=table.top_p[rows].clamp(max=1.0),
        filter_apply_order="top_k_first",
        deterministic=True,
        seed=table.seed[rows],
        offset=positions.long(),
    )
    idle = slots < 0
    out.token.copy_(tokens.masked_fill(idle, -1))
    out.lse.copy_(torch.logsumexp(scaled, dim=1).masked_fill(idle, 0.0))
    out.sampling_logprob.fill_(torch.nan)
    return out
