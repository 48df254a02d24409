"""lm-evaluation-harness over an engine, under budgets: `elastic-decode-lm-eval --model elastic_decode …`.

Importing this module registers the model with lm-eval; `main` is lm-eval's own command with that done, since
lm-eval looks for models of other packages nowhere.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        f"elastic_decode.integrations.lm_eval_model needs lm-evaluation-harness ({error}): "
        "pip install 'elastic-decode[lm-eval]'"
    ) from error

from elastic_decode import budgets
from elastic_decode.budgets import Policy
from elastic_decode.config import EngineConfig
from elastic_decode.core import Completion, Phase, Request, SamplingParams
from elastic_decode.delimiters import Delimiters
from elastic_decode.engine.prompts import encode_prompt
from elastic_decode.errors import ConfigError
from elastic_decode.kernels.budget.layout import Finish, Label
from elastic_decode.llm import Engine
from elastic_decode.phases import Event, Inject, PhaseProgram, PhaseSpec

_log = logging.getLogger(__name__)
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_IGNORED = ("do_sample", "until", "max_gen_toks")  # read by other means
# Policies that think and solve budgets are all of; the others need options.
_POLICIES: dict[str, Callable[[int | None, int | None], Policy]] = {
    "elastic": budgets.elastic,
    "budget_forcing": budgets.budget_forcing,
}


@dataclass(frozen=True)
class _Say(Policy):
    """The whole output is these tokens, forced: their log-probabilities are what is wanted."""

    token_ids: tuple[int, ...]
    name: ClassVar[str] = "say"

    def program(self, delimiters: Delimiters, tokenizer: Any = None) -> PhaseProgram:
        event = Event(next=Finish.BUDGET, inject=Inject(before=self.token_ids))
        phase = PhaseSpec(name="say", label=Label.SOLVE, budget=0, on_expire=event)
        return PhaseProgram(name="say", phases=(phase,), start_think="say", start_solve="say")


@register_model("elastic_decode")
class ElasticDecodeLM(TemplateLM):
    """`--model elastic_decode --model_args pretrained=…,think=1024,solve=1024`.

    pretrained: folder or hub id. think, solve: sampled tokens of each; think=None is unlimited (up to where
    the rest fits), solve=None takes the task's max_gen_toks, which a given solve overrides. policy: "elastic"
    or "budget_forcing" (S1). max_length: positions of prompt and output, the model's unless given.
    max_batch: rows decoded at once (lm-eval's batch_size, a number, does the same). seed: samples depend on
    it, the context and how often that came before. keep_thinking: answers come with the thinking before
    them; as it is, a task sees the solution alone, and `until` acts in it alone. chat_template_args go to the
    chat template, enable_thinking likewise. device, dtype, backend, horizon, kv_memory are EngineConfig's;
    think_open and think_close those of Engine.from_pretrained.

    `loglikelihood` scores a continuation as tokens that are forced behind the context: a decode step a token,
    contexts shared by the prefix cache. Raises ConfigError for generation settings it does not know.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        think: int | None = None,
        solve: int | None = None,
        policy: str = "elastic",
        max_length: int | None = None,
        max_batch: int = 32,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        seed: int = 1234,
        keep_thinking: bool = False,
        enable_thinking: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        device: str | None = None,
        dtype: str = "auto",
        backend: str = "auto",
        horizon: int = 1,
        kv_memory: int | str = "2GiB",
        think_open: str | None = None,
        think_close: str | None = None,
    ) -> None:
        super().__init__()
        if policy not in _POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(_POLICIES)}, got {policy!r}")
        if batch_size is not None and str(batch_size).isdigit() and int(batch_size) > 1:
            max_batch = int(batch_size)
        self._policy, self._think, self._solve = _POLICIES[policy], think, solve
        self._seed, self._keep_thinking = seed, keep_thinking
        self._template_kwargs = dict(chat_template_args or {})
        if enable_thinking is not None:
            self._template_kwargs["enable_thinking"] = enable_thinking
        config = EngineConfig(
            device=_device(device), dtype=dtype, backend=backend, horizon=horizon, kv_memory=kv_memory,
            max_batch=max_batch, max_model_len=max_length,
        )  # fmt: skip
        self.engine = Engine.from_pretrained(
            pretrained, config, think_open=think_open, think_close=think_close
        )
        self.tokenizer = self.engine.tokenizer
        self._pretrained = pretrained
        self._phases: dict[str, Phase] = {}  # of templated chats, where their own generation prompt decides
        self._seen: Counter[str] = Counter()

    # ---- text ----

    @property
    def eot_token_id(self) -> int:
        return self.engine.delimiters.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return self._pretrained.replace("/", "__")

    @property
    def max_length(self) -> int:
        return self.engine.max_model_len

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, with the special tokens a prompt gets, unless it begins with them already."""
        if add_special_tokens is None:
            begun = self.tokenizer.bos_token is not None and string.startswith(self.tokenizer.bos_token)
            add_special_tokens = not begun and string not in self._phases
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, **kwargs)["input_ids"])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._template_kwargs,
        )
        self._phases[text] = encode_prompt(
            self.tokenizer,
            chat_history,
            self.engine.delimiters,
            vocab_size=self.engine.model_config.vocab_size,
            vocabulary=self.engine.vocabulary,
            template_kwargs=self._template_kwargs,
        ).phase
        return str(text)

    # ---- what lm-eval asks for ----

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        asked = [self._request(*request.args) for request in requests]
        texts = []
        for request, completion in zip(requests, self._decode(asked), strict=True):
            text = completion.text if self._keep_thinking else completion.solution
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        found = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 2,
                context_len=1,
            )
            total = sum(self._scores(list(map(make_disjoint_window, windows))))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            found.append(total)
        return found

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        greedy = self._greedy(pairs)
        found = []
        for (key, context, continuation), score in zip(requests, self._scores(pairs), strict=True):
            is_greedy = greedy[tuple(context)][: len(continuation)] == continuation
            self.cache_hook.add_partial("loglikelihood", key, (score, is_greedy))
            found.append((score, is_greedy))
        return found

    # ---- the engine ----

    def _request(self, context: str, gen_kwargs: Mapping[str, Any]) -> Request:
        settings = dict(normalize_gen_kwargs(dict(gen_kwargs)))
        unknown = sorted(set(settings) - {*_SAMPLING, *_IGNORED})
        if unknown:
            raise ConfigError(
                f"generation_kwargs {', '.join(unknown)} would do nothing here; there are "
                f"{', '.join((*_SAMPLING, *_IGNORED))}"
            )
        sampling = {name: settings[name] for name in _SAMPLING if name in settings}
        if not settings["do_sample"]:
            sampling["temperature"] = 0.0
        self._seen[context] += 1
        said = f"{self._seed}/{self._seen[context]}/{context}".encode()
        solve = settings["max_gen_toks"] if self._solve is None else self._solve
        return Request(
            self.tok_encode(context),
            budget=self._policy(self._think, solve),
            sampling=SamplingParams(
                seed=int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big") >> 1,
                stop=[stop for stop in settings["until"] if stop],
                **sampling,
            ),
            start_phase=self._phases.get(context),
        )

    def _decode(self, requests: Iterable[Request]) -> list[Completion]:
        """Their completions, in their order."""
        order = [self.engine.submit(request) for request in requests]
        done: dict[str, Completion] = {}
        while len(done) < len(order):
            for event in self.engine.step():
                if event.completion is not None:
                    done[event.request_id] = event.completion
        return [done[request_id] for request_id in order]

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """The log-probability of each continuation behind its context."""
        greedy = SamplingParams(temperature=0)
        said = [Request(context, budget=_Say(tuple(more)), sampling=greedy) for context, more in pairs]
        return [sum(completion.logprobs) for completion in self._decode(said)]

    def _greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[tuple[int, ...], list[int]]:
        """What greedy decoding says behind each context, as far as a continuation goes."""
        longest: dict[tuple[int, ...], int] = {}
        for context, more in pairs:
            longest[tuple(context)] = max(len(more), longest.get(tuple(context), 0))
        free = SamplingParams(temperature=0, ignore_eos=True)
        said = (
            Request(list(context), budget=budgets.truncate(length), sampling=free)
            for context, length in longest.items()
        )
        outputs = self._decode(said)
        return {context: output.token_ids for context, output in zip(longest, outputs, strict=True)}


def _device(asked: str | None) -> str:
    """lm-eval says cuda:0 where its user says nothing, and means the CPU where there is no GPU."""
    asked = asked or "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        _log.warning("no CUDA device is available to torch: elastic_decode runs on the CPU")
        return "cpu"
    return asked


def main() -> None:
    """`lm_eval` with the model "elastic_decode" registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
