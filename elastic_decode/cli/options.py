"""Flags -> EngineConfig, SamplingParams and a budget policy: one place, so that every command spells them
alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_decode.assets import tiny_model_path
from elastic_decode.config import DTYPES, KV_DTYPES, EngineConfig
from elastic_decode.core import SamplingParams
from elastic_decode.errors import ConfigError

if TYPE_CHECKING:
    from elastic_decode.budgets import Policy

POLICIES = ("elastic", "truncate", "budget-forcing", "soft-landing", "wrap-up", "no-thinking")


def checkpoint(name: str) -> str | Path:
    """A folder or hub id as given; `tiny` is the bundled model unless there is a folder of that name."""
    return tiny_model_path() if name == "tiny" and not Path(name).is_dir() else name


def token_count(text: str) -> int | None:
    """A budget: a number of tokens, or `none` for unlimited."""
    if text.lower() in ("none", "unlimited", "inf"):
        return None
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of tokens nor 'none'") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"a budget must be >= 0 or 'none', got {value}")
    return value


def bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKEN_ID=VALUE, like 151643=-2.5") from None


def add_budget(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "budgets", "in sampled tokens; 'none' is unlimited; forced tokens count in none"
    )
    group.add_argument(
        "--think", type=token_count, default=None, metavar="T", help="thinking budget (default: none)"
    )
    group.add_argument(
        "--solve", type=token_count, default=None, metavar="S", help="solution budget (default: none)"
    )
    group.add_argument(
        "--policy",
        choices=POLICIES,
        default="elastic",
        help="elastic: T, then the close is forced, then S; truncate: --total for everything; "
        "budget-forcing: S1, early closes become --wait; soft-landing: after T, at the next newline within "
        "--grace; wrap-up: --text before the forced close; no-thinking: T = 0 (default: elastic)",
    )
    group.add_argument("--total", type=token_count, metavar="N", help="truncate: the whole output's budget")
    group.add_argument("--waits", type=int, metavar="N", help="budget-forcing: how often (default: 1)")
    group.add_argument("--wait", metavar="TEXT", help="budget-forcing: instead of the close (default: Wait)")
    group.add_argument(
        "--final", metavar="TEXT", help="budget-forcing: what opens the solution (default: Final Answer:)"
    )
    group.add_argument(
        "--newline",
        metavar="TEXT",
        help="budget-forcing: what stands before a forced close (default: a newline; '' for none)",
    )
    group.add_argument(
        "--grace", type=int, metavar="N", help="soft-landing: tokens to find a newline in (default: 64)"
    )
    group.add_argument("--text", metavar="TEXT", help="wrap-up: the sentence before the close")


# Which flags belong to which policy; --think and --solve go with all others.
_OWN_FLAGS = {
    "truncate": ("total",),
    "budget-forcing": ("waits", "wait", "final", "newline"),
    "soft-landing": ("grace",),
    "wrap-up": ("text",),
}


def policy_of(arguments: argparse.Namespace) -> Policy:
    """The policy the flags describe. Raises ConfigError for flags that the chosen policy would ignore."""
    from elastic_decode import budgets  # imports torch: not for --help

    name, think, solve = arguments.policy, arguments.think, arguments.solve
    for owner, flags in _OWN_FLAGS.items():
        for flag in flags:
            if owner != name and getattr(arguments, flag) is not None:
                raise ConfigError(f"--{flag} belongs to --policy {owner}, and the policy is {name}")
    own = {
        flag: getattr(arguments, flag)
        for flag in ("wait", "final", "newline")
        if getattr(arguments, flag) is not None
    }
    if name == "truncate" and (think is not None or solve is not None):
        raise ConfigError(
            "--policy truncate has one budget for everything: give --total, not --think or --solve"
        )
    if name == "no-thinking" and think is not None:
        raise ConfigError("--policy no-thinking is a thinking budget of 0; leave --think out")
    if name == "wrap-up" and not arguments.text:
        raise ConfigError("--policy wrap-up needs --text, the sentence to say before the close")
    make: dict[str, Callable[[], Policy]] = {
        "elastic": lambda: budgets.elastic(think, solve),
        "truncate": lambda: budgets.truncate(arguments.total),
        "budget-forcing": lambda: budgets.budget_forcing(
            think, solve, 1 if arguments.waits is None else arguments.waits, **own
        ),
        "soft-landing": lambda: budgets.soft_landing(
            think, 64 if arguments.grace is None else arguments.grace, solve
        ),
        "wrap-up": lambda: budgets.wrap_up(think, arguments.text, solve),
        "no-thinking": lambda: budgets.no_thinking(solve),
    }
    return make[name]()


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sampling", "a checkpoint's own generation_config defaults are not applied"
    )
    group.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    group.add_argument("--top-k", type=int, default=0, help="0 is off (default)")
    group.add_argument("--top-p", type=float, default=1.0, help="1 is off (default)")
    group.add_argument("--min-p", type=float, default=0.0, help="0 is off (default)")
    group.add_argument(
        "--seed",
        type=int,
        default=None,
        help="the same seed gives the same tokens (default: drawn, reported)",
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the solution here; repeatable"
    )
    group.add_argument(
        "--stop-token-id", action="append", type=int, default=[], metavar="ID", help="likewise, a token"
    )
    group.add_argument("--stop-in-thinking", action="store_true", help="stops act while thinking, too")
    group.add_argument("--ignore-eos", action="store_true", help="EOS is an ordinary token")
    group.add_argument("--min-tokens", type=int, default=0, help="no EOS before so many tokens")
    group.add_argument(
        "--logit-bias", action="append", type=bias, default=[], metavar="ID=VALUE", help="repeatable"
    )
    group.add_argument("--presence-penalty", type=float, default=0.0)
    group.add_argument("--frequency-penalty", type=float, default=0.0)
    group.add_argument("--repetition-penalty", type=float, default=1.0)


def sampling_of(arguments: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=arguments.seed,
        stop=arguments.stop,
        stop_token_ids=arguments.stop_token_id,
        stop_in_thinking=arguments.stop_in_thinking,
        ignore_eos=arguments.ignore_eos,
        min_tokens=arguments.min_tokens,
        logit_bias=dict(arguments.logit_bias) or None,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        repetition_penalty=arguments.repetition_penalty,
    )


def add_engine(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    preset = EngineConfig(**defaults)
    group = parser.add_argument_group("engine")
    group.add_argument("--device", default=preset.device, help=f"cpu or cuda[:i] (default: {preset.device})")
    group.add_argument("--dtype", default=preset.dtype, choices=DTYPES)
    group.add_argument("--kv-dtype", default=preset.kv_dtype, choices=KV_DTYPES)
    group.add_argument(
        "--max-batch", type=int, default=preset.max_batch, help=f"rows at once (default: {preset.max_batch})"
    )
    group.add_argument(
        "--max-model-len",
        type=int,
        default=preset.max_model_len,
        help="prompt + output (default: the model's)",
    )
    group.add_argument(
        "--page-size",
        type=int,
        default=preset.page_size,
        help=f"tokens a KV page (default: {preset.page_size})",
    )
    group.add_argument(
        "--kv-memory", default=preset.kv_memory, help=f"bytes of KV pages (default: {preset.kv_memory})"
    )
    group.add_argument(
        "--horizon", type=int, default=preset.horizon, help="decode steps launched at a time (default: 1)"
    )
    group.add_argument(
        "--prefill-tokens", type=int, default=preset.prefill_tokens, help="prompt tokens between horizons"
    )
    group.add_argument(
        "--backend",
        type=backend,
        default=preset.backend,
        metavar="NAME|OP=NAME,…",
        help="auto, reference, cpu, triton, …, or single ops: linear=torch (see `elastic-decode info`)",
    )
    group.add_argument(
        "--no-prefix-cache", action="store_true", help="do not reuse KV pages of equal prompt beginnings"
    )
    group.add_argument(
        "--no-cuda-graphs", action="store_true", help="launch each kernel instead of replaying recorded steps"
    )
    group.add_argument(
        "--no-batch-invariant", action="store_true", help="allow kernels whose bits depend on the batch"
    )


def backend(text: str) -> str | dict[str, str]:
    """`triton` as it is; `linear=torch,draw=cuda` as a mapping."""
    if "=" not in text:
        return text
    return {op.strip(): name.strip() for op, _, name in (part.partition("=") for part in text.split(","))}


def engine_of(arguments: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        device=arguments.device,
        dtype=arguments.dtype,
        kv_dtype=arguments.kv_dtype,
        max_batch=arguments.max_batch,
        max_model_len=arguments.max_model_len,
        page_size=arguments.page_size,
        kv_memory=arguments.kv_memory,
        horizon=arguments.horizon,
        prefill_tokens=arguments.prefill_tokens,
        backend=arguments.backend,
        prefix_cache=False if arguments.no_prefix_cache else None,
        cuda_graphs=not arguments.no_cuda_graphs,
        batch_invariant=not arguments.no_batch_invariant,
    )


def add_delimiters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("delimiters", "found in the tokenizer and chat template unless given")
    group.add_argument(
        "--think-open", default=None, metavar="TEXT", help="what opens thinking, like '<think>'"
    )
    group.add_argument("--think-close", default=None, metavar="TEXT", help="what closes it, like '</think>'")
    group.add_argument(
        "--eos-id", action="append", type=int, default=None, metavar="ID", help="EOS token id; repeatable"
    )
