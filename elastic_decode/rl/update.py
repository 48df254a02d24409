"""One step's samples into optimizer updates: micro-batches, old and reference log-probabilities, the loss.

The samples of a step are cut, in their order, into `updates` mini-batches, each an optimizer update; a
mini-batch is packed into micro-batches by tokens, whose losses add up to the mini-batch's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from elastic_decode.errors import ConfigError
from elastic_decode.rl.batch import Sample
from elastic_decode.rl.distributed import World
from elastic_decode.rl.logprobs import Packed, TokenLogprobs, attends_in_rows, pack, plan, token_logprobs
from elastic_decode.rl.loss import Objective, Tokens, denominators, mismatch, policy_loss
from elastic_decode.rl.optim import MasterAdamW
from elastic_decode.rl.parallel import Parallel


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
    parallel: Parallel | None = None,
) -> dict[str, float]:
    """Train on one step's samples; metrics of the step (means over its updates).

    trained: of all ranks, the same on each. reference: the frozen model of the KL (also as `Parallel`), or a
    context manager factory under which `model` is it (LoRA's `disable_adapter`). parallel: how ranks share
    the work, None = one process. Raises ConfigError where there is nothing to train on or a term lacks what
    it needs, and FloatingPointError, with no update made, where a gradient is not finite.

    `updates` in the metrics is how many were made: none where there is nothing to learn (all advantages are
    0, and there is neither KL nor entropy in the loss), since AdamW moves weights by a gradient of 0, too.
    """
    parallel = parallel or Parallel(model)
    wanted = [row for row in trained if any(row.sample.loss_mask)]
    if not (options.kl_coef or options.entropy_coef or any(row.advantage for row in wanted)):
        wanted = []
    if options.updates < 1:
        raise ConfigError(f"updates must be >= 1, got {options.updates}")
    if options.kl_coef and reference is None:
        raise ConfigError(f"kl_coef={options.kl_coef} needs a reference model")
    device = next(model.parameters()).device
    in_rows = options.logprobs is token_logprobs and attends_in_rows(model)
    model.train()
    batches = _mini_batches(wanted, options.updates)
    micros = [_micro_batches(batch, options.max_tokens, parallel, in_rows) for batch in batches]
    every = [rows for micro in micros for rows in micro]
    passed = _Pass(parallel, options.logprobs, options.chunk, device, in_rows)
    old = None
    if len(batches) > 1:  # with one update the policy is its own old one
        old = passed.without_gradient(every)
    ref = None
    if options.kl_coef:
        ref = _reference_logprobs(passed, reference, every)
    totals: dict[str, float] = {"updates": float(len(batches))}
    first: dict[int, torch.Tensor] = {}
    for batch, micro in zip(batches, micros, strict=True):
        total_tokens, total_samples = denominators(row.sample.loss_mask for row in batch)
        optimizer.zero_grad()
        summed: dict[str, torch.Tensor] = {}
        for index, rows in enumerate(micro):
            with parallel.accumulating(last=index == len(micro) - 1):
                packed, logprobs, entropy = passed(rows, entropy=bool(options.entropy_coef))
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
                (loss * parallel.scale).backward()
            if parallel.gradients_each_pass:
                optimizer.take_gradients()
            for name, value in metrics.items():
                summed[name] = summed[name] + value if name in summed else value
        norm = optimizer.clip(options.grad_clip if options.grad_clip else math.inf)
        if not torch.isfinite(norm):
            optimizer.zero_grad()
            raise FloatingPointError(
                f"the gradient's norm is {float(norm)}: no update was made. Look at the mismatch of the last "
                "steps and at the rewards; a lower learning rate or a clip of the correction may help"
            )
        optimizer.step(lr)
        for name, value in [*_over_ranks(summed, parallel.world).items(), ("grad_norm", norm)]:
            totals[name] = totals.get(name, 0.0) + float(value) / len(batches)
    optimizer.zero_grad()
    totals |= _mismatch(list(itertools.chain(*every)), first if old is None else old, parallel.world)
    return totals


def _mini_batches(rows: Sequence[Trained], updates: int) -> list[list[Trained]]:
    """`updates` runs of about as many samples each, none empty."""
    count = min(updates, len(rows))
    edges = [len(rows) * i // count for i in range(count + 1)] if count else [0]
    return [list(rows[a:b]) for a, b in itertools.pairwise(edges)]


def _length(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.token_ids)


def _micro_batches(
    batch: Sequence[Trained], max_tokens: int, parallel: Parallel, in_rows: bool
) -> list[list[Trained]]:
    """This rank's part of a mini-batch in micro-batches. Empty ones follow where it has to take part in
    others' passes.
    """
    lengths = [_length(row.sample) for row in batch]
    plans = [
        [[share[i] for i in chosen] for chosen in plan([lengths[i] for i in share], max_tokens, rows=in_rows)]
        for share in parallel.share(lengths)
    ]
    mine = [[batch[i] for i in chosen] for chosen in plans[parallel.world.rank]]
    return mine + [[] for _ in range(parallel.passes([len(plan) for plan in plans]) - len(mine))]


@dataclass(frozen=True, slots=True)
class _Pass:
    """A micro-batch through a model. An empty one is a pass over a token that nothing is made of."""

    parallel: Parallel
    compute: TokenLogprobs
    chunk: int
    device: torch.device
    in_rows: bool

    def __call__(
        self, rows: Sequence[Trained], *, entropy: bool = False
    ) -> tuple[Packed, torch.Tensor, torch.Tensor | None]:
        packed = pack(
            [(row.sample.prompt_ids, row.sample.token_ids) for row in rows] or [((0,), (0,))],
            range(len(rows) or 1),
            [row.temperature for row in rows] or [1.0],
            self.device,
            rows=self.in_rows,
        )
        logprobs, spread = self.parallel.logprobs(self.compute, packed, chunk=self.chunk, entropy=entropy)
        if not rows:
            packed = replace(packed, sample_of=packed.sample_of[:0])
            logprobs, spread = logprobs[:0], None if spread is None else spread[:0]
        return packed, logprobs, spread

    @torch.no_grad()
    def without_gradient(self, micro: Sequence[Sequence[Trained]]) -> dict[int, torch.Tensor]:
        """Log-probabilities of each row's output tokens, by the row's id."""
        found: dict[int, torch.Tensor] = {}
        for rows in micro:
            packed, logprobs, _ = self(rows)
            parts = _split(logprobs, packed, len(rows))
            found |= {id(row): own for row, own in zip(rows, parts, strict=True)}
        return found


def _split(values: torch.Tensor, packed: Packed, rows: int) -> tuple[torch.Tensor, ...]:
    return values.split(packed.sample_of.bincount(minlength=rows).tolist())


def _reference_logprobs(
    passed: _Pass, reference: Any, micro: Sequence[Sequence[Trained]]
) -> dict[int, torch.Tensor]:
    if isinstance(reference, torch.nn.Module):
        reference = Parallel(reference)
    if isinstance(reference, Parallel):
        return replace(passed, parallel=reference).without_gradient(micro)
    with reference():
        return passed.without_gradient(micro)


def _tokens(
    rows: Sequence[Trained],
    packed: Packed,
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
    old: dict[int, torch.Tensor] | None,
    ref: dict[int, torch.Tensor] | None,
    device: torch.device,
) -> Tokens:
    def flat(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(
            [x for row in rows for x in getattr(row.sample, name)], dtype=dtype, device=device
        )

    def of(found: dict[int, torch.Tensor]) -> torch.Tensor:
        return torch.cat([found[id(row)] for row in rows]) if rows else logprobs.detach()

    return Tokens(
        logprobs=logprobs,
        old_logprobs=logprobs.detach() if old is None else of(old),
        mask=flat("loss_mask", torch.bool),
        advantages=torch.tensor([row.advantage for row in rows], dtype=torch.float32, device=device),
        sample_of=packed.sample_of,
        sampling_logprobs=flat("sampling_logprobs", torch.float32),
        forced=flat("forced", torch.bool),
        ref_logprobs=None if ref is None else of(ref),
        entropy=entropy,
    )


def _over_ranks(metrics: dict[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """Sums over ranks; each has the same metrics, if only of an empty micro-batch."""
    if world.size == 1:
        return metrics
    return dict(zip(metrics, world.add(torch.stack([v.double() for v in metrics.values()])), strict=True))


def _mismatch(rows: Sequence[Trained], trainer: dict[int, torch.Tensor], world: World) -> dict[str, float]:
    """The engine's log-probabilities against the trainer's, over the sampled tokens of all ranks.

    Where the rollout drew from another distribution (top-p, penalties …), that one against the trainer's as
    well, as `drawn_p95` …: what the correction is made of, and what trains off-policy without it.
    """
    sampled = torch.tensor([not forced for row in rows for forced in row.sample.forced], dtype=torch.bool)

    def gathered(values: torch.Tensor) -> torch.Tensor:
        return world.concat(values[sampled])

    mine = gathered(torch.cat([torch.empty(0), *(trainer[id(row)].cpu() for row in rows)]))
    theirs = gathered(torch.tensor([p for row in rows for p in row.sample.logprobs]))
    drawn = gathered(torch.tensor([p for row in rows for p in row.sample.sampling_logprobs]))
    every = torch.ones(len(mine), dtype=torch.bool)
    found = mismatch(mine, theirs, every)
    if not torch.equal(drawn, theirs):
        others = mismatch(mine, drawn, every)
        found |= {name.replace("mismatch", "drawn"): value for name, value in others.items()}
    return found
