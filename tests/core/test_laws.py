"""The budget laws: over any stream of draws against an oracle, and one by one on streams made for them."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_decode import automata, budgets
from elastic_decode.core import Phase
from elastic_decode.errors import BudgetError
from elastic_decode.vocabulary import Vocabulary

THINK, SOLVE = Phase.THINK, Phase.SOLVE
EOS, CLOSE, NEWLINE = 0, 1, 2  # of the worlds in budget_runs.py

worlds = pytest.mark.parametrize("world", ["token", "sequence", "text"])
draws = st.lists(st.integers(0, 15), min_size=60, max_size=60)
small = st.integers(0, 6)


def ids(text: bytes, vocabulary: Vocabulary) -> tuple[int, ...]:
    spelled = vocabulary.spell(text)
    assert spelled is not None
    return spelled


# -- the laws, over any stream of draws


@worlds
@settings(max_examples=80, deadline=None)
@given(stream=draws, think=small | st.none(), solve=small | st.none(), start=st.sampled_from(Phase))
def test_elastic_obeys_the_laws(runs, world, stream, think, solve, start):
    vocabulary, delimiters = runs.WORLDS[world]
    if think is None and solve is not None:
        solve = None  # then thinking has a limit: a test of its own
    out = runs.run(budgets.elastic(think, solve), delimiters, vocabulary, stream, start=start)
    assert out == runs.by_law(delimiters, vocabulary, stream, think=think, solve=solve, start=start)
    if start is THINK and think is not None:
        assert out.sampled(THINK) <= think
    if solve is not None:
        assert out.sampled(SOLVE) <= solve


@worlds
@settings(max_examples=80, deadline=None)
@given(stream=draws, think=small, grace=small, solve=small)
def test_soft_landing_obeys_the_laws(runs, world, stream, think, grace, solve):
    vocabulary, delimiters = runs.WORLDS[world]
    out = runs.run(budgets.soft_landing(think, grace, solve), delimiters, vocabulary, stream)
    assert out == runs.by_law(delimiters, vocabulary, stream, think=think, grace=grace, solve=solve)
    assert out.sampled(THINK) <= think + grace
    assert out.sampled(SOLVE) <= solve


@worlds
@settings(max_examples=80, deadline=None)
@given(stream=draws, think=small, solve=small, after=st.sampled_from(["", "ab"]))
def test_wrap_up_obeys_the_laws(runs, world, stream, think, solve, after):
    vocabulary, delimiters = runs.WORLDS[world]
    out = runs.run(budgets.wrap_up(think, "ba\n", solve, after=after), delimiters, vocabulary, stream)
    # EOS ended the thought itself: nothing to wrap up, and nothing after.
    law = runs.by_law(
        delimiters,
        vocabulary,
        stream,
        think=think,
        solve=solve,
        before=ids(b"ba\n", vocabulary),
        final=ids(after.encode(), vocabulary),
    )
    if law.think_end != "eos" or not after:
        assert out == law
    assert out.sampled(THINK) <= think
    assert out.sampled(SOLVE) <= solve


@worlds
@settings(max_examples=80, deadline=None)
@given(stream=draws, think=small, solve=small, waits=st.integers(0, 3), final=st.sampled_from(["", "ab"]))
def test_budget_forcing_obeys_the_laws(runs, world, stream, think, solve, waits, final):
    vocabulary, delimiters = runs.WORLDS[world]
    policy = budgets.budget_forcing(think, solve, waits, wait="ab", final=final)
    if waits and world != "token":
        with pytest.raises(BudgetError, match="replaces an end of more than one token"):
            policy.program(delimiters)
        waits = 0
        policy = dataclasses.replace(policy, waits=0)
    out = runs.run(policy, delimiters, vocabulary, stream)
    law = runs.by_law(
        delimiters,
        vocabulary,
        stream,
        think=think,
        solve=solve,
        before=(NEWLINE,),
        unless_after=b"\n",
        before_at_eos=True,
        wait=ids(b"ab", vocabulary),
        waits=waits,
        final=ids(final.encode(), vocabulary),
    )
    assert out == law
    assert out.sampled(THINK) <= think
    assert out.sampled(SOLVE) <= solve


@worlds
@settings(max_examples=80, deadline=None)
@given(stream=draws, total=st.integers(0, 12) | st.none(), start=st.sampled_from(Phase))
def test_truncate_cuts_the_stream_and_nothing_else(runs, world, stream, total, start):
    vocabulary, delimiters = runs.WORLDS[world]
    out = runs.run(budgets.truncate(total), delimiters, vocabulary, stream, start=start)
    end = stream.index(EOS) + 1 if EOS in stream else len(stream)
    cut = end if total is None else min(end, total)
    assert out.tokens == stream[:cut]
    assert not any(out.forced)
    if EOS in stream[:cut]:
        assert out.finish == "eos"
        assert out.phases[-1] is SOLVE
    else:
        assert out.finish == ("budget" if cut == total else "running")


@worlds
@settings(max_examples=60, deadline=None)
@given(stream=draws, solve=small, max_new=st.integers(12, 40))
def test_open_thinking_leaves_room_for_the_solution(runs, world, stream, solve, max_new):
    """think=None with a finite solve expires where the close and the solution still fit."""
    vocabulary, delimiters = runs.WORLDS[world]
    stream = [token if token != EOS else 3 for token in stream]
    policy = budgets.elastic(None, solve)
    out = runs.run(policy, delimiters, vocabulary, stream, max_new=max_new)
    program = policy.program(delimiters)
    compiled = automata.compile(program, delimiters, vocabulary, len(vocabulary), max_new=max_new)
    assert compiled.bound() == max_new
    think = compiled.program.phase("think").budget
    assert think == max_new - solve - max(compiled._tables.longest)
    assert out == runs.by_law(delimiters, vocabulary, stream, think=think, solve=solve)
    assert out.finish == "budget"
    assert out.sampled(SOLVE) == solve


@worlds
@settings(max_examples=60, deadline=None)
@given(
    stream=draws,
    policy=st.one_of(
        st.builds(budgets.elastic, small | st.none(), small | st.none()),
        st.builds(budgets.truncate, small | st.none()),
        st.builds(budgets.soft_landing, small | st.none(), small, small | st.none()),
        st.builds(budgets.wrap_up, small | st.none(), st.just("ba"), small | st.none()),
        st.builds(
            budgets.budget_forcing,
            small | st.none(),
            small | st.none(),
            st.just(0),
            st.just("a"),
            st.just("b"),
        ),
        st.builds(budgets.no_thinking, small | st.none()),
    ),
    start=st.sampled_from(Phase),
    max_new=st.integers(24, 40),
    end_thinking_at=st.none() | st.integers(0, 10),
    ignore_eos=st.booleans(),
)
def test_no_output_passes_the_bound(runs, world, stream, policy, start, max_new, end_thinking_at, ignore_eos):
    vocabulary, delimiters = runs.WORLDS[world]
    out = runs.run(
        policy,
        delimiters,
        vocabulary,
        stream,
        start=start,
        max_new=max_new,
        end_thinking_at=end_thinking_at,
        ignore_eos=ignore_eos,
    )
    assert out.finish in ("eos", "budget", "length")


# -- the laws, one by one


def run(runs, policy, stream, world="token", **options):
    vocabulary, delimiters = runs.WORLDS[world]
    return runs.run(policy, delimiters, vocabulary, stream, **options)


def test_the_close_as_the_last_thinking_token_is_natural(runs):
    out = run(runs, budgets.elastic(3, 2), [3, 4, CLOSE, 3, 4, 3])
    assert out.tokens == [3, 4, CLOSE, 3, 4]
    assert not any(out.forced)
    assert out.phases == [THINK] * 3 + [SOLVE] * 2
    assert (out.think_end, out.finish) == ("natural", "budget")


def test_the_close_is_forced_behind_the_last_thinking_token_and_counts_nowhere(runs):
    out = run(runs, budgets.elastic(3, 2), [3, 4, 3, 9, 4, 4, 4])
    assert out.tokens == [3, 4, 3, CLOSE, 4, 4]
    assert out.forced == [False] * 3 + [True] + [False] * 2
    assert out.phases == [THINK] * 4 + [SOLVE] * 2
    assert (out.think_end, out.finish) == ("forced", "budget")
    assert (out.sampled(THINK), out.sampled(SOLVE)) == (3, 2)


def test_unused_thinking_is_not_passed_on(runs):
    out = run(runs, budgets.elastic(50, 2), [3, CLOSE, 4, 4, 4, 4])
    assert out.tokens == [3, CLOSE, 4, 4]


def test_eos_as_the_last_solution_token_is_eos(runs):
    out = run(runs, budgets.elastic(3, 2), [CLOSE, 3, EOS])
    assert out.tokens == [CLOSE, 3, EOS]
    assert out.finish == "eos"


def test_eos_in_thinking_is_replaced_by_the_close(runs):
    out = run(runs, budgets.elastic(9, 2), [3, EOS, 4, EOS])
    assert out.tokens == [3, CLOSE, 4, EOS]
    assert out.forced == [False, True, False, False]
    assert (out.think_end, out.finish) == ("eos", "eos")
    assert out.sampled(THINK) == 1


def test_eos_behind_a_half_written_close_completes_it(runs):
    out = run(runs, budgets.elastic(9, 2), [3, 7, 8, EOS, 0, 4, EOS], world="sequence")
    assert out.tokens == [3, 7, 8, 7, 9, 4, EOS]
    assert out.forced == [False] * 3 + [True] * 2 + [False] * 2


@pytest.mark.parametrize(
    ("world", "stream", "tokens"),
    [
        ("sequence", [3, 7, 8, 0, 0, 4], [3, 7, 8, 7, 9, 4]),
        ("text", [3, 4, 5, 0, 4], [3, 4, 5, 6, 4]),
        ("text", [3, 11, 9, 0, 4], [3, 11, 9, 10, 4]),
    ],
)
def test_a_half_written_close_is_completed_and_forced(runs, world, stream, tokens):
    out = run(runs, budgets.elastic(3, 1), stream, world=world)
    assert out.tokens == tokens
    assert out.forced == [False] * 3 + [True] * (len(tokens) - 4) + [False]
    assert out.phases == [THINK] * (len(tokens) - 1) + [SOLVE]
    assert out.think_end == "forced"


def test_a_close_that_merged_with_what_follows_is_natural(runs):
    out = run(runs, budgets.elastic(9, 1), [3, 11, 9, 12, 4], world="text")  # x</ t >b
    assert out.tokens == [3, 11, 9, 12, 4]
    assert out.phases == [THINK] * 4 + [SOLVE]
    assert out.think_end == "natural"


def test_no_budgets(runs):
    out = run(runs, budgets.elastic(0, 2), [9, 3, 4])
    assert out.tokens == [CLOSE, 3, 4]
    assert run(runs, budgets.no_thinking(2), [9, 3, 4]) == out
    out = run(runs, budgets.elastic(2, 0), [3, 4, 9, 9])
    assert out.tokens == [3, 4, CLOSE]
    assert (out.think_end, out.finish) == ("forced", "budget")
    out = run(runs, budgets.elastic(2, 0), [3, CLOSE, 9])
    assert out.tokens == [3, CLOSE]
    assert (out.think_end, out.finish) == ("natural", "budget")
    out = run(runs, budgets.elastic(0, 0), [9, 9])
    assert (out.tokens, out.finish) == ([CLOSE], "budget")
    out = run(runs, budgets.elastic(5, 0), [9, 9], start=SOLVE)
    assert (out.tokens, out.finish) == ([], "budget")


def test_a_prompt_past_its_thinking_has_the_solution_budget_only(runs):
    out = run(runs, budgets.elastic(5, 2), [CLOSE, 3, 4], start=SOLVE)
    assert out.tokens == [CLOSE, 3]
    assert out.phases == [SOLVE] * 2
    assert (out.think_end, out.finish) == ("none", "budget")


def test_stopping_inside_the_thinking_leaves_think_end_none(runs):
    out = run(runs, budgets.truncate(2), [3, 4, CLOSE])
    assert (out.tokens, out.think_end, out.finish) == ([3, 4], "none", "budget")
    out = run(runs, budgets.elastic(), [3, 4, 3], max_new=2)
    assert (out.tokens, out.think_end, out.finish) == ([3, 4], "none", "length")


def test_truncate_shares_one_budget(runs):
    out = run(runs, budgets.truncate(4), [3, CLOSE, 3, 4, 3])
    assert out.tokens == [3, CLOSE, 3, 4]
    assert out.phases == [THINK, THINK, SOLVE, SOLVE]
    assert (out.think_end, out.finish) == ("natural", "budget")
    out = run(runs, budgets.truncate(4), [3, EOS])
    assert (out.tokens, out.phases) == ([3, EOS], [THINK, SOLVE])
    assert (out.think_end, out.finish) == ("eos", "eos")
    assert run(runs, budgets.truncate(2), [3, CLOSE, 3]).finish == "budget"
    assert run(runs, budgets.truncate(3), [3, 4, 3, 4], start=SOLVE).tokens == [3, 4, 3]
    assert run(runs, budgets.truncate(), [3, CLOSE, 3, 4, 3], max_new=4).finish == "length"


def test_budget_forcing_waits_then_lets_the_close_pass(runs):
    policy = budgets.budget_forcing(9, 2, 2, wait="a", final="b")
    out = run(runs, policy, [4, CLOSE, 4, CLOSE, 4, CLOSE, 3, 3, 3])
    assert out.tokens == [4, 3, 4, 3, 4, CLOSE, 3, 3]
    assert out.forced == [False, True, False, True, False, False, False, False]
    assert out.think_end == "natural"
    assert (out.sampled(THINK), out.sampled(SOLVE)) == (4, 2)


def test_open_thinking_leaves_room_for_the_waits_too(runs):
    policy = budgets.budget_forcing(None, 3, 2, wait=[3, 4], final=[4])
    never = run(runs, policy, [3] * 40, max_new=20)
    assert never.sampled(THINK) == 20 - 3 - 2 * 2 - 3  # the solution, the waits, newline + close + final
    always = run(runs, policy, [CLOSE, CLOSE, CLOSE, CLOSE, CLOSE] + [3] * 40, max_new=20)
    assert always.tokens == [3, 4, 3, 4, CLOSE, 3, 3, 3]
    late = run(runs, policy, [3] * 8 + [CLOSE, 3, CLOSE, 3] + [3] * 40, max_new=20)
    assert len(late.tokens) == 20
    assert (late.sampled(SOLVE), late.finish) == (3, "budget")


def test_budget_forcing_announces_the_answer(runs):
    policy = budgets.budget_forcing(2, 1, 2, wait="a", final="b")
    out = run(runs, policy, [3, 4, 9, 9, 9, 3])
    assert out.tokens == [3, 4, NEWLINE, CLOSE, 4, 3]
    assert out.phases == [THINK] * 4 + [SOLVE] * 2
    assert out.think_end == "forced"
    out = run(runs, policy, [3, NEWLINE, 9, 9, 3])
    assert out.tokens == [3, NEWLINE, CLOSE, 4, 3]


def test_soft_landing_waits_for_the_line_to_end(runs):
    policy = budgets.soft_landing(2, 3, 1)
    out = run(runs, policy, [3, NEWLINE, 4, NEWLINE, 9, 3])
    assert out.tokens == [3, NEWLINE, 4, NEWLINE, CLOSE, 3]
    assert out.think_end == "forced"
    assert run(runs, policy, [3, 3, 4, 4, 4, 9, 3]).tokens == [3, 3, 4, 4, 4, CLOSE, 3]
    out = run(runs, policy, [3, 3, 4, CLOSE, 3])
    assert (out.tokens, out.think_end) == ([3, 3, 4, CLOSE, 3], "natural")
    assert run(runs, policy, [3, 3, 15, 9, 3]).tokens == [3, 3, 15, CLOSE, 3]  # "b\n" ends a line too


def test_soft_landing_completes_a_close_begun_before_the_grace(runs):
    out = run(runs, budgets.soft_landing(2, 1, 1), [3, 5, 9, 9, 3], world="text")
    assert out.tokens == [3, 5, 9, 10, 3]
    assert out.forced == [False] * 3 + [True, False]


def test_wrap_up_says_its_sentence_unless_the_close_is_begun(runs):
    policy = budgets.wrap_up(2, "ab\n", 1, after="\n")
    out = run(runs, policy, [3, 3, 9, 9, 9, 9, 4])
    assert out.tokens == [3, 3, 3, 15, CLOSE, NEWLINE, 4]
    assert out.phases[-2:] == [SOLVE, SOLVE]
    out = run(runs, policy, [3, 5, 9, 9, 4], world="text")
    assert out.tokens == [3, 5, 6, NEWLINE, 4]
    assert run(runs, policy, [3, EOS, 4]).tokens == [3, CLOSE, 4]


def test_end_thinking_forces_the_close(runs):
    out = run(runs, budgets.elastic(), [3, 4, 9, 3, EOS], end_thinking_at=2)
    assert out.tokens == [3, 4, CLOSE, 3, EOS]
    assert (out.think_end, out.finish) == ("forced", "eos")


def test_ignored_eos_is_an_ordinary_token(runs):
    out = run(runs, budgets.elastic(3, 2), [EOS, EOS, EOS, 9, EOS, EOS], ignore_eos=True)
    assert out.tokens == [EOS, EOS, EOS, CLOSE, EOS, EOS]
    assert out.finish == "budget"
