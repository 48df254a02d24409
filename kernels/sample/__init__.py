"""Sampling a token a row: penalties, bias, bans, temperature, top-k, top-p, min-p and Gumbel-max noise.

Every draw is a function of (logits, parameters, seed, sample index, position): neither the batch, nor the
place in it, nor the number of threads changes a bit. The filters are thresholds on values: no sort order.
"""

from typing import NamedTuple

import torch

from .. import checks
from ..registry import default_backend, implementation

__all__ = ["Sampled", "SamplingTable", "make_table", "sample"]


class SamplingTable(NamedTuple):
    """Parameters of every slot; S slots, vocabulary V. All tensors contiguous and on the logits' device."""

    temperature: torch.Tensor  # float32 [S]; 0: greedy
    top_k: torch.Tensor  # int32 [S]; 0 or at least V: off
    top_p: torch.Tensor  # float32 [S]; 1 or more: off
    min_p: torch.Tensor  # float32 [S]; 0: off
    seed: torch.Tensor  # int64 [S]
    sample_index: torch.Tensor  # int32 [S]
    repetition: torch.Tensor  # float32 [S]; 1: off
    presence: torch.Tensor  # float32 [S]; 0: off
    frequency: torch.Tensor  # float32 [S]; 0: off
    ban_until: torch.Tensor  # int32 [S]; ban_ids are banned where position < ban_until
    ban_ids: torch.Tensor  # int32 [S, E], padded with -1; E may be 0
    bias_ids: torch.Tensor  # int32 [S, B], padded with -1; B may be 0; an id may occur more than once
    bias_values: torch.Tensor  # float32 [S, B]
    output_counts: torch.Tensor | None = None  # int32 [S, V]: how often the slot's output holds a token
    prompt_mask: torch.Tensor | None = (
        None  # uint8 [S, V]: 1 where the prompt holds it. Both None: no slot uses penalties
    )


class Sampled(NamedTuple):
    """What was drawn, a row of the batch an entry; the draw's log-probability is logits[token] / T - lse."""

    token: torch.Tensor  # int32 [R]; -1: an idle row, or a row with nothing to draw
    lse: torch.Tensor  # float32 [R]: logsumexp of the raw logits / T (T = 1 when greedy)
    sampling_logprob: torch.Tensor  # float32 [R]: under the distribution drawn from; 0 when greedy


def make_table(
    num_slots: int, num_ban_ids: int = 0, num_bias: int = 0, device: torch.device | str = "cpu"
) -> SamplingTable:
    """A table with every option off: temperature 1, seed 0, no bans, no bias, no tensors for penalties."""

    def full(value: float, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.full((num_slots, *shape), value, dtype=dtype, device=device)

    return SamplingTable(
        temperature=full(1, torch.float32),
        top_k=full(0, torch.int32),
        top_p=full(1, torch.float32),
        min_p=full(0, torch.float32),
        seed=full(0, torch.int64),
        sample_index=full(0, torch.int32),
        repetition=full(1, torch.float32),
        presence=full(0, torch.float32),
        frequency=full(0, torch.float32),
        ban_until=full(0, torch.int32),
        ban_ids=full(-1, torch.int32, num_ban_ids),
        bias_ids=full(-1, torch.int32, num_bias),
        bias_values=full(0, torch.float32, num_bias),
    )


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    *,
    out: Sampled | None = None,
    backend: str = "auto",
) -> Sampled:
    """Draws one token a row.

    logits float32 [R, V]; slots int32 [R]: the row of `table` to use, -1 for an idle row (token -1, lse 0,
    sampling_logprob 0); positions int32 [R]: the position in prompt + output that the drawn token will have.
    `out`, where given, is written and returned. Slots must be below S: values on a device are not checked.

    In this order, x being a row's logits, T its temperature:
    1. repetition: x / r where x > 0, else x * r, for tokens of prompt or output (Hugging Face's rule);
       then x - frequency * count - presence * [count > 0], counts over the output;
    2. x + bias, then x = -inf for the banned;
    3. T = 0: the argmax, ties to the lowest id. Otherwise y = x / T and
    4. top-k: kept where fewer than k values are strictly greater;
    5. top-p: kept where the mass strictly above, renormalised over what top-k kept, is below p; the maximum
       always is;
    6. min-p: kept where y - max y >= log(min_p);
    7. the argmax of y + G over what is kept, ties to the lowest id: Gumbel noise G = -log E, E = -log(1 - u),
       u = (word + 1/2) 2^-32. The word is number id % 4 of Philox 4x32-10 (Salmon et al., SC 2011) under the
       key (seed's low 32 bits, sample index) and the counter (id // 4, position, seed's high 32 bits, 0).
       csrc/philox.h says how u is kept from rounding to 0 or 1.

    A row with a NaN or +inf (before or after step 2), or with nothing above -inf, has nothing to draw: token
    -1, sampling_logprob 0; its lse is what logsumexp gives. With every option of steps 1, 2 and 4 to 6 off,
    sampling_logprob equals logits[token] / T - lse to the last bit.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape or device, RuntimeError where the backend
    cannot run here.
    """
    check(logits, slots, positions, table, out)
    name = default_backend(logits.device.type) if backend == "auto" else backend
    if torch.compiler.is_compiling():
        drawn = Sampled(*torch.ops.elastic_decode.sample(logits, slots, positions, *table, backend=name))
        if out is None:
            return drawn
        for target, source in zip(out, drawn, strict=True):
            target.copy_(source)
        return out
    result: Sampled = implementation("sample", name)(logits, slots, positions, table, out=out)
    return result


