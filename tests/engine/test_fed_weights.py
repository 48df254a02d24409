"""Weights given to the engine: from another module, and for what a shared module does not hold as it is."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.errors import ConfigError, WeightsIncomplete

CONFIG = EngineConfig(dtype="float32", kv_memory="16MiB", max_model_len=64, max_batch=8, page_size=4)
PROMPTS = ["9 1 6 = 3", "2 3 4 = 24"]


@pytest.fixture(scope="module")
def parts():
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    return model, other, AutoTokenizer.from_pretrained(tiny_model_path())


def decoded(engine):
    sampling = SamplingParams(temperature=0)
    generations = engine.generate(PROMPTS, budget=Budget(think=12, solve=3), sampling=sampling)
    return [(c.token_ids, c.logprobs) for g in generations for c in g.completions]


def test_an_engine_takes_over_another_modules_weights(parts):
    """Pushed into an engine of its own weights, prefix pages of the old ones are not used again."""
    model, other, tokenizer = parts
    with Engine.from_model(other, tokenizer, CONFIG) as engine:
        want = decoded(engine)
    with Engine.from_pretrained(tiny_model_path(), CONFIG) as engine:
        assert decoded(engine) == decoded(engine) != want
        assert engine.stats()["prefix_hit_tokens"] > 0
        hits = engine.stats()["prefix_hit_tokens"]
        assert engine.sync_weights(iter(other.state_dict().items())) == 1
        assert decoded(engine) == want
        assert engine.stats()["prefix_hit_tokens"] == hits
        with pytest.raises(ConfigError, match="'nonsense' is none of the tensors"):
            engine.sync_weights([("nonsense", torch.zeros(1))])
        pairs = list(model.state_dict().items())
        assert engine.sync_weights(pairs[:3]) == 3, "some of them may be left as they are"


def test_a_fed_engine_wants_its_weights(parts):
    model, other, tokenizer = parts
    fed = [name for name, _ in model.named_parameters() if "proj" in name]
    mixed = {name: p.detach() for name, p in other.named_parameters() if name in fed}
    with Engine.from_model(model, tokenizer, CONFIG, fed=fed) as engine:
        with pytest.raises(ConfigError, match="no values yet"):
            engine.generate(PROMPTS)
        engine.sync_weights((name, model.get_parameter(name)) for name in fed)
        base = decoded(engine)
        engine.sync_weights(mixed.items())
        assert decoded(engine) != base
        with pytest.raises(ConfigError, match="without weights"):
            engine.sync_weights()
        engine.sync_weights((name, model.get_parameter(name)) for name in fed)
        assert decoded(engine) == base
    with Engine.from_model(model, tokenizer, CONFIG) as engine:
        assert decoded(engine) == base


@pytest.mark.parametrize("fed", [False, True])
def test_weights_that_broke_off_are_not_decoded_with(parts, fed):
    model, other, tokenizer = parts
    names = [name for name, _ in model.named_parameters()]
    if fed:
        engine = Engine.from_model(model, tokenizer, CONFIG, fed=names)
        engine.sync_weights(model.named_parameters())
    else:
        engine = Engine.from_pretrained(tiny_model_path(), CONFIG)
    with engine:
        assert set(names) <= engine.weight_shapes.keys()
        before = decoded(engine)
        with pytest.raises(ConfigError, match="has shape"):
            engine.sync_weights([(names[0], torch.zeros(1))])
        assert decoded(engine) == before, "refused before anything was copied"

        def broken():
            yield names[0], other.get_parameter(names[0])
            raise OSError("the peer went away")

        with pytest.raises(OSError, match="went away"):
            engine.sync_weights(broken())
        with pytest.raises(WeightsIncomplete, match="broke off"):
            decoded(engine)
        engine.sync_weights(model.named_parameters())
        assert decoded(engine) == before
