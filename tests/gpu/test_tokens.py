"""The engine on a GPU decodes what the CPU's and Hugging Face do, however its steps are launched."""

import random

import pytest
import torch

from elastic_decode import Engine, EngineConfig, SamplingParams, budgets
from elastic_decode.kernels import gpu

CASES = (
    "qwen2-tied",
    "qwen2-yarn",
    "qwen3-wide-heads",
    "llama3",
    "llama-linear-bias",
    "llama-dynamic",
    "mistral-window",
)
NEAR_TIE = 1e-4  # two best logits as near as this may change places: float32 sums in another order
# Nothing here may change a bit of any result.
WAYS = (
    {"horizon": 2},
    {"horizon": 7, "max_batch": 5},
    {"horizon": 32, "max_batch": 24},
    {"horizon": 1, "cuda_graphs": False},
    {"horizon": 32, "cuda_graphs": False, "max_batch": 3, "prefill_tokens": 7},
    {"horizon": 8, "page_size": 32, "prefix_cache": True},
    {"horizon": 8, "page_size": 8, "max_batch": 1},
)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_hugging_face_and_the_cpu(case, target, helpers):
    """float32 on both sides; where they part, the two best logits must have been as good as equal."""
    family, changes = helpers.CASES[case]
    model = helpers.random_model(family, changes)
    prompts = helpers.mixed_prompts(target.pick(24, 4))
    greedy = {"budget": budgets.truncate(helpers.NEW), "sampling": SamplingParams(temperature=0)}
    expected = [helpers.hf_greedy(model, prompt) for prompt in prompts]
    with target.engine(model, max_batch=16, max_model_len=64, horizon=8) as engine:
        ours = [g.completions[0].token_ids for g in engine.generate(prompts, **greedy)]
    config = EngineConfig(dtype="float32", max_batch=16, max_model_len=64, kv_memory="64MiB")
    target.patch.undo()
    with Engine.from_model(model, engine.tokenizer, config) as engine:
        cpu = [g.completions[0].token_ids for g in engine.generate(prompts, **greedy)]
    ties = 0
    for tokens, (want, gaps), on_cpu in zip(ours, expected, cpu, strict=True):
        for other in (want, on_cpu):
            if tokens != other:
                split = next(i for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b)
                assert gaps[min(split, len(gaps) - 1)] < NEAR_TIE, (case, split, tokens, other)
                ties += 1
    assert ties <= 2


@pytest.mark.parametrize(
    ("dtype", "kernels"),
    [
        ("float32", "default"),
        ("bfloat16", "default"),
        ("float16", "default"),
        ("bfloat16", "launched early"),
        ("bfloat16", "CUDA C++"),
    ],
)
def test_no_way_to_launch_changes_a_bit(dtype, kernels, target, flights, model):
    """Graphs on and off, horizons, batches, chunks, pages, kernels launched before those ahead of them end:
    tokens, logprobs, reasons are the same.
    """
    if not target.real and (dtype == "float16" or kernels != "default"):
        pytest.skip("of the GPU's kernels only")
    wanted = flights.requests(random.Random(5), target.pick(40, 12))
    options = {"dtype": dtype, "max_batch": 16, "backend": "cuda" if kernels == "CUDA C++" else "auto"}
    with target.engine(model, **options, horizon=1) as engine:
        expected = flights.decode_all(engine, wanted)
    assert any(forced for completions in expected for one in completions for forced in one[3])
    if kernels == "launched early":
        target.patch.setattr(gpu, "DEPENDENT_LAUNCH", True)
    for way in WAYS:
        with target.engine(model, **{**options, **way}) as engine:
            found = flights.decode_all(engine, wanted)
        different = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
        assert not different, f"{way}: requests {different} differ"


def test_one_thought_many_budgets(target, model):
    """Each branch of a fork is the run with its budget, on any horizon."""
    thoughts, sampling = [0, 3, 9, 30], SamplingParams(seed=3, temperature=0.8)
    prompts = [[1, 2, 3], [9] * 20]
    with target.engine(model, horizon=8, max_batch=8) as engine:
        curves = engine.fork(prompts, think_at=thoughts, solve=6, sampling=sampling)
        for prompt, curve in zip(prompts, curves, strict=True):
            for think, branch in zip(thoughts, curve.completions, strict=True):
                budget = budgets.elastic(think=think, solve=6)
                [alone] = engine.generate([prompt], budget=budget, sampling=sampling)
                assert alone.completions[0].token_ids == branch.token_ids, think
                assert alone.completions[0].logprobs == branch.logprobs, think


def test_recorded_steps_decode_with_trained_weights(target, helpers):
    """A graph names the weights' memory: what is trained in place is what it reads."""
    module = helpers.random_model("qwen2", {}).to(target.device)  # there, its weights are shared, not copied
    prompts = helpers.mixed_prompts(4)
    greedy = {"budget": budgets.truncate(16), "sampling": SamplingParams(temperature=0)}
    with target.engine(module, horizon=4) as engine:
        before = engine.generate(prompts, **greedy)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
        ids = torch.arange(20, device=target.device)[None]
        module(ids, labels=ids).loss.backward()
        optimizer.step()
        engine.sync_weights()
        after = engine.generate(prompts, **greedy)
    with target.engine(module, horizon=1, cuda_graphs=False) as engine:
        fresh = engine.generate(prompts, **greedy)

    def tokens(generations):
        return [g.completions[0].token_ids for g in generations]

    assert tokens(after) == tokens(fresh)
    assert tokens(after) != tokens(before)


def test_recorded_steps_decode_with_what_they_are_fed(target, helpers):
    """Matrices merged on the caller's stream, W + B A, into the memory that a graph names; what the caller
    writes afterwards comes too late to be seen.
    """
    module = helpers.random_model("qwen2", {}).to(target.device)
    fed = [
        name for name, _ in module.named_parameters() if name.endswith(("q_proj.weight", "down_proj.weight"))
    ]
    base = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    torch.manual_seed(0)
    pairs = {name: (torch.randn(base[name].shape[0], 4), torch.randn(4, base[name].shape[1])) for name in fed}
    pairs = {name: (0.2 * up.to(target.device), down.to(target.device)) for name, (up, down) in pairs.items()}

    def merged():
        for name, (up, down) in pairs.items():
            yield name, base[name].addmm(up, down)

    prompts = helpers.mixed_prompts(4)
    greedy = {"budget": budgets.truncate(16), "sampling": SamplingParams(temperature=0)}
    with target.engine(module, fed=fed, horizon=4) as engine:
        engine.sync_weights((name, base[name]) for name in fed)
        before = engine.generate(prompts, **greedy)
        wanted = dict(merged())
        for _ in range(3):
            engine.sync_weights(merged())
            kept = [up.clone() for up, _ in pairs.values()]
            for up, _ in pairs.values():
                up.add_(1.0)
            after = engine.generate(prompts, **greedy)
            for (up, _), old in zip(pairs.values(), kept, strict=True):
                up.copy_(old)
    assert all(torch.equal(p, base[name]) for name, p in module.named_parameters())
    with torch.no_grad():
        for name, whole in wanted.items():
            module.get_parameter(name).copy_(whole)
    with target.engine(module, horizon=1, cuda_graphs=False) as engine:
        fresh = engine.generate(prompts, **greedy)

    def tokens(generations):
        return [g.completions[0].token_ids for g in generations]

    assert tokens(after) == tokens(fresh)
    assert tokens(after) != tokens(before)
