"""Accuracy of a Countdown-lite checkpoint over think budgets, by transformers alone: the model card's table.

    python recipes/bundled_model/evaluate.py elastic_decode/assets/tiny

A deliberately plain batched decoder, so that the figures do not rest on the engine that the checkpoint is
used to test: at most t sampled tokens of thinking, the close forced when they are used up (an <eos> in
thinking becomes the close), then at most s sampled tokens of solution.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from elastic_decode.tasks import countdown

BUDGETS = (0, 5, 10, 15, 20, 25, 30, 45, None)


@dataclass
class Decoded:
    """One row a problem."""

    tokens: torch.Tensor  # int64 [rows, steps], pad id past the end
    forced: torch.Tensor  # bool [rows, steps]
    think_tokens: torch.Tensor  # int64 [rows]
    solutions: list[str]


@torch.inference_mode()
def decode(
    model,
    tokenizer,
    problems,
    *,
    think: int | None,
    solve: int = 3,
    temperature: float = 1.0,
    limit: int = 160,
) -> Decoded:
    """Decodes every problem once, in one batch (prompts are equally long); None: up to `limit` tokens."""
    close, eos, pad = (
        tokenizer.convert_tokens_to_ids(countdown.CLOSE),
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    budget = limit if think is None else think
    prompts = [
        tokenizer.apply_chat_template(p.chat, add_generation_prompt=True, return_dict=False) for p in problems
    ]
    inputs = torch.tensor(prompts)
    rows = len(problems)
    thinking = torch.ones(rows, dtype=torch.bool)
    running = torch.ones(rows, dtype=torch.bool)
    think_tokens, solve_tokens = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    cache, tokens, forced = DynamicCache(), [], []
    while bool(running.any()):
        logits = model(input_ids=inputs, past_key_values=cache, use_cache=True).logits[:, -1].float()
        if temperature == 0:
            draw = logits.argmax(-1)
        else:
            draw = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
        force = thinking & (think_tokens >= budget)
        draw = torch.where(force | (thinking & (draw == eos)), close, draw)
        think_tokens += thinking & ~force & running
        solve_tokens += ~thinking & running
        tokens.append(torch.where(running, draw, pad))
        forced.append(force & running)
        running &= thinking | ((draw != eos) & (solve_tokens < solve))
        thinking &= draw != close
        inputs = draw[:, None]
    stacked = torch.stack(tokens, 1)
    solutions = []
    for row in stacked.tolist():
        solution = row[row.index(close) + 1 :] if close in row else []
        solutions.append(tokenizer.decode([i for i in solution if i not in (eos, pad)]))
    return Decoded(stacked, torch.stack(forced, 1), think_tokens, solutions)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--problems", type=int, default=500, help="held-out problems to draw")
    parser.add_argument("--samples", type=int, default=4, help="samples a problem at temperature 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    problems = countdown.sample("test", args.problems, args.seed)
    print(f"{len(problems)} held-out problems; T = 1: {args.samples} samples each")
    print("| think budget | accuracy, T = 1 | accuracy, greedy | think tokens, T = 1 |")
    print("|---|---|---|---|")
    for budget in BUDGETS:
        cells = []
        for temperature, drawn in ((1.0, problems * args.samples), (0.0, problems)):
            out = decode(model, tokenizer, drawn, think=budget, temperature=temperature)
            right = sum(countdown.grade(p, s) for p, s in zip(drawn, out.solutions, strict=True))
            cells.append((right / len(drawn), out.think_tokens.float().mean().item()))
        name = "unlimited" if budget is None else str(budget)
        print(f"| {name} | {cells[0][0]:.3f} | {cells[1][0]:.3f} | {cells[0][1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
