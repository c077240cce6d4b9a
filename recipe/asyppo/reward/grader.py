r"""The grading process: are two plain answers equal, as math-verify's parser reads them and with exact values?

math-verify alone accepts 69 of 199 wrong answers: its parser drops what it cannot express (primes, A^T, 1011_2, gcd of
symbols) and makes r of R, and its comparison is absolute, to 15 digits: 1/2^80 = 1/2^81 (Math-Verify issues 14, 41, 60, 64).
So an expression is read in full or not at all; it has the same symbols, and is equal exactly or to 100 digits. sympy can run
for hours or fill the memory on ten characters, in C code that no signal handler stops: the kernel ends its process (SIGALRM).
"""

import json
import logging
import re
import resource
import signal
import sys
from functools import lru_cache
from itertools import accumulate
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify

from recipe.asyppo.reward.math_reward import number


def equal(truth: str, answer: str) -> bool:
    """Equality of two plain answers: numbers, words, expressions, equations, and lists, sets, intervals of them.

    Pairs and intervals are ordered, lists and sets only if just one side has names. 62.5% is 5/8, and may be 62.5.
    "x = 5" and "5" are equal, whichever is the truth; "x = 5" and "y = 5" are not.
    """
    return next(verdict for rule in RULES if (verdict := rule(truth, answer)) is not None)


# -- the same text, or number --------------------------------------------------------------------------------------


def _as_text(truth: str, answer: str) -> bool | None:
    exact = number(truth)
    return truth == answer or (exact is not None and exact == number(answer)) or None


# -- lists, sets, points, intervals --------------------------------------------------------------------------------

# More than single values: -1 < x < 1, and x \in (-1, 1)
REGION = re.compile(r"[<>]|\\(?:[lg]eq?(?:slant)?|[lg]t)(?![a-z])|\\in(?![a-z]) ?[\[(]")


def _parts(text: str) -> tuple[str, list[str]]:
    r"""Brackets and parts of a list, set, pair or interval, "(]" and ["1", "2"] of (1,2]; anything else is one part."""
    signs = re.findall(r"\\?.", text)
    depths = list(accumulate((sign[-1] in "([{") - (sign[-1] in ")]}") for sign in signs))
    outer = int(min(depths[:-1], default=0) > 0)
    inside = zip(signs[outer : len(signs) - outer], depths[outer:], strict=False)
    parts = "".join("\n" if it == (",", outer) else it[0] for it in inside).split("\n")
    return (signs[0] + signs[-1] if outer else ""), parts


def _as_lists(truth: str, answer: str) -> bool | None:
    """Part by part, where both have several."""
    (brackets, parts), (others, given) = _parts(truth), _parts(answer)
    if min(len(parts), len(given)) < 2:
        return None
    kinds = {brackets, others}
    if len(parts) != len(given) or (len(kinds) > 1 and kinds not in ({"", "()"}, {"", r"\{\}"})):
        return False
    names = [[EQUALS.split(part)[0] for part in side if EQUALS.search(part)] for side in (parts, given)]
    if "()" in kinds and any(len(set(it)) < len(it) for it in names):  # values of one name are no point
        return False
    named = [len(set(it)) > 1 for it in names]
    if kinds - {"", r"\{\}"} or named[0] != named[1]:
        return all(map(equal, parts, given))
    return sorted(parts) == sorted(given) or all(
        sum(equal(part, it) for it in parts) == sum(equal(part, it) for it in given) for part in parts
    )


def _as_region(truth: str, answer: str) -> bool | None:
    """False for a list or set beside a region."""
    for text, other in ((truth, answer), (answer, truth)):
        brackets, parts = _parts(text)
        if len(parts) > 1 and brackets in ("", r"\{\}") and REGION.search(other) and not REGION.search(text):
            return False
    return None


# -- equations -----------------------------------------------------------------------------------------------------

