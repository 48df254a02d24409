"""Floors against numbers computed by hand; docs/predictions.md is what the command writes."""

import floors
import pytest
import shapes
import torch
from attention_cases import Size
from floors import Assumptions, Rates, Work

ROUND = Rates(1e12, 1e14)  # a byte a picosecond, a hundred flops a picosecond


def test_linear():
    # x 3*4 + weight 5*4 + bias 5 = 37 values of 2 bytes, 15 results of 4; 2*3*4*5 flops
    assert floors.linear(3, 4, 5, bias=True, out_size=4) == Work(74 + 60, 120.0, 1)
    assert floors.linear(1, 4, 5) == Work(2 * (4 + 20 + 5), 40.0, 1)


def test_small_ops():
    assert floors.rms_norm(3, 4).bytes == 2 * (4 * 12 + 4)
    assert floors.rms_norm(3, 4, residual=False).bytes == 2 * (2 * 12 + 4)
    assert floors.silu_mul(3, 4).bytes == 2 * (24 + 12)
    # a token: q, k, v of 4 + 2 + 2 heads and q, k, v out again, each 8 wide, 8 floats, two indices
    assert floors.rope(1, 4, 2, 8).bytes == 2 * 64 + 32 + 8 + 2 * 64
    assert floors.rope(1, 4, 2, 8, kv_size=1).bytes == 2 * 64 + 32 + 8 + 2 * 32 + 32
    assert floors.draw(3, 10) == Work(120, 0.0, 2)
    assert floors.embedding(3, 10).bytes == 2 * 60 + 12


def test_attention():
    # 2 rows, 17 keys: k and v of 2 heads of 8, 2 pages a row, q and the result of 4 heads
    work = floors.attention_decode(2, 17, 4, 2, 8, page_size=16)
    assert work.bytes == 2 * (2 * 2 * 17 * 2 * 8) + 4 * 2 * 2 + 2 * 2 * 2 * 4 * 8
    assert work.flops == 4 * 2 * 17 * 4 * 8


def test_attention_of_groups_and_of_prompts():
    heads = (4, 2, 8)
    one = floors.attention_decode(4, 48, *heads)
    # two groups of two that share 32 tokens: 64 keys and values of 2 heads need not be read again
    grouped = Size(4, 48, *heads, group=2, own=16).work(torch.bfloat16)
    assert one.bytes - grouped.bytes == 64 * 2 * 2 * 8 * 2
    assert grouped.flops == one.flops
    # 3 queries over 48, 47 and 46 keys; two more of them read and two more results written a row
    prompt = Size(4, 48, *heads, new=3).work(torch.bfloat16)
    assert prompt.flops == 4 * 4 * (46 + 47 + 48) * 4 * 8
    assert prompt.bytes - one.bytes == 2 * 2 * 4 * 2 * 4 * 8
    small = Size(4, 48, *heads, kv_dtype="float8_e4m3fn").work(torch.bfloat16)
    assert one.bytes - small.bytes == 4 * 48 * 2 * 2 * 8


def test_the_larger_of_both_is_the_floor():
    assert floors.floor_us(Work(1e6, 1e6), ROUND) == pytest.approx(1.0)
    assert floors.floor_us(Work(1e6, 1e9), ROUND) == pytest.approx(10.0)
    assume = Assumptions(kernel_us=2.0, bandwidth=0.5, matmul=0.25)
    assert floors.predicted_us(Work(1e6, 1e6, 3), ROUND, assume) == pytest.approx(3 * 2 + 2.0)
    assert floors.predicted_us(Work(1e6, 1e9, 1), ROUND, assume) == pytest.approx(2 + 40.0)


def test_a_step_of_the_distilled_model_reads_its_weights_once():
    """3.09 GB of weights; 28 layers keep 2 * 2 * 128 values of 2 bytes a token: 28,672."""
    config = shapes.config("1.5B")
    weights = 28 * (2048 * 1536 + 1536 * 1536 + 2 * 8960 * 1536 + 1536 * 8960) + 151936 * 1536
    step = floors.decode_step(config, 1, 0)
    linears = sum(work.bytes for name, work in step.items() if name.startswith("linear"))
    assert 2 * weights == pytest.approx(linears, rel=1e-3)
    longer = floors.total(floors.decode_step(config, 8, 1600)).bytes
    shorter = floors.total(floors.decode_step(config, 8, 800)).bytes
    assert longer - shorter == 8 * 800 * 28672 + 28 * 8 * 50 * 4
    half = floors.total(floors.decode_step(config, 8, 1600, kv_size=1)).bytes
    assert longer - half == 8 * 1601 * 28672 / 2  # its own key and value are written
    flops = floors.total(floors.decode_step(config, 7, 0)).flops
    assert flops == 7 * 2 * weights
    assert floors.step_floor_us(config, 1, 0, ROUND) == pytest.approx(linears / 1e6, rel=1e-2)


def test_the_document_is_what_the_command_writes():
    assert floors.DOCUMENT.read_text() == floors.document(), "run benchmarks/floors.py --write"
