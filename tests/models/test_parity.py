"""The decoder computes what the Hugging Face module computes, for every family and option."""

import pytest
import torch

from elastic_decode.config import ModelConfig
from elastic_decode.models.weights import load_checkpoint

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS = {
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen2-layer-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2-unused-window": ("qwen2", {"use_sliding_window": False, "sliding_window": 4}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-bias": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "llama-3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 7, "head_dim": 10}),
    "one-kv-head": ("qwen2", {"num_key_value_heads": 1}),
    "all-kv-heads": ("llama", {"num_key_value_heads": 6}),
}
PROMPTS = [[5, 17, 60, 3, 96, 41, 41, 8, 0], [77], [*range(20, 57)]]
DECODED = 6


@pytest.fixture(scope="module", params=VARIANTS, ids=list(VARIANTS))
def pair(request, tmp_path_factory, make_model, hub_form):
    """A module and its checkpoint, half of them in the form of the hub."""
    family, changes = VARIANTS[request.param]
    model = make_model(family, **changes)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    if list(VARIANTS).index(request.param) % 2 and "layer_types" not in changes:
        hub_form(folder)
    return model, folder


@torch.no_grad()
def hf_logits(model, ids):
    return model(torch.tensor([ids])).logits[0].float()


def test_prefill_chunks_and_decode(pair, session, backend):
    """Whole prompts, then tokens one by one; and the same in chunks; both equal one full HF forward a row."""
    model, folder = pair
    config = ModelConfig.from_hf(folder)
    weights = load_checkpoint(folder, config, torch.float32)
    tails = [torch.randint(0, 97, (DECODED,)).tolist() for _ in PROMPTS]
    expected = [hf_logits(model, p + t) for p, t in zip(PROMPTS, tails, strict=True)]

    whole = session(config, weights, backend)
    pieces = [whole.step(PROMPTS)] + [whole.step([[t[i]] for t in tails]) for i in range(DECODED)]
    chunked = session(config, weights, backend)
    cuts = [(0, 4), (4, 5), (5, 18), (18, 37)]
    parts = [chunked.step([p[a:b] for p in PROMPTS]) for a, b in cuts]
    parts += [chunked.step([t[:4] for t in tails]), chunked.step([t[4:] for t in tails])]
    for steps in (pieces, parts):
        for row, want in enumerate(expected):
            got = torch.cat([step[row] for step in steps])
            assert (got - want).abs().max() < 2e-5 * want.abs().max()


def test_rows_selects_tokens(pair, session, backend):
    """Only the wanted rows' hidden states, bit for bit those of the whole pass."""
    _, folder = pair
    config = ModelConfig.from_hf(folder)
    weights = load_checkpoint(folder, config, torch.float32)
    every = session(config, weights, backend).step(PROMPTS)
    last = session(config, weights, backend).step(PROMPTS, last_only=True)
    for all_tokens, only_last in zip(every, last, strict=True):
        if backend == "reference":  # its linear is torch's, which rounds otherwise for another number of rows
            torch.testing.assert_close(all_tokens[-1:], only_last, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(all_tokens[-1:], only_last)


def test_greedy_equals_generate(pair, session, backend):
    model, folder = pair
    config = ModelConfig.from_hf(folder)
    got = session(config, load_checkpoint(folder, config, torch.float32), backend).greedy(PROMPTS, 10)
    for prompt, tokens in zip(PROMPTS, got, strict=True):
        ids = torch.tensor([prompt])
        want = model.generate(ids, max_new_tokens=10, do_sample=False, attention_mask=torch.ones_like(ids))
        assert tokens == want[0, len(prompt) :].tolist()


def test_bfloat16(pair, session, backend):
    """No further from float32 than twice what the HF module in bfloat16 is."""
    model, folder = pair
    config = ModelConfig.from_hf(folder)
    weights = load_checkpoint(folder, config, torch.bfloat16)
    half = type(model).from_pretrained(folder, dtype=torch.bfloat16)
    rounded = type(model).from_pretrained(folder, dtype=torch.float32)
    rounded.load_state_dict({name: t.float() for name, t in half.state_dict().items()})
    got = torch.cat(session(config, weights, backend).step(PROMPTS))
    want = torch.cat([hf_logits(rounded, p) for p in PROMPTS])
    theirs = torch.cat([hf_logits(half, p) for p in PROMPTS])
    assert (got - want).norm() <= 2 * (theirs - want).norm()
    assert (got - want).abs().max() <= 2 * (theirs - want).abs().max()


def test_dynamic_rope_decodes_as_hf(make_model, session, backend, tmp_path):
    """Past the original length each token gets the base of its own length, as in HF's cached decode."""
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    model = make_model("llama", rope_parameters=rope, max_position_embeddings=16)
    model.save_pretrained(tmp_path)
    config = ModelConfig.from_hf(tmp_path)
    ids = torch.randint(0, 97, (40,)).tolist()
    runner = session(config, load_checkpoint(tmp_path, config, torch.float32), backend, rows=1)
    got = [runner.step([ids[:10]])[0]] + [runner.step([[token]])[0] for token in ids[10:]]
    with torch.no_grad():
        output = model(torch.tensor([ids[:10]]), use_cache=True)
        want = [output.logits[0]]
        for token in ids[10:]:
            output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
            want.append(output.logits[0])
    expected = torch.cat(want)
    assert (torch.cat(got) - expected).abs().max() < 2e-5 * expected.abs().max()


def test_empty_batch(make_model, session, backend, tmp_path):
    """No tokens at all, and rows that idle, give no logits and write nothing."""
    make_model("qwen2").save_pretrained(tmp_path)
    config = ModelConfig.from_hf(tmp_path)
    runner = session(config, load_checkpoint(tmp_path, config, torch.float32), backend)
    assert [tuple(row.shape) for row in runner.step([[], [], []])] == [(0, 97)] * 3
    assert all(torch.isnan(t).all() for pages in runner.kv for t in pages)
    logits = runner.step([[], [4, 5], []])
    assert [len(row) for row in logits] == [0, 2, 0]
    assert torch.isfinite(logits[1]).all()