def check(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    out: Sampled | None = None,
) -> None:
    """Raises for shapes, dtypes or devices that break the contract of `sample`."""
    checks.check_tensor("logits", logits, (None, None), torch.float32)
    rows, vocab = logits.shape
    device = logits.device
    if vocab == 0:
        raise ValueError("logits has an empty vocabulary")
    checks.check_tensor("slots", slots, (rows,), torch.int32, device)
    checks.check_tensor("positions", positions, (rows,), torch.int32, device)
    num_slots = table.temperature.shape[0]
    for name in ("temperature", "top_p", "min_p", "repetition", "presence", "frequency"):
        checks.check_tensor(f"table.{name}", getattr(table, name), (num_slots,), torch.float32, device)
    for name in ("top_k", "sample_index", "ban_until"):
        checks.check_tensor(f"table.{name}", getattr(table, name), (num_slots,), torch.int32, device)
    checks.check_tensor("table.seed", table.seed, (num_slots,), torch.int64, device)
    checks.check_tensor("table.ban_ids", table.ban_ids, (num_slots, None), torch.int32, device)
    checks.check_tensor("table.bias_ids", table.bias_ids, (num_slots, None), torch.int32, device)
    checks.check_tensor(
        "table.bias_values", table.bias_values, tuple(table.bias_ids.shape), torch.float32, device
    )
    if (table.output_counts is None) != (table.prompt_mask is None):
        raise ValueError("table.output_counts and table.prompt_mask must both be given, or both be None")
    if table.output_counts is not None and table.prompt_mask is not None:
        checks.check_tensor(
            "table.output_counts", table.output_counts, (num_slots, vocab), torch.int32, device
        )
        checks.check_tensor("table.prompt_mask", table.prompt_mask, (num_slots, vocab), torch.uint8, device)
    if out is not None:
        checks.check_tensor("out.token", out.token, (rows,), torch.int32, device)
        checks.check_tensor("out.lse", out.lse, (rows,), torch.float32, device)
        checks.check_tensor("out.sampling_logprob", out.sampling_logprob, (rows,), torch.float32, device)


def empty(logits: torch.Tensor) -> Sampled:
    """Outputs for `logits`, not initialised."""
    rows = logits.shape[0]
    return Sampled(
        torch.empty(rows, dtype=torch.int32, device=logits.device),
        torch.empty(rows, dtype=torch.float32, device=logits.device),
        torch.empty(rows, dtype=torch.float32, device=logits.device),
    )


@torch.library.custom_op("elastic_decode::sample", mutates_args=())
def _sample_op(
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
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
    drawn: Sampled = implementation("sample", backend)(logits, slots, positions, table)
    return drawn.token, drawn.lse, drawn.sampling_logprob


@_sample_op.register_fake
def _sample_fake(logits, *_args, **_kwargs):
    return tuple(empty(logits))