# "x = ...", "f(x) = ...", "P(X > 1) = ...", "a + b = ...", but not "2x = ..." or "x^2 = ..."
NAME = re.compile(
    r"(?!\\pi$)(?=.*[A-Za-z])(?:[^]\d^()[{}-]|(?:_|\\text)\{[^{}]*\}|\\overline\{[A-Z]{2}\}|\([^()]*\)|\[[^][]*\])+"
)
EQUALS = re.compile(r"(?:=|\\in(?![a-z])|\\approx)(?![^{]*\})")


def _named(text: str) -> tuple[str, list[str]]:
    """("x", [values]) of "x = ..."; ("", [all sides]) if the left side is no name, or is used on another side ("AB = BA")."""
    name, *values = EQUALS.split(text)
    without_units = re.sub(r"\\text\{[^{}]*\}", "", " ".join(values))
    own, used = (re.findall(r"\\[A-Za-z]+|[A-Za-z]", it) for it in (re.sub(r"[(_[].*", "", name), without_units))
    named = values and NAME.fullmatch(name) and not set(own) & set(used)
    return (name, values) if named else ("", [name, *values])


def _as_equations(truth: str, answer: str) -> bool | None:
    """By what stands on the last side of the truth, where one names its value and the other not, or both alike."""
    (true_name, true), (name, values) = _named(truth), _named(answer)
    bare = not name and len(values) == 1
    if not ((bare or name == true_name) if true_name else (len(true) == 1 and not bare)):
        return None
    if r"\approx" not in answer:
        return all(equal(true[-1], side) for side in values)
    right = [equal(true[-1], side) for side in values]
    return any(right) and all(it or _is_near(true[-1], side) for it, side in zip(right, values, strict=True))


def _is_near(truth: str, side: str) -> bool:
    """True if one of the two is a decimal and the other, no integer, is rounded to it: 9/4 pi and 7.07."""
    decimals = [text for text in (truth, side) if re.fullmatch(r"-?\d*\.\d+", text)]
    if len(decimals) != 1 or any(re.fullmatch(r"-?\d+", text) for text in (truth, side)):
        return False
    if truth in decimals and _parse(side).is_Rational:  # 0.3 is not 1/3
        return False
    true, value = (complex(_parse(text)) for text in (truth, side))
    return abs(value - true) <= 0.5001 * 10.0 ** -len(decimals[0].partition(".")[2])


# -- units and words -----------------------------------------------------------------------------------------------

# A value and its unit, or all and nothing. Not a unit: what changes value or statement, other signs, capitals that no unit has.
NO_UNIT = (
    r"\b(?:not?|more|less|least|most|below|above|except|(?:pair|dozen|hundred|thousand|\w*illion|third|quarter|\w+(?<!mon)th)s?"
    r"|hal\w+|squared|cubed|factorial|plus|minus|times|modulo|base|even|odd|i[sfd]|of|to|[ap]m)\b|.\(|[,.+]|\d(?![^{}]*\})"
    r"|(?<!\\text)\{(?!\\text|\\circ|(?<=\^\{)-?\d\})|\b(?!(?:[kMGmnh]?(?:Hz|Wh?|V|N|J|Pa|eV|A|L|T|pc)|dB|AU|[CKF]|Celsius|Fahrenheit|[A-Z]{3})\b)\w*[A-Z]"
)
UNIT = re.compile(
    rf"((?:[^A-Za-z\\]|\\(?:pi|frac|sqrt|times|cdot))+?(?=(?:[(^{{]|\\frac\{{|\\mu)*(?:\\text.*|\\circ\}}.*|%)$)"
    rf"(?!.*?(?:{NO_UNIT}))|.*)(.*)"
)


def _as_measured(truth: str, answer: str) -> bool | None:
    """Without the units, of which one may be missing."""
    (value, unit), (given, other) = (UNIT.findall(text)[0] for text in (truth, answer))
    return ("" in (unit, other) or unit == other) and equal(value, given) if unit or other else None


