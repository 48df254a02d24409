"""The rotary tables are those of transformers' own functions."""

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from elastic_decode.config import ModelConfig, RopeConfig
from elastic_decode.errors import CheckpointError, UnsupportedModel
from elastic_decode.models.rope import cos_sin_table, inverse_frequencies

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
SCALED = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": YARN,
    "yarn-factor-one": {**YARN, "factor": 1.0},
    "yarn-attention-factor": {**YARN, "attention_factor": 0.7},
    "yarn-betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-untruncated": {**YARN, "truncate": False},
    "yarn-mscale": {**YARN, "factor": 40.0, "mscale": 0.8, "mscale_all_dim": 1.2},
    "yarn-mscale-alone": {**YARN, "mscale": 0.8},
    "yarn-degenerate": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
}


def hf_config(rope, theta=10000.0, head_dim=64):
    return transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=32,
        vocab_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=8192,
        rope_parameters={"rope_theta": theta, **rope},
    )


@pytest.mark.parametrize("theta", [10000.0, 1000000])
@pytest.mark.parametrize("name", SCALED)
def test_scaled_frequencies(name, theta):
    config = hf_config(SCALED[name], theta)
    want, scale = ROPE_INIT_FUNCTIONS[SCALED[name]["rope_type"]](config, None)
    got, factor = inverse_frequencies(ModelConfig.from_hf(config).rope, 64)
    torch.testing.assert_close(got, want, rtol=3e-7, atol=0)
    assert factor == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("name", ["default", *SCALED])
def test_table_against_the_module(name):
    """Rows of the table against what a Llama module's rotary embedding returns, up to long positions."""
    config = hf_config({"rope_type": "default"} if name == "default" else SCALED[name])
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    table = cos_sin_table(ModelConfig.from_hf(config).rope, 64, 8192)
    assert table.shape == (8192, 64)
    assert table.dtype == torch.float32
    cos, sin = rotary(torch.zeros(1), torch.arange(8192)[None])
    torch.testing.assert_close(table, torch.cat([cos[0, :, :32], sin[0, :, :32]], -1), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        table[:512], torch.cat([cos[0, :512, :32], sin[0, :512, :32]], -1), rtol=0, atol=6e-5
    )


@pytest.mark.parametrize("head_dim", [16, 128])
def test_dynamic_by_position(head_dim):
    config = hf_config({"rope_type": "dynamic", "factor": 2.0}, head_dim=head_dim)
    config.max_position_embeddings = 32
    table = cos_sin_table(ModelConfig.from_hf(config).rope, head_dim, 100)
    for position in (0, 5, 31, 32, 33, 70, 99):
        frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, None, seq_len=torch.tensor(position + 1))
        angles = position * frequencies
        torch.testing.assert_close(
            table[position], torch.cat([angles.cos(), angles.sin()]), rtol=0, atol=1e-5
        )


def test_yarn_without_a_factor_takes_the_ratio():
    rope = {"type": "yarn", "factor": None, "original_max_position_embeddings": 2048}
    assert RopeConfig.from_hf({"rope_scaling": rope}, 8192).factor == 4.0


@pytest.mark.parametrize(
    ("config", "error", "named"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, UnsupportedModel, "longrope"),
        ({"rope_parameters": {"rope_type": "proportional"}}, UnsupportedModel, "proportional"),
        (
            {"rope_scaling": {"type": "default", "mrope_section": [1, 2]}},
            UnsupportedModel,
            "mrope_section",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, UnsupportedModel, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.25}, UnsupportedModel, "partial_rotary_factor 0.25"),
        ({"rope_scaling": {"type": "linear"}}, CheckpointError, "'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, CheckpointError, "'low_freq_factor'"),
        ({"rope_theta": "big"}, CheckpointError, "theta"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, CheckpointError, "factor"),
        ({"rope_parameters": {"full_attention": {}}}, UnsupportedModel, "full_attention"),
    ],
)
def test_errors_name_the_cause(config, error, named):
    with pytest.raises(error, match=named):
        RopeConfig.from_hf(config, 4096)
