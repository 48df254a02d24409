r"""Answers to mathematics problems, as text: found in a solution, and compared as far as writing decides it.

An answer is read into its shape first: a tuple `(1, 2)`, an interval `[1, 2)`, a set `\{1, 2\}`, a union, a
list `1, 2` without brackets, or one value. Shapes are compared here, part by part; two values are equal,
different, or not to be told apart by writing alone: `tasks/math_grader.py` has a computer algebra system for
those. What counts as equal, and what does not: docs/graders.md. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from elastic_decode.tasks.math_spelling import bare_value, tidy

Where = Literal["boxed", "answer", "hash"]
WHERE: tuple[Where, ...] = ("boxed", "answer", "hash")
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_ANSWER_LINE = re.compile(r"(?im)\banswer(?:\s+is)?\s*[:：][*_\s]*(\S.*)$")
_HASHES = re.compile(r"####[^\S\n]*(\S.*)")
MOST_PARTS = 64  # more of them than this in an answer are compared as one text


def extract(text: str, where: Sequence[Where] = ("boxed",)) -> str | None:
    r"""The answer that a solution text gives, None if there is none. What counts is the first of `where`:

    "boxed": what the last `\boxed`, `\fbox` or `\framebox` holds, nothing if its braces are never closed;
    "answer": what the last "Answer: …" or "answer is: …" says to the end of its line; "hash": likewise of the
    last `#### …`.
    """
    finders = {"boxed": boxed, "answer": _last(_ANSWER_LINE), "hash": _last(_HASHES)}
    for place in where:
        if found := finders[place](text):
            return found
    return None


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{…}` holds: up to the brace that closes it, or up to a space, for `\boxed 5`."""
    starts = [match.end() for match in _BOX.finditer(text)]
    if not starts:
        return None
    start = starts[-1]
    if text[start : start + 1] != "{":
        bare = re.match(r"[^\s$]+", text[start:])
        return bare.group().rstrip(".,;") or None if bare else None
    depth, place = 0, start
    while place < len(text):
        if text[place] == "\\":
            place += 1  # an escaped brace, or another escaped character
        elif text[place] == "{":
            depth += 1
        elif text[place] == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : place].strip() or None
        place += 1
    return None


def _last(pattern: re.Pattern[str]) -> Callable[[str], str | None]:
    def find(text: str) -> str | None:
        found = pattern.findall(text)
        return found[-1].strip() if found else None

    return find


Kind = Literal["value", "tuple", "interval", "set", "union", "list"]


@dataclass(frozen=True, slots=True)
class Shape:
    """An answer read. text: all of it, tidied. brackets: the pair around a tuple, interval or set. label:
    what stands before the first `=` (or before ∈), where that only names the value.
    """

    kind: Kind
    text: str
    parts: tuple[Shape, ...] = ()
    brackets: tuple[str, str] = ("", "")
    label: str = ""


def read(answer: str) -> Shape:
    """The shape of an answer. Costs time linear in its length, times its depth of nesting."""
    text = tidy(answer)
    pieces = [_thousands(piece) for piece in _split(text, ";")]
    pieces = [part for piece in pieces for part in _split(piece, ",")]
    if not 1 < len(pieces) <= MOST_PARTS:
        return _value(_thousands(text) if len(pieces) == 1 else text)
    return Shape("list", text, tuple(_value(piece) for piece in pieces))


_GROUPED = re.compile(r"((?:[^,;=]*=)?\s*[-+]?)(\d{1,3}(?:,\d{3})+)(?!\d)([^,]*)")


def _thousands(text: str) -> str:
    """`1,234` is a number where it is all there is; inside brackets a comma separates."""
    match = _GROUPED.fullmatch(text)
    return match[1] + match[2].replace(",", "") + match[3] if match else text


_IN = re.compile(r"\\in(?![A-Za-z])")
_EQUALS = re.compile(r"(?<![<>!:=])=")
_NAME = re.compile(r"(?:[A-Za-z\\(){},'|\s_]|(?<=_)\d+|(?<=_\{)\d+)+")


def _value(text: str) -> Shape:
    """The shape of what is no list; a label is taken off."""
    text = text.strip()
    for sign in (_EQUALS, _IN):
        ends = [match.span() for match in sign.finditer(text)]
        depths = _depth_at(text) if ends else []
        ends = [(start, end) for start, end in ends if depths[start] == 0]
        if ends and _NAME.fullmatch(text[: ends[0][0]]):
            inner = _bracketed(text[ends[-1][1] :].strip())
            name = bare_value(text[: ends[0][0]])
            return Shape(inner.kind, text, inner.parts or (inner,), inner.brackets, name)
    return _bracketed(text)


_OPEN = ("(", "[", r"\{")
_CLOSE = (")", "]", r"\}")


