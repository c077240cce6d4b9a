r"""The grading process: are two plain answers equal, as math-verify's parser reads them and with exact values?

math-verify alone accepts 69 of 199 wrong answers: its parser drops what it cannot express (primes, A^T, 1011_2, gcd of
symbols) and makes r of R, and its comparison is absolute, to 15 digits: 1/2^80 = 1/2^81 (Math-Verify issues 14, 41, 60, 64).
So an expression is read in full or not at all; it has the same symbols, and is equal exactly or to 100 digits.

sympy can run for hours or fill the memory on ten characters, in C code that no signal handler stops. So it has a process,
whose memory the kernel caps, and which the kernel ends when an answer takes too long (SIGALRM).
"""

import json
import logging
import os
import re
import resource
import signal
import sys
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify

from recipe.asyppo.reward.answer_text import number

# Misread without an error: words, 5 6 (as 5 + 6), u x v, n!! and gcd(m, n) (as u v, (n!)! and 1), 1011_2 (as 1011), A^T,
# f^{(n)} and f^{-1}(x) (as A, f^n and 1/f).
UNREADABLE = re.compile(
    r"\\(?:text|circ|mod|partial|nabla)(?![a-z])|\d \d|\d[eE][+-]?\d|\d_|%|!!|\\vec.*\\times|[^\W\d_]\\times ?[^\W\d_]"
    r"|\\(?:gcd|lcm)\([^()]*[a-z]|[A-Z]\^\{\\?(?:[Tc*]|top|ast|dagger)\}|[A-Za-z]\^\{\(\w+\)\}|(?<![\\A-Za-z])[f-h]\^\{-1\}\("
)
# Sines of degrees; f' is a name of its own, E and I are names, not Euler's number and the imaginary unit; (2,100) is no 2100.
READABLE: dict[str, Any] = {
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{\d\})?\(?)(\d+)\^\{\\circ\}": r"\1\\frac{\2\\pi}{180}",
    r"'+": lambda primes: f"_{{{'p' * len(primes[0])}}}",
    r"(?<![\\A-Za-z])E(?![A-Za-z])": r"\\Xi ",
    r"(?<![\\A-Za-z])I(?![A-Za-z])": r"\\Upsilon ",
    r"\\log(?!_)": r"\\ln ",
    r"(?<=\d),": ", ",
}
# R and r are two symbols.
AS_WRITTEN: Any = {"normalization_config": None, "conversion_config": ConversionConfig(lowercase_symbols=False)}
WORD = re.compile(r"(?<![\\A-Za-z])(?:[A-Z]{2,}|(?![pb]?matrix)[A-Za-z]{3,})")  # or factors that may not commute
# "x = ...", "f(x) = ...", "P(X > 1) = ...", "a + b = ...", but not "2x = ..." or "x^2 = ..."
NAME = re.compile(r"(?=.*[A-Za-z])(?:[^]\d^()[{}-]|(?:_|\\text)\{[^{}]*\}|\([^()]*\)|\[[^][]*\])+")
EQUALS = re.compile(r"(?:=|\\in(?![a-z])|\\approx)(?![^{]*\})")
LETTER = re.compile(r"\\[A-Za-z]+|[A-Za-z]")
CONDITION = re.compile(r"(?<=.),?\\text\{(?:for|where|with|if|when)\b.*")
UNIT = re.compile(
    r"((?:[^A-Za-z\\]|\\(?:pi|frac|sqrt|times|cdot))+?)(\(?(?:\\mu|\^\{\\circ\}|\\frac\{)?\\text.*|\^\{\\circ\}|%)"
)
# Not a unit: what changes the value or the statement, other punctuation, words with a capital that no unit has.
NO_UNIT = re.compile(
    r"\b(?:not?|more|less|least|most|dozens?|hundreds?|thousand|[mb]illion|squared|cubed|even|odd|is|if|of|to|[ap]m|times)\b"
    r"|(?<!\\text)\{(?!\\text|\\circ|-?\d\})|.\(|[,.+]|\b(?!(?:[kMG]?(?:Hz|W|V|N|J|Pa|eV)|[KCFAT]|[A-Z]{3})\b)\w*[A-Z]"
)


def _parts(text: str) -> tuple[str, list[str]]:
    r"""Brackets and parts of a list, set, pair or interval, "(]" and ["1", "2"] of (1,2]; anything else is one part."""
    signs = re.findall(r"\\?.", text)
    depths = list(accumulate((sign[-1] in "([{") - (sign[-1] in ")]}") for sign in signs))
    outer = int(min(depths[:-1], default=0) > 0)
    inside = zip(signs[outer : len(signs) - outer], depths[outer:], strict=False)
    parts = "".join("\n" if it == (",", outer) else it[0] for it in inside).split("\n")
    expanded = [part.replace(r"\pm", sign, 1) for part in parts for sign in ("+-" if r"\pm" in part else " ")]
    return (signs[0] + signs[-1] if outer else ""), expanded


