r"""One spelling for what is written in many ways: `\dfrac12`, `\frac{1}{2}`; `5\text{ cm}`, `5`; `1{,}000`,
`1000`.

Nothing here computes: a value keeps its digits and signs, and `\sqrt{12}` does not become `2\sqrt{3}`.
"""

from __future__ import annotations

import re

_CHARACTERS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "÷": "/",
        "π": r"\pi ",
        "∞": r"\infty ",
        "√": r"\sqrt ",
        "≤": r"\leq ",
        "≥": r"\geq ",
        "≠": r"\neq ",
        "∪": r"\cup ",
        "∈": r"\in ",
        "±": r"\pm ",
        "∅": r"\emptyset ",
        "°": "",
        "€": "",
        "£": "",
        "，": ",",
        "\u00a0": " ",
        "\u202f": " ",
        "\u2009": " ",
    }
)
_END = r"(?![A-Za-z])"
_ONE = (
    r"(\d|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|\\(?:pi|alpha|beta|gamma|theta|lambda|mu|phi|omega)(?![A-Za-z]))"
)
# In this order, each on what the ones before it leave.
_SPELLINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), to)
    for pattern, to in (
        (r"(?<=\d)(?:\{,\}|,\\!|\\,|\\ |\{\\,\})(?=\d{3}(?!\d))", ""),  # thousands: 1{,}000
        (r"(?<!\\)\\[()\[\]]|\\?\$", ""),  # math delimiters; dollars
        (rf"\\(?:left|right|[bB]igg?[lrm]?){_END}\s*\.?", ""),
        (rf"\\(?:displaystyle|textstyle|limits|nolimits|quad|qquad|hspace\{{[^{{}}]*\}}){_END}", " "),
        (r"(?<!\\)\\[,;:!\s]|~", " "),
        (rf"\\(?:boxed|fbox|framebox){_END}", ""),
        (rf"\\[dtc]frac{_END}", r"\\frac"),
        (rf"\\(?:textbf|textit|textrm|textsf|textnormal|mbox|mathrm|mathsf){_END}\s*(?=\{{)", r"\\text"),
        (rf"\\(?:mathbf|boldsymbol|bm|mathit|operatorname){_END}\s*\{{([^{{}}]*)\}}", r"\1"),
        (r"\\text\{\s*([A-Za-z])\s*\}(?=\^|_)|\{\\rm\s*([^{}]*)\}", r"\1\2"),
        (rf"\\(?:langle|lparen){_END}", "("),
        (rf"\\(?:rangle|rparen){_END}", ")"),
        (rf"\\lbrace{_END}", r"\\{"),
        (rf"\\rbrace{_END}", r"\\}"),
        (rf"\\lbrack{_END}", "["),
        (rf"\\rbrack{_END}", "]"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree" + _END, ""),
        (rf"<=|\\le{_END}|\\leqslant{_END}", r"\\leq "),
        (rf">=|\\ge{_END}|\\geqslant{_END}", r"\\geq "),
        (rf"!=|\\ne{_END}", r"\\neq "),
        (rf"\\lt{_END}", "<"),
        (rf"\\gt{_END}", ">"),
        (rf"\\varnothing{_END}|\\\{{\s*\\\}}", r"\\emptyset "),
        (rf"\\to{_END}", r"\\rightarrow "),
        (r"^\\text\{[^{}]*\b(?:is|are|equals)\s*:?\s*\}|^\s*the (?:final )?answer is:?\s", ""),
        (r"\\text\{\s*percent\s*\}|\\%|\bpercent\b", "%"),
        (r"\\text\{\s*,?\s*(?:and|or)\s*\}|,?\s(?:and|or)\s", ";"),
        (rf"\\(?:lor|vee|cdots?\s*;){_END}", ";"),
        (r"(?<=\{)(\d{1,3}),(\d{3})(?=\})", r"\1\2"),  # \frac{1,000}{3}
        (rf"\\frac\s*{_ONE}\s*{_ONE}", r"\\frac{\1}{\2}"),
        (rf"\\frac\s*{_ONE}\s*\{{", r"\\frac{\1}{"),
        (rf"\\frac\s*(\{{[^{{}}]*\}})\s*{_ONE}", r"\\frac\1{\2}"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"\s+", " "),
    )
)
_SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,])")


