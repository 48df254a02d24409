"""Policies and phase programs as data: what fits, what they refuse, and each over real tokenizers."""

import dataclasses

import pytest

from elastic_decode import automata, budgets
from elastic_decode.core import Budget, Phase
from elastic_decode.delimiters import resolve, vocabulary_bytes
from elastic_decode.errors import BudgetError
from elastic_decode.kernels.budget.layout import MAX_ENDS, MAX_EVENTS, MAX_PHASES, Finish, Label
from elastic_decode.phases import Event, IdSequence, Inject, PhaseProgram, PhaseSpec, Printed

THINK, SOLVE = Phase.THINK, Phase.SOLVE
CLOSE = 1  # of the worlds in budget_runs.py

# -- what fits


@pytest.mark.parametrize(
    ("policy", "start", "bound"),
    [
        (budgets.elastic(10, 5), THINK, 16),
        (budgets.elastic(10, 5), SOLVE, 5),
        (budgets.elastic(10, None), THINK, 100),
        (budgets.elastic(None, 5), THINK, 100),
        (budgets.elastic(None, 5), SOLVE, 5),
        (budgets.elastic(), THINK, 100),
        (budgets.no_thinking(5), THINK, 6),
        (budgets.truncate(30), THINK, 30),
        (budgets.truncate(30), SOLVE, 30),
        (budgets.truncate(), THINK, 100),
        (budgets.soft_landing(10, 4, 5), THINK, 20),
        (budgets.wrap_up(10, [3, 4, 3], 5, after=[3, 4]), THINK, 21),
        (budgets.budget_forcing(10, 5, 3, wait=[3, 4], final=[3, 4, 3]), THINK, 26),
    ],
    ids=str,
)
def test_bound(runs, policy, start, bound):
    vocabulary, delimiters = runs.WORLDS["token"]
    program = policy.program(delimiters)
    compiled = automata.compile(program, delimiters, vocabulary, len(vocabulary), max_new=100, start=start)
    assert compiled.bound() == bound
    free = automata.compile(program, delimiters, vocabulary, len(vocabulary), start=start)
    assert free.bound() == (None if bound == 100 else bound)
    if bound < 100:
        automata.compile(program, delimiters, vocabulary, len(vocabulary), max_new=bound, start=start)
        with pytest.raises(BudgetError, match=rf"needs up to {bound} new tokens .* and {bound - 1} fit"):
            automata.compile(program, delimiters, vocabulary, len(vocabulary), max_new=bound - 1, start=start)


def test_half_of_a_budget_that_cannot_fit_raises(runs):
    vocabulary, delimiters = runs.WORLDS["token"]
    for policy in (budgets.elastic(10, None), budgets.elastic(None, 10), budgets.soft_landing(9, 1, None)):
        program = policy.program(delimiters)
        automata.compile(program, delimiters, vocabulary, len(vocabulary), max_new=11)
        with pytest.raises(BudgetError, match="it needs up to 11 new tokens"):
            automata.compile(program, delimiters, vocabulary, len(vocabulary), max_new=10)
    with pytest.raises(BudgetError, match="no token fits behind the prompt"):
        automata.compile(program, delimiters, vocabulary, len(vocabulary), max_new=0)


# -- policies are data


def test_policies_are_values():
    assert budgets.elastic(1, 2) == budgets.elastic(1, 2) != budgets.elastic(2, 2)
    assert budgets.as_policy(Budget(1, 2)) == budgets.elastic(1, 2)
    assert budgets.as_policy(None) == budgets.elastic()
    assert budgets.as_policy(budgets.truncate(5)) == budgets.truncate(5)
    assert budgets.wrap_up(1, [3, 4], 2) == budgets.wrap_up(1, (3, 4), 2)
    names = {
        "elastic": budgets.elastic(1, 2),
        "truncate": budgets.truncate(5),
        "budget_forcing": budgets.budget_forcing(1, 2, 3),
        "soft_landing": budgets.soft_landing(1, 2, 3),
        "wrap_up": budgets.wrap_up(1, "so", 2),
        "no_thinking": budgets.no_thinking(1),
    }
    for name, policy in names.items():
        assert policy.name == name
        assert hash(policy) == hash(dataclasses.replace(policy))
        assert str(policy).startswith(f"{name}(")
    assert str(budgets.elastic(5, None)) == "elastic(think=5)"
    with pytest.raises(BudgetError, match="must be a Budget or a policy"):
        budgets.as_policy(5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: budgets.elastic(-1, 5), "elastic: think must be an int >= 0 or None"),
        (lambda: budgets.elastic(True, 5), "elastic: think must be"),
        (lambda: budgets.elastic(5, 1.5), "elastic: solve must be"),
        (lambda: budgets.truncate(-1), "truncate: total must be"),
        (lambda: budgets.soft_landing(5, None, 5), "soft_landing: grace must be an int >= 0, got None"),
        (lambda: budgets.budget_forcing(5, 5, -1), "budget_forcing: waits must be an int >= 0"),
        (lambda: budgets.budget_forcing(5, 5, 1, wait=""), "budget_forcing: wait must not be empty"),
        (lambda: budgets.wrap_up(5, "", 5), "wrap_up: text must not be empty"),
        (lambda: budgets.no_thinking(-1), "no_thinking: solve must be"),
    ],
)
def test_wrong_arguments_raise(make, says):
    with pytest.raises(BudgetError, match=says):
        make()


