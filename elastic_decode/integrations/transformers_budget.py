"""Budgets in Hugging Face `generate`: the engine's own draw, over the logits that transformers computes.

A logits processor comes before the draw, and a budget acts behind it: EOS in the thinking is a draw that the
close replaces. So the processor draws itself, with the op of the engine's decode step (`kernels.draw`: a
counter-based generator, then the budget machine), and leaves the token that comes out as the only candidate.
What `generate` then does to a row of one candidate (temperature, top_p, its own draw) changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from elastic_decode.budgets import Policy
from elastic_decode.core import Budget, Generation, Phase, Prompt, Request, SamplingParams
from elastic_decode.delimiters import Delimiters, resolve
from elastic_decode.engine.batch_state import BatchState
from elastic_decode.engine.delivery import Delivery, Sink
from elastic_decode.engine.device import CudaDevice, Device, HostDevice, ordinary_tensors
from elastic_decode.engine.intake import Intake
from elastic_decode.engine.output_ring import Flight, Landed
from elastic_decode.engine.prompts import as_prompt_list, one_each
from elastic_decode.engine.proof import must_be_proven
from elastic_decode.engine.sequence import Sequence as Sample
from elastic_decode.errors import BackendUnproven, ConfigError
from elastic_decode.kernels import registry, selfcheck
from elastic_decode.kernels.budget.layout import Finish, Flag, State
from elastic_decode.kernels.draw import Ring, draw, make_ring
from elastic_decode.kernels.selfcheck import Matrix, Shapes
from elastic_decode.vocabulary import Vocabulary, vocabulary_bytes

UNBOUNDED = 1 << 30  # positions, where no max_model_len is given
_RING = 256  # steps a ring holds; then there is another
_ONE_CALL = "A BudgetLogitsProcessor serves one call of generate: make a new one for the next."


class BudgetLogitsProcessor(LogitsProcessor):
    """`model.generate(**inputs, **processor.generate_kwargs(), max_new_tokens=…)` decodes under budgets.

    budget, sampling: one value or one a prompt; policies of `elastic_decode.budgets` too. All sampling is set
    here, as for the engine: a temperature given to `generate` does nothing. Stops, which act on the text, are
    generate's (`stop_strings`), so SamplingParams with stops or ignore_eos are refused.

    prompts: what the rows were encoded from (strings, ids or chats), so that for a chat only the generation
    prompt decides where the output begins; their ids must be those of the rows. Without them the rows' own
    ids are read once, before the first draw, from behind the left padding: `prompt_lengths` (ints [rows]),
    else behind leading `tokenizer.pad_token_id`; the last marker decides. start_phase overrides: one, or one
    a prompt. n: generate's num_return_sequences. max_model_len: positions of prompt and output as
    EngineConfig's: an open thinking budget with a finite solve ends where close and solution still fit.
    delimiters: those of `delimiters.resolve(tokenizer, generation_config=…)` unless given. backend: of the
    draw; "auto" is the C++ kernel on the CPU and Triton on a GPU, compared with its reference there first.

    With the same logits its outputs are the engine's, greedy or sampled by a seed, token for token, the
    replaced EOS included. transformers' forward pass is not the engine's to
    the last bit, so near-ties may fall differently.

    What differs: a row that its budget ends is done (`BudgetStoppingCriteria`, in `generate_kwargs`), and
    generate pads it; without the criterion EOS is forced there. `output_scores` holds the one candidate
    (`output_logits` the model's own); log-probabilities are in `generations()`.

    No step reads a tensor back: tables and counters are on the device of the scores. Beam search and assisted
    generation are refused. Raises ConfigError, BudgetError or DelimiterError.
    """

    def __init__(
        self,
        tokenizer: Any,
        budget: Budget | Policy | Sequence[Budget | Policy] | None = None,
        *,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        prompts: Any = None,
        prompt_lengths: Any = None,
        start_phase: Phase | str | Sequence[Phase | str] | None = None,
        n: int = 1,
        max_model_len: int | None = None,
        delimiters: Delimiters | None = None,
        generation_config: Any = None,
        backend: str = "auto",
    ) -> None:
        self.tokenizer = tokenizer
        self.delimiters = delimiters or resolve(tokenizer, generation_config=generation_config)
        self._budget, self._sampling, self._n = budget, sampling, n
        self._prompts = None if prompts is None else as_prompt_list(prompts)
        self._lengths = prompt_lengths
        self._start = start_phase
        self._max_model_len = UNBOUNDED if max_model_len is None else max_model_len
        self._backend = backend
        listed = [sampling] if isinstance(sampling, SamplingParams) else sampling or ()
        for params in listed:
            if params.stop or params.stop_token_ids or params.ignore_eos:
                raise ConfigError(
                    "BudgetLogitsProcessor: stop, stop_token_ids and ignore_eos are not the processor's to "
                    "do; give stop_strings= or eos_token_id= to generate"
                )
        if getattr(generation_config, "num_beams", 1) not in (None, 1):
            raise ConfigError(_no_beams("generation_config.num_beams is not 1"))
        eos = getattr(tokenizer, "eos_token_id", None)
        self._eos = eos if eos in self.delimiters.eos_ids else self.delimiters.eos_ids[0]
        self._rows = 0  # before the first call
        self._width = 0  # tokens of a row in the last call
        self._rings: list[Ring] = []
        self._samples: list[Sample] = []  # a row each
        self._steps = 0

    def generate_kwargs(self) -> dict[str, Any]:
        """For `model.generate`: this processor and its stopping criterion, and no beams."""
        return {
            "logits_processor": LogitsProcessorList([self]),
            "stopping_criteria": StoppingCriteriaList([BudgetStoppingCriteria(self)]),
            "do_sample": self._n > 1,  # among one candidate; generate refuses n > 1 without it
            "num_beams": 1,
            "num_return_sequences": self._n,
        }

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores [R, V], any float dtype -> the same shape: 0 at the token to emit, -inf elsewhere."""
        with ordinary_tensors():
            if not self._rows:
                self._begin(input_ids, scores)
            elif input_ids.shape[1] != self._width + 1 or input_ids.shape[0] != self._rows:
                raise ConfigError(
                    f"the rows are {list(input_ids.shape)}, expected [{self._rows}, {self._width + 1}]: one "
                    f"more token than at the last call. {_ONE_CALL} Beam search and assisted generation "
                    "have no place for budgets."
                )
            else:
                self._positions += 1
            self._width = input_ids.shape[1]
            at = self._steps % _RING
            if at == 0:
                self._rings.append(make_ring(_RING, self._rows, scores.device))
            ring = self._rings[-1]
            # A copy of its own: contiguous, and nobody else's to change.
            logits = torch.empty(scores.shape, dtype=torch.float32, device=scores.device).copy_(scores)
            table, machine = self._batch.table, self._batch.machine
            draw(logits, self._slots, self._positions, table, machine, ring, backend=self._backend)
            self._steps += 1
            emitted = torch.where((ring.flags[at] & int(Flag.VALID)) != 0, ring.tokens[at], self._eos)
            only = torch.full_like(scores, -torch.inf)
            return only.scatter_(1, emitted.long().unsqueeze(1), 0.0)

    @property
    def finished(self) -> torch.Tensor:
        """bool [R], on the device: rows whose output is complete."""
        if not self._rows:
            raise ConfigError("BudgetLogitsProcessor: generate has not called it yet")
        return self._batch.state[: self._rows, State.FINISH] != int(Finish.RUNNING)

    def generations(self, sequences: torch.Tensor) -> list[Generation]:
        """What `generate` returned [R, prompt + new], as the engine's Generations: phases, provenance,
        log-probabilities, counts. One a prompt, with n completions.

        A row that neither EOS nor its budget ended has reason "stop" where generate's own criteria ended it
        before the others, else "length". Raises NonFiniteLogits where a row had no candidate to draw. Once.
        """
        rows = self._rows
        if not rows or sequences.shape[0] != rows:
            raise ConfigError(
                f"generations() takes what this processor's generate returned: {rows} rows, got "
                f"{list(sequences.shape)}"
            )
        steps = self._steps
        tokens, flags, logprobs, sampling_logprobs = (
            torch.cat([ring[field] for ring in self._rings])[:steps].T.cpu() for field in range(4)
        )
        prompt_width = self._width - steps + 1
        new = sequences[:, prompt_width:].cpu()[:, :steps]
        # What was drawn for a row behind its end by generate's own criteria is discarded.
        kept = (new == tokens[:, : new.shape[1]]).long().cumprod(1).sum(1)
        kept_or_empty = (torch.arange(steps) < kept[:, None]) | (flags & int(Flag.VALID) == 0)
        flags = torch.where(kept_or_empty, flags, 0)
        landed = Landed(tokens.tolist(), flags.tolist(), logprobs.tolist(), sampling_logprobs.tolist())
        delivery = Delivery(self.tokenizer)
        delivery.accept(Flight(self._samples, steps, _Landed()), landed)
        for sample, count in zip(self._samples, kept.tolist(), strict=True):
            if sample.finish_reason is not None:
                continue
            if sample.state_row[State.FINISH] == Finish.BUDGET:  # a budget of no token at all
                delivery.finish(sample, "budget")
            else:
                delivery.finish(sample, "length" if count == steps else "stop")
        self._samples = []
        found = list(self._sink.queue)
        for item in found:
            if isinstance(item, Exception):
                raise item
        return sorted(found, key=lambda generation: generation.index)

    def _begin(self, input_ids: torch.Tensor, scores: torch.Tensor) -> None:
        """Compile the budgets and put the rows' tables on the device. Reads the prompts' ids."""
        rows, vocab_size = scores.shape
        if rows % self._n:
            raise ConfigError(f"generate has {rows} rows, which are no multiple of n={self._n}")
        # Beam search hands its processors log-probabilities; a model's logits never sum to exactly one.
        if bool((torch.logsumexp(scores.float(), dim=-1).abs() < 1e-4).all()):
            raise ConfigError(_no_beams("the scores are log-probabilities, as beam search makes them"))
        prompts = self._read_prompts(input_ids)
        budgets = one_each("budget", self._budget, Budget(), (Budget, Policy), len(prompts))
        params = one_each("sampling", self._sampling, SamplingParams(), SamplingParams, len(prompts))
        starts = one_each("start_phase", self._start, None, str, len(prompts))
        intake = Intake(
            tokenizer=self.tokenizer,
            delimiters=self.delimiters,
            vocabulary=_vocabulary(self.tokenizer, vocab_size),
            vocab_size=vocab_size,
            max_model_len=self._max_model_len,
            page_size=self._max_model_len,  # there are no pages: one holds anything
            num_pages=1,
        )
        self._sink = Sink()
        groups = [
            intake.group(
                Request(
                    prompt, budget=budgets[i], sampling=params[i], n=self._n, start_phase=starts[i],
                    delimiters=self.delimiters,
                ),
                request_id=f"row-{i}",
                index=i,
                sink=self._sink,
                streams=False,
            )
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip
        self._samples = [sample for group in groups for sample in group.sequences]
        self._check_ids(input_ids, self._samples)
        device = _device(scores.device)
        self._prove(scores.device, vocab_size)
        self._batch = BatchState(num_slots=rows, max_pages=1, vocab_size=vocab_size, device=device)
        for slot, sample in enumerate(self._samples):
            self._batch.admit(
                slot,
                program=sample.program,
                state_row=sample.state_row,
                pages=(),
                sampling=sample.group.sampling,
                seed=sample.group.seed,
                sample_index=sample.sample,
                prompt_ids=sample.group.prompt_ids,
                output_ids=(),
                ban_ids=sample.group.ban_ids,
            )
        self._batch.flush()
        self._slots = device.upload(list(range(rows)))
        self._positions = device.upload([len(sample.group.prompt_ids) for sample in self._samples])
        self._rows = rows

    def _read_prompts(self, input_ids: torch.Tensor) -> list[Prompt]:
        count = input_ids.shape[0] // self._n
        if self._prompts is not None:
            if len(self._prompts) != count:
                raise ConfigError(_wrong_rows(len(self._prompts), self._n, input_ids.shape[0]))
            return self._prompts
        ids = input_ids[:: self._n].tolist()
        if self._lengths is not None:
            lengths = [int(length) for length in self._lengths]
            if len(lengths) != count:
                raise ConfigError(_wrong_rows(len(lengths), self._n, input_ids.shape[0]))
            return [row[len(row) - length :] for row, length in zip(ids, lengths, strict=True)]
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return [_behind(row, pad) for row in ids]

    def _check_ids(self, input_ids: torch.Tensor, samples: Sequence[Sample]) -> None:
        for row, (ids, sample) in enumerate(zip(input_ids.tolist(), samples, strict=True)):
            wanted = sample.group.prompt_ids
            if ids[len(ids) - len(wanted) :] != wanted:
                raise ConfigError(
                    f"row {row} does not end in the ids of its prompt: {ids[-8:]} against {wanted[-8:]} at "
                    "the end. Pad on the left, order rows as prompts, and encode them as the engine does "
                    "(chats without further special tokens)."
                )

    def _prove(self, device: torch.device, vocab_size: int) -> None:
        if not must_be_proven(device):
            return
        backend = registry.default_backend(device.type) if self._backend == "auto" else self._backend
        shapes = Shapes(  # only the vocabulary matters to a draw
            hidden_size=64, intermediate_size=64, num_heads=1, num_kv_heads=1, head_dim=64,
            vocab_size=vocab_size, page_size=16, matrices=(Matrix(64, 64),), dtype=torch.float32,
            kv_dtype=torch.float32, qk_norm=False, windows=(None,), eps=1e-6,
        )  # fmt: skip
        outcome = selfcheck.check("draw", backend, shapes, device)
        if not outcome.ok:
            raise BackendUnproven(
                f"the {backend} draw disagrees with its reference on {device}: {outcome.summary()}"
            )


class BudgetStoppingCriteria(StoppingCriteria):
    """Ends the rows whose budget or EOS has ended them, at their last token."""

    def __init__(self, processor: BudgetLogitsProcessor) -> None:
        self._processor = processor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self._processor.finished


# Built once a tokenizer: it takes a second at 150,000 tokens, and automata are cached by it.
_vocabularies: WeakKeyDictionary[Any, dict[tuple[int, int], Vocabulary]] = WeakKeyDictionary()


def _vocabulary(tokenizer: Any, vocab_size: int) -> Vocabulary:
    known = _vocabularies.setdefault(tokenizer, {})
    key = (len(tokenizer), vocab_size)
    if key not in known:
        known[key] = vocabulary_bytes(tokenizer, vocab_size)
    return known[key]


class _Landed:
    """The Download of a flight whose output is on the host already."""

    def read(self, then: Any, *, queued_behind: bool) -> Any:
        raise AssertionError("there is nothing to read")


def _device(device: torch.device) -> Device:
    # On a GPU everything goes to the stream that generate uses, so only uploads are taken from the engine's.
    return HostDevice(device) if device.type == "cpu" else CudaDevice(device, graphs=False)


def _behind(row: list[int], pad: int | None) -> list[int]:
    start = next((at for at, token in enumerate(row) if token != pad), 0)
    return row[start:]


def _wrong_rows(given: int, n: int, rows: int) -> str:
    return (
        f"{given} prompts with n={n} make {given * n} rows, generate has {rows}. n is num_return_sequences; "
        "beam search, which multiplies rows, is refused."
    )


def _no_beams(seen: str) -> str:
    return (
        f"BudgetLogitsProcessor: {seen}. A budget follows one output from token to token, and beams change "
        "rows: use num_beams=1."
    )
