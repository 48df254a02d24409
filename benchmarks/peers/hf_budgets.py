"""A thinking and a solving budget by transformers alone: two calls of `generate`, as one has to write it.

The first call thinks: at most `think` tokens, ended by the close or by EOS. Where the close did not come it
is put there; then all rows are padded on the left anew, and the second call computes them again from their
first token and solves. The rules are those of `Budget(think, solve)`: the close counts as a token of thinking
where it was sampled, an EOS in thinking becomes the close.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig


@dataclass(frozen=True, kw_only=True)
class Ids:
    """Token ids of the delimiters."""

    close: int
    eos: int
    pad: int

    @classmethod
    def of(cls, tokenizer: Any, close: str) -> Ids:
        (found,) = tokenizer.encode(close, add_special_tokens=False)
        return cls(close=found, eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id)


class Output(NamedTuple):
    """ids: a final EOS included. forced: where the close was put there; None where it was sampled."""

    ids: list[int]
    forced: int | None


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    think: int,
    solve: int,
    ids: Ids,
    temperature: float = 1.0,
) -> list[Output]:
    """One sample a prompt; the whole distribution, nothing filtered. All prompts are one batch."""
    rows = [list(prompt) for prompt in prompts]
    thoughts = _call(model, rows, think, [ids.close, ids.eos], ids.pad, temperature)
    outputs = []
    for thought in thoughts:
        if thought[-1] == ids.close:
            outputs.append(Output(thought, None))
        else:
            kept = thought[:-1] if thought[-1] == ids.eos else thought
            outputs.append(Output([*kept, ids.close], len(kept)))
    longer = [row + output.ids for row, output in zip(rows, outputs, strict=True)]
    answers = _call(model, longer, solve, [ids.eos], ids.pad, temperature)
    return [
        Output(output.ids + answer, output.forced) for output, answer in zip(outputs, answers, strict=True)
    ]


def _call(
    model: Any, rows: list[list[int]], new: int, ends: list[int], pad: int, temperature: float
) -> list[list[int]]:
    """New tokens of each row, up to and with the first of `ends`."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    config = GenerationConfig(
        max_new_tokens=new,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=ends,
        pad_token_id=pad,
    )
    # Else what the checkpoint's own configuration says of sampling replaces what is a default here.
    model.generation_config = config
    found = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    return [_until(row, ends) for row in found]


def _until(row: list[int], ends: list[int]) -> list[int]:
    last = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
    return row[: last + 1]
