r"""Answers as text: find the box in a response, write an answer in one plain way, read it as an exact number.

Everything here takes time linear in the length of the text and never evaluates an expression, so that it is safe on
whatever a model writes. What is left, equality of expressions, is decided in :mod:`recipe.asyppo.reward.grader`.
"""

import re
from decimal import Decimal
from fractions import Fraction

BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# What may stand between two boxes of one answer: "$\boxed{3}$ and $\boxed{5}$".
BETWEEN_BOXES = re.compile(r"[\s$,;]*(?:and|or)?[\s$]*")

REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\!\s*|\\\$|\$|(?<!\\)\\[()\[\]]", ""),
        (r"\\(?:displaystyle|left|right|[bB]igg?[lr]?)(?![A-Za-z])", ""),
        (r"\\(?:quad|qquad)(?![A-Za-z])|(?<!\\)\\[,;: ]|~", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:mbox|textbf|textrm|textit|textnormal|mathrm|operatorname)(?=\s*\{)", r"\\text"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree|°", ""),
        (r"\\%", "%"),
        (r"\bnp\.", ""),
        (r"(?<=\d)\.(?!\d)", ""),
        (r"(?<=\d)[eE]([+-]?\d+)(?![\w.])", r" \\times 10^{\1}"),
        (r"(?<![\\A-Za-z])(a?r?c?(?:sin|cos|tan)|exp|ln|log)(?=\s*[({])", r"\\\1"),
        (r"\s+", " "),
    )
]
WHOLE_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
UNIT = re.compile(r"(?<=[^\s{(=])\s*\\text\s*\{[^{}]*\}(?:\s*\^\s*(?:\d|\{\d\}))?$")
BARE_SCRIPT = re.compile(r"([_^])(\w)")
LETTER = re.compile(r"\(([A-Z])\)")

# The first digit is a decimal one: S_3 and D_4 are groups, not numbers.
BASED = re.compile(r"(?P<digits>\d[\dA-Z]*)_\{?(?P<base>\d+)\}?")

DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,100})"
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<mantissa>{DIGITS}(?:\.\d{{1,100}})?|\.\d{{1,100}})"
    r"(?:(?:\\times|\\cdot|\*)10\^(?:\{(?P<braced>[+-]?\d{1,3})\}|(?P<bare>\d)))?"
    r"|(?P<power>10\^(?:\{(?P<power_braced>[+-]?\d{1,3})\}|(?P<power_bare>\d)))"
    rf"|(?:\\frac\{{(?P<top>-?{DIGITS})\}}\{{(?P<bottom>{DIGITS})\}}|(?P<over>{DIGITS})/(?P<under>{DIGITS})))(?P<percent>%?)"
)


def _closing(text: str, start: int, end: int) -> int | None:
    """Position before ``end`` of the brace that closes the one before ``start``, or None; escaped ones do not count."""
    depth = 1
    for match in BRACE.finditer(text, start, end):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}``; boxes with only "and", "or" or commas between them are one answer.

    None without a box, or when the last one is empty or never closed (a response that was cut off).
    """
    boxes = list(BOX.finditer(text))
    if not boxes or (end := _closing(text, boxes[-1].end(), len(text))) is None:
        return None
    parts, after = [text[boxes[-1].end() : end].strip()], boxes[-1].start()
    for box in reversed(boxes[:-1]):
        end = _closing(text, box.end(), after)
        if end is None or after - end > 20 or not BETWEEN_BOXES.fullmatch(text, end + 1, after):
            break
        parts, after = [text[box.end() : end].strip(), *parts], box.start()
    # A box that is written twice is one answer.
    return ", ".join(dict.fromkeys(part for part in parts if part)) or None


def tidy(answer: str) -> str:
    r"""``answer`` without notation that carries no meaning: dollar signs, spacing, ``\left``, degrees, units at the end.

    ``\text{...}`` around everything is opened, "(C)" is C, words are in lower case. Text that is tidy stays as it is.
    """
    for pattern, replacement in REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = answer.strip(" .,;")
    if whole := WHOLE_TEXT.fullmatch(answer):
        answer = whole.group(1).strip(" .,;")
    answer = UNIT.sub("", answer).strip(" .,;")
    if letter := LETTER.fullmatch(answer):
        answer = letter[1]
    is_word = answer.isalpha() and (len(answer) > 3 or answer.lower() in ("yes", "no"))
    return answer.lower() if is_word else answer


def canonical(answer: str) -> str:
    """One form for tidy answers that differ in spaces, in braces around one character, or as the same plain number."""
    values = numbers(answer)
    return str(values[0]) if values else BARE_SCRIPT.sub(r"\1{\2}", answer.replace(" ", ""))


def numbers(answer: str) -> list[Fraction]:
    """The exact value of a tidy ``answer`` that is one plain number; a percentage may mean either of two.

    Plain are 1,234.5, .5, 3/4, \\frac{3}{4} and 4.5 \\times 10^{33}. Empty for anything else.
    """
    match = NUMBER.fullmatch(answer.replace(" ", ""))
    if match is None:
        return []
    found = {name: text.replace(",", "") for name, text in match.groupdict().items() if text}
    if "mantissa" in found or "power" in found:
        exponent = next((found[key] for key in ("braced", "bare", "power_braced", "power_bare") if key in found), "0")
        value = Fraction(Decimal(found.get("mantissa", "1")).scaleb(int(exponent)))
    else:
        bottom = int(found.get("bottom") or found["under"])
        if bottom == 0:
            return []
        value = Fraction(int(found.get("top") or found["over"]), bottom)
    value = -value if found.get("sign") == "-" else value
    return [value, value / 100] if "percent" in found else [value]


def is_rounded(answer: str) -> bool:
    """Whether a number is written with a decimal point, hence is exact to its digits only; 10^6 and 3/4 are exact."""
    return "." in answer


def compare_text(truth: str, answer: str) -> bool | None:
    """Equality of two tidy answers where text and plain numbers decide it, else None.

    Numbers are equal if they are the same, or within a relative 1e-4 if the truth is rounded (as in the evaluation code
    of Qwen2.5-Math). A truth such as 52_8 is equal to 52, whose base the question asks for, and not to 52_9.
    """
    if canonical(truth) == canonical(answer):
        return True
    if based := BASED.fullmatch(truth):
        return answer == based["digits"]
    true_values, values = numbers(truth), numbers(answer)
    if not true_values or not values:
        return None
    tolerance = Fraction(1, 10_000) if is_rounded(truth) else 0
    return any(abs(value - true) <= tolerance * abs(true) for true in true_values for value in values)
