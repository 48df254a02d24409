"""GRPOConfig: recipes load, everything round-trips, and mistakes are named by their path."""

import dataclasses
from pathlib import Path

import pytest

from elastic_decode.errors import ConfigError
from elastic_decode.rl.budget_options import longest
from elastic_decode.rl.config import GRPOConfig, changes, load_config

RECIPES = Path(__file__).parents[2] / "recipes"
TOY = RECIPES / "toy.yaml"


def test_every_recipe_is_loaded_here():
    assert {path.name for path in RECIPES.glob("*.yaml")} == {
        "toy.yaml",
        "e1_math_1.5b.yaml",
        "e1_code_14b.yaml",
    }


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_load_and_round_trip(recipe, tmp_path):
    config = load_config(recipe)
    assert GRPOConfig.from_dict(config.to_dict()) == config
    written = tmp_path / "again.yaml"
    written.write_text(config.to_yaml())
    again = load_config(written)
    assert again == config
    assert again.to_yaml() == config.to_yaml()
    assert again.fingerprint() == config.fingerprint()


def test_the_papers_numbers():
    math, code = (load_config(RECIPES / name) for name in ("e1_math_1.5b.yaml", "e1_code_14b.yaml"))
    for config in (math, code):
        assert longest(config.rollout.budgets) == (1024, 1024)
        assert (config.rollout.prompts_per_step, config.rollout.group_size) == (128, 8)
        assert config.optim.lr == 1e-6
        assert config.optim.updates_per_step == 2
        assert config.rollout.sampling.temperature == 0.6
        assert config.rollout.train_on_forced
    assert (math.objective.kl, math.objective.entropy, math.run.steps) == (0.001, 0.001, 200)
    assert (code.objective.kl, code.objective.entropy) == (0.0, 0.0)
    assert (math.objective.clip_high, code.objective.clip_high) == (0.2, 0.28)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("zzz=1", "unknown key 'zzz'; known here: model, data"),
        ("optim.lr=fast", "optim.lr must be a number, got 'fast'"),
        ("optim.lr='1e-5'", "leave the quotes out"),
        ("optim.lr=.nan", "optim.lr must be > 0, got nan"),
        ("run.name=off", "run.name must be a string, got False (YAML reads on, off"),
        ("run.steps=true", "run.steps must be a whole number, got True"),
        ("run.steps=1.5", "run.steps must be a whole number, got 1.5"),
        ("run.log=[wandbb]", "run.log.0 must be one of tensorboard, wandb, trackio, got 'wandbb'"),
        ("optim.betas=[0.9]", "optim.betas must be two numbers in [0, 1)"),
        ("optim.lora.r=0", "optim.lora.r must be >= 1, got 0"),
        ("optim.lora.rank=4", "unknown key 'optim.lora.rank'; known here: r, alpha"),
        ("optim.updates_per_step=257", "optim.updates_per_step must be <= the 256 samples"),
        ("objective.name=ppo", "objective: no objective 'ppo'; there are grpo"),
        ("objective={name: grpo, dynamic_sampling: true}", "it needs objective.drop_flat"),
        (
            "objective={name: rloo, clip_low: 0.2}",
            "objective.clip_low must be null where objective.name is 'rloo'",
        ),
        ("objective={name: rloo, clip_high: 0.2}", "objective.clip_high must be null where"),
        ("objective={name: grpo, constant_length: 20}", "null unless objective.normalisation is 'constant'"),
        ("data.name=main", "data.name is for a dataset of the hub, which countdown is not"),
        ("data={source: here.jsonl, split: test}", "data.split: the file here.jsonl has no splits"),
        ("evaluation.data={source: a.json, split: test}", "evaluation.data: data.split: the file a.json has"),
        ("data={source: a.parquet, revision: v2}", "data.revision is for a dataset of the hub"),
        ("engine.max_bach=3", "did you mean 'engine.max_batch'?"),
        ("engine.device=tpu", "engine: EngineConfig.device must be"),
        ("rollout.group_size=1", "rollout.group_size must be >= 2"),
        ("rollout.sampling.seed=3", "rollout.sampling.seed must be null"),
        ("rollout.sampling.top_p=2", "rollout.sampling: SamplingParams.top_p must be in (0, 1]"),
        ("rollout.chat_template_kwargs={tokenize: true}", "the engine decides on this itself"),
        ("rollout.budgets.thnik=3", "did you mean 'rollout.budgets.think'?"),
        ("rollout.budgets.think=-1", "rollout.budgets: Fixed.think must be a number of tokens >= 0"),
        ("rollout.budgets={plan: uniform, low: 0, solve: 3}", "rollout.budgets.high is missing"),
        ("rollout.budgets={plan: fork, think_at: [1, 2, 3], solve: 3}", "a multiple of the 3 budgets"),
        ("rollout.budgets={plan: fork, think_at: 4, solve: 3}", "Fork.think_at must list budgets"),
        (
            "rollout.budgets={plan: schedule, stages: [{start: 1, plan: fixed, think: 1, solve: 1}]}",
            "must be steps that begin at 0 and rise, got [1]",
        ),
        ("rewards=[]", "rewards must be one or more functions"),
        (
            "rewards.0.function=nothing",
            "rewards.0: function must be 'module:function', countdown or l1_exact",
        ),
        ("rewards.1.weight=2", "rewards is a list of 1"),
        ("data.source.x=2", "data.source is 'countdown': it has no keys"),
        ("data=3", "data must be a mapping of keys, got 3"),
        ("model=null", "model must be a mapping of keys, got None"),
        ("model={}", "model.path is missing: it has no default"),
        ("run.steps", "is not of the form key.key=value"),
        ("run.steps=", "has no value; null is written out"),
        ("run.steps=[", "is not valid YAML"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError) as raised:
        load_config(TOY, [override])
    assert message in str(raised.value)


