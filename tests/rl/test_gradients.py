"""Derivatives of the decoder's operators by finite differences; the kernel is plain PyTorch in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck

from elastic_decode.kernels.paged_attention.reference import paged_attention
from elastic_decode.rl import attention_gradient, gradients
from elastic_decode.rl.attention_gradient import Sequences


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("biased", [True, False])
def test_linear(biased):
    bias = numbers(4) if biased else None
    run = partial(gradients.linear, torch.nn.functional.linear)
    assert gradcheck(run, (numbers(3, 5), numbers(4, 5), bias))


def norm(x, weight, eps, *, residual=None):
    if residual is not None:
        residual += x
        x = residual
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def test_rms_norm_and_the_sum_it_leaves():
    weight = numbers(5)
    assert gradcheck(lambda x, w: gradients.rms_norm(norm, x, w, 1e-3), (numbers(3, 5), weight))

    def added(x, w, residual):
        residual = residual * 1.0  # changed in place: not a leaf
        first = gradients.rms_norm(norm, x, w, 1e-3, residual=residual)
        middle = residual.clone()
        second = gradients.rms_norm(norm, first, w, 1e-3, residual=residual)
        return first, second, middle, residual

    assert gradcheck(added, (numbers(3, 5), weight, numbers(3, 5, seed=1)))


def test_silu_mul():
    def kernel(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    assert gradcheck(partial(gradients.silu_mul, kernel), (numbers(3, 8) * 3,))


def rotated(heads, weight, eps, cos, sin):
    if weight is not None:
        heads = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + eps) * weight
    a, b = heads.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rope(qkv, cos_sin, positions, slots, keys, values, *, num_heads, num_kv_heads, q_weight, k_weight, eps):
    q, k, v = qkv.view(len(qkv), -1, cos_sin.shape[1]).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    keys.flatten(0, 1)[slots] = rotated(k, k_weight, eps, cos, sin)
    values.flatten(0, 1)[slots] = v
    return rotated(q, q_weight, eps, cos, sin)


@pytest.mark.parametrize("normed", [True, False])
def test_rope_and_the_pages_it_writes(normed):
    angles = torch.arange(9.0, dtype=torch.float64).unsqueeze(1) * torch.tensor([1.0, 0.1])
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions, slots = torch.tensor([0, 1, 2, 0, 8]), torch.tensor([0, 1, 2, 6, 3])

    def run(qkv, q_weight, k_weight):
        pages = [torch.zeros(2, 4, 1, 4, dtype=torch.float64) for _ in range(2)]
        query = gradients.rope(
            rope, qkv, cos_sin, positions, slots, *pages,
            num_heads=2, num_kv_heads=1, q_weight=q_weight, k_weight=k_weight, eps=1e-3,
        )  # fmt: skip
        return query, *pages

    weights = (numbers(4), numbers(4, seed=1)) if normed else (None, None)
    assert gradcheck(run, (numbers(5, 16), *weights))


LENGTHS = (5, 1, 2, 9, 5)


def test_sequences_are_grouped_by_length_and_lie_in_pages_of_their_own():
    sequences = Sequences.of(LENGTHS, 4, torch.device("cpu"))
    assert sequences.pages == 2 + 1 + 1 + 3 + 2
    assert sequences.first_pages == (0, 2, 3, 4, 7)
    assert sequences.slots.tolist() == [*range(5), 8, 12, 13, *range(16, 25), *range(28, 33)]
    tokens = torch.cat([group.tokens[~group.padding[:, :, 0, 0]] for group in sequences.groups])
    assert [group.tokens.shape for group in sequences.groups] == [(2, 9), (1, 5), (2, 2)], (
        "3/4 of each is real"
    )
    assert sorted(tokens.tolist()) == list(range(sum(LENGTHS)))


@pytest.mark.parametrize("window", [None, 3, 100])
def test_attention(window):
    sequences = Sequences.of(LENGTHS, 4, torch.device("cpu"))
    lengths, starts = torch.tensor(LENGTHS), torch.tensor([0, *LENGTHS]).cumsum(0)
    table = torch.tensor(sequences.first_pages).unsqueeze(1) + torch.arange(3)

    def run(q, k, v):
        pages = [
            torch.full((sequences.pages * 4, 2, 4), torch.nan, dtype=torch.float64).index_copy(
                0, sequences.slots, each
            )
            for each in (k, v)
        ]
        return attention_gradient.paged_attention(
            paged_attention, sequences, q, *(each.view(-1, 4, 2, 4) for each in pages),
            table, lengths, starts, scale=0.7, window=window,
        )  # fmt: skip

    tokens = sum(LENGTHS)
    inputs = numbers(tokens, 4, 4), numbers(tokens, 2, 4), numbers(tokens, 2, 4, seed=1)
    assert gradcheck(run, inputs, fast_mode=True)


def test_a_fused_weight_hands_its_gradient_to_its_parts():
    buffer = torch.arange(10.0).view(5, 2)
    parts = [torch.nn.Parameter(buffer[:3].clone()), torch.nn.Parameter(buffer[3:].clone())]
    whole = gradients.fused(buffer, parts)
    assert whole.data_ptr() == buffer.data_ptr()
    (whole * torch.arange(5.0).unsqueeze(1)).sum().backward()
    assert parts[0].grad[:, 0].tolist() == [0, 1, 2]
    assert parts[1].grad[:, 1].tolist() == [3, 4]


def test_a_low_rank_part_hands_it_on_to_its_factors():
    down, up = numbers(2, 5), numbers(3, 2)
    buffer = torch.zeros(4, 5, dtype=torch.float64)
    other = numbers(1, 5)

    def run(down, up):
        parts = [gradients.low_rank(down, up, 0.7, torch.float64), other]
        return gradients.fused(buffer, parts)

    grad = numbers(4, 5, seed=1).detach()
    mine = torch.autograd.grad(run(down, up), (down, up, other), grad)
    wanted = torch.autograd.grad(torch.cat((0.7 * up @ down, other)), (down, up, other), grad)
    torch.testing.assert_close(mine, wanted)