def _as_words(truth: str, answer: str) -> bool | None:
    is_text = re.fullmatch(r"(?=.*[A-Za-z]{4})[A-Za-z]+(?: [A-Za-z]+)*|(?i:yes|no)", truth)
    return truth.casefold() == answer.casefold() if is_text else None


# -- what sympy says -----------------------------------------------------------------------------------------------

# Misread without an error: words, factors that may not commute, 5 6 (as 5 + 6), u x v, n!! and gcd(m, n) (as u v, (n!)! and 1),
# 1011_2, 0.\overline{3} and 1\frac{2}{3} (as 1011, 0.3 and 2/3), A^T, f^{(n)} and f^{-1}(x) (as A, f^n and 1/f).
UNREADABLE = re.compile(
    r"(?<![\\A-Za-z])(?<!_\{)(?:[A-Z]{2,}|(?![pb]?matrix)[A-Za-z]{3,})|\\(?:text|circ|mod|partial|nabla)(?![a-z])|\d \d"
    r"|\d_|%|!!|\\vec.*\\times|[^\W\d_]\\times ?[^\W\d_]|\\(?:gcd|lcm)\([^()]*[a-z]|[A-Z]\^\{\\?(?:[Tc*]|top|ast|dagger)\}"
    r"|[A-Za-z]\^\{\(\w+\)\}|(?<![\\A-Za-z])[f-h]\^\{-1\}\(|\d,\d{3}|\d\\frac\{\d+\}\{\d+\}.|\d[eE][+-]?\d|\\(?:overline|dot)\{\d"
)


@lru_cache(maxsize=4096)
def _parse(text: str) -> Any:
    """The sympy value of plain text, where i is the imaginary unit, and k, m, n, N are counts; an error if in doubt."""
    if UNREADABLE.search(text):
        raise ValueError(f"{text} would be misread")
    # E and I are names, not Euler's number and the imaginary unit; R and r are two symbols.
    text = re.sub(r"(?<![\\A-Za-z])([EI])(?![A-Za-z])", r"\\mathcal{\1}", text)
    value = latex2sympy(text, normalization_config=None, conversion_config=ConversionConfig(lowercase_symbols=False))
    if isinstance(value, sympy.Eq) and not sympy.simplify(value.lhs - value.rhs).free_symbols:
        raise ValueError(f"{text} says nothing to sympy")
    exact: dict = {decimal: sympy.Rational(str(decimal)) for decimal in value.atoms(sympy.Float)}
    counts = {s: sympy.Symbol(s.name, integer=True, positive=True) for s in value.free_symbols if s.name[0] in "kmnN"}
    return value.xreplace(exact | counts | {sympy.Symbol("i"): sympy.I})


def _as_values(truth: str, answer: str) -> bool:
    parsed = [_parse(text) for text in (truth, answer)]
    if all(isinstance(it, sympy.Expr) for it in parsed):
        # math-verify ignores the case of symbols, and its comparison is absolute.
        if parsed[0].free_symbols != parsed[1].free_symbols or all(it.is_Rational for it in parsed):
            return parsed[0] == parsed[1]
        parsed = [it.doit().as_dummy() for it in parsed]
    return verify(*parsed, 50, 100, allow_set_relation_comp=True, timeout_seconds=None)


RULES = (_as_text, _as_lists, _as_region, _as_equations, _as_measured, _as_words, _as_values)
"""In this order; the first that has a verdict, not None, decides. The last always has one, or raises."""


def main() -> None:
    """Answer every line ``[truth, answer]`` until the end of input; the kernel ends this process at a limit."""
    limits = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    replies, sys.stdout = sys.stdout, sys.stderr  # Nothing that a library prints may disturb the protocol.
    equal(r"\frac{1}{2}", r"\sqrt{x^{2}}+3")  # loads the grammar
    resource.setrlimit(resource.RLIMIT_AS, (limits["megabytes"] << 20, limits["megabytes"] << 20))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, limits["seconds"])
        try:
            verdict = equal(*json.loads(line))
        except Exception:  # Whatever sympy raises on nonsense, RecursionError and MemoryError included.
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main()
