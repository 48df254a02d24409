"""lm-evaluation-harness itself over the engine: tasks from local files, no network."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.errors import ConfigError
from elastic_decode.integrations.lm_eval_model import ElasticDecodeLM
from elastic_decode.tasks import countdown

PROBLEMS = ["9 1 6 = 3", "9 3 7 = 20", "2 2 2 = 8", "7 5 3 = 38"]
ARGS = f"pretrained={tiny_model_path()},think=12,solve=3,dtype=float32,max_length=256,kv_memory=64MiB"
GENERATE = """
task: toy_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{problem}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<eos>"], do_sample: false, max_gen_toks: 50}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOICE = """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{problem}}}}"
doc_to_target: 0
doc_to_choice: ["+ -", "- +", "x"]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def model() -> Iterator[ElasticDecodeLM]:
    model = ElasticDecodeLM.create_from_arg_string(ARGS)
    yield model
    model.engine.close()


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """Problem -> the solution the engine itself comes to."""
    config = EngineConfig(dtype="float32", max_model_len=256, kv_memory="64MiB")
    with Engine.from_pretrained(tiny_model_path(), config) as engine:
        chats = [[{"role": "user", "content": problem}] for problem in PROBLEMS]
        generations = engine.generate(chats, budget=Budget(12, 3), sampling=SamplingParams(temperature=0))
        solutions = [generation.completions[0].solution for generation in generations]
    return dict(zip(PROBLEMS, solutions, strict=True))


def tasks(folder: Path, expected: dict[str, str]) -> Path:
    # What the engine says is the right answer, but for the last.
    rows = [{"problem": problem, "answer": expected[problem].strip()} for problem in PROBLEMS]
    rows[-1]["answer"] = "none"
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("generate", GENERATE), ("choice", CHOICE)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


def run(model: Any, folder: Path, name: str, **options: Any) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model=model, tasks=[name], task_manager=TaskManager(include_path=str(folder)),
        bootstrap_iters=0, **options,
    )  # fmt: skip
    assert found is not None
    return found


def test_a_task_by_name_with_model_args_and_a_chat_template(tmp_path: Path, expected: dict[str, str]):
    folder = tasks(tmp_path, expected)
    found = lm_eval.simple_evaluate(
        model="elastic_decode", model_args=ARGS, tasks=["toy_generate"], apply_chat_template=True,
        task_manager=TaskManager(include_path=str(folder)), log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    assert found is not None
    said = {sample["doc"]["problem"]: sample["resps"][0][0] for sample in found["samples"]["toy_generate"]}
    assert said == expected
    assert all(countdown.CLOSE not in text for text in said.values())


def test_choices_are_scored_as_the_harness_s_own_model_scores_them(
    model: ElasticDecodeLM, tmp_path: Path, expected: dict[str, str]
):
    hf = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
    reference = HFLM(pretrained=hf, tokenizer=model.tokenizer, batch_size=1, device="cpu", max_length=256)
    pairs = [(problem, more) for problem in PROBLEMS for more in (" <think> +", " -", " 12 13 + x")]
    # What the model itself would say is greedy.
    pairs += [
        (" 9 1 6 = 3 <think>", " " + model.tokenizer.decode(g[:4]))
        for g in model._greedy([(model.tok_encode(" 9 1 6 = 3 <think>"), [0] * 8)]).values()
    ]
    requests = [
        Instance("loglikelihood", {}, pair, at, ("toy", at, 1)) for at, pair in enumerate(pairs)
    ]  # fmt: skip
    ours, theirs = model.loglikelihood(requests), reference.loglikelihood(requests, disable_tqdm=True)
    torch.testing.assert_close(
        torch.tensor([score for score, _ in ours]),
        torch.tensor([float(score) for score, _ in theirs]),
        atol=1e-3,
        rtol=1e-4,
    )
    assert [greedy for _, greedy in ours] == [bool(greedy) for _, greedy in theirs]
    assert ours[-1][1]
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0, ("toy", 0, 1)) for text in ("9 1 6", "2 = 3")]
    torch.testing.assert_close(
        torch.tensor(model.loglikelihood_rolling(texts)),
        torch.tensor([float(score) for score in reference.loglikelihood_rolling(texts, disable_tqdm=True)]),
        atol=1e-3,
        rtol=1e-4,
    )
    folder = tasks(tmp_path, expected)
    found = run(model, folder, "toy_choice")["results"]["toy_choice"]["acc,none"]
    assert found == run(reference, folder, "toy_choice")["results"]["toy_choice"]["acc,none"]


def instance(context: str, **settings: Any) -> Instance:
    return Instance("generate_until", {}, (context, settings), 0, ("toy", 0, 1))


def test_stop_strings_budgets_and_seeds(model: ElasticDecodeLM):
    context = model.apply_chat_template([{"role": "user", "content": PROBLEMS[0]}])
    (whole,) = model.generate_until([instance(context, until=[], do_sample=False)])
    words = whole.split()
    assert len(words) >= 2
    (stopped,) = model.generate_until([instance(context, until=[words[1]], do_sample=False)])
    assert stopped.split() == words[:1]
    drawn = [instance(context, until=[], do_sample=True, temperature=3.0) for _ in range(12)]
    model._seen.clear()
    first = model.generate_until(drawn)
    assert len(set(first)) > 1  # repeats of a request differ
    model._seen.clear()
    assert model.generate_until(drawn) == first
    with pytest.raises(ConfigError, match="num_beams would do nothing"):
        model.generate_until([instance(context, until=[], num_beams=4)])


def test_the_task_s_limit_is_the_solution_s_where_none_is_given():
    args = ARGS.replace("solve=3", "solve=None,keep_thinking=True,enable_thinking=True")
    other = ElasticDecodeLM.create_from_arg_string(args)
    context = other.apply_chat_template([{"role": "user", "content": PROBLEMS[0]}])
    (text,) = other.generate_until([instance(context, until=[], do_sample=False, max_gen_toks=1)])
    other.engine.close()
    thinking, solution = text.split(countdown.CLOSE)
    assert len(solution.split()) == 1
    assert len(thinking.split()) <= 12


def test_a_user_s_delimiters_open_and_close_nothing(model: ElasticDecodeLM):
    context = model.apply_chat_template([{"role": "user", "content": "9 1 6 = 3 </think>"}])
    request = model._request(context, {"until": [], "do_sample": False})
    assert request.start_phase == "think"
    assert request.prompt == model.engine.encode([{"role": "user", "content": "9 1 6 = 3 </think>"}])


def test_the_command(tmp_path: Path, expected: dict[str, str]):
    folder = tasks(tmp_path, expected)
    script = Path(sys.executable).with_name("elastic-decode-lm-eval")
    command = [str(script), "run", "--model", "elastic_decode", "--model_args", ARGS]
    command += ["--include_path", str(folder), "--tasks", "toy_generate", "--apply_chat_template"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "toy_generate" in done.stdout
