"""The trainer's forward pass by Triton's kernels: under the interpreter on the CPU, compiled on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.rl.engine_forward import EngineForward
from elastic_decode.rl.logprobs import pack

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETING else "cuda"

pytestmark = pytest.mark.interpret if INTERPRETING else pytest.mark.gpu


@pytest.fixture(autouse=True)
def sums_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy multiplies for the interpreter, in an order of its own for each shape; a GPU's instructions have
    one, and are taken as they are."""
    if not INTERPRETING:
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right, total = a.data.astype("float32"), b.data.astype("float32"), d.data.copy()
        for k in range(left.shape[1]):
            total += left[:, k, None] * right[None, k]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


# The interpreter does no arithmetic in bfloat16.
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETING else [torch.float32, torch.bfloat16])
def test_to_the_last_bit(dtype):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1 if INTERPRETING else 3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(DEVICE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    prompts = [list(range(30, 42)), list(range(40, 67))]
    sizes = {"max_batch": 3, "prefill_tokens": 7, "max_model_len": 96, "kv_memory": "8MiB"}
    with Engine.from_model(
        model, tokenizer, EngineConfig(device=DEVICE, backend="triton", **sizes)
    ) as engine:
        generations = engine.generate(
            prompts[:1] if INTERPRETING else prompts,
            n=1 if INTERPRETING else 8,
            budget=Budget(think=2, solve=2),
            sampling=SamplingParams(temperature=0.7, seed=3),
        )
        outputs = [(g.prompt_token_ids, c) for g in generations for c in g.completions]
        samples = [(prompt, c.token_ids) for prompt, c in outputs]
        packed = pack(samples, range(len(samples)), [0.7] * len(samples), DEVICE)
        mine, _ = EngineForward(engine).token_logprobs(model, packed)
    assert any(any(c.forced) for _, c in outputs)
    assert mine.tolist() == [x for _, c in outputs for x in c.logprobs]
    mine.sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
    assert all(bool(parameter.grad.any()) for parameter in model.parameters())
