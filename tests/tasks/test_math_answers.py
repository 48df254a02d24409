"""Answers compared: what is equal, what is not, where algebra has to say; and where an answer is found."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elastic_decode.tasks.math_answers import WHERE, boxed, extract
from elastic_decode.tasks.math_grader import LONGEST, Grader, compare

EQUAL_AS_WRITTEN = [
    ("1/2", "0.5"),
    ("1/2", r"\frac12"),
    ("0.5", r"\dfrac{1}{2}"),
    ("1/2", r"\tfrac 1 2"),
    ("-1/2", r"-\frac{1}{2}"),
    ("-1/2", r"\frac{-1}{2}"),
    ("7/2", r"3\frac{1}{2}"),
    ("50", r"50\%"),
    ("0.5", r"50\%"),
    (r"50\%", "50%"),
    ("1000", "1,000"),
    ("1000", r"1{,}000"),
    ("1000", r"1\,000"),
    ("1000000", r"1,\!000,\!000"),
    ("1234567", "1 234 567"),
    ("5", "5.0"),
    ("5", "5."),
    ("5", "5\\ "),
    ("5", r"5 \\"),
    ("5", "+5"),
    ("025", "25"),
    ("-3", "−3"),
    ("5", "x = 5"),
    ("5", r"\angle ABC = 5^\circ"),
    ("5", "2 + 3 = 5"),
    ("x=5", "5"),
    ("5", r"5\text{ cm}"),
    ("5", r"5 \text{ cm}^2"),
    (r"5\text{ cm}", "5"),
    ("12", r"12 \text{ km}/\text{h}"),
    ("12", r"12\ \mathrm{km/h}"),
    ("5", "5 cm"),
    ("5", "5 apples"),
    ("5", r"\text{5 apples}"),
    ("5", r"\text{The answer is } 5"),
    ("5", r"\$5"),
    ("5", "$5$"),
    ("5", r"\mathbf{5}"),
    ("5", r"\displaystyle 5"),
    ("5000000", r"5\text{ million dollars}"),
    ("3.3e12", r"3.3 \times 10^{12}"),
    ("90", r"90^{\circ}"),
    (r"\frac{\pi}{2}", r"\dfrac \pi {2}"),
    (r"x^2", "x^{2}"),
    ("(1,2)", r"\left( 1, 2 \right)"),
    ("(3,4)", "(x, y) = (3, 4)"),
    ("(0.5,2)", r"(\frac{1}{2}, 2)"),
    ("[0,1)", r"x \in [0, 1)"),
    (r"(-\infty,1)\cup(2,\infty)", r"(2, \infty) \cup (-\infty, 1)"),
    (r"\{1,2\}", r"\left\{2, 1\right\}"),
    ("1,2", r"\{2, 1\}"),
    ("2,-2", r"x = \pm 2"),
    ("2,-2", "x=2 or x=-2"),
    ("(1,2),(3,4)", "(3,4) and (1,2)"),
    ("5", r"\{5\}"),
    ("2516_8", "2516_{8}"),
    ("2516_8", "2516"),
    (r"\text{Evelyn}", "evelyn"),
    ("C", r"\text{(C)}"),
    ("C", r"\textbf{C}"),
    (r"6:30\text{ p.m.}", r"6:30 \text{ p.m.}"),
    (r"\emptyset", r"\{\}"),
]
EQUAL_BY_ALGEBRA = [
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"2\sqrt{3}", "2sqrt(3)"),
    (r"\frac{\sqrt{3}}{3}", r"1/\sqrt3"),
    (r"\pi/2", r"\frac{\pi}{2}"),
    (r"2.5\pi", r"\frac{5\pi}{2}"),
    (r"20\pi", r"4 \cdot 5\pi \text{ cm}^2"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\frac{n(n+1)}{2}", "n(n+1)/2"),
    ("x^{2.5}", "x^{5/2}"),
    ("1024", "2^{10}"),
    ("120", "5!"),
    ("0.001", "10^{-3}"),
    ("2^{2024}-1", "4^{1012}-1"),
    ("6+9i", "9i+6"),
    ("y=2x+1", "2x-y+1=0"),
    ("p=2q", "q=p/2"),
    ("x>3", "3<x"),
    ("[0,1)", r"0 \le x < 1"),
    (r"(0,\infty)", "x>0"),
    (r"(-\infty,1)\cup(2,\infty)", "x<1 or x>2"),
    (r"(\sqrt{12},1)", r"(2\sqrt3, 1)"),
    (r"(-\infty,2\sqrt{2}]", r"\left(-\infty, \sqrt{8}\right]"),
    (r"\{\sqrt{8},1\}", r"\{1, 2\sqrt{2}\}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    (r"\begin{pmatrix}1/2\\0\end{pmatrix}", r"\begin{pmatrix} 0.5 \\ 0 \end{pmatrix}"),
]
DIFFERENT_AS_WRITTEN = [
    ("1/2", "2/1"),
    ("1/3", "0.333"),
    ("1/3", "0.333333"),
    ("-3", "3"),
    ("12", "12,000"),
    ("12", "1.2"),
    ("12", "1 2"),
    ("12", "12 and 13"),
    ("12", "12, 13"),
    ("12,13", "12"),
    ("2", r"\pm 2"),
    ("1,1", "1"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "1,2"),
    ("(1,2)", r"\{1,2\}"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(1,2,3)"),
    ("[0,1)", "(0,1)"),
    ("[0,1)", "[0,1]"),
    ("[0,1)", "[0,2)"),
    (r"(-\infty,1)\cup(2,\infty)", r"(-\infty,1)"),
    (r"5\%", "500"),
    ("2516_8", "2516_9"),
    ("C", "D"),
    ("5", "none"),
    ("5", "a lot of words that are no mathematics at all"),
    (r"\text{Evelyn}", "Nelyve"),
    ("Evelyn", "Nelyve"),
    ("5", ""),
    ("5", "  "),
    ("5", "10^{10^{10}}"),
    ("5", "9!!!!!"),
    ("5", "100000!"),
    ("5", "2^{99999999}"),
    ("5", "9" * 500 + "^2"),
    ("5", "(" * 200 + "5" + ")" * 200),
    ("5", "5" * 100_000),
]
DIFFERENT_BY_ALGEBRA = [
    (r"\sqrt{2}", "2"),
    (r"\sqrt{2}", "1.414214"),
    (r"\sqrt{2}", "1.4142135623730951"),
    (r"\pi", "3.14"),
    (r"\pi", "22/7"),
    (r"\frac{\pi}{2}", r"\frac{\pi}{3}"),
    (r"\sqrt{2}\cdot10^{-8}", r"\sqrt{3}\cdot 10^{-8}"),
    ("x=5", "y=5"),
    ("x+1", "x-1"),
    ("5", "5!"),
    ("100", "10^2x"),
    ("310^2", "300"),
    ("[0,1)", "0<x<1"),
    ("x>3", "x<3"),
    (r"\infty", r"-\infty"),
    ("5", "6:30"),
    ("5", r"\frac{5}{0}"),
    ("5", r"\frac{5}{"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    (r"(\sqrt{12},1)", r"(1, 2\sqrt3)"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL_AS_WRITTEN)
def test_equal_as_written(gold, answer):
    assert compare([gold], answer) is True


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT_AS_WRITTEN, ids=lambda text: text[:30])
def test_different_as_written(gold, answer):
    assert compare([gold], answer) is False


@pytest.fixture(scope="module")
def grader():
    pytest.importorskip("math_verify")
    with Grader(workers=1, limit=20) as grader:
        yield grader


@pytest.mark.parametrize(
    ("pairs", "grade"),
    [
        (EQUAL_BY_ALGEBRA, 1.0),
        (DIFFERENT_BY_ALGEBRA, 0.0),
        (EQUAL_AS_WRITTEN, 1.0),
        (DIFFERENT_AS_WRITTEN, 0.0),
    ],
    ids=["equal", "different", "equal as written", "different as written"],
)
def test_by_algebra(grader, pairs, grade):
    golds, answers = zip(*pairs, strict=True)
    grades = grader.grade(answers, golds)
    wrong = [pair for pair, got in zip(pairs, grades, strict=True) if got != grade]
    assert not wrong
    assert not grader.failures
    if pairs in (EQUAL_BY_ALGEBRA, DIFFERENT_BY_ALGEBRA):
        assert {compare([gold], answer) for gold, answer in pairs} == {None}, "writing decides none of these"


def test_a_tolerance_is_for_numbers(grader):
    assert compare(["9.81"], "9.8", tolerance=0.01) is True
    assert compare(["9.81"], "9.7", tolerance=0.01) is False
    assert compare(["(9.81, 2)"], "(9.8, 2)", tolerance=0.01) is True
    with Grader(workers=1, limit=20, tolerance=0.01) as rough:
        assert rough.grade([r"\pi", r"\sqrt{2}", "x", "3.1x"], ["3.14", "1.5", "3.14", "3.14x"]) == [
            1,
            0,
            0,
            0,
        ]
    assert grader.grade([r"\pi"], ["3.14"]) == [0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{5}$, no: $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{[0,1\}}", r"[0,1\}"),
        (r"\boxed{\text{a \{ b}}", r"\text{a \{ b}"),
        (r"\boxed {7}", "7"),
        (r"\boxed 7.", "7"),
        (r"\fbox{7}", "7"),
        (r"\framebox{204} minutes", "204"),
        (r"\boxed{1}, and \boxed{2", None),
        (r"first \boxed{1}, in \boxed{}", None),
        (r"\boxedly{3}", None),
        ("Answer: 42", None),
        ("", None),
    ],
)
def test_the_last_box(text, answer):
    assert boxed(text) == answer
    assert extract(text) == answer


def test_other_places_only_where_asked():
    text = "The answer is: 3\n**Final Answer:** $7$\n#### 1,234\n"
    assert extract(text) is None
    assert extract(text, ("answer",)) == "$7$"
    assert extract(text, ("boxed", "hash", "answer")) == "1,234"
    assert extract(text + r"\boxed{5}", WHERE) == "5"


PIECES = st.sampled_from(
    [
        *r"{}()[],;1.x=<^_!$/-|",
        *("12", "1,000", "and", r"\text{cm}"),
        *re.findall(r"\S+", r"\frac \{ \} \\ \% \sqrt \left \pm \cup \in"),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=60).map(" ".join))
@example("_a" * 400 + "=")
@example("(" * 29)
def test_anything_can_be_compared(text):
    assert compare(["5"], text) in (True, False, None)
    if text.strip():
        assert compare([text], text) is True
    assert len(text) > LONGEST or compare([text + " "], text) in (True, False, None)
