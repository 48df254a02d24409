"""The definition of `sample` in slow, obvious PyTorch: a Python loop over rows.

Noise and steps 1 and 2 are in float32, as in every backend; what follows is in float64.
"""

import math
from typing import Any

import torch

from . import Sampled, SamplingTable, empty

_LOW = 0xFFFFFFFF


def philox(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Philox 4x32-10 (Salmon et al., SC 2011) on 32-bit words held in int64.

    counter [..., 4] and key [..., 2] -> [..., 4].
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        # Products wrap modulo 2^64 in int64; masking after the shift leaves exactly the high word.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, low0, high1, low1 = (p0 >> 32) & _LOW, p0 & _LOW, (p1 >> 32) & _LOW, p1 & _LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack((c0, c1, c2, c3), -1)


def words(
    seed: int, sample_index: int, position: int, vocab: int, device: torch.device | None = None
) -> torch.Tensor:
    """The 32-bit random word of every vocabulary id: int64 [vocab]."""
    groups = torch.arange((vocab + 3) // 4, dtype=torch.int64, device=device)
    constants = torch.tensor([position & _LOW, (seed >> 32) & _LOW, 0], dtype=torch.int64, device=device)
    counter = torch.cat((groups[:, None], constants.expand(len(groups), 3)), 1)
    key = torch.tensor([seed & _LOW, sample_index & _LOW], dtype=torch.int64, device=device)
    return philox(counter, key.expand(len(groups), 2)).flatten()[:vocab]


def exponential(word: torch.Tensor) -> torch.Tensor:
    """E = -log(1 - u), u = (word + 1/2) 2^-32: words int64, 0 .. 2^32 - 1 -> float32, in [2^-33, 23).

    Below u = 2^-10 the series of -log1p(-u): word + 1/2 is exact in float32 there, and the next term is under
    2^-31 of the sum. Above, 1 - u is formed from the word's complement, (2^32 - 1 - word + 1/2) 2^-32, which
    never rounds to 0; and it is at most 1 - 2^-10, so its logarithm never rounds to 0 either.
    """
    u = (word.float() + 0.5) * 2.0**-32
    series = u * (1 + u * (0.5 + u * (1 / 3)))
    rest = ((_LOW - word).float() + 0.5) * 2.0**-32
    return torch.where(word < 2**22, series, -torch.log(rest))


def gumbel(word: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise: words int64 -> float32, from -log(33 log 2) = -3.13 to 33 log 2 = 22.87."""
    return -torch.log(exponential(word))


def modified_logits(raw: torch.Tensor, slot: int, position: int, table: SamplingTable) -> torch.Tensor:
    """Steps 1 and 2: one row's float32 logits after penalties, bias and bans."""
    x = raw.clone()
    vocab = x.shape[0]
    if table.output_counts is not None and table.prompt_mask is not None:
        count = table.output_counts[slot]
        seen = (table.prompt_mask[slot] != 0) | (count > 0)
        repetition = table.repetition[slot]
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        x = torch.where(count > 0, x - table.frequency[slot] * count - table.presence[slot], x)
    for token, value in zip(table.bias_ids[slot].tolist(), table.bias_values[slot], strict=True):
        if 0 <= token < vocab:
            x[token] += value
    if position < int(table.ban_until[slot]):
        for token in table.ban_ids[slot].tolist():
            if 0 <= token < vocab:
                x[token] = -math.inf
    return x


def kept(y: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Steps 4 to 6: which entries of one row, y = x / T float64 [V], may be drawn."""
    keep = y > -math.inf
    if 0 < top_k < y.shape[0]:
        keep &= y >= torch.sort(y, descending=True).values[top_k - 1]
    if top_p < 1:
        mass = torch.softmax(y.masked_fill(~keep, -math.inf), 0)
        values, index = torch.unique(y, sorted=True, return_inverse=True)
        from_top = torch.zeros_like(values).index_add_(0, index, mass).flip(0)
        strictly_above = (from_top.cumsum(0) - from_top).flip(0)[index]
        keep &= (strictly_above < top_p) | (y == y.max())
    if min_p > 0:
        keep &= y - y.max() >= math.log(min(min_p, 1.0))
    return keep


def is_plain(slot: int, position: int, table: SamplingTable, vocab: int) -> bool:
    """Whether no option of steps 1, 2 and 4 to 6 is on, so that a draw is from softmax(raw logits / T)."""

    def listed(ids: torch.Tensor) -> bool:
        return bool(((ids[slot] >= 0) & (ids[slot] < vocab)).any())

    penalties = (table.repetition[slot], table.presence[slot], table.frequency[slot])
    penalized = table.output_counts is not None and penalties != (1.0, 0.0, 0.0)
    banned = position < int(table.ban_until[slot]) and listed(table.ban_ids)
    filtered = (
        0 < int(table.top_k[slot]) < vocab or float(table.top_p[slot]) < 1 or float(table.min_p[slot]) > 0
    )
    return not (penalized or listed(table.bias_ids) or banned or filtered)


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    *,
    out: Sampled | None = None,
) -> Sampled:
    """See `kernels.sample.sample`. Computed on the host, wherever the tensors are."""
    given = empty(logits) if out is None else out
    logits, slots, positions = logits.cpu(), slots.cpu(), positions.cpu()
    parts: list[Any] = [None if part is None else part.cpu() for part in table]
    table = SamplingTable(*parts)
    out = Sampled(*(part.cpu() for part in given))
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        out.token[row], out.lse[row], out.sampling_logprob[row] = -1, 0.0, 0.0
        if slot < 0:
            continue
        raw = logits[row]
        temperature = float(table.temperature[slot])
        scale = temperature if temperature > 0 else 1.0
        out.lse[row] = torch.logsumexp(raw.double() / scale, 0)
        x = modified_logits(raw, slot, position, table)
        if bool((raw.isnan() | (raw == math.inf)).any()) or not math.isfinite(float(x.max())):
            continue
        if temperature <= 0:
            out.token[row] = int((x == x.max()).nonzero()[0])
            continue
        y = x.double() / temperature
        keep = kept(y, int(table.top_k[slot]), float(table.top_p[slot]), float(table.min_p[slot]))
        word = words(int(table.seed[slot]), int(table.sample_index[slot]), position, len(y), y.device)
        score = (y + gumbel(word).double()).masked_fill(~keep, -math.inf)
        token = int((score == score.max()).nonzero()[0])
        out.token[row] = token
        if is_plain(slot, position, table, len(y)):
            out.sampling_logprob[row] = raw[token] / table.temperature[slot] - out.lse[row]
        else:
            out.sampling_logprob[row] = torch.log_softmax(y.masked_fill(~keep, -math.inf), 0)[token]
    for target, source in zip(given, out, strict=True):
        target.copy_(source)
    return given
