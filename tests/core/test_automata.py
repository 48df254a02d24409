"""The compiled tables: what patterns match, what is forced from where, and what fits."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_decode import automata, budgets
from elastic_decode.automata.matchers import IdMatcher, TextMatcher, combine
from elastic_decode.delimiters import Delimiters, Marker, resolve, vocabulary_bytes
from elastic_decode.errors import BudgetError
from elastic_decode.kernels.budget.layout import AutomatonWord, Label
from elastic_decode.phases import IdSequence
from elastic_decode.vocabulary import Vocabulary

EOS = 0
LETTERS = [b"<eos>", b"a", b"b", b"c", b"ab", b"ba", b"aab", b"abab", b"bc", b"cab", b"", b"abcabcabc"]


def word(tables, name, count):
    at = int(tables[name])
    return tables[at : at + count]


def inject(compiled, number, state):
    """What inject `number` forces from this state, read from the packed words."""
    tables = compiled.automaton.numpy()
    states = int(tables[AutomatonWord.NUM_STATES])
    at = int(tables[AutomatonWord.INJECT]) + 2 * (number * states + state)
    offset, length = tables[at : at + 2]
    return tables[offset : offset + length].tolist()


def spelled(text: str, vocabulary: Vocabulary) -> Delimiters:
    return Delimiters(None, Marker(vocabulary.spell(text.encode()), text), (EOS,))


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("abc", min_size=1, max_size=7),
    stream=st.lists(st.integers(1, len(LETTERS) - 1), max_size=40),
)
def test_text_matcher_agrees_with_search(text, stream):
    vocabulary = Vocabulary(LETTERS)
    matcher = TextMatcher(text, vocabulary, len(LETTERS) + 2)
    data, state, printed = text.encode(), 0, b""
    for token in stream:
        state, done = matcher.step(state, int(matcher.kind_of[token]))
        before, printed = len(printed), printed + LETTERS[token]
        # Somewhere an occurrence ends inside this token.
        ends = [i + len(data) for i in range(len(printed)) if printed.startswith(data, i)]
        assert done == any(before < end for end in ends)
        longest = max(n for n in range(len(data)) if n == 0 or printed.endswith(data[:n]))
        assert matcher.progress(state) == longest


def test_unused_ids_leave_a_text_as_it_is():
    vocabulary = Vocabulary(LETTERS)
    matcher = TextMatcher("aab", vocabulary, len(LETTERS) + 2)
    state, _ = matcher.step(0, int(matcher.kind_of[LETTERS.index(b"a")]))
    for token in (LETTERS.index(b""), len(LETTERS), len(LETTERS) + 1):
        assert matcher.step(state, int(matcher.kind_of[token])) == (state, False)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.frozensets(st.integers(0, 4), min_size=1), min_size=1, max_size=4),
    stream=st.lists(st.integers(0, 5), max_size=40),
)
def test_id_matcher_agrees_with_search(steps, stream):
    matcher = IdMatcher(IdSequence(tuple(steps)), 6)
    state = 0
    for at, token in enumerate(stream):
        state, done = matcher.step(state, int(matcher.kind_of[token]))

        def fits(n, at=at):
            tail = stream[at + 1 - n : at + 1]
            return len(tail) == n and all(token in step for token, step in zip(tail, steps, strict=False))

        assert done == (at + 1 >= len(steps) and fits(len(steps)))
        assert matcher.progress(state) == max(n for n in range(min(len(steps), at + 2)) if n == 0 or fits(n))


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3, unique=True),
    sequence=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    stream=st.lists(st.integers(0, len(LETTERS) - 1), max_size=30),
)
def test_the_product_runs_every_matcher_at_once(texts, sequence, stream):
    size = len(LETTERS)
    matchers = [TextMatcher(text, Vocabulary(LETTERS), size) for text in texts]
    matchers.append(IdMatcher(IdSequence(tuple(frozenset((i,)) for i in sequence)), size))
    automaton = combine(matchers, len(matchers), [EOS, 3], size)
    assert [bool(automaton.eos[automaton.class_of[i]]) for i in range(size)] == [
        i in (EOS, 3) for i in range(size)
    ]
    state, alone = 0, [0] * len(matchers)
    for token in stream:
        moves = [m.step(s, int(m.kind_of[token])) for m, s in zip(matchers, alone, strict=True)]
        alone = [after for after, _ in moves]
        kind = automaton.class_of[token]
        assert automaton.match[state, kind] == sum(1 << p for p, (_, done) in enumerate(moves) if done)
        state = int(automaton.next[state, kind])
        assert automaton.states[state] == tuple(alone)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text("abc", min_size=1, max_size=8),
    stream=st.lists(st.integers(1, len(LETTERS) - 1), max_size=20),
)
def test_a_half_written_text_close_is_completed_exactly(text, stream):
    vocabulary = Vocabulary(LETTERS)
    delimiters = spelled(text, vocabulary)
    compiled = automata.compile(
        budgets.elastic(5, 5).program(delimiters), delimiters, vocabulary, len(LETTERS), max_new=100
    )
    state = compiled.walk(stream)
    printed, data = vocabulary.join(stream), text.encode()
    have = max(n for n in range(len(data)) if n == 0 or printed.endswith(data[:n]))
    assert vocabulary.join(inject(compiled, 0, state)) == data[have:]


@pytest.mark.parametrize("name", ["qwen_like", "merging", "gpt_oss_like", "sentencepiece_like"])
@pytest.mark.parametrize("text", ["</think>", "[/THINK]", "◁/think▷", "\n\nAnswer:", "éé→é"])
def test_every_state_of_every_close_is_completed(made, name, text):
    tokenizer = getattr(made, name)()
    vocabulary = vocabulary_bytes(tokenizer)
    delimiters = resolve(tokenizer, think_close=text, vocabulary=vocabulary)
    program = budgets.elastic(5, 5).program(delimiters)
    compiled = automata.compile(program, delimiters, vocabulary, len(vocabulary), max_new=100)
    data = text.encode()
    if delimiters.close.text is None:
        assert inject(compiled, 0, 0) == list(delimiters.close.ids)
        return
    assert inject(compiled, 0, 0) == list(delimiters.close.ids)
    for state, (written,) in enumerate(compiled._tables.automaton.states):
        assert vocabulary.join(inject(compiled, 0, state)) == data[written:]
    assert {written for (written,) in compiled._tables.automaton.states} == set(range(len(data)))


def test_a_half_written_id_close_is_completed(made):
    tokenizer = made.gpt_oss_like()
    delimiters = resolve(tokenizer)
    program = budgets.elastic(5, 5).program(delimiters)
    compiled = automata.compile(program, delimiters, None, len(tokenizer), max_new=100)
    close = list(delimiters.close.ids)
    for n in range(len(close)):
        assert inject(compiled, 0, compiled.walk([7, *close[:n]])) == close[n:]
        # <|end|> begins the close anew; any other token breaks it off.
        assert inject(compiled, 0, compiled.walk([*close[:n], close[0]])) == close[1:]
        assert inject(compiled, 0, compiled.walk([*close[:n], 7])) == close


def test_the_close_that_merged_with_its_neighbours_is_seen(made):
    tokenizer = made.merging()
    vocabulary = vocabulary_bytes(tokenizer)
    delimiters = resolve(tokenizer, think_close="</think>", vocabulary=vocabulary)
    token = {vocabulary[i]: i for i in range(len(vocabulary))}
    program = budgets.elastic(50, 50).program(delimiters)
    compiled = automata.compile(program, delimiters, vocabulary, len(vocabulary), max_new=200)
    automaton = compiled._tables.automaton
    for pieces in ([b".</", b"think", b">\n\n"], [b"\n</", b"thin", b"k>\n"], [b"<", b"/", b"thin", b"k>\n"]):
        *first, last = [token[piece] for piece in pieces]
        state = compiled.walk(first)
        assert automaton.match[state, automaton.class_of[last]] == 1
        for n in range(len(first)):
            assert automaton.match[compiled.walk(first[:n]), automaton.class_of[first[n]]] == 0


def test_a_lead_is_left_out_where_the_close_is_begun_or_it_stands_there(made):
    tokenizer = made.qwen_like()
    vocabulary = vocabulary_bytes(tokenizer)
    delimiters = resolve(tokenizer)
    token = {vocabulary[i]: i for i in range(len(vocabulary))}
    program = budgets.budget_forcing(5, 5, 0).program(delimiters)
    compiled = automata.compile(program, delimiters, vocabulary, len(vocabulary), max_new=100)
    close = delimiters.close.ids[0]
    newline = token[b"\n"]
    assert inject(compiled, 0, 0) == [newline, close]
    assert inject(compiled, 0, compiled.walk([newline])) == [close]
    assert inject(compiled, 0, compiled.walk([newline, token[b"x"]])) == [newline, close]

    oss = made.gpt_oss_like()
    vocabulary, delimiters = vocabulary_bytes(oss), resolve(oss)
    program = budgets.wrap_up(5, "the end\n", 5).program(delimiters)
    compiled = automata.compile(program, delimiters, vocabulary, len(vocabulary), max_new=100)
    close = list(delimiters.close.ids)
    assert vocabulary.join(inject(compiled, 0, 0)[: -len(close)]) == b"the end\n"
    assert inject(compiled, 0, compiled.walk(close[:2])) == close[2:]


def test_one_automaton_for_programs_that_differ_in_budgets_only(made):
    tokenizer = made.merging(chat_template="<think>")
    vocabulary, delimiters = vocabulary_bytes(tokenizer), resolve(tokenizer)

    def compiled(policy, **options):
        return automata.compile(
            policy.program(delimiters), delimiters, vocabulary, len(vocabulary), **options
        )

    one = compiled(budgets.elastic(5, 5), max_new=100)
    for other in (
        compiled(budgets.elastic(7, None), max_new=90),
        compiled(budgets.no_thinking(3), max_new=90, start=Label.SOLVE),
        compiled(budgets.elastic(), max_new=10, ignore_eos=True),
    ):
        assert other.automaton is one.automaton
        assert other.key == one.key
        assert not np.array_equal(other.program_row, one.program_row)
    assert compiled(budgets.soft_landing(5, 5, 5), max_new=100).key != one.key


def test_a_large_vocabulary_compiles_quickly(benchmark):
    rng = random.Random(0)
    letters = " etaoinshrdlucmwfgypbvk<>/.\n(){}_="
    tokens = {bytes([i]): None for i in range(256)}
    while len(tokens) < 151_936:
        tokens["".join(rng.choices(letters, k=rng.randint(2, 9))).encode()] = None
    delimiters = spelled("</think>", Vocabulary(tokens))
    program = budgets.soft_landing(5, 3, 4).program(delimiters)

    def build():
        # A new vocabulary each time: nothing is cached.
        return automata.compile(program, delimiters, Vocabulary(tokens), len(tokens), max_new=100)

    assert benchmark.pedantic(build, rounds=2).automaton.numel() > len(tokens)


def test_what_cannot_be_compiled_says_why(made):
    tokenizer = made.qwen_like()
    vocabulary, delimiters = vocabulary_bytes(tokenizer), resolve(tokenizer)
    size = len(vocabulary)

    def compiled(policy, delimiters=delimiters, vocabulary=vocabulary, size=size):
        return automata.compile(policy.program(delimiters), delimiters, vocabulary, size, max_new=100)

    with pytest.raises(BudgetError, match="needs the vocabulary"):
        compiled(budgets.wrap_up(5, "so", 5), vocabulary=None)
    with pytest.raises(BudgetError, match=f"token id {delimiters.close.ids[0]}, the model has ids 0 … 278"):
        compiled(budgets.elastic(5, 5), size=279)
    with pytest.raises(BudgetError, match="EOS id 277 is not a token of the model"):
        compiled(budgets.elastic(5, 5), size=277)
    with pytest.raises(BudgetError, match="token id 999 is to be forced"):
        compiled(budgets.wrap_up(5, [999], 5))
    with pytest.raises(BudgetError, match=r"cannot spell 'the end'.*pass token ids"):
        compiled(budgets.wrap_up(5, "the end", 5), vocabulary=[b"<eos>"] * size)
    wrong = Delimiters(None, Marker((1,), "</think>"), (EOS,))
    with pytest.raises(BudgetError, match="but they print"):
        compiled(budgets.elastic(5, 5), delimiters=wrong)
    bare = [b"</think>", *[b"x"] * (size - 1)]
    with pytest.raises(BudgetError, match="the rest of a half-written '</think>'"):
        compiled(
            budgets.elastic(5, 5), Delimiters(None, Marker((0,), "</think>"), (5,)), [*bare[:-1], b"<"], size
        )


def test_a_prompt_may_have_begun_the_close(made):
    tokenizer = made.gpt_oss_like()
    delimiters = resolve(tokenizer)
    program = budgets.elastic(5, 5).program(delimiters)
    compiled = automata.compile(program, delimiters, None, len(tokenizer), max_new=100)
    prompt = tokenizer.encode("<|start|>user<|message|>so<|end|><|start|>assistant", add_special_tokens=False)
    final = tokenizer.convert_tokens_to_ids(["<|channel|>", "final", "<|message|>"])
    assert inject(compiled, 0, compiled.start_state(prompt)) == final
    # So an answer without any thinking is seen to be one.
    state = compiled.walk(final[:-1], compiled.start_state(prompt))
    automaton = compiled._tables.automaton
    assert automaton.match[state, automaton.class_of[final[-1]]] == 1
    assert compiled.start_state(prompt[:-3]) == 0
    assert compiled.start_state([]) == 0
