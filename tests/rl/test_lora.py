"""LoRA: adapters are trained, the engine decodes with them merged, and the base stays what it was."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.errors import CheckpointError, ConfigError, UnsupportedModel
from elastic_decode.rl import lora
from elastic_decode.rl.assemble import assemble, enable_checkpointing
from elastic_decode.rl.batch import Row
from elastic_decode.rl.budgets import Fixed
from elastic_decode.rl.config import LoraOptions, load_config
from elastic_decode.rl.estimate import estimate
from elastic_decode.rl.loss import objective
from elastic_decode.rl.optim import MasterAdamW
from elastic_decode.rl.rewards import Rewards
from elastic_decode.rl.trainer import GRPOTrainer, TrainerOptions
from elastic_decode.rl.update import UpdateOptions
from elastic_decode.tasks import countdown

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROBLEMS = countdown.problems("train")[:64]
TOKENIZER = AutoTokenizer.from_pretrained(tiny_model_path())
TOY = Path(__file__).parents[2] / "recipes" / "toy.yaml"


def rows(position: int, count: int) -> tuple[list[Row], int]:
    chosen = [i % len(PROBLEMS) for i in range(position, position + count)]
    return [Row(i, PROBLEMS[i].chat, {}) for i in chosen], position + count


def spread(completions, completion_ids, **columns):
    """A reward that nearly every group has a spread of."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


class Run:
    """A trainer over the bundled model with adapters, and everything it stands on."""

    def __init__(self, folder=None, dtype=torch.float32, kl=0.0, checkpointing=False, steps=3, **options):
        base = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=dtype)
        if checkpointing:
            enable_checkpointing(base)
        wanted = LoraOptions(**{"r": 4, "alpha": 8.0, **options})
        self.adapters = lora.attach(base, wanted, run_seed=1, base_name=str(tiny_model_path()))
        self.engine = Engine.from_model(
            base,
            TOKENIZER,
            EngineConfig(max_batch=16, max_model_len=128, kv_memory="16MiB"),
            fed=self.adapters.names,
        )
        self.metrics: list[dict[str, float]] = []
        self.trainer = GRPOTrainer(
            engine=self.engine,
            model=self.adapters.model,
            next_rows=rows,
            rewards=Rewards(spread, workers=0),
            budgets=Fixed(think=10, solve=3),
            optimizer=MasterAdamW(self.adapters.model.parameters(), lr=1e-2),
            options=TrainerOptions(
                steps=steps,
                prompts_per_step=3,
                group_size=4,
                lr=1e-2,
                run_seed=1,
                update=UpdateOptions(objective=objective("grpo"), max_tokens=256, kl_coef=kl),
            ),
            reference=self.adapters.model.disable_adapter if kl else None,
            adapters=self.adapters,
            folder=folder,
            on_step=[lambda step, metrics, groups: self.metrics.append(metrics)],
        )

    def weights(self, trained):
        """Parameters that are trained, or that are not."""
        return {
            name: parameter.detach().clone()
            for name, parameter in self.adapters.model.named_parameters()
            if parameter.requires_grad == trained
        }

    def told(self):
        """The metrics without what the clock says."""
        return [{k: v for k, v in m.items() if "second" not in k} for m in self.metrics]


def greedy(engine):
    prompts = [problem.chat for problem in PROBLEMS[:6]]
    found = engine.generate(prompts, budget=Budget(think=12, solve=3), sampling=SamplingParams(temperature=0))
    return [(c.token_ids, c.logprobs) for g in found for c in g.completions]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "mlp.down_proj"]], ids=["all", "two"])
def test_the_engine_decodes_with_what_is_trained(targets):
    """A forgotten merge, one into the wrong rows, a wrong scale: the log-probabilities would differ."""
    run = Run(targets=targets)
    before, base = run.weights(True), run.weights(False)
    run.trainer.train()
    assert [m["groups_with_spread"] > 0 for m in run.metrics] == [True] * 3
    assert max(m["mismatch_max"] for m in run.metrics) < 1e-5
    after = run.weights(True)
    assert all("lora_" in name for name in after)
    assert not any(torch.equal(before[name], after[name]) for name in after if "lora_B" in name)
    assert same(run.weights(False), base), "the base is bit for bit what it was"
    assert run.engine.stats()["weight_epoch"] == 4  # one at the start

    # The test of this test: with the first weights still in the engine the difference is seen.
    run.trainer._sync = lambda: None
    with torch.no_grad():
        for name, parameter in run.adapters.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.02)
    metrics, _ = run.trainer.train_step()
    assert metrics["mismatch_max"] > 1e-2