def test_an_objective_without_a_ratio_makes_one_update_a_rollout():
    rloo = "objective={name: rloo, normalisation: constant, constant_length: 20}"
    assert load_config(TOY, [rloo]).objective.constant_length == 20
    with pytest.raises(ConfigError, match=r"optim.updates_per_step must be 1 where objective.name is 'rloo'"):
        load_config(TOY, [rloo, "optim.updates_per_step=2"])


def test_overrides_are_yaml_and_come_in_order():
    config = load_config(
        TOY,
        ["optim.lr=1e-5", "optim.lr=2e-5", "optim.lora.r=4", "rewards.0.weight=0.5", "run.log=[tensorboard]"],
    )
    assert config.optim.lr == 2e-5
    assert config.optim.lora is not None
    assert config.optim.lora.r == 4
    assert config.rewards[0].weight == 0.5
    assert config.run.log == ("tensorboard",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {path: a}\nmodel: {path: b}\n", "the key 'model' comes twice"),
        ("- a\n", "must hold a mapping of keys, got list"),
        ("model: [\n", "is not valid YAML"),
        ("model: {path: a}\n", "data is missing"),
    ],
)
def test_files_that_are_none(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "absent.yaml")


def test_what_may_differ_when_a_run_is_resumed():
    config = load_config(TOY)
    for free in ("run.steps=9", "run.name=x", "engine.max_batch=3", "grading.workers=1", "run.keep=7"):
        other = load_config(TOY, [free])
        assert other != config
        assert changes(config, other) == []
        assert other.fingerprint() == config.fingerprint()
    other = load_config(TOY, ["optim.lr=1e-5", "rollout.budgets={plan: uniform, low: 1, high: 2, solve: 3}"])
    assert other.fingerprint() != config.fingerprint()
    assert changes(config, other) == [
        "rollout.budgets.plan: fixed -> uniform",
        "rollout.budgets.think: 15 -> (not there)",
        "optim.lr: 0.0001 -> 1e-05",
        "rollout.budgets.low: (not there) -> 1",
        "rollout.budgets.high: (not there) -> 2",
    ]
    cosine = load_config(TOY, ["optim.schedule=cosine"])
    longer = load_config(TOY, ["optim.schedule=cosine", "run.steps=900"])
    assert changes(cosine, longer) == ["run.steps: 400 -> 900"]


def test_the_hash_is_the_same_everywhere():
    assert load_config(TOY).fingerprint() == load_config(TOY).fingerprint()
    assert len({load_config(path).fingerprint() for path in RECIPES.glob("*.yaml")}) == 3


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(TOY).optim.lr = 1.0  # type: ignore[misc]


def test_longest_budgets():
    stages = [
        {"start": 0, "plan": "ramp", "first": 3, "last": 9, "steps": 5, "solve": 2},
        {"start": 9, "plan": "choice", "think": [1, None], "solve": 7},
    ]
    assert longest({"plan": "schedule", "stages": stages}) == (None, 7)
    assert longest({"plan": "uniform", "low": 0, "high": 30, "solve": None}) == (30, None)