# -- programs of one's own

DONE = Event(next=Finish.EOS)
OVER = Event(next=Finish.BUDGET)
CLOSED = IdSequence((frozenset((CLOSE,)),))


def spec(name="solve", **changes):
    fields = {"name": name, "label": Label.SOLVE, "budget": 5, "on_expire": OVER, "on_eos": DONE}
    return PhaseSpec(**{**fields, **changes})


def program(*phases, **changes):
    fields = {"name": "mine", "phases": phases, "start_think": phases[0].name, "start_solve": phases[0].name}
    return PhaseProgram(**{**fields, **changes})


WAIT = Inject(before=(3,))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: spec(on_expire=None), "has a budget of 5 and no on_expire: it would do nothing"),
        (lambda: spec(on_expire=Event(next="solve")), "expires into itself"),
        (lambda: spec(on_expire=Event(next=Finish.EOS, inject=WAIT, replace=True)), "no draw to replace"),
        (lambda: spec(budget=-1), "must be an int >= 0"),
        (lambda: spec(ends=((CLOSED, DONE),) * (MAX_ENDS + 1)), f"at most {MAX_ENDS} fit"),
        (
            lambda: spec(ends=((Printed("ab"), Event(next="solve", inject=WAIT, replace=True)),)),
            "replaces an end of more than one token",
        ),
        (lambda: Event(next="solve", replace=True), "must force something in its place"),
        (lambda: Event(next="solve", max_count=1), "go together"),
        (lambda: Event(next="solve", fallback=DONE), "go together"),
        (lambda: Event(next="solve", max_count=-1, fallback=DONE), "must be >= 0"),
        (lambda: Event(next=Finish.LENGTH), "EOS or BUDGET, not LENGTH"),
        (lambda: Inject(), "needs a text or a close"),
        (lambda: Inject(before="a", unless_after="a"), "could come out empty"),
        (lambda: IdSequence(()), "at least one step"),
        (lambda: IdSequence((frozenset(),)), "at least one id"),
        (lambda: Printed(""), "must not be empty"),
        (lambda: program(spec("a"), spec("a")), "names a phase twice"),
        (lambda: program(spec(on_eos=Event(next="else"))), "has no phase 'else'; its phases are solve"),
        (lambda: program(spec(), start_think="else"), "has no phase 'else'"),
        (lambda: program(*[spec(str(i)) for i in range(MAX_PHASES + 1)]), f"1 to {MAX_PHASES} are possible"),
        (
            lambda: program(
                spec("a", budget=0, on_expire=Event(next="b")), spec("b", budget=0, on_expire=Event(next="a"))
            ),
            "expire in a circle: a -> b -> a",
        ),
    ],
)
def test_malformed_programs_raise(make, says):
    with pytest.raises(BudgetError, match=says):
        make()


def test_too_many_events_raise():
    def chain(n):
        event = DONE
        for i in range(n):
            event = Event(next="solve", max_count=i, fallback=event, inject=WAIT)
        return event

    assert len(program(spec(on_eos=chain(MAX_EVENTS - 2))).events()) == MAX_EVENTS
    with pytest.raises(BudgetError, match=f"at most {MAX_EVENTS} fit"):
        program(spec(on_eos=chain(MAX_EVENTS - 1)))


def test_equal_events_are_one_and_share_their_count(runs):
    wait = Event(next="think", inject=WAIT, replace=True, max_count=2, fallback=Event(next="solve"))
    patterns = [CLOSED, IdSequence((frozenset((4,)),))]
    think = PhaseSpec(
        name="think",
        label=Label.THINK,
        budget=9,
        ends=tuple((pattern, dataclasses.replace(wait)) for pattern in patterns),
        on_expire=OVER,
    )

    @dataclasses.dataclass(frozen=True)
    class Mine(budgets.Policy):
        def program(self, delimiters, tokenizer=None):
            return program(think, spec(), start_solve="solve")

    out = runs.run(Mine(), *runs.WORLDS["token"][::-1], [9, CLOSE, 4, 4, 9, 9, 9, 9, 9])
    assert out.tokens[:4] == [9, 3, 3, 4]
    assert out.phases[4] is SOLVE


def test_every_policy_runs_over_real_tokenizers(made, runs):
    policies = [
        budgets.elastic(4, 3),
        budgets.truncate(6),
        budgets.soft_landing(4, 2, 3),
        budgets.wrap_up(4, "so the end.\n", 3, after="\n\n"),
        budgets.budget_forcing(4, 3, 0),
        budgets.no_thinking(3),
    ]
    for name in ("qwen_like", "merging", "gpt_oss_like", "sentencepiece_like"):
        tokenizer = getattr(made, name)(chat_template="<think>\n")
        vocabulary = vocabulary_bytes(tokenizer)
        delimiters = resolve(tokenizer, vocabulary=vocabulary)
        close = vocabulary.join(delimiters.close.ids)
        stream = tokenizer.encode(
            "think of the line and so on and on and on and on", add_special_tokens=False
        )
        for policy in policies:
            out = runs.run(policy, delimiters, vocabulary, stream * 4)
            assert out.finish == "budget"
            printed = vocabulary.join(out.tokens)
            assert (close in printed) == (policy.name != "truncate")
            if policy.name == "wrap_up":
                assert b"so the end.\n" + close + b"\n\n" in printed
            if policy.name == "budget_forcing":
                assert b"\n" + close + b"Final Answer:" in printed