def test_merged_is_float32_and_cast_once():
    run = Run(dtype=torch.bfloat16, r=3, alpha=5.0)
    run.trainer.train()
    names = dict(run.adapters.model.get_base_model().named_modules())
    for name, tensor in run.adapters.merged():
        layer = names[name.removesuffix(".weight")]
        up, down = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
        want = layer.base_layer.weight.double() + 5 / 3 * up @ down
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), want, rtol=1e-6, atol=1e-7)
    weights = run.engine._shared.weights.layers[1]
    gate = dict(run.adapters.merged())["model.layers.1.mlp.gate_proj.weight"]
    assert torch.equal(weights.gate_up[: len(gate)], gate.bfloat16())


def test_an_engine_of_another_dtype():
    """Trained in float32, decoded with in bfloat16: what is fed and what is copied are each cast once."""
    adapters = Run().adapters
    config = EngineConfig(dtype="bfloat16", kv_memory="16MiB")
    with Engine.from_model(adapters.base, TOKENIZER, config, fed=adapters.names) as engine:
        with torch.no_grad():
            for name, parameter in adapters.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.01)
        engine.sync_weights(adapters.merged())
        held = engine._shared.weights
        assert torch.equal(held.embed, adapters.base.model.embed_tokens.weight.detach().bfloat16())
        down = dict(adapters.merged())["model.layers.2.mlp.down_proj.weight"]
        assert down.dtype == torch.float32
        assert torch.equal(held.layers[2].down, down.bfloat16())


def test_a_base_in_bfloat16_has_float32_adapters_and_says_how_far_off_it_is():
    run = Run(dtype=torch.bfloat16)
    base = run.weights(False)
    run.trainer.train()
    assert {p.dtype for p in run.weights(True).values()} == {torch.float32}
    assert {p.dtype for p in base.values()} == {torch.bfloat16}
    assert same(run.weights(False), base)
    assert 1e-4 < run.metrics[-1]["mismatch_max"] < 0.2


def test_kl_is_to_the_base_without_a_copy():
    run = Run(kl=0.1)
    run.trainer.train()
    assert run.metrics[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert run.metrics[2]["kl"] > 1e-5
    with run.adapters.model.disable_adapter():
        ids = torch.arange(4, 30)[None]
        base = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
        assert torch.equal(run.adapters.model(ids).logits, base(ids).logits)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_run_that_is_cut_goes_on_bit_for_bit(tmp_path, dropout):
    straight = Run(steps=4, dropout=dropout)
    straight.trainer.train()

    cut = Run(tmp_path, steps=4, dropout=dropout)
    cut.trainer.train_step(), cut.trainer.train_step()
    path = cut.trainer.save()
    cut.trainer.train_step()

    torch.manual_seed(99)  # nothing may hang on the state of the generator
    resumed = Run(tmp_path, steps=4, dropout=dropout)
    assert resumed.trainer.resume()
    resumed.trainer.train()
    assert same(resumed.weights(True), straight.weights(True))
    assert resumed.told() == straight.told()[2:]
    assert greedy(resumed.engine) == greedy(straight.engine)
    assert not (path / "model.safetensors").exists()
    assert (path / "adapter_model.safetensors").stat().st_size < 200_000
    if dropout:
        assert resumed.metrics[0]["mismatch_max"] > 1e-3, "only the trainer drops"


def test_a_checkpoint_is_pefts_and_can_be_exported_whole(tmp_path):
    run = Run(tmp_path)
    run.trainer.train()
    path = run.trainer.save()
    assert greedy(run.engine) != greedy(Run().engine)

    again = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(again, path).eval()
    ids = torch.arange(4, 30)[None]
    assert torch.equal(loaded(ids).logits, run.adapters.model.eval()(ids).logits)
    assert loaded.peft_config["default"].base_model_name_or_path == str(tiny_model_path())

    base = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
    lora.export(path, tmp_path / "whole", base=base, tokenizer=TOKENIZER)
    with Engine.from_pretrained(tmp_path / "whole", EngineConfig(dtype="float32")) as engine:
        assert greedy(engine) == greedy(run.engine)
    with pytest.raises(ConfigError, match="not empty"):
        lora.export(path, tmp_path / "whole", base=base, tokenizer=TOKENIZER)

    with pytest.raises(CheckpointError, match=r"other adapters: .*; they were not loaded"):
        Run(r=2).adapters.load(path)
    with pytest.raises(CheckpointError, match="other adapters"):
        Run(targets=["q_proj"]).adapters.load(path)


def test_gradient_checkpointing_changes_nothing():
    plain, kept = Run(steps=2), Run(steps=2, checkpointing=True)
    passes = []
    for run in (plain, kept):
        run.adapters.base.model.layers[0].mlp.register_forward_pre_hook(lambda *_, r=run: passes.append(r))
        run.trainer.train()
    assert passes.count(kept) == 2 * passes.count(plain), "layers are computed again"
    for one, other in zip(plain.weights(True).values(), kept.weights(True).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def base_model():
    return AutoModelForCausalLM.from_pretrained(tiny_model_path())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "qq"], r"no linear module 'qq'; it has q_proj, k_proj, .*, lm_head, and 'all-linear'"),
        ("proj", "no linear module 'proj'"),
        (["embed_tokens"], "no linear module 'embed_tokens'"),
        (["lm_head"], "'lm_head' is tied to the embeddings"),
    ],
)
def test_targets_that_cannot_be(targets, message):
    with pytest.raises(ConfigError, match=message):
        lora.attach(base_model(), LoraOptions(targets=targets), run_seed=0, base_name="x")
    config = load_config(TOY, ["optim.lora={targets: [q_proj]}"])
    object.__setattr__(config.optim.lora, "targets", targets)
    with pytest.raises(ConfigError, match=message):
        estimate(config, Run().engine.model_config, None)