def tidy(text: str) -> str:
    """One spelling of LaTeX and of signs; separators of lists become `,` and `;`; single spaces stay."""
    text = text.strip().translate(_CHARACTERS)
    for pattern, to in _SPELLINGS:
        text = pattern.sub(to, text)
    text = _SPACED.sub(lambda match: match.group().replace(" ", ""), text)
    return text.strip().rstrip(".,;: \\")


_POWERS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"(?<=[\d\s])\s*(?:\\text\{{\s*)?({'|'.join(_POWERS)})s?\b\s*([^{{}}]*\}})?")
_UNITS = frozenset(
    re.findall(
        r"\w+",
        """cm mm km dm nm kg mg ml kl ft hr hrs min sec mi mph kph lb lbs oz yd sq cu hz khz kj kw ev mol unit
        units square cubic per meter metre meters metres centimeter centimeters centimetre centimetres
        kilometer kilometers kilometre kilometres millimeter millimeters inch inches foot feet yard yards mile
        miles gram grams kilogram kilograms pound pounds ounce ounces ton tons liter liters litre litres
        gallon gallons second seconds minute minutes hour hours day days week weeks month months year years
        degree degrees radian radians dollar dollars cent cents euro euros bucks usd joule joules newton
        newtons watt watts volt volts ohm ohms kelvin celsius fahrenheit point points""",
    )
)
_FUNCTIONS = frozenset(
    re.findall(r"\w+", "sin cos tan cot sec csc log exp det mod gcd lcm max min arcsin arccos arctan")
)
_EXPONENT = r"(?:\s*\^\s*\{?\s*-?\d\s*\}?)?"
_UNIT = re.compile(
    rf"\s*(?:/|\\cdot)?\s*(?:(?P<wrapped>\\text\{{[^{{}}]*\}}{_EXPONENT}"
    rf"(?:\s*(?:/|\\cdot)?\s*\\text\{{[^{{}}]*\}}{_EXPONENT})*)"
    rf"|(?<![A-Za-z\\{{])(?P<words>[A-Za-z]+(?: [A-Za-z]+)*)\.?{_EXPONENT})\.?$"
)
_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d[\d,.]*|\.\d+|\d*\s*\\frac\{-?\d+\}\{-?\d+\}|\d+\s*/\s*\d+)\s*%?")


def _without_unit(text: str) -> str:
    """`5 \\text{ cm}^2` -> `5`: any words behind a plain number, known units behind anything else."""
    match = _UNIT.search(text)
    if match is None or not text[: match.start()].strip():
        return text
    body = text[: match.start()].rstrip()
    wrapped = match["wrapped"] is not None
    content = " ".join(re.findall(r"\{([^{}]*)\}", match["wrapped"])) if wrapped else match["words"]
    words = re.findall(r"[A-Za-z]+", content.casefold())
    known = all(word in _UNITS for word in words) and not re.search(r"[<>=]", content)
    if _PLAIN_NUMBER.fullmatch(body):
        spaced = text[len(body) : match.start("words")].isspace()
        likely = all(len(word) > 2 and word not in _FUNCTIONS for word in words)
        known |= not re.search(r"\d", match["wrapped"]) if wrapped else spaced and likely and len(words) <= 3
    if not known or body[-1] in "+-*/^=<>(,":
        return text
    return _without_unit(body)


def bare_value(text: str) -> str:
    """One value without its unit and without spaces (but for those that end a control word)."""
    text = _SCALE.sub(lambda m: rf"\times10^{{{_POWERS[m[1]]}}}" + (rf"\text{{{m[2]}" if m[2] else ""), text)
    text = re.sub(r"\\text\{\s*\}", "", text)
    text = _without_unit(text.strip())
    whole = re.fullmatch(r"\\text\{([^{}]*\d[^{}]*)\}", text)
    if whole:  # \text{5 apples} is a number in wrapping
        text = _without_unit(whole[1].strip())
    text = re.sub(r"(\\[A-Za-z]+) (?=[A-Za-z])", "\\1\0", text)
    text = re.sub(r"(?<=\d) (?=\d)", "\0", text)  # 1 2 is not 12
    text = text.replace(" ", "").replace("\0", " ")
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    text = text.removeprefix("+")
    while text.startswith("{") and text.endswith("}") and text.count("{") == 1:
        text = text[1:-1]
    return text