def _bracketed(text: str) -> Shape:
    union = _split(text, r"\cup")
    if len(union) > 1:
        return Shape("union", text, tuple(_bracketed(part) for part in union))
    opening = next((sign for sign in _OPEN if text.startswith(sign)), None)
    closing = next((sign for sign in _CLOSE if text.endswith(sign)), None)
    if opening and closing and _spans(text) and not re.search(r":|\\mid|\|", text):
        inside = text[len(opening) : -len(closing)]
        parts = [part for piece in _split(inside, ";") for part in _split(piece, ",")]
        brackets = (opening, closing)
        if brackets == ("(", ")") and len(parts) == 1:
            return _value(inside)
        shapes = tuple(_value(part) for part in parts)
        if brackets == (r"\{", r"\}"):
            return Shape("set", text, shapes, brackets)
        if r"\{" not in brackets and r"\}" not in brackets and 1 < len(parts) <= MOST_PARTS:
            return Shape("tuple" if brackets == ("(", ")") else "interval", text, shapes, brackets)
    if len(re.findall(r"\\pm(?![A-Za-z])", text)) == 1:  # both signs: two values
        both = [re.sub(r"\\pm(?![A-Za-z])\s*", sign, text).removeprefix("+") for sign in "+-"]
        return Shape("list", text, tuple(Shape("value", bare_value(one)) for one in both))
    return Shape("value", bare_value(text))


_TOKEN = re.compile(r"\\begin\{\w+\*?\}|\\end\{\w+\*?\}|\\[A-Za-z]+|\\.|.", re.DOTALL)


def _depths(text: str) -> list[tuple[str, int]]:
    """Every token with the depth of brackets that it stands in; a bracket itself with that outside it."""
    found, depth = [], 0
    for token in _TOKEN.findall(text):
        closes = token in (")", "]", "}", r"\}") or token.startswith(r"\end{")
        depth -= closes
        found.append((token, depth))
        depth += token in ("(", "[", "{", r"\{") or token.startswith(r"\begin{")
    return found


def _depth_at(text: str) -> list[int]:
    """The depth of every character."""
    return [depth for token, depth in _depths(text) for _ in token]


def _spans(text: str) -> bool:
    """Whether the first bracket is closed by the last one."""
    depths = [depth for _, depth in _depths(text)]
    return depths[-1] == 0 and all(depth > 0 for depth in depths[1:-1])


def _split(text: str, separator: str) -> list[str]:
    """The non-empty parts between separators that stand outside all brackets."""
    if separator not in text:
        return [text.strip()] if text.strip() else []
    parts = [""]
    for token, depth in _depths(text):
        if token == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts if part.strip()]


Values = Callable[[str, str], bool | None]


def same(gold: Shape, answer: Shape, values: Values) -> bool | None:
    """Whether two answers are equal, None if that hangs on values that `values` cannot tell apart.

    values(gold, answer): whether two values are equal, None for unknown.
    """
    if gold.label or answer.label:
        if gold.label and answer.label and gold.label != answer.label:
            return values(_whole(gold), _whole(answer))  # x = 2y and y = x/2, say
        one_is_an_equation = any(not s.label and s.kind == "value" and "=" in s.text for s in (gold, answer))
        if one_is_an_equation:
            return values(_whole(gold), _whole(answer))
        return same(_unlabelled(gold), _unlabelled(answer), values)
    if gold.kind == answer.kind == "value":
        right = answer.text
        if _EQUALS.search(right) and not _EQUALS.search(gold.text):
            right = right[right.rindex("=") + 1 :]  # 2 + 3 = 5 says 5
        return values(gold.text, right)
    if gold.kind == answer.kind and gold.kind in ("tuple", "interval"):
        if gold.brackets != answer.brackets or len(gold.parts) != len(answer.parts):
            return False
        return _all(same(g, a, values) for g, a in zip(gold.parts, answer.parts, strict=True))
    kinds = {gold.kind, answer.kind}
    if kinds == {"set", "value"}:
        if gold.kind == "set":
            return same(gold.parts[0], answer, values) if len(gold.parts) == 1 else False
        return same(gold, answer.parts[0], values) if len(answer.parts) == 1 else False
    if kinds <= {"list", "set"} or kinds <= {"list", "union"}:
        return _matching([[same(g, a, values) for a in answer.parts] for g in gold.parts], len(answer.parts))
    relation = next((s for s in (gold, answer) if s.kind == "value"), None)
    if relation and re.search(r"[<>]|\\[lg]eq", relation.text):  # 0 < x < 1 and (0, 1)
        return values(gold.text, answer.text)
    return False


