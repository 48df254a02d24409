"""What steps produced -> sequences, events and finished generations, in the hands of whoever asked."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from elastic_decode.core import Completion, FinishReason, Generation, Phase, ThinkEnd, TokenEvent
from elastic_decode.engine.output_ring import Flight, Landed
from elastic_decode.engine.sequence import Group, Sequence, Stage
from elastic_decode.engine.text import split_text, text_of
from elastic_decode.errors import ElasticDecodeError, NonFiniteLogits
from elastic_decode.kernels.budget.layout import Finish, Flag
from elastic_decode.kernels.budget.layout import ThinkEnd as ThinkEndCode

_REASONS: dict[int, FinishReason] = {Finish.EOS: "eos", Finish.BUDGET: "budget", Finish.LENGTH: "length"}
_THINK_ENDS: dict[int, ThinkEnd] = {
    ThinkEndCode.NONE: "none",
    ThinkEndCode.NATURAL: "natural",
    ThinkEndCode.FORCED: "forced",
    ThinkEndCode.EOS: "eos",
}
_VALID, _FORCED, _SOLVE = int(Flag.VALID), int(Flag.FORCED), int(Flag.SOLVE)
_FINISH_SHIFT, _THINK_END_SHIFT = int(Flag.FINISH_SHIFT), int(Flag.THINK_END_SHIFT)


@dataclass(slots=True, eq=False)
class Sink:
    """Where one call's output waits: events (`stream`, `submit`), generations (the others), or an error to
    raise.
    """

    queue: deque[Any] = field(default_factory=deque)
    open_groups: int = 0

    def put(self, item: TokenEvent | Generation | ElasticDecodeError) -> None:
        self.queue.append(item)


class Delivery:
    """Turns landed flights into output; `accept` returns the sequences that can be retired."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.sampled_tokens = 0
        self.forced_tokens = 0

    def accept(self, flight: Flight, landed: Landed) -> list[Sequence]:
        finished = []
        for row, sequence in enumerate(flight.sequences):
            if sequence.stage is Stage.DONE or sequence.finish_reason is not None:
                continue  # what the device decoded past a host-side stop is discarded
            flags = landed.flags[row]
            count = next((step for step, word in enumerate(flags) if not word & _VALID), flight.steps)
            output = (
                landed.tokens[row][:count],
                flags[:count],
                landed.logprobs[row][:count],
                landed.sampling_logprobs[row][:count],
            )
            if (
                sequence.text is None
                and not sequence.group.streams
                and not sequence.group.sampling.stop_token_ids
            ):
                if count:
                    self._take_all(sequence, *output)
            else:
                for entry in zip(*output, strict=True):
                    self._take(sequence, *entry)
                    if sequence.finish_reason is not None:
                        break
            if sequence.finish_reason is not None:
                finished.append(sequence)
            elif count < flight.steps:
                finished += self._ended_without_a_token(sequence, flags[count])
        return finished

    def _ended_without_a_token(self, sequence: Sequence, flags: int) -> list[Sequence]:
        """The sequences that the first entry without a token ends."""
        finish = (flags >> _FINISH_SHIFT) & 15
        if finish == Finish.INVALID:
            self._fail(sequence)
            return sequence.group.sequences
        if finish in _REASONS:  # an expiry that forces nothing
            sequence.think_end = _THINK_ENDS[(flags >> _THINK_END_SHIFT) & 3]
            self.finish(sequence, _REASONS[finish])
            return [sequence]
        return []

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sample from the host's side: abort, or a budget that leaves nothing to decode."""
        sequence.finish_reason = reason
        group = sequence.group
        if group.streams:
            event = self._event(group, sequence, None, self._last_text(sequence), False, 0.0)
            group.sink.put(event)
        self._close(sequence)

    def finish_like_root(self, branch: Sequence) -> None:
        """The root's thought ended before this branch's budget: its completion is the root's."""
        self._close(branch)

    def _take_all(
        self,
        sequence: Sequence,
        tokens: list[int],
        flags: list[int],
        logprobs: list[float],
        sampling_logprobs: list[float],
    ) -> None:
        """`_take` of several tokens at once: only the machine can end the sequence, and nobody looks on."""
        forced = [bool(word & _FORCED) for word in flags]
        phases = [Phase.SOLVE if word & _SOLVE else Phase.THINK for word in flags]
        sequence.token_ids += tokens
        sequence.logprobs += logprobs
        sequence.sampling_logprobs += sampling_logprobs
        sequence.forced += forced
        sequence.phases += phases
        solved = sum(word & (_FORCED | _SOLVE) == _SOLVE for word in flags)
        sampled = len(flags) - sum(forced)
        sequence.solve_tokens += solved
        sequence.think_tokens += sampled - solved
        self.sampled_tokens += sampled
        self.forced_tokens += len(flags) - sampled
        last = flags[-1]
        sequence.think_end = _THINK_ENDS[(last >> _THINK_END_SHIFT) & 3]
        sequence.finish_reason = _REASONS.get((last >> _FINISH_SHIFT) & 15)
        if sequence.finish_reason is not None:
            self._close(sequence)

    def _take(
        self, sequence: Sequence, token: int, flags: int, logprob: float, sampling_logprob: float
    ) -> None:
        group = sequence.group
        forced = bool(flags & _FORCED)
        phase = Phase.SOLVE if flags & _SOLVE else Phase.THINK
        sequence.token_ids.append(token)
        sequence.logprobs.append(logprob)
        sequence.sampling_logprobs.append(sampling_logprob)
        sequence.forced.append(forced)
        sequence.phases.append(phase)
        if forced:
            self.forced_tokens += 1
        else:
            self.sampled_tokens += 1
            if phase is Phase.SOLVE:
                sequence.solve_tokens += 1
            else:
                sequence.think_tokens += 1
        sequence.think_end = _THINK_ENDS[(flags >> _THINK_END_SHIFT) & 3]
        finish = (flags >> _FINISH_SHIFT) & 15
        reason = _REASONS.get(finish)
        sampling = group.sampling
        may_stop = phase is Phase.SOLVE or sampling.stop_in_thinking
        if reason != "eos" and not forced and may_stop and token in sampling.stop_token_ids:
            reason = "stop"
        piece = ""
        if sequence.text is not None and sequence.scanner is not None:
            if reason not in ("eos", "stop"):
                piece = sequence.text.push(token)
                if forced:  # a stop is the model's own: what is forced neither begins nor completes one
                    piece = sequence.scanner.flush() + piece
                elif may_stop:
                    piece = sequence.scanner.push(piece)
                    if sequence.scanner.stopped:
                        reason = "stop"
            if reason is not None:
                piece += self._last_text(sequence)
            sequence.pieces.append(piece)
        sequence.finish_reason = reason
        if group.streams:
            group.sink.put(self._event(group, sequence, token, piece, forced, logprob))
        if reason is not None:
            self._close(sequence)

    def _last_text(self, sequence: Sequence) -> str:
        """What is still held back when a sample ends."""
        if sequence.text is None or sequence.scanner is None or sequence.scanner.stopped:
            return ""
        rest = sequence.text.flush()
        held = sequence.scanner.push(rest)
        return held + sequence.scanner.flush()

    def _event(
        self, group: Group, sequence: Sequence, token: int | None, text: str, forced: bool, logprob: float
    ) -> TokenEvent:
        phase = sequence.phases[-1] if sequence.phases else group.start_phase
        return TokenEvent(
            group.request_id,
            group.index,
            sequence.sample,
            token,
            text,
            phase,
            forced,
            logprob,
            sequence.finish_reason,
            None if sequence.finish_reason is None else self._completion(sequence),
        )

    def _close(self, sequence: Sequence) -> None:
        group = sequence.group
        group.unfinished -= 1
        if group.unfinished == 0:
            group.sink.open_groups -= 1
            if not group.streams:
                group.sink.put(self._generation(group))

    def _fail(self, sequence: Sequence) -> None:
        """No candidate to draw: the request ends with an error for its own consumer, and for nobody else."""
        group = sequence.group
        for other in group.sequences:
            other.finish_reason = other.finish_reason or "abort"
        group.unfinished = 0
        group.sink.open_groups -= 1
        error = NonFiniteLogits(
            f"request {group.request_id}, sample {sequence.sample}: after {len(sequence.token_ids)} "
            "output tokens the model's logits hold NaN or no finite value; check the weights, or the "
            "dtype (float16 overflows where bfloat16 does not)"
        )
        error.request_id = group.request_id
        group.sink.put(error)

    def _generation(self, group: Group) -> Generation:
        if group.think_at:
            by_budget = {sequence.known_output: sequence for sequence in group.sequences[1:]}
            root = group.sequences[0]
            wanted = [by_budget.get(budget, root) for budget in group.think_at]
            chosen = [root if sequence.finish_reason is None else sequence for sequence in wanted]
        else:
            chosen = group.sequences
        completions = [self._completion(sequence) for sequence in chosen]
        return Generation(group.request_id, group.index, list(group.prompt_ids), completions)

    def _completion(self, sequence: Sequence) -> Completion:
        group, reason = sequence.group, sequence.finish_reason
        assert reason is not None
        stopped_by_text = reason == "stop" and sequence.scanner is not None and sequence.scanner.stopped
        hidden = 1 if reason == "eos" or (reason == "stop" and not stopped_by_text) else 0
        shown = len(sequence.token_ids) - hidden
        ids, phases = sequence.token_ids[:shown], sequence.phases[:shown]
        thinking, solution = split_text(self._tokenizer, ids, phases, sequence.think_end, group.delimiters)
        if stopped_by_text:
            text = "".join(sequence.pieces)
            ended_in = sequence.phases[-1]
            stops = tuple(group.sampling.stop)
            if ended_in is Phase.SOLVE:
                cut = _cut(solution, stops)
                if cut == solution:  # the stop begins in the thinking
                    thinking, cut = _cut(thinking + solution, stops)[: len(thinking)], ""
                solution = cut
            else:
                thinking = _cut(thinking, stops)
        else:
            text = text_of(self._tokenizer, ids)
        return Completion(
            token_ids=list(sequence.token_ids),
            logprobs=list(sequence.logprobs),
            sampling_logprobs=list(sequence.sampling_logprobs),
            forced=list(sequence.forced),
            phases=list(sequence.phases),
            text=text,
            thinking=thinking,
            solution=solution,
            think_tokens=sequence.think_tokens,
            solve_tokens=sequence.solve_tokens,
            think_end=sequence.think_end,
            finish_reason=reason,
            seed=group.seed,
            weight_epoch=sequence.weight_epoch,
        )


def _cut(text: str, stops: tuple[str, ...]) -> str:
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return text[: min(found)] if found else text
