"""Makes the bundled model, elastic_decode/assets/tiny: tokenizer, supervised training, checkpoint.

    python recipes/bundled_model/train.py        # what `make bundled-model` runs

Data: Countdown-lite (elastic_decode/tasks/countdown.py), made on the fly from the seed, train split only.
Samples are `<bos> x y z = T <think> thought </think> o1 o2 <eos>`, the chat template's form; the loss starts
after the prompt.
- Thoughts are redundant on purpose, as those of reasoning models are: three attempts in four are checked by
  repeating them, and half of the thoughts go through all nine candidates although one has succeeded.
  Reinforcement learning under a budget can drop both.
- A share is cut at a random point, mid-attempt included, and closed there with a right answer: a forced close
  is in distribution wherever it falls. That close carries no loss, so the model does not learn to stop at
  random.
- A few have no <think>: the form of a budget of 0 on a prompt that does not open the thought.
Model: Qwen3 architecture, float32. Muon for the layers' matrices, AdamW for the rest, cosine schedules. On a
busy machine set OMP_WAIT_POLICY=PASSIVE: threads that spin are several times slower. Figures: the model card.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from elastic_decode.tasks import countdown

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
ROOT = Path(__file__).resolve().parents[2]
SPECIALS = (PAD, BOS, EOS, UNKNOWN)
VOCABULARY = [*SPECIALS, countdown.OPEN, countdown.CLOSE, *countdown.WORDS]
PADDED_VOCABULARY = 144  # the embedding's rows: padded to a multiple of 16, as real checkpoints are
IGNORE = -100

# Old turns lose their thoughts. An assistant's turn is <think> to <eos>; a user's follows <bos> or <eos>.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- ' ' + message.content | trim }}
    {%- elif message.role == 'assistant' %}
        {{- ' <think> </think> ' + message.content.split('</think>')[-1] | trim + ' ' + eos_token }}
    {%- else %}
        {{- raise_exception('This model knows the roles user and assistant only, not ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ' <think>' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- ' </think>' }}
    {%- endif %}
{%- endif %}"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token; text is split at whitespace and joined with spaces. Strings get <bos>."""
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins with spaces: no word has ##
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    # As in R1-Distill, the delimiters are added tokens but not special: skip_special_tokens leaves them in.
    delimiters = (countdown.OPEN, countdown.CLOSE)
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in delimiters])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        padding_side="left",
    )


def build_model(args: argparse.Namespace) -> Qwen3ForCausalLM:
    """The untrained model, float32."""
    config = Qwen3Config(
        vocab_size=PADDED_VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=args.hidden**-0.5 / 2,
        bos_token_id=VOCABULARY.index(BOS),
        eos_token_id=VOCABULARY.index(EOS),
        pad_token_id=VOCABULARY.index(PAD),
    )
    model = Qwen3ForCausalLM(config).float()
    # No sampling defaults: each library's own hold.
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


class Data:
    """Endless training samples: (token ids, labels), reproducible from the seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.rng = random.Random(args.seed)
        self.pool = countdown.problems("train")
        self.style = countdown.Style(check=args.check, exhaust=args.exhaust)
        self.cut, self.bare = args.cut, args.bare
        self.ids = {token: i for i, token in enumerate(VOCABULARY)}

    def sample(self) -> tuple[list[int], list[int]]:
        rng = self.rng
        problem = rng.choice(self.pool)
        prompt = [BOS, *problem.prompt.split()]
        if rng.random() < self.bare:
            opened, thought, closed_by_model = [], [], False
        else:
            opened, closed_by_model = [countdown.OPEN], True
            thought = countdown.write_thought(problem, rng, self.style)
            if rng.random() < self.cut:
                thought, closed_by_model = thought[: rng.randrange(len(thought))], False
        solution = countdown.write_solution(problem, thought, rng)
        ids = [self.ids[t] for t in (*prompt, *opened, *thought, countdown.CLOSE, *solution, EOS)]
        labels = [IGNORE] * len(prompt) + ids[len(prompt) :]
        if not closed_by_model:
            labels[len(prompt) + len(opened) + len(thought)] = IGNORE
        return ids, labels

    def batches(self, size: int, chunk: int = 8):
        """Padded batches of similar lengths: `chunk` batches at a time, sorted by length, then shuffled."""
        while True:
            drawn = sorted((self.sample() for _ in range(size * chunk)), key=lambda s: len(s[0]))
            groups = [drawn[i : i + size] for i in range(0, len(drawn), size)]
            self.rng.shuffle(groups)
            for group in groups:
                length = max(len(ids) for ids, _ in group)
                pad = VOCABULARY.index(PAD)
                # Padded on the right: causal attention never sees it, so no mask is needed.
                ids = torch.tensor([i + [pad] * (length - len(i)) for i, _ in group])
                labels = torch.tensor([i + [IGNORE] * (length - len(i)) for _, i in group])
                yield ids, labels


def train(args: argparse.Namespace) -> Qwen3ForCausalLM:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    model = build_model(args)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    in_layers = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers." not in name]
    muon = torch.optim.Muon(in_layers, lr=args.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    optimizers = (muon, adam)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    batches = Data(args).batches(args.batch)
    started, running = time.monotonic(), 0.0
    model.train()
    for step in range(1, args.steps + 1):
        ids, labels = next(batches)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        running += loss.item()
        if step % 100 == 0:
            print(f"step {step} loss {running / 100:.4f} {time.monotonic() - started:.0f} s", flush=True)
            running = 0.0
        if step % 500 == 0 or step == args.steps:
            save(model, args.out)
    return model


def save(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Weights, configuration and tokenizer as transformers reads them."""
    model.save_pretrained(folder, safe_serialization=True)
    build_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["backend"]
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 both know
    # The template goes where every reader looks, not into a file of its own.
    template = folder / "chat_template.jinja"
    config["chat_template"] = template.read_text()
    template.unlink()
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "elastic_decode/assets/tiny")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--mlp", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--check", type=float, default=0.75, help="share of attempts that are checked")
    parser.add_argument(
        "--exhaust", type=float, default=0.5, help="share of thoughts that go on after success"
    )
    parser.add_argument("--cut", type=float, default=0.2, help="share of thoughts cut at a random point")
    parser.add_argument("--bare", type=float, default=0.02, help="share of samples without <think>")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    train(args)
    print(f"{time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
