"""The laws of budgets, one test each, end to end through the engine with a scripted model."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from elastic_decode import Budget, Phase, SamplingParams, budgets
from elastic_decode.core import Completion
from elastic_decode.delimiters import Delimiters, Marker, resolve
from elastic_decode.errors import BudgetError, DelimiterError

EOS, OPEN, CLOSE = 256, 257, 258
GREEDY = SamplingParams(temperature=0)
PROMPT = [ord(c) for c in "ab"]
DOT = ord(".")


def ids(text: str) -> list[int]:
    return [ord(c) for c in text]


@pytest.fixture
def run(scripted):
    """Decode one prompt whose model says tokens[i] at output position i; returns the completion."""

    def decode(tokens, budget, *, prompt=PROMPT, sampling=GREEDY, then=DOT, **options) -> Completion:
        def script(history):
            index = len(history) - len(prompt)
            return tokens[index] if index < len(tokens) else then

        engine = scripted(script, **options).engine
        before = engine.stats()["free_pages"]
        (generation,) = engine.generate(prompt, budget=budget, sampling=sampling)
        assert engine.stats()["free_pages"] == before
        (completion,) = generation.completions
        count = len(completion.token_ids)
        lists = (completion.logprobs, completion.sampling_logprobs, completion.forced, completion.phases)
        assert all(len(parallel) == count for parallel in lists)
        sampled = [
            phase for phase, forced in zip(completion.phases, completion.forced, strict=True) if not forced
        ]
        assert completion.think_tokens == sampled.count(Phase.THINK)
        assert completion.solve_tokens == sampled.count(Phase.SOLVE)
        return completion

    return decode


def test_natural_close_counts_and_unused_thinking_is_not_passed_on(run):
    c = run([*ids("hm"), CLOSE, *ids("xyzzzz")], Budget(think=10, solve=3))
    assert c.token_ids == [*ids("hm"), CLOSE, *ids("xyz")]
    assert (c.think_tokens, c.solve_tokens, c.think_end, c.finish_reason) == (3, 3, "natural", "budget")
    assert not any(c.forced)
    assert (c.thinking, c.solution) == ("hm", "xyz")


def test_expiry_forces_the_close_which_counts_in_no_budget(run):
    c = run([], Budget(think=4, solve=2))
    assert c.token_ids == [*ids("...."), CLOSE, *ids("..")]
    assert c.forced == [False] * 4 + [True] + [False] * 2
    assert c.phases == [Phase.THINK] * 5 + [Phase.SOLVE] * 2
    assert (c.think_tokens, c.solve_tokens, c.think_end, c.finish_reason) == (4, 2, "forced", "budget")


def test_close_as_the_last_budgeted_token_is_natural(run):
    c = run([*ids("abc"), CLOSE], Budget(think=4, solve=1))
    assert c.token_ids == [*ids("abc"), CLOSE, ord(".")]
    assert c.think_end == "natural"
    assert not any(c.forced)


def test_eos_as_the_last_budgeted_token_is_eos(run):
    c = run([CLOSE, ord("x"), EOS], Budget(think=4, solve=2))
    assert c.token_ids == [CLOSE, ord("x"), EOS]
    assert (c.finish_reason, c.solve_tokens) == ("eos", 2)
    assert (c.text, c.solution) == ("</think>x", "x")


def test_eos_in_thinking_is_replaced_by_the_close(run):
    c = run([*ids("hm"), EOS, *ids("ok"), EOS], Budget(think=10, solve=5))
    assert c.token_ids == [*ids("hm"), CLOSE, *ids("ok"), EOS]
    assert c.forced == [False, False, True, False, False, False]
    assert (c.think_end, c.think_tokens, c.finish_reason) == ("eos", 2, "eos")
    assert c.sampling_logprobs[2] == 0.0
    assert c.logprobs[2] < -5, (
        "the model's own log-probability of the forced token, not of the EOS it replaced"
    )


def test_budget_zero_forces_the_close_first(run):
    c = run([], Budget(think=0, solve=2))
    assert c.token_ids == [CLOSE, *ids("..")]
    assert c.forced == [True, False, False]
    assert (c.think_tokens, c.think_end) == (0, "forced")


def test_solve_zero_ends_with_the_close(run):
    natural = run([ord("a"), CLOSE], Budget(think=5, solve=0))
    assert (natural.token_ids, natural.finish_reason, natural.think_end) == (
        [ord("a"), CLOSE],
        "budget",
        "natural",
    )
    forced = run([], Budget(think=2, solve=0))
    assert (forced.token_ids, forced.finish_reason) == ([*ids(".."), CLOSE], "budget")
    both = run([], Budget(think=0, solve=0))
    assert (both.token_ids, both.finish_reason) == ([CLOSE], "budget")


def test_solve_zero_after_closed_thinking_is_an_empty_completion(run):
    c = run([], Budget(think=2, solve=0), prompt=[*PROMPT, OPEN, CLOSE])
    assert (c.token_ids, c.finish_reason, c.think_end) == ([], "budget", "none")


def test_a_close_in_the_solution_is_an_ordinary_token(run):
    c = run([CLOSE, ord("x"), CLOSE, ord("y"), EOS], Budget(think=5, solve=9))
    assert c.token_ids == [CLOSE, ord("x"), CLOSE, ord("y"), EOS]
    assert c.phases[2] is Phase.SOLVE
    assert c.solve_tokens == 4


def test_a_sampled_open_is_an_ordinary_counted_token(run):
    c = run([OPEN, *ids("hm"), CLOSE, EOS], Budget(think=5, solve=9))
    assert c.think_tokens == 4
    assert c.phases[0] is Phase.THINK
    assert c.thinking == "hm"


@pytest.mark.parametrize(
    ("prompt", "phase"),
    [
        ([*PROMPT, OPEN], Phase.THINK),
        ([*PROMPT, OPEN, 10, CLOSE], Phase.SOLVE),
        ([*PROMPT, OPEN, CLOSE, 10, OPEN, 10], Phase.THINK),
        (PROMPT, Phase.THINK),
        ("ab<think>x</think>", Phase.SOLVE),
        ("ab</think><think>", Phase.THINK),
    ],
)
def test_the_last_marker_of_the_prompt_decides(scripted, prompt, phase):
    engine = scripted(lambda history: ord("z")).engine
    (generation,) = engine.generate([prompt], budget=Budget(think=2, solve=2), sampling=GREEDY)
    assert generation.completions[0].phases[0] is phase


def test_start_phase_overrides_the_prompt(scripted):
    from elastic_decode import Request

    engine = scripted(lambda history: ord("z")).engine
    engine.submit(
        Request([*PROMPT, OPEN], budget=Budget(think=2, solve=2), start_phase="solve", sampling=GREEDY)
    )
    events = []
    while engine.has_work:
        events += engine.step()
    assert [event.phase for event in events] == [Phase.SOLVE] * 2


MULTI = Delimiters(Marker((1, 2)), Marker((3, 4, 5)), (EOS,))


def test_a_close_half_sampled_when_the_budget_ends_is_completed(run):
    c = run([ord("a"), 3, 4], Budget(think=3, solve=1), delimiters=MULTI)
    assert c.token_ids == [ord("a"), 3, 4, 5, ord(".")]
    assert c.forced == [False, False, False, True, False]
    assert (c.think_end, c.think_tokens, c.thinking) == ("forced", 3, "a")


def test_a_replaced_eos_completes_a_half_close_too(run):
    c = run([ord("a"), 3, EOS], Budget(think=9, solve=1), delimiters=MULTI)
    assert c.token_ids == [ord("a"), 3, 4, 5, ord(".")]
    assert c.think_end == "eos"


def test_a_broken_half_close_is_forced_whole(run):
    c = run([3, 4, ord("a")], Budget(think=3, solve=1), delimiters=MULTI)
    assert c.token_ids == [3, 4, ord("a"), 3, 4, 5, ord(".")]


TEXTUAL = Delimiters(None, Marker((*ids("</t>"),), text="</t>"), (EOS,))


def test_a_textual_close_is_seen_and_completed(run):
    seen = run(ids("hm</t>ok"), Budget(think=9, solve=2), delimiters=TEXTUAL)
    assert (seen.thinking, seen.solution, seen.think_end) == ("hm", "ok", "natural")
    cut = run(ids("hm</"), Budget(think=4, solve=2), delimiters=TEXTUAL)
    assert cut.text == "hm</t>.."
    assert cut.forced == [False] * 4 + [True] * 2 + [False] * 2
    assert (cut.thinking, cut.solution) == ("hm", "..")


def test_length_ends_a_run_without_budgets(run):
    c = run([], Budget(), max_model_len=16)
    assert (len(c.token_ids), c.finish_reason, c.think_end) == (14, "length", "none")


def test_open_thinking_with_a_solve_budget_leaves_room_for_it(run):
    c = run([], Budget(think=None, solve=4), max_model_len=32)
    assert c.finish_reason == "budget"
    assert c.solve_tokens == 4
    assert c.think_end == "forced"
    assert len(PROMPT) + len(c.token_ids) == 32


def test_a_finite_budget_that_cannot_fit_raises_with_the_numbers(scripted):
    engine = scripted(lambda history: ord("z"), max_model_len=32).engine
    with pytest.raises(BudgetError, match="30"):
        engine.generate([PROMPT], budget=Budget(think=100, solve=4))


def test_ignore_eos_makes_eos_an_ordinary_token(run):
    c = run(
        [EOS, EOS, CLOSE, EOS, EOS],
        Budget(think=4, solve=3),
        sampling=SamplingParams(temperature=0, ignore_eos=True),
    )
    assert c.token_ids == [EOS, EOS, CLOSE, EOS, EOS, ord(".")]
    assert c.finish_reason == "budget"


def test_min_tokens_bans_eos_until_then(run):
    c = run(
        [CLOSE, EOS, EOS, EOS], Budget(think=4, solve=9), sampling=SamplingParams(temperature=0, min_tokens=3)
    )
    assert EOS not in c.token_ids[:3]
    assert c.token_ids[3] == EOS


# ---- the other policies ----


def test_truncate_spends_one_budget_over_both_phases(run):
    c = run([*ids("ab"), CLOSE, *ids("cdefgh")], budgets.truncate(6))
    assert c.token_ids == [*ids("ab"), CLOSE, *ids("cde")]
    assert (c.finish_reason, c.think_tokens, c.solve_tokens) == ("budget", 3, 3)
    inside = run([], budgets.truncate(6))
    assert (inside.finish_reason, inside.think_end, inside.think_tokens) == ("budget", "none", 6)
    eos = run([ord("a"), EOS], budgets.truncate(6))
    assert (eos.token_ids, eos.finish_reason) == ([ord("a"), EOS], "eos")
    solving = run([], budgets.truncate(3), prompt=[*PROMPT, OPEN, CLOSE])
    assert (solving.solve_tokens, solving.finish_reason) == (3, "budget")


def test_budget_forcing_replaces_early_closes_by_wait(run):
    policy = budgets.budget_forcing(think=8, solve=2, waits=1, wait="W", final="")
    c = run([ord("a"), CLOSE, ord("b"), CLOSE], policy)
    assert c.token_ids[0] == ord("a")
    assert c.token_ids[1] == ord("W")
    assert c.forced[1]
    assert c.token_ids.count(CLOSE) == 1
    assert c.think_end == "natural"


def test_budget_forcing_closes_with_the_final_text(run):
    policy = budgets.budget_forcing(think=3, solve=2, waits=0, final="F:")
    c = run([], policy)
    text = c.text
    assert text.startswith("...\n</think>")
    assert "F:" in c.solution
    assert c.solve_tokens == 2
    standing = run([ord("a"), ord("b"), 10], policy)
    assert standing.token_ids[3] == CLOSE, "after a newline none is added"


def test_soft_landing_waits_for_a_newline_within_the_grace(run):
    policy = budgets.soft_landing(think=2, grace=4, solve=1)
    lands = run([*ids("abc"), 10, *ids("x")], policy)
    assert lands.token_ids[:5] == [*ids("abc"), 10, CLOSE]
    assert lands.forced[4]
    never = run([], policy)
    assert never.think_tokens == 6
    assert never.token_ids[6] == CLOSE


def test_wrap_up_says_the_sentence_before_the_close(run):
    c = run([], budgets.wrap_up(think=2, text="So:", solve=1))
    assert c.token_ids == [*ids(".."), *ids("So:"), CLOSE, ord(".")]
    assert c.forced == [False] * 2 + [True] * 4 + [False]


def test_no_thinking_is_a_budget_of_zero(run):
    assert run([], budgets.no_thinking(2)).token_ids == [CLOSE, *ids("..")]


def test_rows_of_one_batch_hold_different_programs(scripted):
    def script(history):
        return ord(".")

    engine = scripted(script).engine
    policies = [
        Budget(think=2, solve=1),
        budgets.truncate(3),
        budgets.no_thinking(2),
        budgets.wrap_up(think=1, text="!", solve=1),
        Budget(think=1, solve=0),
    ]
    generations = engine.generate([PROMPT] * 5, budget=policies, sampling=GREEDY)
    assert [g.completions[0].token_ids for g in generations] == [
        [*ids(".."), CLOSE, ord(".")],
        ids("..."),
        [CLOSE, *ids("..")],
        [*ids(".!"), CLOSE, ord(".")],
        [ord("."), CLOSE],
    ]


def test_an_unresolvable_delimiter_raises():
    words = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, "a"))
    bare = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    with pytest.raises(DelimiterError, match="think_close"):
        resolve(bare)


GPT_OSS = Delimiters(None, Marker((1, 2, 3, 4)), (EOS,))


def test_a_prompt_that_has_begun_the_close_is_gone_on_from(run):
    """gpt-oss's generation prompt is the first part of its close; an answer may go on with the rest."""
    begun = [*PROMPT, 1, 2]
    straight = run([3, 4, ord("x"), EOS], Budget(think=9, solve=5), prompt=begun, delimiters=GPT_OSS)
    assert straight.token_ids == [3, 4, ord("x"), EOS]
    assert straight.think_end == "natural"
    forced = run([ord("x")], Budget(think=0, solve=1), prompt=begun, delimiters=GPT_OSS)
    assert forced.token_ids[:2] == [3, 4]
    assert forced.forced[:2] == [True, True]