def test_a_head_of_its_own_can_be_adapted(tmp_path):
    model = base_model()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    adapters = lora.attach(model, LoraOptions(r=2, targets=["lm_head"]), run_seed=0, base_name="x")
    assert adapters.names == ("lm_head.weight",)
    with torch.no_grad():
        model.lm_head.lora_B["default"].weight.normal_(0, 0.1)
    with Engine.from_model(model, TOKENIZER, EngineConfig(kv_memory="16MiB"), fed=adapters.names) as engine:
        engine.sync_weights(adapters.merged())
        ((tokens, logprobs), *_) = greedy(engine)
        prompt = engine.encode(PROBLEMS[0].chat)
    with torch.no_grad():
        logits = adapters.model.eval()(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    want = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert (want - torch.tensor(logprobs)).abs().max() < 1e-5


def test_what_cannot_be_merged_is_refused():
    wrapped = peft.get_peft_model(base_model(), peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(UnsupportedModel, match="DoRA"):
        lora.Adapters(wrapped)
    run = Run()
    run.adapters.model.merge_adapter()
    with pytest.raises(ConfigError, match=r"q_proj\.weight holds its adapter already"):
        run.trainer._sync()
    with pytest.raises(UnsupportedModel, match=r"lora.* has no place in the decoder.*fed="):
        Engine.from_model(Run().adapters.base, TOKENIZER)


def test_adapters_start_from_the_runs_seed_alone():
    states = []
    for seed, noise in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(noise)
        adapters = lora.attach(base_model(), LoraOptions(r=2), run_seed=seed, base_name="x")
        states.append({n: p.clone() for n, p in adapters.model.named_parameters() if "lora_" in n})
        assert torch.initial_seed() == noise
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_configuration_is_enough(tmp_path, dtype):
    """From a recipe to steps, resumed; and the plan's numbers are the real ones."""
    changes = [
        f"run.folder={tmp_path}",
        "run.steps=1",
        "rollout.prompts_per_step=4",
        "rollout.group_size=4",
        "grading.workers=0",
        "run.eval_every=0",
        "evaluation=null",
        "engine.max_batch=16",
        "engine.dtype=auto",
        f"optim.dtype={dtype}",
        "optim.lora={r: 2, alpha: 4, targets: [q_proj, v_proj, up_proj]}",
        "objective.kl=0.01",
    ]
    config = load_config(TOY, changes)
    with assemble(config) as parts:
        plan = estimate(config, parts.engine.model_config, None)
        model, shared = parts.model, parts.engine._shared
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert plan.trained == sum(p.numel() for p in trained)
        assert plan.parameters == sum(p.numel() for p in frozen)
        sizes = {name.partition(" (")[0]: count for name, count in plan.memory.items()}
        assert sizes["weights"] == sum(p.nbytes for p in frozen)
        assert sizes["adapters"] == sizes["gradients"] == sum(p.nbytes for p in trained)
        assert sizes["the engine's merged matrices"] == sum(t.nbytes for t in shared.fed.values())
        assert not {"master weights", "reference model"} & sizes.keys()
        assert "shares the rest" in plan.sharing
        parts.trainer.train()
        state = parts.trainer.optimizer.state_dict()
        moments = [s[k] for s in state["adamw"]["state"].values() for k in ("exp_avg", "exp_avg_sq")]
        if moments:  # groups with a spread were found
            assert sizes["AdamW's moments"] == sum(t.nbytes for t in moments)
    with assemble(load_config(TOY, [*changes, "run.steps=2"])) as parts:
        assert parts.trainer.resume()
        parts.trainer.train()


def test_peft_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    config = load_config(TOY, [f"run.folder={tmp_path}", "optim.lora={r: 2}"])
    with pytest.raises(ConfigError, match=r"elastic-decode\[train\]"), assemble(config):
        pass
