"""One step's samples into optimizer updates: micro-batches, old and reference log-probabilities, the loss.

The samples of a step are cut, in their order, into `updates` mini-batches, each an optimizer update; a
mini-batch is packed into micro-batches by tokens, whose losses add up to the mini-batch's own.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elastic_decode.errors import ConfigError
from elastic_decode.rl.batch import Sample
from elastic_decode.rl.logprobs import Packed, TokenLogprobs, attends_in_rows, pack, plan, token_logprobs
from elastic_decode.rl.loss import Objective, Tokens, denominators, mismatch, policy_loss
from elastic_decode.rl.optim import MasterAdamW

# How a loop over ranks adds up a tensor in place; one process has nothing to add.
Reduce = Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateOptions:
    """See rl/config.py for what each means to a run. logprobs: how the trainer's are computed."""

    objective: Objective
    max_tokens: int  # of a micro-batch
    updates: int = 1
    eps_low: float | None = None
    eps_high: float | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    correction_cap: float | None = None
    constant_length: int | None = None
    grad_clip: float | None = 1.0
    chunk: int = 1024
    logprobs: TokenLogprobs = token_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A sample with its advantage and the temperature it was drawn at."""

    sample: Sample
    advantage: float
    temperature: float


def update(
    model: Any,
    optimizer: MasterAdamW,
    trained: Sequence[Trained],
    options: UpdateOptions,
    *,
    lr: float,
    reference: Any = None,
    reduce: Reduce | None = None,
    ranks: int = 1,
) -> dict[str, float]:
    """Train on one step's samples; metrics of the step (means over its updates).

    reference: the frozen model of the KL, or a context manager factory under which `model` is it (LoRA's
    `disable_adapter`). reduce, ranks: for torch.distributed, whose DDP averages gradients. Raises ConfigError
    where there is nothing to train on or a term lacks what it needs, and FloatingPointError, with no update
    made, where a gradient is not finite.
    """
    wanted = [row for row in trained if any(row.sample.loss_mask)]
    if options.updates < 1:
        raise ConfigError(f"updates must be >= 1, got {options.updates}")
    if options.kl_coef and reference is None:
        raise ConfigError(f"kl_coef={options.kl_coef} needs a reference model")
    device = next(model.parameters()).device
    in_rows = _in_rows(model, options)
    model.train()
    batches = _mini_batches(wanted, options.updates)
    old: dict[int, torch.Tensor] = {}
    if len(batches) > 1:  # with one update the policy is its own old one
        old = _logprobs_of(model, wanted, options, device)
    ref = {}
    if options.kl_coef:
        ref = _reference_logprobs(model, reference, wanted, options, device)
    totals: dict[str, float] = {}
    first: dict[int, torch.Tensor] = {}
    for batch in batches:
        counts = torch.tensor(denominators(row.sample.loss_mask for row in batch), device=device)
        if reduce is not None:
            reduce(counts)
        total_tokens, total_samples = (int(count) for count in counts.tolist())
        if total_tokens == 0:
            continue
        optimizer.zero_grad()
        micro = plan([_length(row.sample) for row in batch], options.max_tokens, rows=in_rows)
        summed: dict[str, torch.Tensor] = {}
        for index, chosen in enumerate(micro):
            held = contextlib.nullcontext()
            if index < len(micro) - 1 and hasattr(model, "no_sync"):
                held = model.no_sync()
            with held:
                rows = [batch[i] for i in chosen]
                packed = _pack(rows, device, in_rows)
                logprobs, entropy = options.logprobs(
                    model, packed, chunk=options.chunk, entropy=bool(options.entropy_coef)
                )
                for row, own in zip(rows, _split(logprobs.detach(), packed, len(rows)), strict=True):
                    first.setdefault(id(row), own)
                tokens = _tokens(rows, packed, logprobs, entropy, old, ref, device)
                loss, metrics = policy_loss(
                    options.objective,
                    tokens,
                    total_tokens=total_tokens,
                    total_samples=total_samples,
                    eps_low=options.eps_low,
                    eps_high=options.eps_high,
                    kl_coef=options.kl_coef,
                    entropy_coef=options.entropy_coef,
                    correction_cap=options.correction_cap,
                    constant_length=options.constant_length,
                )
                (loss * ranks).backward()
            for name, value in metrics.items():
                summed[name] = summed[name] + value if name in summed else value
        norm = torch.nn.utils.clip_grad_norm_(
            optimizer.parameters, options.grad_clip if options.grad_clip else math.inf
        )
        if not torch.isfinite(norm):
            optimizer.zero_grad()
            raise FloatingPointError(
                f"the gradient's norm is {float(norm)}: no update was made. Look at the mismatch of the last "
                "steps and at the rewards; a lower learning rate or a clip of the correction may help"
            )
        optimizer.step(lr)
        for name, value in [*summed.items(), ("grad_norm", norm)]:
            totals[name] = totals.get(name, 0.0) + float(value) / len(batches)
    optimizer.zero_grad()
    totals |= _mismatch(wanted, old or {id(row): first[id(row)] for row in wanted})
    return totals


def _in_rows(model: Any, options: UpdateOptions) -> bool:
    return options.logprobs is token_logprobs and attends_in_rows(model)


def _mini_batches(rows: Sequence[Trained], updates: int) -> list[list[Trained]]:
    """`updates` runs of about as many samples each, none empty."""
    count = min(updates, len(rows))
    edges = [len(rows) * i // count for i in range(count + 1)] if count else [0]
    return [list(rows[a:b]) for a, b in itertools.pairwise(edges)]


def _length(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.token_ids)


def _pack(rows: Sequence[Trained], device: torch.device, in_rows: bool) -> Packed:
    return pack(
        [(row.sample.prompt_ids, row.sample.token_ids) for row in rows],
        range(len(rows)),
        [row.temperature for row in rows],
        device,
        rows=in_rows,
    )


def _split(values: torch.Tensor, packed: Packed, rows: int) -> tuple[torch.Tensor, ...]:
    return values.split(packed.sample_of.bincount(minlength=rows).tolist())


@torch.no_grad()
def _logprobs_of(
    model: Any, rows: Sequence[Trained], options: UpdateOptions, device: torch.device
) -> dict[int, torch.Tensor]:
    """Log-probabilities of each row's output tokens, by the row's id."""
    found: dict[int, torch.Tensor] = {}
    in_rows = _in_rows(model, options)
    for chosen in plan([_length(row.sample) for row in rows], options.max_tokens, rows=in_rows):
        some = [rows[i] for i in chosen]
        packed = _pack(some, device, in_rows)
        logprobs, _ = options.logprobs(model, packed, chunk=options.chunk)
        found |= {id(row): own for row, own in zip(some, _split(logprobs, packed, len(some)), strict=True)}
    return found


def _reference_logprobs(
    model: Any, reference: Any, rows: Sequence[Trained], options: UpdateOptions, device: torch.device
) -> dict[int, torch.Tensor]:
    if isinstance(reference, torch.nn.Module):
        return _logprobs_of(reference, rows, options, device)
    with reference():
        return _logprobs_of(model, rows, options, device)


def _tokens(
    rows: Sequence[Trained],
    packed: Packed,
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
    old: dict[int, torch.Tensor],
    ref: dict[int, torch.Tensor],
    device: torch.device,
) -> Tokens:
    def flat(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(
            [x for row in rows for x in getattr(row.sample, name)], dtype=dtype, device=device
        )

    return Tokens(
        logprobs=logprobs,
        old_logprobs=torch.cat([old[id(row)] for row in rows]) if old else logprobs.detach(),
        mask=flat("loss_mask", torch.bool),
        advantages=torch.tensor([row.advantage for row in rows], dtype=torch.float32, device=device),
        sample_of=packed.sample_of,
        sampling_logprobs=flat("sampling_logprobs", torch.float32),
        forced=flat("forced", torch.bool),
        ref_logprobs=torch.cat([ref[id(row)] for row in rows]) if ref else None,
        entropy=entropy,
    )


def _mismatch(rows: Sequence[Trained], trainer: dict[int, torch.Tensor]) -> dict[str, float]:
    """The engine's log-probabilities against the trainer's, over the sampled tokens."""
    if not rows:
        return {}
    mine = torch.cat([trainer[id(row)] for row in rows]).cpu()
    theirs = torch.tensor([p for row in rows for p in row.sample.logprobs])
    sampled = torch.tensor([not forced for row in rows for forced in row.sample.forced], dtype=torch.bool)
    return mismatch(mine, theirs, sampled)
