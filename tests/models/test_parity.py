"""The decoder computes what the Hugging Face module computes."""

import pytest
import torch

from elastic_decode.config import ModelConfig
from elastic_decode.models.weights import load_checkpoint


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_prefill_logits(family, make_model, session, backend, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    config = ModelConfig.from_hf(tmp_path)
    weights = load_checkpoint(tmp_path, config, torch.float32)
    prompts = [list(range(5, 5 + n)) for n in (9, 1, 17)]
    for prompt, logits in zip(prompts, session(config, weights, 3, 64, backend).step(prompts), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0]
        assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()
