"""The bundled model as transformers sees it: files, tokenizer, chat template, and what thinking is worth."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_decode.delimiters import resolve
from elastic_decode.tasks import countdown

ROOT = Path(__file__).parents[2]
TINY = ROOT / "elastic_decode" / "assets" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def recipe():
    path = ROOT / "recipes" / "bundled_model" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("bundled_model_evaluate", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_size(model):
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert sum(f.stat().st_size for f in TINY.glob("*.safetensors")) <= 8_000_000


def test_files_are_what_hubs_hold(model, tokenizer):
    config = json.loads((TINY / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["vocab_size"] >= len(tokenizer)
    generation = json.loads((TINY / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert not {"temperature", "top_p", "top_k"} & set(generation)
    assert (TINY / "README.md").exists()


def test_every_word_is_one_token(tokenizer):
    ids = tokenizer(list(countdown.WORDS), add_special_tokens=False)["input_ids"]
    assert all(len(i) == 1 and i != [tokenizer.unk_token_id] for i in ids)
    assert len({i[0] for i in ids}) == len(countdown.WORDS)


def test_round_trip(tokenizer):
    text = "3 5 2 = 16 <think> + × 8 16 ok </think> + × <eos>"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == f"<bos> {text}"
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix(" <eos>")
    assert tokenizer("3 minus 5", add_special_tokens=False)["input_ids"][1] == tokenizer.unk_token_id


def test_delimiters(tokenizer):
    found = resolve(tokenizer)
    ids = [tokenizer.convert_tokens_to_ids(t) for t in (countdown.OPEN, countdown.CLOSE)]
    assert [found.open.ids, found.close.ids] == [(i,) for i in ids]
    assert tuple(found.eos_ids) == (tokenizer.eos_token_id,)
    assert not set(ids) & set(tokenizer.all_special_ids)


def rendered(tokenizer, chat, **options):
    text = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    ids = tokenizer.apply_chat_template(chat, return_dict=False, **options)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    return text


def test_chat_template(tokenizer):
    user, assistant = {"role": "user", "content": "3 5 2 = 16"}, {"role": "assistant", "content": "+ ×"}
    assert rendered(tokenizer, [user]) == "<bos> 3 5 2 = 16"
    assert rendered(tokenizer, [user], add_generation_prompt=True) == "<bos> 3 5 2 = 16 <think>"
    closed = rendered(tokenizer, [user], add_generation_prompt=True, enable_thinking=False)
    assert closed == "<bos> 3 5 2 = 16 <think> </think>"
    thought = {"role": "assistant", "content": "<think> + × 8 16 ok </think> + ×"}
    for turn in (assistant, thought):
        old = rendered(tokenizer, [user, turn, user], add_generation_prompt=True)
        assert old == "<bos> 3 5 2 = 16 <think> </think> + × <eos> 3 5 2 = 16 <think>"
    with pytest.raises(Exception, match="user and assistant only, not system"):
        rendered(tokenizer, [{"role": "system", "content": "be brief"}, user])


def test_a_string_is_tokenised_as_the_chat(tokenizer):
    problem = countdown.sample("test", 1, seed=0)[0]
    chat = tokenizer.apply_chat_template(problem.chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer(f"{problem.prompt} <think>")["input_ids"] == chat
    # Without the marker the model opens the thought itself.
    assert tokenizer(problem.prompt)["input_ids"] == chat[:-1]


def test_the_model_opens_thoughts_itself(model, tokenizer):
    ids = tokenizer([p.prompt for p in countdown.sample("test", 32, seed=1)], return_tensors="pt")[
        "input_ids"
    ]
    with torch.inference_mode():
        probability = (
            model(input_ids=ids).logits[:, -1].softmax(-1)[:, tokenizer.convert_tokens_to_ids("<think>")]
        )
    assert probability.min() > 0.5


def test_thinking_is_worth_something(model, tokenizer, recipe):
    problems = countdown.sample("test", 192, seed=0)
    torch.manual_seed(0)
    accuracy = {}
    for budget in (0, 20, None):
        out = recipe.decode(model, tokenizer, problems, think=budget)
        assert budget is None or int(out.think_tokens.max()) <= budget
        right = sum(countdown.grade(p, s) for p, s in zip(problems, out.solutions, strict=True))
        accuracy[budget] = right / len(problems)
    # The card's .649, .782 and .992, give or take three standard errors of 192 samples.
    assert 0.55 < accuracy[0] < 0.75, accuracy
    assert accuracy[0] < accuracy[20] < accuracy[None], accuracy
    assert accuracy[None] > 0.97, accuracy
