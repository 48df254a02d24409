"""Completions and events as the OpenAI API's objects: whole answers, chunks of a stream, usage."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from elastic_decode.core import Completion, FinishReason, Phase, TokenEvent
from elastic_decode.llm import Engine
from elastic_decode.server.segments import Segments

DONE = b"data: [DONE]\n\n"
_REASONS: dict[FinishReason, str] = {
    "eos": "stop",
    "stop": "stop",
    "budget": "length",
    "length": "length",
    "abort": "length",
}
_LOWEST = -9999.0  # what the API says of a token that could not be; JSON has no infinity


def event_stream(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(prompt_tokens: int, completions: Sequence[Completion]) -> dict[str, Any]:
    """Tokens of a request. `completion_tokens` are sampled and forced ones; think and solve count sampled
    ones only, as budgets do.
    """
    think = sum(completion.think_tokens for completion in completions)
    solve = sum(completion.solve_tokens for completion in completions)
    total = sum(len(completion.token_ids) for completion in completions)
    reasoning = sum(completion.phases.count(Phase.THINK) for completion in completions)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": total,
        "total_tokens": prompt_tokens + total,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
        "think_tokens": think,
        "solve_tokens": solve,
        "forced_tokens": total - think - solve,
    }


def _ours(completion: Completion) -> dict[str, Any]:
    """What the API has no field for."""
    return {
        "finish_reason": completion.finish_reason,
        "think_end": completion.think_end,
        "think_tokens": completion.think_tokens,
        "solve_tokens": completion.solve_tokens,
        "forced_tokens": sum(completion.forced),
        "seed": completion.seed,
    }


class Reply:
    """The answer to one HTTP request: `whole`, or `opening`, `chunk`s and `ending`."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    id_prefix: ClassVar[str]

    def __init__(self, engine: Engine, model: str, choices: int, *, logprobs: bool, with_usage: bool) -> None:
        """logprobs: of every token. with_usage: a last chunk of a stream has the usage."""
        self._tokenizer, self._vocabulary = engine.tokenizer, engine.vocabulary
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._choices = choices
        self._logprobs = logprobs
        self._with_usage = with_usage

    def whole(self, prompt_tokens: int, completions: Sequence[Completion]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                **self._answer(completion),
                "logprobs": self._logprobs_of(_entries(completion)) if self._logprobs else None,
                "finish_reason": _REASONS[completion.finish_reason],
                "elastic": _ours(completion),
            }
            for index, completion in enumerate(completions)
        ]
        return {
            **self._head,
            "object": self.whole_object,
            "choices": choices,
            "usage": usage(prompt_tokens, completions),
        }

    def opening(self) -> bytes:
        """What is sent as soon as the engine has taken the request."""
        return b""

    def chunk(self, index: int, events: Sequence[TokenEvent]) -> bytes:
        """What new events of a choice add; nothing where all they bring is still held back."""
        piece = self._piece(index, events)
        last = events[-1].completion
        if piece is None and last is None and not self._logprobs:
            return b""
        choice = {"index": index, **(piece or self._no_piece())}
        choice["logprobs"] = None
        if self._logprobs:
            entries = [(e.token_id, e.logprob, e.forced, e.phase) for e in events if e.token_id is not None]
            choice["logprobs"] = self._logprobs_of(entries)
        choice["finish_reason"] = None if last is None else _REASONS[last.finish_reason]
        if last is not None:
            choice["elastic"] = _ours(last)
        return self._event([choice], None)

    def ending(self, prompt_tokens: int, completions: Sequence[Completion]) -> bytes:
        """The end of a stream that came to its end."""
        return (self._event([], usage(prompt_tokens, completions)) if self._with_usage else b"") + DONE

    def _event(self, choices: list[dict[str, Any]], counted: dict[str, Any] | None) -> bytes:
        body = {**self._head, "object": self.chunk_object, "choices": choices}
        if self._with_usage:
            body["usage"] = counted
        return event_stream(body)

    def _token(self, token_id: int) -> str:
        """A token as it prints; those that print nothing by their names."""
        printed = self._vocabulary[token_id].decode(errors="replace")
        return printed or self._tokenizer.decode([token_id], skip_special_tokens=False)

    def _answer(self, completion: Completion) -> dict[str, Any]:
        raise NotImplementedError

    def _piece(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        raise NotImplementedError

    def _no_piece(self) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs_of(self, entries: Iterable[_Entry]) -> dict[str, Any]:
        raise NotImplementedError


_Entry = tuple[int, float, bool, Phase]  # token id, log-probability, forced, phase


def _entries(completion: Completion) -> Iterable[_Entry]:
    return zip(completion.token_ids, completion.logprobs, completion.forced, completion.phases, strict=True)


class ChatReply(Reply):
    """Thinking in `reasoning_content`, the solution in `content`."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, engine: Engine, model: str, choices: int, **how: Any) -> None:
        super().__init__(engine, model, choices, **how)
        self._segments = [Segments(engine.delimiters, engine.tokenizer) for _ in range(choices)]

    def opening(self) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return b"".join(
            self._event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}], None)
            for index in range(self._choices)
        )

    def _answer(self, completion: Completion) -> dict[str, Any]:
        message = {"role": "assistant", "content": completion.solution, "refusal": None}
        return {"message": message | {"reasoning_content": completion.thinking or None}}

    def _piece(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        thinking = solution = ""
        for event in events:
            more = self._segments[index].push(event)
            thinking, solution = thinking + more[0], solution + more[1]
        delta = {
            name: text for name, text in (("reasoning_content", thinking), ("content", solution)) if text
        }
        return {"delta": delta} if delta else None

    def _no_piece(self) -> dict[str, Any]:
        return {"delta": {}}

    def _logprobs_of(self, entries: Iterable[_Entry]) -> dict[str, Any]:
        """The solution's tokens where the API has them, the thinking's beside them."""
        lists: dict[str, Any] = {"content": [], "reasoning_content": [], "refusal": None}
        for token_id, logprob, forced, phase in entries:
            lists["content" if phase is Phase.SOLVE else "reasoning_content"].append(
                {
                    "token": self._token(token_id),
                    "bytes": list(self._vocabulary[token_id]) or None,
                    "logprob": max(logprob, _LOWEST),
                    "top_logprobs": [],
                    "token_id": token_id,
                    "forced": forced,
                }
            )
        return lists


class CompletionReply(Reply):
    """All of the text as the model wrote it, thinking and delimiters too."""

    whole_object = chunk_object = "text_completion"
    id_prefix = "cmpl"

    def _answer(self, completion: Completion) -> dict[str, Any]:
        return {"text": completion.text}

    def _piece(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        text = "".join([event.text for event in events])
        return {"text": text} if text else None

    def _no_piece(self) -> dict[str, Any]:
        return {"text": ""}

    def _logprobs_of(self, entries: Iterable[_Entry]) -> dict[str, Any]:
        listed = list(entries)
        return {
            "tokens": [self._token(token_id) for token_id, *_ in listed],
            "token_logprobs": [max(logprob, _LOWEST) for _, logprob, _, _ in listed],
            "top_logprobs": None,
            "text_offset": None,
            "token_ids": [token_id for token_id, *_ in listed],
            "forced": [forced for _, _, forced, _ in listed],
            "phases": [phase.value for *_, phase in listed],
        }
