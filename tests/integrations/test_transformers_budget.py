"""Budgets in Hugging Face `generate`: the same outputs as the engine's, over the same float32 weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessorList

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams, budgets
from elastic_decode.assets import tiny_model_path
from elastic_decode.core import Generation, Phase
from elastic_decode.errors import BackendUnproven, ConfigError, NonFiniteLogits
from elastic_decode.integrations import transformers_budget
from elastic_decode.integrations.transformers_budget import BudgetLogitsProcessor

GREEDY = SamplingParams(temperature=0)
PROBLEMS = ["9 1 6 = 3", "9 3 7 = 20", "2 2 2 = 8", "7 5 3 = 38", "1 9 4 = 14", "8 8 8 = 72"]
# One a row: forced at once, forced in mid-thought, natural, unlimited, no solution, and other policies.
MIXED: list[Any] = [
    Budget(0, 3),
    Budget(7, 3),
    Budget(200, 3),
    Budget(None, None),
    Budget(5, 0),
    budgets.budget_forcing(30, 3, waits=2, wait=[5], final=[6, 7], newline=""),
]


class Bundled:
    def __init__(self) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_path())
        self.model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
        config = EngineConfig(dtype="float32", max_model_len=256)
        self.engine = Engine.from_pretrained(tiny_model_path(), config)

    @property
    def chats(self) -> list[Any]:
        return [[{"role": "user", "content": problem}] for problem in PROBLEMS]

    def inputs(self, prompts: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )


@pytest.fixture(scope="module")
def bundled() -> Iterator[Bundled]:
    bundled = Bundled()
    yield bundled
    bundled.engine.close()


def generated(model: Any, inputs: Any, processor: BudgetLogitsProcessor, **options: Any) -> list[Generation]:
    options = {"max_new_tokens": 100, **processor.generate_kwargs(), **options}
    return processor.generations(model.generate(**inputs, **options))


def same(ours: list[Generation], theirs: list[Generation]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.prompt_token_ids == other.prompt_token_ids
        for a, b in zip(one.completions, other.completions, strict=True):
            assert a.token_ids == b.token_ids
            assert (a.forced, a.phases, a.think_end) == (b.forced, b.phases, b.think_end)
            assert (a.think_tokens, a.solve_tokens) == (b.think_tokens, b.solve_tokens)
            assert (a.finish_reason, a.text, a.solution) == (b.finish_reason, b.text, b.solution)
            torch.testing.assert_close(
                torch.tensor([a.logprobs, a.sampling_logprobs]),
                torch.tensor([b.logprobs, b.sampling_logprobs]),
                atol=2e-4,
                rtol=1e-4,
            )


def test_greedy_with_a_budget_a_row_equals_the_engine(bundled: Bundled):
    inputs = bundled.inputs(bundled.chats)
    processor = BudgetLogitsProcessor(bundled.tokenizer, MIXED, sampling=GREEDY, max_model_len=256)
    ours = generated(bundled.model, inputs, processor)
    same(ours, bundled.engine.generate(bundled.chats, budget=MIXED, sampling=GREEDY))
    ends = {g.completions[0].think_end for g in ours}
    assert {"forced", "natural"} <= ends


def test_sampled_by_seed_equals_the_engine(bundled: Bundled):
    ways = [(1, 0, 1), (0.7, 0, 1), (1.3, 20, 1), (1, 0, 0.9), (2, 0, 1), (0, 0, 1)]
    sampling = [
        SamplingParams(temperature=t, top_k=k, top_p=p, seed=seed) for seed, (t, k, p) in enumerate(ways)
    ]
    processor = BudgetLogitsProcessor(
        bundled.tokenizer, MIXED, sampling=sampling, prompts=bundled.chats, n=3, max_model_len=256
    )
    ours = generated(bundled.model, bundled.inputs(bundled.chats), processor)
    same(ours, bundled.engine.generate(bundled.chats, budget=MIXED, sampling=sampling, n=3))
    assert len({tuple(c.token_ids) for c in ours[4].completions}) > 1


def test_rows_end_at_their_last_token_and_are_padded(bundled: Bundled):
    processor = BudgetLogitsProcessor(bundled.tokenizer, [Budget(5, 0), Budget(20, 3)], sampling=GREEDY)
    inputs = bundled.inputs(bundled.chats[:2])
    out = bundled.model.generate(**inputs, **processor.generate_kwargs(), max_new_tokens=100)
    first, second = (generation.completions[0] for generation in processor.generations(out))
    new = out[:, inputs["input_ids"].shape[1] :].tolist()
    assert first.finish_reason == "budget"
    assert len(first.token_ids) == 6  # five of thinking, and the close
    assert new[0] == first.token_ids + [0] * (len(new[0]) - 6)
    assert new[1] == second.token_ids  # nobody waits for more than the longest row


def test_without_the_criterion_eos_is_forced(bundled: Bundled):
    processor = BudgetLogitsProcessor(bundled.tokenizer, Budget(5, 0), sampling=GREEDY)
    inputs = bundled.inputs(bundled.chats[:2])
    out = bundled.model.generate(
        **inputs, logits_processor=LogitsProcessorList([processor]), do_sample=False, max_new_tokens=50
    )
    new = out[:, inputs["input_ids"].shape[1] :]
    close = bundled.tokenizer.convert_tokens_to_ids("</think>")
    assert new.shape[1] == 7
    assert new[:, 5:].tolist() == [[close, 2]] * 2


def test_a_prompt_that_has_closed_the_thought_starts_in_the_solution(bundled: Bundled):
    # As text: the last marker decides. As a chat: the template's own opening does, not the user's close.
    template = {"add_generation_prompt": True, "enable_thinking": False, "padding": True}
    inputs = bundled.tokenizer.apply_chat_template(
        bundled.chats, return_dict=True, return_tensors="pt", **template
    )
    processor = BudgetLogitsProcessor(bundled.tokenizer, Budget(7, 2), sampling=GREEDY, max_model_len=256)
    ours = generated(bundled.model, inputs, processor)
    theirs = bundled.engine.generate(
        bundled.chats,
        budget=Budget(7, 2),
        sampling=GREEDY,
        chat_template_kwargs={"enable_thinking": False},
    )
    same(ours, theirs)
    assert all(c.phases == [Phase.SOLVE] * 2 and c.think_end == "none" for g in ours for c in g.completions)


def test_start_phase_and_prompts_decide_against_markers_in_the_ids(bundled: Bundled):
    chats = [[{"role": "user", "content": "9 1 6 = 3 </think>"}]]
    inputs = bundled.inputs(chats)
    want = bundled.engine.generate(chats, budget=Budget(4, 2), sampling=GREEDY)
    for more in ({"prompts": chats}, {"start_phase": "think"}):
        processor = BudgetLogitsProcessor(bundled.tokenizer, Budget(4, 2), sampling=GREEDY, **more)
        same(generated(bundled.model, inputs, processor), want)


def test_max_new_tokens_and_stop_strings_of_generate(bundled: Bundled):
    inputs = bundled.inputs(bundled.chats[:3])
    whole = bundled.engine.generate(bundled.chats[:3], budget=Budget(30, 3), sampling=GREEDY)
    processor = BudgetLogitsProcessor(bundled.tokenizer, Budget(30, 3), sampling=GREEDY)
    for generation, full in zip(
        generated(bundled.model, inputs, processor, max_new_tokens=4), whole, strict=True
    ):
        completion = generation.completions[0]
        assert completion.token_ids == full.completions[0].token_ids[:4]
        assert completion.finish_reason == "length"

    class FirstRowIsDone(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            done = torch.zeros(len(input_ids), dtype=torch.bool)
            done[0] = input_ids.shape[1] >= inputs["input_ids"].shape[1] + 3
            return done

    processor = BudgetLogitsProcessor(bundled.tokenizer, Budget(30, 3), sampling=GREEDY)
    options = processor.generate_kwargs()
    options["stopping_criteria"].append(FirstRowIsDone())
    out = bundled.model.generate(**inputs, **options, max_new_tokens=100)
    first, second, _ = processor.generations(out)
    assert first.completions[0].finish_reason == "stop"
    assert first.completions[0].token_ids == whole[0].completions[0].token_ids[:3]
    assert second.completions[0].token_ids == whole[1].completions[0].token_ids


# ---- another checkpoint: random weights, a close that is text of several tokens, EOS at every turn ----

PIECES = [*"</think>.\u0120abo", "</", "th", "nk", "nk>", ".<", "<eos>"]


def small_bpe() -> Any:
    """A vocabulary so small that random weights write the close, and parts of it, by themselves."""
    vocab = {piece: at for at, piece in enumerate(dict.fromkeys(PIECES))}
    merges = [("<", "/"), ("t", "h"), ("n", "k"), ("nk", ">"), (".", "<")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )


@pytest.fixture(scope="module")
def textual() -> Iterator[Any]:
    tokenizer = small_bpe()
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 3,  # padded, as checkpoints are
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    kept = Engine.from_model(
        model, tokenizer, EngineConfig(dtype="float32", max_model_len=96), think_close="</think>"
    )
    yield SimpleNamespace(tokenizer=tokenizer, model=model, engine=kept)
    kept.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_a_textual_close_of_several_tokens_equals_the_engine(textual: Any, temperature: float):
    texts = ["ab", "oab.", "a</think>b", "th", "b a b a", "</", "o", "nk> a"] * 3
    plans = [Budget(t, s) for t in (0, 1, 4, 9, 20, None) for s in (0, 2, 5, 11)]
    sampling = [SamplingParams(temperature=temperature, seed=seed) for seed in range(len(texts))]
    processor = BudgetLogitsProcessor(
        textual.tokenizer,
        plans,
        sampling=sampling,
        delimiters=textual.engine.delimiters,
        max_model_len=96,
    )
    inputs = textual.tokenizer(texts, return_tensors="pt", padding=True)
    lengths = inputs["attention_mask"].sum(1)
    assert lengths.min() < lengths.max()
    inputs.pop("token_type_ids", None)
    ours = generated(textual.model, inputs, processor)
    theirs = textual.engine.generate(texts, budget=plans, sampling=sampling)
    same(ours, theirs)
    completions = [generation.completions[0] for generation in ours]
    assert "forced" in {c.think_end for c in completions}
    if temperature:  # draws that the close replaced, closes the model wrote, and some it was helped with
        assert {"eos", "forced", "none"} <= {c.think_end for c in completions}


# ---- what is refused ----


def test_refusals(bundled: Bundled):
    inputs = bundled.inputs(bundled.chats[:2])

    def fresh(*args: Any, **options: Any) -> BudgetLogitsProcessor:
        return BudgetLogitsProcessor(bundled.tokenizer, *args, **{"sampling": GREEDY, **options})

    def run(processor: BudgetLogitsProcessor, **options: Any) -> Any:
        return bundled.model.generate(
            **inputs, **{**processor.generate_kwargs(), "max_new_tokens": 8, **options}
        )

    with pytest.raises(ConfigError, match="beam"):
        run(fresh(Budget(3, 3)), num_beams=2)
    with pytest.raises(ConfigError, match="multiplies rows"):
        run(fresh(Budget(3, 3), prompts=bundled.chats[:2]), num_return_sequences=2, do_sample=True)
    with pytest.raises(ConfigError, match="3 entries for 2 prompts"):
        run(fresh([Budget(3, 3)] * 3))
    with pytest.raises(ConfigError, match="row 0 does not end in the ids of its prompt"):
        run(fresh(Budget(3, 3), prompts=bundled.chats[1::-1]))
    with pytest.raises(ConfigError, match="stop_strings"):
        fresh(sampling=SamplingParams(stop="x"))
    used = fresh(Budget(3, 3))
    run(used)
    with pytest.raises(ConfigError, match="one call of generate"):
        run(used)
    with pytest.raises(ConfigError, match="has not called it yet"):
        _ = fresh().finished


def test_rows_without_a_candidate_raise(bundled: Bundled):
    class Poison(transformers.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.index_fill(0, torch.tensor([1]), torch.nan)

    processor = BudgetLogitsProcessor(bundled.tokenizer, Budget(3, 3), sampling=GREEDY)
    options = processor.generate_kwargs()
    options["logits_processor"] = LogitsProcessorList([Poison(), processor])
    out = bundled.model.generate(**bundled.inputs(bundled.chats[:2]), **options, max_new_tokens=8)
    with pytest.raises(NonFiniteLogits):
        processor.generations(out)


def test_a_step_reads_nothing_back(bundled: Bundled, monkeypatch: pytest.MonkeyPatch):
    """After the first call, which reads the prompts, no tensor is turned into Python values."""
    processor = BudgetLogitsProcessor(bundled.tokenizer, Budget(3, 3), sampling=GREEDY)
    ids = bundled.inputs(bundled.chats[:2])["input_ids"]
    scores = torch.randn(2, 144)
    processor(ids, scores)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a step read a tensor")

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for _ in range(8):
        ids = torch.cat([ids, torch.zeros((2, 1), dtype=torch.long)], dim=1)
        processor(ids, scores)
        _ = processor.finished


def test_where_kernels_must_be_proven_the_draw_is_checked_first(
    bundled: Bundled, monkeypatch: pytest.MonkeyPatch
):
    checked = []

    def check(op: str, *args: Any, **more: Any) -> Any:
        checked.append(op)
        outcome = real(op, *args, **more)
        return outcome if fine else outcome._replace(ok=False, problem="made up")

    real, fine = transformers_budget.selfcheck.check, True
    monkeypatch.setattr(transformers_budget, "must_be_proven", lambda device: True)
    monkeypatch.setattr(transformers_budget.selfcheck, "check", check)
    inputs = bundled.inputs(bundled.chats[:1])
    processor = BudgetLogitsProcessor(bundled.tokenizer, Budget(2, 2), sampling=GREEDY)
    assert generated(bundled.model, inputs, processor)[0].completions[0].think_end == "forced"
    assert checked == ["draw"]
    fine = False
    processor = BudgetLogitsProcessor(bundled.tokenizer, Budget(2, 2), sampling=GREEDY)
    with pytest.raises(BackendUnproven, match="made up"):
        bundled.model.generate(**inputs, **processor.generate_kwargs(), max_new_tokens=8)


def test_the_documented_example_runs(capsys: pytest.CaptureFixture[str]):
    text = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    (source,) = re.findall(r"^## transformers.*?^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(compile(source, "docs/integrations.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert printed[1].endswith("| 5 forced")
