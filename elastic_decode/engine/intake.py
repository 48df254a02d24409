"""Requests -> groups: prompts encoded, budgets compiled, bounds checked. Everything that can be refused is
refused here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from elastic_decode import automata
from elastic_decode.budgets import Policy, as_policy
from elastic_decode.core import Budget, Phase, Prompt, Request
from elastic_decode.delimiters import Delimiters
from elastic_decode.engine.prompts import Encoded, as_prompt_list, encode_prompt
from elastic_decode.engine.sequence import Group
from elastic_decode.engine.sequence import Sequence as Sample
from elastic_decode.engine.text import StopScanner, TextStream
from elastic_decode.errors import BudgetError, CapacityError, ConfigError
from elastic_decode.kernels import registry
from elastic_decode.kernels.budget.layout import (
    EVENT_WORDS,
    EVENTS,
    PHASE_WORDS,
    STATE_WORDS,
    EventWord,
    Finish,
    Header,
    Label,
    PhaseWord,
    State,
)
from elastic_decode.vocabulary import Vocabulary

_LABELS = {Phase.THINK: Label.THINK, Phase.SOLVE: Label.SOLVE}


class Intake:
    def __init__(
        self,
        *,
        tokenizer: Any,
        delimiters: Delimiters,
        vocabulary: Vocabulary,
        vocab_size: int,
        max_model_len: int,
        page_size: int,
        num_pages: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._delimiters = delimiters
        self.vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._page_size = page_size
        self._num_pages = num_pages
        # Rows are prepared on the host by the compiled machine, whatever device the engine decodes on.
        host = "cpu" if registry.why_unavailable("budget", "cpu") is None else "reference"
        self._enter_start = registry.implementation("budget", host, "enter_start")
        self._budget_step = registry.implementation("budget", host, "budget_step")

    def group(
        self,
        request: Request,
        *,
        request_id: str,
        index: int,
        sink: Any,
        streams: bool,
    ) -> Group:
        """A group of `request.n` samples. Raises ConfigError, BudgetError or CapacityError, naming what
        cannot be.
        """
        group = self._empty_group(request, request_id, index, sink, streams)
        program = self._compile(request.budget, group)
        for sample in range(request.n):
            group.sequences.append(self._sample(group, sample, program))
        group.siblings = group.sequences[1:]
        group.unfinished = len(group.sequences)
        self._check_fits(group.sequences[:1])
        return group

    def fork(
        self,
        request: Request,
        *,
        think_at: Sequence[int],
        solve: int | None,
        request_id: str,
        index: int,
        sink: Any,
    ) -> Group:
        """A group that thinks once, up to the largest budget, and branches at every smaller one."""
        group = self._empty_group(request, request_id, index, sink, False)
        group.think_at = tuple(think_at)
        largest = max(think_at)
        root = self._sample(group, 0, self._compile(Budget(think=largest, solve=solve), group))
        group.sequences.append(root)
        if group.start_phase is Phase.THINK:  # with thinking already closed every budget is the same run
            for budget in sorted(set(think_at) - {largest}):
                branch = self._sample(
                    group, len(group.sequences), self._compile(Budget(think=budget, solve=solve), group)
                )
                branch.known_output = budget
                group.sequences.append(branch)
        group.branches = group.sequences[1:]
        group.unfinished = len(group.sequences)
        self._check_fits(group.sequences)
        return group

    def encode(
        self, prompt: Prompt, delimiters: Delimiters, template_kwargs: Mapping[str, Any] | None
    ) -> Encoded:
        """A prompt's ids and the phase they start in. Raises ConfigError."""
        return encode_prompt(
            self._tokenizer,
            prompt,
            delimiters,
            vocab_size=self._vocab_size,
            vocabulary=self.vocabulary,
            template_kwargs=template_kwargs,
        )

    def grow_branch(self, branch: Sample) -> None:
        """Give a branch the root's first tokens and the state its own budget leaves after them."""
        root, shared = branch.group.sequences[0], branch.known_output
        branch.token_ids = root.token_ids[:shared]
        branch.logprobs = root.logprobs[:shared]
        branch.sampling_logprobs = root.sampling_logprobs[:shared]
        branch.forced = root.forced[:shared]
        branch.phases = root.phases[:shared]
        branch.think_tokens = shared
        self._replay(branch)
        if branch.text is not None and branch.scanner is not None:
            for token in branch.token_ids:
                piece = branch.text.push(token)
                branch.pieces.append(
                    branch.scanner.push(piece) if branch.group.sampling.stop_in_thinking else piece
                )

    @staticmethod
    def can_end_thinking(sequence: Sample) -> bool:
        """Whether the policy leads from thinking to a solution on its own: `truncate`, for one, has no close
        to force.
        """
        row = sequence.program.program_row
        phase = Header.PHASES + PHASE_WORDS * sequence.program.start[Label.THINK]
        event = int(row[phase + PhaseWord.ON_EXPIRE])
        return event >= 0 and int(row[EVENTS + EVENT_WORDS * event + EventWord.NEXT]) >= 0

    def _empty_group(
        self,
        request: Request,
        request_id: str,
        index: int,
        sink: Any,
        streams: bool,
    ) -> Group:
        (prompt,) = as_prompt_list([request.prompt])
        delimiters = request.delimiters or self._delimiters
        if not isinstance(delimiters, Delimiters):
            raise ConfigError(f"Request.delimiters must be Delimiters, got {delimiters!r}")
        encoded = self.encode(prompt, delimiters, request.chat_template_kwargs)
        prompt_ids = encoded.ids
        if len(prompt_ids) >= self._max_model_len:
            raise CapacityError(
                f"the prompt has {len(prompt_ids)} tokens, max_model_len is {self._max_model_len}: no room "
                "for an answer; shorten the prompt or raise EngineConfig.max_model_len"
            )
        sampling = request.sampling
        self._check_ids("logit_bias", sampling.logit_bias or ())
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        return Group(
            request_id=request_id,
            index=index,
            prompt_ids=prompt_ids,
            sampling=sampling,
            seed=sampling.seed if sampling.seed is not None else random.SystemRandom().getrandbits(63),
            delimiters=delimiters,
            start_phase=request.start_phase or encoded.phase,
            tail=encoded.tail,
            ban_ids=tuple(dict.fromkeys((*delimiters.eos_ids, *sampling.stop_token_ids))),
            sink=sink,
            streams=streams,
        )

    def _check_ids(self, name: str, ids: Any) -> None:
        outside = next((token for token in ids if not 0 <= token < self._vocab_size), None)
        if outside is not None:
            raise ConfigError(
                f"SamplingParams.{name} names token id {outside}, outside the model's vocabulary of "
                f"{self._vocab_size}"
            )

    def _compile(self, budget: Budget | Policy, group: Group) -> automata.CompiledProgram:
        policy = as_policy(budget)
        return automata.compile(
            policy.program(group.delimiters, self._tokenizer),
            group.delimiters,
            self.vocabulary,
            self._vocab_size,
            max_new=self._max_model_len - len(group.prompt_ids),
            start=group.start_phase,
            ignore_eos=group.sampling.ignore_eos,
        )

    def _sample(self, group: Group, sample: int, program: automata.CompiledProgram) -> Sample:
        prompt_len = len(group.prompt_ids)
        state = torch.zeros(STATE_WORDS, dtype=torch.int32)
        state[State.TOKEN] = group.prompt_ids[-1]
        state[State.POSITION] = prompt_len - 1
        state[State.LIMIT] = self._max_model_len
        if group.start_phase is Phase.THINK:  # a prompt may have begun the close already, as gpt-oss's does
            state[State.DFA] = program.start_state(group.tail)
        start = program.start[_LABELS[group.start_phase]]
        self._enter_start(state, program.program_row, program.automaton, start)
        bound = program.bound()
        assert bound is not None, "compiled with max_new, so it is known"
        sequence = Sample(
            group=group,
            sample=sample,
            program=program,
            state_row=state.numpy(),
            bound=min(prompt_len + bound, self._max_model_len),
        )
        if group.streams or group.sampling.stop:
            sequence.text = TextStream(self._tokenizer)
            sequence.scanner = StopScanner(tuple(group.sampling.stop))
        return sequence

    def _check_fits(self, together: list[Sample]) -> None:
        """Positions of sequences that are admitted together (a fork's branches share what comes before their
        last token).
        """
        first = together[0]
        size = self._page_size
        pages = -(-first.bound // size)
        pages += sum(-(-b.bound // size) - (b.num_known - 1) // size for b in together[1:])
        if pages > self._num_pages:
            raise CapacityError(
                f"{len(first.group.prompt_ids)} prompt tokens and a bound of "
                f"{first.bound - len(first.group.prompt_ids)} output "
                f"tokens{' with ' + str(len(together) - 1) + ' branches' if len(together) > 1 else ''} need "
                f"{pages} KV pages of {size} tokens; the engine has {self._num_pages}. Lower the budgets or "
                "raise kv_memory"
            )

    def _replay(self, branch: Sample) -> None:
        """Run the branch's own budget machine over the shared tokens, on the host, to the state it has after
        them.
        """
        state = torch.from_numpy(branch.state_row.reshape(1, -1))
        program = branch.program.program_row.reshape(1, -1)
        automaton = branch.program.automaton
        slot, index = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        logits = torch.zeros((1, 1))
        ints = [torch.zeros((1, 1), dtype=torch.int32) for _ in range(2)]
        floats = [torch.zeros((1, 1)) for _ in range(2)]
        zero = torch.zeros(1)
        for token in branch.token_ids:
            draw = torch.tensor([token], dtype=torch.int32)
            self._budget_step(
                state, program, automaton, slot, draw, logits, zero, zero, zero, *ints, *floats, index
            )
            if int(state[0, State.TOKEN]) != token:
                raise AssertionError("the branch's machine left the thought before its budget was used")
        if int(state[0, State.FINISH]) != Finish.RUNNING:
            raise BudgetError("a branch finished within the shared thought: there is nothing to decode")
        branch.state_row = np.ascontiguousarray(state[0].numpy())