def _same_parts(brackets: set[str], parts: list[str], given: list[str]) -> bool:
    """Pairs and intervals in their order, lists and sets in any; in order also names beside none."""
    if len(parts) != len(given) or (len(brackets) > 1 and brackets not in ({"", "()"}, {"", r"\{\}"})):
        return False
    named = [len({EQUALS.split(part)[0] for part in side if EQUALS.search(part)}) > 1 for side in (parts, given)]
    if brackets - {"", r"\{\}"} or named[0] != named[1]:
        return all(map(equal, parts, given))
    for part in parts:
        found = next((other for other in given if equal(part, other)), None)
        if found is None:
            return False
        given.remove(found)
    return True


def _named(text: str) -> tuple[str, list[str]]:
    """The name before "=", if it is no part of the value as in "AB = BA", and what is on the other sides."""
    name, *values = EQUALS.split(text)
    own = set(LETTER.findall(re.sub(r"[(_[].*", "", name)))
    if values and NAME.fullmatch(name) and not own & set(LETTER.findall(values[-1])):
        return name, values
    return "", [name, *values]


def _unit(text: str) -> tuple[str, str]:
    match = UNIT.fullmatch(text)
    return (match[1], match[2]) if match and not NO_UNIT.search(match[2]) else (text, "")


def equal(truth: str, answer: str) -> bool:
    """Equality of two plain answers: numbers, words, expressions, equations, and lists, sets, intervals of them.

    "x = 5" and "5" are equal, whichever is the truth; "x = 5" and "y = 5" are not. 62.5% is 5/8, and may be 62.5.
    """
    if truth == answer:
        return True
    if not CONDITION.search(truth):
        answer = CONDITION.sub("", answer)
    (brackets, parts), (others, given) = _parts(truth), _parts(answer)
    if min(len(parts), len(given)) > 1:
        return _same_parts({brackets, others}, parts, given)
    (true_name, true), (name, values) = _named(truth), _named(answer)
    if true_name and (name == true_name or (not name and len(values) == 1)):
        return equal(true[-1], values[-1])
    if len(true) == 1 and not true_name and (name or len(values) > 1):
        return all(equal(truth, side) for side in values)
    (truth, unit), (answer, other) = _unit(truth), _unit(answer)
    if unit and other and unit != other:
        return False
    if (exact := number(truth)) is not None and (value := number(answer)) is not None:
        return exact in (value, value * Fraction(100) ** ((unit == "%") - (other == "%")))
    if re.fullmatch("[A-Z]", truth) and (choice := re.match(r"(?:\\text\{)?\(?([A-Z])[:).]", answer)):
        return truth == choice[1]
    if re.fullmatch(r"[A-Za-z]{4,}|(?i:yes|no)", truth):
        return truth.casefold() == answer.casefold()
    if sorted(WORD.findall(truth)) != sorted(WORD.findall(answer)):
        return False
    parsed = _parse(truth), _parse(answer)
    return None not in parsed and _same(*parsed)


@lru_cache(maxsize=4096)
def _parse(text: str) -> Any:
    """The sympy value of plain text; None if latex2sympy cannot read all of it."""
    for pattern, written in READABLE.items():
        text = re.sub(pattern, written, text)
    if UNREADABLE.search(text):
        return None
    try:
        value = latex2sympy(text, **AS_WRITTEN)
    except Exception:
        return None
    # AB = BA says nothing to sympy.
    empty = isinstance(value, sympy.Eq) and not sympy.simplify(value.lhs - value.rhs).free_symbols
    if empty or value.has(sympy.Derivative, sympy.Limit, sympy.zoo, sympy.nan):
        return None
    exact: dict = {decimal: sympy.Rational(str(decimal)) for decimal in value.atoms(sympy.Float)}
    # i is the imaginary unit, k, m, n and N are counts.
    for symbol in value.free_symbols:
        if symbol.name[0] in "ikmnN":
            exact[symbol] = sympy.I if symbol.name == "i" else sympy.Symbol(symbol.name, integer=True, positive=True)
    return value.xreplace(exact)


def _same(true: Any, value: Any) -> bool:
    if isinstance(true, sympy.Expr) and isinstance(value, sympy.Expr):
        # math-verify ignores the case of symbols, and its comparison is absolute.
        if true.free_symbols != value.free_symbols or (true.is_Rational and value.is_Rational):
            return true == value
        true, value = true.doit().as_dummy(), value.doit().as_dummy()
    return verify(true, value, 50, 100, allow_set_relation_comp=True, timeout_seconds=None)


def main() -> None:
    """Answer every line ``[truth, answer]`` until the end of input; the kernel ends this process at a limit."""
    seconds, megabytes = float(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    # Nothing that a library prints may disturb the protocol.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    equal(r"\frac{1}{2}", r"\sqrt{x^{2}}+3")  # loads the grammar
    print("ready", file=replies, flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            verdict = equal(*json.loads(line))
        except Exception:
            # Whatever sympy raises on nonsense, RecursionError and MemoryError included: not equal.
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main()