def _unlabelled(shape: Shape) -> Shape:
    if not shape.label:
        return shape
    if shape.kind == "value":
        return shape.parts[0]
    return Shape(shape.kind, shape.text, shape.parts, shape.brackets)


def _whole(shape: Shape) -> str:
    return bare_value(shape.text)


def _all(found: Iterable[bool | None]) -> bool | None:
    known = list(found)
    if False in known:
        return False
    return None if None in known else True


def _matching(equal: list[list[bool | None]], columns: int) -> bool | None:
    """Whether rows and columns can be paired off, each with an equal one: parts in another order."""
    if len(equal) != columns:
        return False
    if _pairs_off([[cell is True for cell in row] for row in equal]):
        return True
    return None if _pairs_off([[cell is not False for cell in row] for row in equal]) else False


def _pairs_off(allowed: list[list[bool]]) -> bool:
    """Whether a bipartite graph has a perfect matching, by augmenting paths."""
    partner: dict[int, int] = {}

    def pair(row: int, seen: set[int]) -> bool:
        for column in range(len(allowed)):
            if allowed[row][column] and column not in seen:
                seen.add(column)
                if column not in partner or pair(partner[column], seen):
                    partner[column] = row
                    return True
        return False

    return all(pair(row, set()) for row in range(len(allowed)))


_DIGITS = r"(?:\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]*)(?:(?P<whole>\d+)?\\frac\{{(?P<top>-?{_DIGITS})\}}\{{(?P<bottom>-?{_DIGITS})\}}"
    rf"|(?P<a>{_DIGITS})(?:/(?P<b>{_DIGITS}))?)"
    r"(?:(?:\\times|\\cdot|\*|×)?(?:10\^\{?|(?<=[\d.])[eE])(?P<power>[-+]?\d{1,3})\}?)?(?P<percent>%?)"
)
_LONGEST_NUMBER = 400


def number(text: str) -> tuple[Fraction, bool] | None:
    """A value that is a rational number as it is written, and whether a percent sign follows; else None."""
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    if match is None:
        return None
    if match["a"] is not None:
        value, bottom = Fraction(match["a"]), Fraction(match["b"] or 1)
    else:
        value, bottom = Fraction(match["top"]), Fraction(match["bottom"])
    if bottom == 0:
        return None
    value = value / bottom + int(match["whole"] or 0)  # 3\frac{1}{2} is a mixed number
    if match["power"]:
        if "10^" in match.group() and not re.search(r"\\times|\\cdot|\*|×", match.group()):
            return None  # 310^{2} is no 3 · 10^2
        value *= Fraction(10) ** int(match["power"])
    return value * (-1) ** match["sign"].count("-"), bool(match["percent"])


_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_APART = re.compile(r"-?[\d.]+(?: [\d.]+)+")
_BASED = re.compile(r"([0-9A-Fa-f]+)_\{?(\d+)\}?")


def written_alike(gold: str, answer: str, tolerance: float = 0.0) -> bool | None:
    """Whether two values (texts of a Shape) are equal, where writing decides it; None where it does not.

    tolerance: how far a number may be from the gold number, relative to it; 0 = not at all.
    """
    if gold == answer:
        return True
    if not answer or _APART.fullmatch(answer):
        return False  # nothing, or numbers with a space between them, which would be multiplied
    left, right = number(gold), number(answer)
    if left and right:
        return _equal_numbers(left, right, tolerance)
    if _TEXT.fullmatch(gold) or _TEXT.fullmatch(answer):
        return _word(gold) == _word(answer)
    bases = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
    if bases[0] and bases[1]:
        return bases[0].groups() == bases[1].groups()
    for based, other in ((bases[0], answer), (bases[1], gold)):
        if based and re.fullmatch(r"[0-9A-Fa-f]+", other):
            return based[1] == other  # the base may be left out
    if len(gold) == len(answer) == 1:
        return gold.casefold() == answer.casefold() if gold.isalpha() and answer.isalpha() else False
    if (left and answer.isalpha()) or (right and gold.isalpha()):
        return False
    if gold.isalpha() and answer.isalpha() and len(gold) > 3 and len(answer) > 3:
        return gold.casefold() == answer.casefold()  # a word: no product of variables, in any order
    return None


def _equal_numbers(gold: tuple[Fraction, bool], answer: tuple[Fraction, bool], tolerance: float) -> bool:
    values = [answer[0]]
    if gold[1] != answer[1]:  # 50% is taken for 50 and for 1/2
        values.append(answer[0] * 100 if gold[1] else answer[0] / 100)
    return any(abs(value - gold[0]) <= Fraction(tolerance) * abs(gold[0]) for value in values)


def _word(text: str) -> str:
    """A word without its wrapping, case and punctuation."""
    return re.sub(r"[\s().,:'\"]", "", _TEXT.sub(r"\1", text)).casefold()
