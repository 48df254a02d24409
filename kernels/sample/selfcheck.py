"""`sample` over a model's vocabulary: every option, rows without a candidate, rows that idle."""

import math
from collections.abc import Iterator

import torch

from ..selfcheck import Finding, Random, Shapes, Use, same, within
from . import Sampled, SamplingTable, make_table, reference

# A draw's score is a sum in float32; the one drawn may lie this far below the best.
NEAR_TIE = 2e-5

# A slot each; what is not named is off.
SLOTS: tuple[dict[str, float], ...] = (
    {"temperature": 0},
    {"temperature": 1},
    {"temperature": 0.6},
    {"temperature": 0.6, "top_p": 0.95},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 0.8, "min_p": 0.05},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0, "ban_until": 10_000},
    {"temperature": 1, "ban_until": 10_000, "repetition": 1.2, "frequency": 0.3, "presence": 0.5},
    {"temperature": 1},  # its row holds NaN
    {"temperature": 1},  # its row holds nothing but -inf
)


def coarse(logits: torch.Tensor) -> torch.Tensor:
    """In steps of 1/8: equal logits are kept or dropped together, so that a filter's threshold is hardly ever
    so near to a token's place that rounding decides (and the lowest of equal ids is asked for)."""
    return (logits * 8).round() / 8


def make_options(shapes: Shapes, random: Random, *, penalties: bool) -> SamplingTable:
    """A table of SLOTS: without room for bans and biases, as an engine's is until a request has some; or with
    them and penalties, where bans act as ban_until says."""
    vocab = shapes.vocab_size
    bans, biases = (3, 2) if penalties else (0, 0)
    table = make_table(len(SLOTS), num_ban_ids=bans, num_bias=biases, device=random.device)
    for slot, options in enumerate(SLOTS):
        for name, value in options.items():
            getattr(table, name)[slot] = value
        table.seed[slot] = (slot * 0x9E3779B97F4A7C15 + 12345) % 2**63
        table.sample_index[slot] = slot % 3
        if not penalties:
            continue
        table.ban_ids[slot] = random.ints([slot % vocab, 3 * slot % vocab, -1])
        if slot % 3 == 1:
            table.bias_ids[slot] = random.ints([-1, 7 * slot % vocab])
            table.bias_values[slot] = 6
    if penalties:
        counts = (random.normal(len(SLOTS), vocab).abs() > 1).int() * 3
        mask = (random.normal(len(SLOTS), vocab).abs() > 1).to(torch.uint8)
        table = table._replace(output_counts=counts, prompt_mask=mask)
    return table


def checks(use: Use, shapes: Shapes, random: Random, batch_invariant: bool) -> Iterator[Finding]:
    sample = use()
    count = len(SLOTS)
    logits = coarse(3 * random.normal(count + 1, shapes.vocab_size))
    logits[count - 2, shapes.vocab_size // 2] = math.nan
    logits[count - 1] = -math.inf
    # Rows in an order of their own, so that a row is not its slot; one idles.
    order = [*range(count - 1, 2, -1), -1, *range(3)]
    slots, positions = random.ints(order), random.ints([100 + 7 * row for row in range(len(order))])
    logits = logits[[slot % (count + 1) for slot in order]]
    for row, slot in enumerate(order):
        if slot >= count - 2:
            continue
        logits[row, 7 * slot % shapes.vocab_size] = 8.0  # so that a bias there matters
    for penalties in (False, True):
        table = make_options(shapes, random, penalties=penalties)

        def run(rows: slice, table: SamplingTable = table) -> Sampled:
            part = logits[rows]
            out = Sampled(
                torch.full((len(part),), -77, dtype=torch.int32, device=random.device),
                random.nan(len(part)),
                random.nan(len(part)),
            )
            sample(part, slots[rows], positions[rows], table, out=out)
            return out

        name = "with penalties, bans, bias" if penalties else "plain"
        out = run(slice(None))
        exact = reference.sample(logits, slots, positions, table)
        yield Finding(f"{name}: tokens", _worst_draw(logits, order, positions, table, out, exact), NEAR_TIE)
        yield within(f"{name}: lse", out.lse, exact.lse, rtol=2e-6, atol=4e-6)
        agree = out.token == exact.token
        logprobs = (each.sampling_logprob[agree] for each in (out, exact))
        yield within(f"{name}: sampling_logprob", *logprobs, rtol=4e-6, atol=2e-5)
        if batch_invariant:
            for rows in (slice(1), slice(2, 7), slice(-1, None)):
                for field, part, whole in zip(Sampled._fields, run(rows), out, strict=True):
                    yield same(f"{name}: bits of {len(part)} rows' {field}", part, whole[rows])


def _worst_draw(
    logits: torch.Tensor, order: list[int], positions: torch.Tensor, table: SamplingTable, out: Sampled,
    exact: Sampled,
) -> float:  # fmt: skip
    """How far the scores of the tokens drawn lie below the best ones; infinite for one that may not be."""
    worst = 0.0
    pairs = zip(out.token.tolist(), exact.token.tolist(), strict=True)
    for row, (token, wanted) in enumerate(pairs):
        if token == wanted:
            continue
        if wanted < 0 or not 0 <= token < logits.shape[1]:
            return math.inf
        slot, position = order[row], int(positions[row])
        x = reference.modified_logits(logits[row], slot, position, table).double()
        temperature = float(table.temperature[slot])
        if temperature > 0:
            x = x / temperature
            filters = int(table.top_k[slot]), float(table.top_p[slot]), float(table.min_p[slot])
            x = x.masked_fill(~reference.kept(x, *filters), -math.inf)
            seed, index = int(table.seed[slot]), int(table.sample_index[slot])
            x = x + reference.gumbel(reference.words(seed, index, position, len(x), x.device)).double()
        worst = max(worst, float(x[wanted] - x[token]))
    return worst
