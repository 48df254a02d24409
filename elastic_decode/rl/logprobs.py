"""Log-probabilities of rollouts under the trained module: little or no padding, logits never whole.

Samples are laid into micro-batches of a number of tokens in one of two ways. End to end: positions start
anew at each, and transformers keeps packed sequences from seeing each other by that; for attention kernels
that know where sequences end. In rows, of about equal lengths: for those that do not (`attends_in_rows`),
where the mask of a packed micro-batch, and the time, is tokens squared; what pads a row stands behind it,
where causal attention does not see it.

The vocabulary is wide (152k tokens times 4 bytes is 0.6 MB a token), so logits are made for a chunk of
positions at a time and, where there are several, made again in the backward pass instead of being kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import checkpoint

from elastic_decode.errors import ConfigError, UnsupportedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Samples end to end, in one row of N tokens of prompts and outputs, or in R rows of N, padded behind;
    M of the tokens are outputs.

    input_ids, position_ids int64 [R, N]; predicts int64 [M]: the position, in the rows end to end, whose
    logits give each output token; targets int64 [M]: the output tokens; sample_of int64 [M]: which of
    `samples` each belongs to; temperature float32 [M]. All on one device.
    """

    samples: tuple[int, ...]  # which of the samples given to `pack`, in order
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predicts: torch.Tensor
    targets: torch.Tensor
    sample_of: torch.Tensor
    temperature: torch.Tensor


def attends_in_rows(model: Any) -> bool:
    """Whether `model`'s attention wants its samples in rows: it is one of transformers' that would get a mask
    of a packed micro-batch's tokens squared.
    """
    return getattr(_parts(model)[0].config, "_attn_implementation", None) in ("sdpa", "eager")


def plan(lengths: Sequence[int], max_tokens: int, *, rows: bool = False) -> list[list[int]]:
    """Which samples go into which micro-batch, padding counted in its tokens.

    lengths: prompt + output tokens. End to end: longest first, each into the first that has room. rows: the
    next longest together, while no row is padded to more than twice its length. A function of the lengths
    alone, so a run that is resumed packs alike. Raises ConfigError where one sample alone is longer than
    `max_tokens`.
    """
    for index, length in enumerate(lengths):
        if length > max_tokens:
            raise ConfigError(
                f"sample {index} has {length} tokens (prompt and output), more than "
                f"max_tokens_per_microbatch={max_tokens}; raise it, or lower the budgets"
            )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches = _in_rows(order, lengths, max_tokens) if rows else _end_to_end(order, lengths, max_tokens)
    return [sorted(batch) for batch in batches]


def _in_rows(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in order:
        longest = lengths[batches[-1][0]] if batches else 0
        fits = batches and (len(batches[-1]) + 1) * longest <= max_tokens
        if fits and 2 * lengths[index] >= longest:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _end_to_end(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room: list[int] = []
    for index in order:
        fits = next((b for b, left in enumerate(room) if left >= lengths[index]), None)
        if fits is None:
            batches.append([index])
            room.append(max_tokens - lengths[index])
        else:
            batches[fits].append(index)
            room[fits] -= lengths[index]
    return batches


def pack(
    samples: Sequence[tuple[Sequence[int], Sequence[int]]],
    chosen: Sequence[int],
    temperatures: Sequence[float],
    device: torch.device | str = "cpu",
    *,
    rows: bool = False,
) -> Packed:
    """`chosen` of the samples (prompt ids, output ids), end to end or in rows. Prompts must not be empty.

    temperatures: what each sample was drawn at; 0 (greedy) counts as 1, as in the engine's `logprobs`.
    """
    width = max((sum(map(len, samples[index])) for index in chosen), default=0) if rows else 0
    ids: list[int] = []
    positions: list[int] = []
    predicts: list[int] = []
    targets: list[int] = []
    sample_of: list[int] = []
    scale: list[float] = []
    for place, index in enumerate(chosen):
        prompt, output = samples[index]
        if not prompt:
            raise ValueError(f"sample {index} has no prompt: nothing predicts its first token")
        start = len(ids) + len(prompt) - 1
        own = len(prompt) + len(output)
        ids += prompt
        ids += output
        ids += [0] * (width - own)
        # Rising behind the end, too: a position that starts anew would be the next of packed sequences.
        positions += range(max(width, own))
        predicts += range(start, start + len(output))
        targets += output
        sample_of += [place] * len(output)
        scale += [temperatures[index] or 1.0] * len(output)

    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    shape = (-1, width) if width else (1, -1)
    return Packed(
        samples=tuple(chosen),
        input_ids=ints(ids).view(shape),
        position_ids=ints(positions).view(shape),
        predicts=ints(predicts),
        targets=ints(targets),
        sample_of=ints(sample_of),
        temperature=torch.tensor(scale, dtype=torch.float32, device=device),
    )


class TokenLogprobs(Protocol):
    """`token_logprobs`, or another way to the same numbers."""

    def __call__(
        self, model: Any, packed: Packed, *, chunk: int = ..., entropy: bool = ...
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...


def token_logprobs(
    model: Any, packed: Packed, *, chunk: int = 1024, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log_softmax(logits / T) at each output token, float32 [M]; and the entropies, float32 [M], where asked.

    model: a Hugging Face causal language model. chunk: output positions whose logits exist at a time. What
    the engine calls `logprobs` is the same quantity. Differentiable.
    """
    backbone, head = _parts(model)
    hidden = backbone(
        input_ids=packed.input_ids, position_ids=packed.position_ids, attention_mask=None, use_cache=False
    ).last_hidden_state
    hidden = hidden.flatten(0, 1).index_select(0, packed.predicts)
    again = (
        torch.is_grad_enabled() and len(hidden) > chunk
    )  # one chunk is no more than the backward pass makes
    logprobs, entropies = [], []
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        arguments = (head, hidden[part], packed.targets[part], packed.temperature[part], entropy)
        if again:
            logprob, spread = checkpoint(_chunk, *arguments, use_reentrant=False)
        else:
            logprob, spread = _chunk(*arguments)
        logprobs.append(logprob)
        entropies.append(spread)
    if not logprobs:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty if entropy else None
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None


def _chunk(
    head: torch.nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    logits = head(hidden).float() / temperature.unsqueeze(1)
    lse = torch.logsumexp(logits, dim=-1)
    logprob = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - lse
    if not entropy:
        return logprob, None
    probabilities = torch.softmax(logits, dim=-1)
    return logprob, lse - (probabilities * logits).sum(dim=-1)


def _parts(model: Any) -> tuple[Any, torch.nn.Module]:
    """The module below the head, and the head. Sees through peft's and DDP's wrappers."""
    inner = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    backbone = getattr(inner, getattr(inner, "base_model_prefix", ""), None)
    if head is None or backbone is None:
        raise UnsupportedModel(
            f"{type(inner).__name__} has no base model with an output head; a Hugging Face causal language "
            "model is needed"
        )
    return backbone, head
