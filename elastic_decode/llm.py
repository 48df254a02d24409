"""Engine: the public face. A checkpoint or a live module in; tokens, completions and rollouts out."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from elastic_decode.budgets import Policy, truncate
from elastic_decode.config import EngineConfig, ModelConfig
from elastic_decode.core import Budget, Generation, Prompt, Request, SamplingParams, TokenEvent
from elastic_decode.delimiters import Delimiters, resolve
from elastic_decode.engine.build import build, check_device
from elastic_decode.engine.delivery import Sink
from elastic_decode.engine.device import ordinary_tensors
from elastic_decode.engine.prompts import as_prompt_list, one_each
from elastic_decode.engine.runner import interrupts_held
from elastic_decode.engine.sequence import Group
from elastic_decode.errors import (
    BudgetError,
    ConfigError,
    EngineAsleep,
    EngineBusy,
    EngineClosed,
    WeightsIncomplete,
)
from elastic_decode.models import hub
from elastic_decode.models.layout import Weights, named_tensors
from elastic_decode.models.sharing import SharedWeights, copy_in, share_module
from elastic_decode.models.weights import choose_dtype, load_checkpoint, stored_dtype
from elastic_decode.vocabulary import Vocabulary

AnyBudget = Budget | Policy
_CLOSED = "this engine is closed; make a new one"


class Engine:
    """Decodes batches of prompts under separate think and solve budgets.

    Make one with `Engine.from_pretrained` or `Engine.from_model`. It works only inside a call and in one
    thread at a time; it is also a context manager. Several generators may be open: any `next()` advances all
    requests, the others' output waits.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights: Weights,
        tokenizer: Any,
        delimiters: Delimiters,
        config: EngineConfig,
        *,
        prefix_cache: bool,
        shared: SharedWeights | None = None,
    ) -> None:
        """Not for users: the two class methods below find out what goes in here."""
        parts = build(model, weights, tokenizer, delimiters, config, prefix_cache=prefix_cache)
        self.config = config
        self.model_config = model
        self.tokenizer = tokenizer
        self.delimiters = delimiters
        self.max_model_len = parts.max_model_len
        self.backends = parts.backends
        self._weights, self._shared = weights, shared
        self._runner, self._intake, self._loop, self._pool, self._device = (
            parts.runner,
            parts.intake,
            parts.loop,
            parts.pool,
            parts.device,
        )
        self._submitted = Sink()
        self._orphans: list[Group] = []
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._closed = self._asleep = self._torn = False

    # ---- making one ----

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        config: EngineConfig | None = None,
        *,
        think_open: str | Sequence[int] | None = None,
        think_close: str | Sequence[int] | None = None,
        eos_ids: Sequence[int] | None = None,
    ) -> Engine:
        """An engine over a checkpoint folder or a hub id (config.json, safetensors, tokenizer).

        `think_open`, `think_close` and `eos_ids` override what tokenizer, chat template and generation_config
        say. Raises CheckpointError, UnsupportedModel, DelimiterError or ConfigError.
        """
        config = config or EngineConfig()
        check_device(config.device)
        folder = hub.resolve(path_or_id)
        model = ModelConfig.from_hf(folder)
        tokenizer = hub.tokenizer(folder)
        delimiters = resolve(
            tokenizer,
            generation_config=hub.generation_config(folder),
            think_open=think_open,
            think_close=think_close,
            eos_ids=eos_ids,
        )
        dtype = choose_dtype(config.dtype, model.dtype or stored_dtype(folder), config.device)
        weights = load_checkpoint(folder, model, dtype, config.device)
        return cls(
            model, weights, tokenizer, delimiters, config, prefix_cache=config.prefix_cache is not False
        )

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any,
        config: EngineConfig | None = None,
        *,
        think_open: str | Sequence[int] | None = None,
        think_close: str | Sequence[int] | None = None,
        eos_ids: Sequence[int] | None = None,
        fed: Collection[str] = (),
    ) -> Engine:
        """An engine over a live Hugging Face module, sharing its weights without a copy where dtype and
        device agree.

        The module's parameters become views of the engine's fused buffers, so training them in place trains
        what the engine runs. Call `sync_weights()` after every update. The prefix cache is off unless
        `EngineConfig.prefix_cache=True`.

        fed: checkpoint names ("model.layers.0.self_attn.q_proj.weight") of tensors that the module does not
        hold as they are to be decoded with, since adapters lie beside them or they are sharded. The engine
        has buffers of its own for these, decodes once `sync_weights(weights)` has filled them, and wants all
        of them at every call.
        """
        config = config or EngineConfig()
        check_device(config.device)
        shape = ModelConfig.from_hf(model.config)
        stored = str(next(model.parameters()).dtype).removeprefix("torch.")
        delimiters = resolve(
            tokenizer,
            generation_config=getattr(model, "generation_config", None),
            think_open=think_open,
            think_close=think_close,
            eos_ids=eos_ids,
        )
        dtype = choose_dtype(config.dtype, stored, config.device)
        shared = share_module(model, shape, dtype, config.device, fed=fed)
        return cls(
            shape,
            shared.weights,
            tokenizer,
            delimiters,
            config,
            prefix_cache=config.prefix_cache is True,
            shared=shared,
        )

    # ---- decoding ----

    def stream(
        self,
        prompts: Any,
        *,
        budget: AnyBudget | Sequence[AnyBudget] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        n: int = 1,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Generator[TokenEvent, None, None]:
        """A TokenEvent for every token of every sample, as they come. Closing the generator aborts what is
        left.
        """
        sink = Sink()
        groups = self._groups(prompts, budget, sampling, n, chat_template_kwargs, sink, streams=True)
        return self._drain(groups, sink)

    def generate(
        self,
        prompts: Any,
        *,
        budget: AnyBudget | Sequence[AnyBudget] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        n: int = 1,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Generation]:
        """All completions, one Generation a prompt in prompt order."""
        rollout = self.rollout(
            prompts, n=n, budget=budget, sampling=sampling, chat_template_kwargs=chat_template_kwargs
        )
        return sorted(rollout, key=lambda generation: generation.index)

    def rollout(
        self,
        prompts: Any,
        *,
        n: int = 1,
        budget: AnyBudget | Sequence[AnyBudget] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Generator[Generation, None, None]:
        """Each prompt's Generation of `n` completions as soon as the group is complete; `.index` says which
        prompt it is.
        """
        sink = Sink()
        groups = self._groups(prompts, budget, sampling, n, chat_template_kwargs, sink, streams=False)
        return self._drain(groups, sink)

    def fork(
        self,
        prompts: Any,
        *,
        think_at: Sequence[int],
        solve: int | None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Generation]:
        """One thought, a completion a budget: thinking is decoded once, to max(think_at), and forked at each
        smaller budget.

        The completion at b equals `Budget(think=b, solve=solve)` with the same seed, token for token. One
        Generation a prompt, completions in the order of `think_at`.
        """
        forks = self.fork_rollout(
            prompts,
            think_at=think_at,
            solve=solve,
            sampling=sampling,
            chat_template_kwargs=chat_template_kwargs,
        )
        return sorted(forks, key=lambda generation: generation.index)

    def fork_rollout(
        self,
        prompts: Any,
        *,
        think_at: Sequence[int],
        solve: int | None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Generator[Generation, None, None]:
        """`fork` as `rollout` does it: each prompt's Generation as soon as all its branches are complete."""
        budgets = list(think_at) if isinstance(think_at, Sequence) else [think_at]
        if not budgets or any(isinstance(b, bool) or not isinstance(b, int) or b < 0 for b in budgets):
            raise BudgetError(f"think_at must be a list of one or more budgets >= 0, got {think_at!r}")
        self._ready()
        listed = as_prompt_list(prompts)
        params = one_each("sampling", sampling, SamplingParams(), SamplingParams, len(listed))
        sink = Sink()
        groups = [
            self._intake.fork(
                Request(prompt, sampling=params[index], chat_template_kwargs=chat_template_kwargs),
                think_at=budgets,
                solve=solve,
                request_id=self._new_id(),
                index=index,
                sink=sink,
            )
            for index, prompt in enumerate(listed)
        ]
        return self._drain(groups, sink)

    # ---- embedding ----

    def submit(self, request: Request) -> str:
        """Queue a request for `step()`; returns its id. Raises at once what could never run."""
        if not isinstance(request, Request):
            raise ConfigError(f"submit takes a Request, got {type(request).__name__}")
        self._ready()
        request_id = request.request_id or self._new_id()
        if request_id in self._runner.groups:
            raise ConfigError(f"request_id {request_id!r} is already in use by a running request")
        with self._working():
            group = self._intake.group(
                request, request_id=request_id, index=0, sink=self._submitted, streams=True
            )
            self._runner.add(group)
        return request_id

    def prompt_token_ids(self, request_id: str) -> list[int]:
        """The token ids that a request is decoded from, while it has not finished. Raises ConfigError."""
        if self._closed:
            raise EngineClosed(_CLOSED)
        if request_id not in self._runner.groups:
            raise ConfigError(f"request_id {request_id!r} is of no request that waits or runs")
        return list(self._runner.groups[request_id].prompt_ids)

    def step(self) -> list[TokenEvent]:
        """Advance everything once; the new events of submitted requests (perhaps none)."""
        self._ready(between_steps=True)
        queue = self._submitted.queue
        if not queue and not self._runner.idle:
            with self._working():
                self._runner.advance()
        events: list[TokenEvent] = []
        while queue and not isinstance(queue[0], Exception):
            events.append(queue.popleft())
        if queue and not events:
            raise queue.popleft()
        return events

    @property
    def has_work(self) -> bool:
        """Whether a request, of any generator or submitted, has not finished, or events of `step` wait."""
        return not self._closed and (bool(self._submitted.queue) or not self._runner.idle)

    def abort(self, request_id: str) -> bool:
        """End a request; its samples end with reason "abort" and keep what they have. False where it was not
        running.
        """
        if self._closed:
            raise EngineClosed(_CLOSED)
        group = self._runner.groups.get(request_id)
        if group is None:
            return False
        with self._working():
            self._runner.abort(group)
        return True

    def end_thinking(self, request_id: str) -> bool:
        """Force the close on every sample of the request that still thinks. False where it was not running.

        Raises BudgetError where its policy has no close to force.
        """
        self._ready()
        group = self._runner.groups.get(request_id)
        if group is None:
            return False
        if not self._intake.can_end_thinking(group.sequences[0]):
            raise BudgetError(
                f"request {request_id}: its policy never forces a close, so its thinking cannot be ended"
            )
        with self._working():
            self._runner.end_thinking(group)
        return True

    # ---- the engine itself ----

    @property
    def vocabulary(self) -> Vocabulary:
        """What each token prints, as bytes."""
        if self._closed:
            raise EngineClosed(_CLOSED)
        return self._intake.vocabulary

    def encode(self, prompt: Prompt, *, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
        """The token ids that a prompt is decoded from: `Generation.prompt_token_ids`."""
        if self._closed:
            raise EngineClosed(_CLOSED)
        (listed,) = as_prompt_list([prompt])
        return self._intake.encode(listed, self.delimiters, chat_template_kwargs).ids

    @property
    def weights(self) -> Weights:
        """The tensors it decodes with; those of a live module where they are shared."""
        return self._weights

    def sync_weights(self, weights: Iterable[tuple[str, torch.Tensor]] | None = None) -> int:
        """Take over updated weights: required after every update of a shared module. Returns the new weight
        epoch.

        Shared parameters need no copy; others are cast over. Prefix pages of the old weights are forgotten.

        weights: (checkpoint name, whole tensor of any dtype and device) pairs, each cast into the engine's
        buffer as it comes, so a generator holds one at a time. They are for what the engine holds itself: all
        of `fed` for an engine made by from_model, any of the checkpoint's tensors for one made by
        from_pretrained. Raises ConfigError for a wrong name or shape, a `fed` one that is missing, or no
        `weights` where there are some. Where that, or an error of the iterator, comes after the first pair,
        the engine decodes no more (WeightsIncomplete) until a call gets through.
        """
        if self._closed:
            raise EngineClosed(_CLOSED)
        if weights is not None:
            weights = self._tearing(weights)
        with self._working():
            try:
                if self._shared is not None:
                    self._shared.sync(weights)
                elif weights is not None:
                    copy_in(self._own_tensors(), weights)
                self._torn = False
            finally:  # an iterator that raised has brought some
                self._runner.scheduler.new_weights()
        return self._runner.scheduler.epoch

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The checkpoint names that `sync_weights(weights)` takes, with the shapes it wants."""
        if self._closed:
            raise EngineClosed(_CLOSED)
        held = self._own_tensors() if self._shared is None else self._shared.fed
        return {name: tuple(tensor.shape) for name, tensor in held.items()}

    def warmup(self) -> None:
        """Run each kernel once at full width, and on a GPU record every shape of step, so that the first
        request pays for neither.
        """
        self._ready()
        ids = [0] * min(self.config.prefill_tokens, max(1, self.max_model_len - 2))
        for _ in self.rollout([ids], budget=truncate(1)):
            pass
        with self._working():
            self._loop.record_all()

    def sleep(self) -> None:
        """Release the KV pages, and on a GPU the recorded graphs, for the optimizer's step; `wake()` takes
        them back.

        Known prefixes are forgotten. Raises EngineBusy where a request is in flight. Until `wake()` nothing
        can be decoded (EngineAsleep); `sync_weights`, `stats` and `close` work. Does nothing where it sleeps.
        """
        self._ready(awake=False)
        with self._working():
            if not self._runner.idle:
                raise EngineBusy(
                    f"sleep() with requests in flight ({', '.join(sorted(self._runner.groups))}): their keys "
                    "and values would be lost; finish, close or abort them first"
                )
            if not self._asleep:
                self._asleep = True
                self._runner.release_memory()

    def wake(self) -> None:
        """Take back what `sleep()` released. Does nothing where it is awake; where the memory is not to be
        had, torch's error is raised and it sleeps on.
        """
        self._ready(awake=False)
        with self._working():
            if self._asleep:
                self._runner.take_memory()
                self._asleep = False

    def stats(self) -> dict[str, int]:
        """Counters: pages (reserved for running rows against filled ones), rows, tokens so far.

        host_waits: how often a flight's results were read; idle_host_waits: with nothing enqueued behind it.
        """
        if self._closed:
            raise EngineClosed(_CLOSED)
        runner, pool = self._runner, self._pool
        active = runner.scheduler.active.values()
        return {
            "num_pages": pool.num_pages,
            "free_pages": pool.available,
            "reserved_pages": sum(len(sequence.pages) for sequence in active),
            "used_pages": sum(
                pool.pages_for(max(sequence.computed, sequence.length - 1)) for sequence in active
            ),
            "indexed_pages": pool.indexed,
            "running": len(active),
            "prefilling": sum(sequence.computed < sequence.num_known - 1 for sequence in active),
            "waiting": len(runner.scheduler.waiting),
            "sampled_tokens": runner.delivery.sampled_tokens,
            "forced_tokens": runner.delivery.forced_tokens,
            "decode_steps": self._loop.steps,
            "host_waits": self._device.waits,
            "idle_host_waits": self._device.idle_waits,
            "prefix_hit_tokens": runner.scheduler.prefix_hit_tokens,
            "weight_epoch": runner.scheduler.epoch,
            "max_model_len": self.max_model_len,
        }

    def close(self) -> None:
        """Abort everything and let go of weights and pages. A shared module keeps its parameters."""
        if self._closed:
            return
        with self._working():
            self._runner.abort_all()
        self._closed = True
        # Weights and pages go when nothing names them; a shared module keeps its own parameters.
        del self._runner, self._intake, self._loop, self._pool, self._device, self._weights, self._shared

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- inside ----

    def _groups(
        self,
        prompts: Any,
        budget: Any,
        sampling: Any,
        n: int,
        template_kwargs: Mapping[str, Any] | None,
        sink: Sink,
        *,
        streams: bool,
    ) -> list[Group]:
        self._ready()
        listed = as_prompt_list(prompts)
        budgets = one_each("budget", budget, Budget(), (Budget, Policy), len(listed))
        params = one_each("sampling", sampling, SamplingParams(), SamplingParams, len(listed))
        return [
            self._intake.group(
                Request(
                    prompt,
                    budget=budgets[index],
                    sampling=params[index],
                    n=n,
                    chat_template_kwargs=template_kwargs,
                ),
                request_id=self._new_id(),
                index=index,
                sink=sink,
                streams=streams,
            )
            for index, prompt in enumerate(listed)
        ]

    def _drain(self, groups: list[Group], sink: Sink) -> Generator[Any, None, None]:
        """Submit at the first `next()`, yield what arrives, abort the rest when the consumer goes away."""
        try:
            self._ready()
            with self._working():
                for group in groups:
                    self._runner.add(group)
            while True:
                while sink.queue:
                    item = sink.queue.popleft()
                    if isinstance(item, Exception):
                        raise item
                    yield item
                if not sink.open_groups:
                    return
                self._ready(between_steps=True)
                with self._working():
                    self._runner.advance()
        finally:
            self._let_go(groups)

    def _let_go(self, groups: list[Group]) -> None:
        """Abort groups whose consumer has gone; at the next chance, where the garbage collector came in
        mid-step.
        """
        self._orphans.extend(groups)
        if not self._closed and self._lock.acquire(blocking=False):
            try:
                with interrupts_held():
                    self._abort_orphans()
            finally:
                self._lock.release()

    def _abort_orphans(self) -> None:
        while self._orphans:
            self._runner.abort(self._orphans.pop())

    def _new_id(self) -> str:
        while (name := f"request-{next(self._ids)}") in self._runner.groups:
            pass
        return name

    def _own_tensors(self) -> dict[str, torch.Tensor]:
        return named_tensors(self._weights, self.model_config)

    def _tearing(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same pairs; once the second is asked for, the first is copied: the weights are a mixture."""
        for pair in weights:
            yield pair
            self._torn = True

    def _ready(self, *, between_steps: bool = False, awake: bool = True) -> None:
        if self._closed:
            raise EngineClosed(_CLOSED)
        if awake and self._asleep:
            raise EngineAsleep("this engine has released its memory in sleep(); call wake() first")
        if self._torn and awake:
            raise WeightsIncomplete(
                "the last sync_weights(weights) broke off, with old weights left beside new ones; call it "
                "again with all of them"
            )
        if self._shared is not None:
            self._shared.verify(modules=not between_steps)

    @contextmanager
    def _working(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("the engine is at work in another thread; use it from one thread at a time")
        try:
            with interrupts_held(), ordinary_tensors(), self._device.at_work():
                self._abort_orphans()
                yield
        finally:
            self._lock.release()
