"""config.json in both forms, and everything that must be refused by name."""

import json

import pytest

from elastic_decode.config import ModelConfig, RopeConfig
from elastic_decode.errors import CheckpointError, UnsupportedModel

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def of(family, **changes):
    """A hub-form config.json of `family`; a value of None stays, `...` drops the key."""
    names = {
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
    }
    config = {**QWEN2, "architectures": [names[family]], "model_type": family, **changes}
    return {key: value for key, value in config.items() if value is not ...}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 2048,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_both_forms_agree(family, rope, make_model, hub_form, tmp_path):
    model = make_model(family, rope_parameters={"rope_theta": 5000.0, **rope}, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    new = ModelConfig.from_hf(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_parameters"]["rope_theta"] == 5000.0
    hub_form(tmp_path)
    assert "rope_parameters" not in json.loads((tmp_path / "config.json").read_text())
    assert ModelConfig.from_hf(tmp_path) == new == ModelConfig.from_hf(model.config)
    assert (new.rope.type, new.rope.theta, new.dtype) == (rope["rope_type"], 5000.0, "float32")
    assert new.tie_embeddings
    assert new.qk_norm == (family == "qwen3")
    assert new.attention_bias == (family == "qwen2")
    assert not new.o_bias


def test_hub_key_wins_over_the_new_one_as_in_transformers():
    both = of(
        "llama", rope_scaling={"type": "linear", "factor": 3.0}, rope_parameters={"rope_type": "default"}
    )
    assert ModelConfig.from_hf({**both, "rope_theta": 7.0}).rope == RopeConfig(
        type="linear", theta=7.0, factor=3.0, original_length=4096
    )


def test_what_a_file_leaves_out():
    """The defaults are those of transformers."""
    sparse = ("num_key_value_heads", "max_position_embeddings")
    llama = ModelConfig.from_hf(of("llama", **dict.fromkeys(sparse, ...)))
    assert (llama.num_kv_heads, llama.head_dim, llama.max_position_embeddings) == (8, 8, 2048)
    assert (llama.rope.theta, llama.rms_norm_eps, llama.tie_embeddings, llama.dtype) == (
        1e4,
        1e-6,
        False,
        None,
    )
    assert ModelConfig.from_hf(of("qwen3")).head_dim == 128
    mistral = ModelConfig.from_hf(of("mistral", num_key_value_heads=...))
    assert mistral.num_kv_heads == 8
    assert mistral.sliding_window == (4096,) * 4
    assert ModelConfig.from_hf(of("llama", architectures=None)).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (of("qwen2", sliding_window=128, max_window_layers=2), (None,) * 4),
        (
            of("qwen2", sliding_window=128, max_window_layers=2, use_sliding_window=True),
            (None, None, 128, 128),
        ),
        (of("qwen3", sliding_window=9, max_window_layers=9, use_sliding_window=True), (None,) * 4),
        (
            of(
                "qwen3",
                sliding_window=9,
                use_sliding_window=True,
                layer_types=["sliding_attention", "full_attention"] * 2,
            ),
            (9, None, 9, None),
        ),
        (of("mistral", sliding_window=None), (None,) * 4),
        (of("mistral", sliding_window=64), (64,) * 4),
        (of("llama", sliding_window=None), (None,) * 4),
    ],
)
def test_sliding_windows(config, windows):
    assert ModelConfig.from_hf(config).sliding_window == windows


SLIDING = ["sliding_attention"] * 4


@pytest.mark.parametrize(
    ("config", "error", "named"),
    [
        (of("qwen2", architectures=["Qwen2MoeForCausalLM"]), UnsupportedModel, "Qwen2MoeForCausalLM"),
        (of("qwen2", architectures=[], model_type="gpt2"), UnsupportedModel, "gpt2"),
        (of("qwen2", architectures=None, model_type=...), UnsupportedModel, "model_type None"),
        (of("llama", hidden_act="gelu"), UnsupportedModel, "gelu"),
        (of("llama", quantization_config={"quant_method": "awq"}), UnsupportedModel, "awq"),
        (of("llama", torch_dtype="float64"), UnsupportedModel, "float64"),
        (of("llama", rope_scaling={"type": "longrope"}), UnsupportedModel, "longrope"),
        (of("llama", sliding_window=16), UnsupportedModel, "sliding_window"),
        (of("llama", layer_types=SLIDING), UnsupportedModel, "sliding_window"),
        (of("qwen2", layer_types=SLIDING), UnsupportedModel, "use_sliding_window"),
        (
            of("qwen2", layer_types=SLIDING, use_sliding_window=True, sliding_window=None),
            UnsupportedModel,
            "sliding_window is null",
        ),
        (of("mistral", layer_types=["full_attention"] * 4), UnsupportedModel, "layer_types"),
        (of("qwen3", layer_types=["chunked_attention"] * 4), UnsupportedModel, "chunked_attention"),
        (of("qwen3", layer_types=["full_attention"]), CheckpointError, "1 entries for 4 layers"),
        (of("mistral", sliding_window=0), CheckpointError, "sliding_window"),
        (of("llama", hidden_size=...), CheckpointError, "'hidden_size'"),
        (of("llama", hidden_size="64"), CheckpointError, "'hidden_size'"),
        (of("llama", num_hidden_layers=0), CheckpointError, "'num_hidden_layers'"),
        (of("llama", num_key_value_heads=3), CheckpointError, "num_kv_heads 3"),
        (of("llama", head_dim=7), CheckpointError, "head_dim"),
        (of("llama", vocab_size=True), CheckpointError, "'vocab_size'"),
    ],
)
def test_errors_name_the_cause(config, error, named):
    with pytest.raises(error, match=named):
        ModelConfig.from_hf(config)


def test_folder_errors(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        ModelConfig.from_hf(str(tmp_path))
    with pytest.raises(TypeError, match="int"):
        ModelConfig.from_hf(3)
