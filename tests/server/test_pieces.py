"""Budgets of a request within the server's, and streamed text without delimiters."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams, budgets
from elastic_decode.assets import tiny_model_path
from elastic_decode.core import Completion, Phase, TokenEvent
from elastic_decode.delimiters import Delimiters, Marker
from elastic_decode.engine.text import TextStream, split_text
from elastic_decode.errors import BudgetError, ConfigError
from elastic_decode.server.options import ServerOptions, policy_for
from elastic_decode.server.segments import Segments

elastic, truncate = budgets.elastic, budgets.truncate


@pytest.mark.parametrize(
    ("default", "think", "solve", "total", "policy"),
    [
        (elastic(), None, None, None, elastic()),
        (elastic(), 5, None, None, elastic(5, None)),
        (elastic(), 5, 3, 8, elastic(5, 3)),
        (elastic(), 5, None, 8, elastic(5, 3)),
        (elastic(), None, 3, 8, elastic(5, 3)),
        (elastic(), None, 8, 8, elastic(0, 8)),
        (elastic(), None, None, 8, truncate(8)),
        (elastic(9, 4), None, None, None, elastic(9, 4)),
        (elastic(9, 4), 20, None, None, elastic(20, 4)),
        (elastic(9, 4), None, None, 100, elastic(9, 4)),
        (elastic(9, 4), None, None, 10, elastic(6, 4)),
        (elastic(9, 4), None, None, 3, elastic(0, 3)),
        (elastic(9, 4), 5, None, 7, elastic(5, 2)),
        (elastic(9, 4), None, 6, 7, elastic(1, 6)),
        (elastic(9, None), None, None, 12, elastic(9, 3)),
        (elastic(None, 4), None, None, 12, elastic(8, 4)),
        (budgets.soft_landing(9, 2, 4), None, None, 12, budgets.soft_landing(6, 2, 4)),
        (budgets.wrap_up(9, "Done.", 4), 3, None, None, budgets.wrap_up(3, "Done.", 4)),
        (budgets.no_thinking(4), None, None, 12, budgets.no_thinking(4)),
        (budgets.no_thinking(4), 6, None, None, elastic(6, 4)),
    ],
)
def test_budgets_of_a_request(default, think, solve, total, policy):
    assert policy_for(default, think=think, solve=solve, total=total) == policy


@pytest.mark.parametrize(
    ("default", "think", "solve", "total", "says"),
    [
        (elastic(), 8, None, 8, "thinking budget of 8"),
        (elastic(), None, 9, 8, "9 for the solution"),
        (elastic(), 5, 4, 8, "5 for thinking and 4 for the solution"),
        (elastic(9, None), None, None, 9, "thinking budget of 9"),
        (elastic(9, 4), 8, None, 8, "thinking budget of 8"),
        (budgets.soft_landing(9, 5, 4), None, None, 5, "max_tokens 5"),
        (budgets.budget_forcing(None, None), None, None, 9, "budget_forcing may think"),
    ],
)
def test_what_a_request_says_is_never_changed(default, think, solve, total, says):
    with pytest.raises(BudgetError, match=says):
        policy_for(default, think=think, solve=solve, total=total)


@pytest.mark.parametrize(
    "wrong", [{"policy": truncate(5)}, {"max_waiting": -1}, {"api_key": ""}, {"model_name": ""}]
)
def test_options_that_cannot_be(wrong):
    with pytest.raises(ConfigError):
        ServerOptions(**({"model_name": "tiny"} | wrong))


# ---- text ----


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, then <eos>, <think>, </think> and a token that holds a close and more."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.add_tokens(["<think>", "</think>", "k>\n", ">!"])
    return tokenizer


TOKENIZER = byte_tokenizer()
EOS, OPEN, CLOSE, MERGED, BANG = 256, 257, 258, 259, 260
SINGLE = Delimiters(open=Marker((OPEN,)), close=Marker((CLOSE,)), eos_ids=(EOS,))
SEVERAL = Delimiters(open=Marker(tuple(b"<t>")), close=Marker(tuple(b"</t>")), eos_ids=(EOS,))
AS_TEXT = Delimiters(
    open=Marker(tuple(b"<think>"), "<think>"), close=Marker(tuple(b"</think>"), "</think>"), eos_ids=(EOS,)
)


def ids(text: str) -> list[int]:
    return list(text.encode())


def played(think: list[int], solve: list[int], delimiters: Delimiters) -> tuple[Segments, Completion, list]:
    """Segments fed with the events that an engine would give of these tokens, a piece at a time."""
    segments, stream = Segments(delimiters, TOKENIZER), TextStream(TOKENIZER)
    tokens = think + solve
    phases = [Phase.THINK] * len(think) + [Phase.SOLVE] * len(solve)
    ended = "natural" if solve or think[-1:] == [CLOSE] else "none"
    thinking, solution = split_text(TOKENIZER, tokens, phases, ended, delimiters)
    whole = Completion(
        token_ids=tokens,
        logprobs=[0.0] * len(tokens),
        sampling_logprobs=[0.0] * len(tokens),
        forced=[False] * len(tokens),
        phases=phases,
        text="",
        thinking=thinking,
        solution=solution,
        think_tokens=len(think),
        solve_tokens=len(solve),
        think_end=ended,
        finish_reason="budget",
        seed=0,
        weight_epoch=0,
    )
    pieces = []
    for at, (token, phase) in enumerate(zip(tokens, phases, strict=True)):
        last = at == len(tokens) - 1
        text = stream.push(token) + (stream.flush() if last else "")
        reason = "budget" if last else None
        event = TokenEvent("r", 0, 0, token, text, phase, False, 0.0, reason, whole if last else None)
        pieces.append(segments.push(event))
    return segments, whole, pieces


CASES: dict[str, tuple[list[int], list[int], Delimiters]] = {
    "one token": ([*ids("so 1 < 2"), CLOSE], ids("\n\nyes"), SINGLE),
    "an open of the model's own": ([OPEN, *ids("\nhm"), CLOSE], ids("yes"), SINGLE),
    "white space before the open": ([*ids("\n "), OPEN, *ids("hm"), CLOSE], ids("yes"), SINGLE),
    "white space and no open": ([*ids("\n hm"), CLOSE], ids("yes"), SINGLE),
    "only white space": ([*ids("\n\n"), CLOSE], ids("yes"), SINGLE),
    "an open too late": ([*ids("a"), OPEN, *ids("hm"), CLOSE], ids("yes"), SINGLE),
    "a close spelled out is none": ([*ids("a </think> b"), CLOSE], ids("yes"), SINGLE),
    "an open spelled out is none": ([*ids("<think> b"), CLOSE], ids("yes"), SINGLE),
    "several tokens": (ids("<t>a </tt> </t </t>"), ids("yes"), SEVERAL),
    "as text": (ids("<think>a </thin </think>"), ids("yes"), AS_TEXT),
    "as text, merged with what follows": ([*ids("a </thin"), MERGED], ids("yes"), AS_TEXT),
    "as text, merged, rest without a space": ([*ids("a </think"), BANG], ids("yes"), AS_TEXT),
    "characters of several bytes": ([*ids("né 日本"), CLOSE], ids("ж🙂"), SINGLE),
    "half a character at the end": ([*ids("é")[:1], CLOSE], ids("日")[:2], SINGLE),
    "it stops while thinking": (ids("so </"), [], AS_TEXT),
    "it stops in the close": (ids("so </t"), [], SEVERAL),
    "nothing but the close": ([CLOSE], [], SINGLE),
    "no thinking": ([], ids("</think> yes"), SINGLE),
}


@pytest.mark.parametrize("case", CASES)
def test_pieces_joined_are_the_segments(case):
    think, solve, delimiters = CASES[case]
    segments, whole, pieces = played(think, solve, delimiters)
    assert "".join(thinking for thinking, _ in pieces) == whole.thinking == segments.thinking
    assert "".join(solution for _, solution in pieces) == whole.solution == segments.solution


def test_text_is_not_held_longer_than_need_be():
    """What comes before the last event is what counts: that one repairs all."""
    _, _, pieces = played([*ids("so 1 < 2, a</b"), CLOSE], ids("yes"), SINGLE)
    assert "".join(thinking for thinking, _ in pieces[:-4]) == "so 1 < 2, a</b"
    assert [solution for _, solution in pieces[-3:]] == ["y", "e", "s"]
    _, _, pieces = played(ids("a</b </think>"), ids("yes"), AS_TEXT)
    assert [thinking for thinking, _ in pieces[:6]] == ["a", "", "", "</b", " ", ""]


# ---- what the engine gives for it ----


def test_the_last_event_of_a_sample_has_its_completion():
    config = EngineConfig(dtype="float32", max_model_len=128, kv_memory="16MiB")
    how: dict[str, Any] = {
        "budget": Budget(7, 4),
        "sampling": SamplingParams(seed=5),
        "n": 2,
    }
    chat = [{"role": "user", "content": "9 1 6 = 3"}]
    with Engine.from_pretrained(tiny_model_path(), config) as engine:
        [generation] = engine.generate(chat, **how)
        events = list(engine.stream(chat, **how))
        last = {event.sample: event for event in events if event.completion is not None}
        assert [last[sample].completion for sample in (0, 1)] == generation.completions
        assert all((event.completion is None) == (event.finish_reason is None) for event in events)
