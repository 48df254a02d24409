"""Rotary position tables: formulas and float32 rounding as in transformers' modeling_rope_utils."""

from __future__ import annotations

import math

import torch

from elastic_decode.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """float32 [head_dim / 2] radians a position, and the factor on cos and sin.

    `dynamic` gives those of a sequence within the original length; `cos_sin_table` stretches by position.
    """
    plain = 1.0 / _powers(rope.theta, head_dim)
    if rope.type == "linear":
        return plain / rope.factor, 1.0
    if rope.type == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.type == "yarn":
        return _yarn(rope, head_dim), _yarn_scale(rope)
    return plain, 1.0


def cos_sin_table(
    rope: RopeConfig, head_dim: int, max_positions: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """float32 [max_positions, head_dim]: a row a position, first half cosines, second half sines.

    `dynamic`: row p has the base of a sequence of p + 1 tokens once that exceeds the original length, which
    is what transformers uses for the token it decodes at p.
    """
    positions = torch.arange(max_positions, dtype=torch.float32)
    frequencies, scale = inverse_frequencies(rope, head_dim)
    if rope.type == "dynamic" and head_dim > 2:
        lengths = (positions + 1).clamp(min=rope.original_length)
        stretch = rope.factor * lengths / rope.original_length - (rope.factor - 1)
        bases = rope.theta * stretch ** (head_dim / (head_dim - 2))
        frequencies = 1.0 / _powers(bases[:, None], head_dim)
    angles = positions[:, None] * frequencies
    return torch.cat([angles.cos() * scale, angles.sin() * scale], dim=-1).to(device)


def _powers(base: float | torch.Tensor, head_dim: int) -> torch.Tensor:
    return base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _llama3(rope: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths stretched by the factor, short ones kept, a smooth passage between."""
    low_wavelength = rope.original_length / rope.low_freq_factor
    high_wavelength = rope.original_length / rope.high_freq_factor
    wavelength = 2 * math.pi / plain
    smooth = (rope.original_length / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * plain / rope.factor + smooth * plain
    stretched = torch.where(wavelength > low_wavelength, plain / rope.factor, between)
    return torch.where(wavelength < high_wavelength, plain, stretched)


def _yarn(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): interpolated below beta_slow turns, kept above beta_fast, a ramp between."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as the reference code: no division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    powers = _powers(rope.theta, head_dim)
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _yarn_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
