r"""The grading process: are two plain answers equal, as math-verify's parser reads them and with exact values?

math-verify alone accepts 105 of 361 wrong answers: its parser drops what it cannot express (primes, A^T, 1011_2, gcd of
symbols) and makes r of R, and its comparison is absolute, to 15 digits: 1/2^80 = 1/2^81 (Math-Verify issues 14, 41, 60, 64).
So here an expression is read in full or not at all, and values agree to 50 digits, at five points where there are symbols.

sympy can run for hours or fill the memory on ten characters, in C code that no signal handler stops. So it runs in a process
of its own, whose memory the kernel caps, and which the kernel ends when an answer takes too long (SIGALRM).
"""

import json
import logging
import os
import random
import re
import resource
import signal
import sys
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanFunction

from recipe.asyppo.reward.answer_text import ARGUMENT, number

# Misread without an error: words, 5 6 (as 5 + 6), u x v, n!! and gcd(m, n) (as u v, (n!)! and 1), 1011_2 (as 1011), A^T,
# f^{(n)} and f^{-1}(x) (as A, f^n and 1/f).
UNREADABLE = re.compile(
    r"\\(?:text|circ|mod|partial|nabla)(?![a-z])|\d \d|\d[eE][+-]?\d|\d_|%|!!|\\vec.*\\times|[^\W\d_]\\times ?[^\W\d_]"
    r"|\\(?:gcd|lcm)\([^()]*[a-z]|[A-Z]\^\{\\?(?:[Tc*]|top|ast|dagger)\}|[A-Za-z]\^\{\(\w+\)\}|(?<![\\A-Za-z])[f-h]\^\{-1\}\("
)
# Sines of degrees; f' is a name of its own, and E and I are names, not Euler's number and the imaginary unit.
READABLE: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{\d\})?\(?)(\d+)\^\{\\circ\}"), r"\1\\frac{\2\\pi}{180}"),
    (re.compile(r"\^\{\\circ\}"), ""),
    (re.compile(r"('+)"), lambda primes: f"_{{{'p' * len(primes[1])}}}"),
    (re.compile(r"(?<![\\A-Za-z])E(?![A-Za-z])"), r"\\Xi "),
    (re.compile(r"(?<![\\A-Za-z])I(?![A-Za-z])"), r"\\Upsilon "),
    (re.compile(r"\\log(?!_)"), r"\\ln "),
    (re.compile(r"(?<=\d),"), ", "),
    (re.compile(r"(.*)\\pm(.*)", re.DOTALL), r"\1+\2, \1-\2"),
]
# A pair keeps its brackets, in a third part: the parser makes an open interval of (1,2), and the empty set of (2,1).
ITEM = r"((?:[^][(),]|\((?:[^()]|\([^()]*\))*\)|\[\w+\])*)"
PAIR = re.compile(rf"(?<![A-Za-z}}])([(\[]){ITEM},{ITEM}([])])")
INTERVAL = re.compile(r"[<>]|\\(?:[lg]e|cup|cap|setminus|infty|mathbb)(?![a-z])")
LETTER = re.compile(r"\\[A-Za-z]+|[A-Za-z]")
WORD = re.compile(r"(?<![\\A-Za-z])(?:[A-Z]{2,}|(?![pb]?matrix)[A-Za-z]{3,})")  # or factors that may not commute
# "x = ...", "f(x) = ...", "P(X > 1) = ...", "|AB| = ..."; \sigma^2 is a name, x^2 is not.
NAMED = re.compile(
    rf"((?:\\?[A-Za-z]|_{ARGUMENT}|\^\{{-1\}}|\\text{ARGUMENT}|\([^()]*\)|\[[^][]*\]|\\frac\{{d\w?\}}\{{d\w\}}"
    r"|(?<=sigma)\^\{2\}|['|+ ]|\\\|)+?)(?:=|\\in(?!f)|\\approx)(.+)"
)
EQUALS = re.compile(r"=(?![^{]*\})")
CONDITION = re.compile(
    r"(?<=.),?(\\text\{(?:for|where|with|if|when)\b.*|(?<=[^A-Za-z])\([^()]*(?:<|>|\\[lg]e|\\ne|\\in(?!f))[^()]*\))$"
)
UNIT = re.compile(r"((?:[^A-Za-z\\]|\\(?:pi|frac|sqrt|times|cdot))+?)(\(?(?:\\mu|\^\{\\circ\}|\\frac\{)?\\text.*|%)")
# Not a unit: what changes the value or the statement, other punctuation, words with a capital that no unit has.
NO_UNIT = re.compile(
    r"\b(?:not?|more|less|least|most|dozens?|hundreds?|thousand|[mb]illion|squared|cubed|even|odd|is|if|of|to|[ap]m|times)\b"
    r"|(?<!\\text)\{(?!\\text|\\circ|-?\d\})|.\(|[,.+]|\b(?!(?:[kMG]?(?:Hz|W|V|N|J|Pa|eV)|[KCFAT]|[A-Z]{3})\b)\w*[A-Z]"
)


def _named(text: str) -> tuple[str, str]:
    """The name and the value of a statement such as "x = 5"; no name where the name is part of the value: "AB = BA"."""
    match = NAMED.fullmatch(text)
    if not match or not re.search("[A-Za-z]", match[1]) or ("," in match[2] and EQUALS.search(match[2])):
        return "", text
    own, others = (set(LETTER.findall(part)) for part in (re.sub(r"(?:[(_]|\\frac).*", "", match[1]), match[2]))
    return ("", text) if own & others else (match[1], match[2])


def _unit(text: str) -> tuple[str, str]:
    """A number and its unit; no unit for anything else."""
    match = UNIT.fullmatch(text)
    return (match[1], match[2]) if match and not NO_UNIT.search(match[2]) else (text, "")


def equal(truth: str, answer: str) -> bool:
    """Equality of two plain answers: numbers, words, expressions, equations, and lists, sets, intervals of them.

    "x = 5" and "5" are equal, whichever is the truth; "x = 5" and "y = 5" are not. 62.5% is 5/8, and may be 62.5.
    """
    if truth == answer:
        return True
    condition, other = (match and match[1] for match in map(CONDITION.search, (truth, answer)))
    truth, answer = CONDITION.sub("", truth), CONDITION.sub("", answer)
    (true_name, true), (name, value) = _named(truth), _named(answer)
    if condition and condition != other:
        return False
    if true_name and true_name == name:
        return equal(true, value)
    if not true_name and not EQUALS.search(truth) and (name or (EQUALS.search(answer) and "," not in answer)):
        return all(equal(truth, side) for side in EQUALS.split(value))
    if true_name and not name and ("," in answer or not EQUALS.search(answer)):
        return equal(EQUALS.split(true)[-1], answer)
    (truth, unit), (answer, other) = _unit(truth), _unit(answer)
    if unit and other and unit != other:
        return False
    if (exact := number(truth)) is not None and (given := number(answer)) is not None:
        # The truth is rounded where it has a decimal point and four digits.
        error = Fraction(1, 10_000) if re.fullmatch(r"-?0*(?=.*\.)\.?0*(?:\d\.?){4,}", truth) else 0
        scales = {Fraction(1), Fraction(100) ** ((unit == "%") - (other == "%"))}
        return any(abs(exact - given * scale) <= error * abs(exact) for scale in scales)
    if re.fullmatch("[A-Z]", truth) and (choice := re.match(r"(?:\\text\{)?\(?([A-Z])[:).]", answer)):
        return truth == choice[1]
    if re.fullmatch(r"[A-Za-z]{4,}|(?i:yes|no)", truth):
        return truth.casefold() == answer.casefold()
    if sorted(WORD.findall(truth)) != sorted(WORD.findall(answer)):
        return False
    # A set in braces is not a pair.
    if {truth[:1], answer[:1]} == {"\\", "("} and r"\}" in truth + answer and (truth + answer).count("(") == 1:
        return False
    pairs = not INTERVAL.search(truth + answer)
    parsed = _parse(truth, pairs), _parse(answer, pairs)
    return None not in parsed and _same(*parsed)


@lru_cache(maxsize=4096)
def _parse(text: str, pairs: bool) -> Any:
    """The sympy value of plain text, with ``pairs`` as triples; None if latex2sympy cannot read all of it."""
    for pattern, written in READABLE:
        text = pattern.sub(written, text)
    if pairs:
        text = PAIR.sub(lambda it: rf"({it[2]},{it[3]},\Lambda_{{{'oc'[it[1] == '[']}{'oc'[it[4] == ']']}}})", text)
    if UNREADABLE.search(text):
        return None
    try:
        # R and r are two symbols.
        value = latex2sympy(
            text, normalization_config=None, conversion_config=ConversionConfig(lowercase_symbols=False)
        )
    except Exception:
        return None
    if value.has(sympy.Derivative, sympy.Limit, sympy.zoo, sympy.nan):
        return None
    return value.xreplace({decimal: sympy.Rational(str(decimal)) for decimal in value.atoms(sympy.Float)})


def _draw(name: str, point: int) -> sympy.Expr:
    """The value of a symbol at a point: i is the imaginary unit, k, m, n and N are counts, others have any sign."""
    draw = random.Random(f"{name} {point}")
    if name[0] in "ikmnN":
        return sympy.I if name == "i" else sympy.Integer(draw.randint(2, 12))
    return sympy.Rational(draw.randint(101, 999) * (1 if point < 2 else draw.choice((1, -1))), 331)


def _value(expression: sympy.Expr, point: int) -> sympy.Expr | None:
    """The value of ``expression`` at a point: exact if it is rational, else to 60 digits; None where it has none."""
    # An unknown function has equal values for equal arguments.
    calls = {
        call: sympy.sin(sum(_draw(f"{call.func}() {i}", point) * x for i, x in enumerate((1, *call.args))))
        for call in expression.atoms(AppliedUndef)
    }
    value = expression.xreplace(calls)
    value = value.xreplace({symbol: _draw(symbol.name, point) for symbol in value.free_symbols}).doit()
    value = value if value.is_Rational else value.evalf(60)
    return value if value.is_finite and all(part.is_Number for part in value.as_real_imag()) else None


def _same(true: Any, value: Any) -> bool:
    if isinstance(true, sympy.MatrixBase) and isinstance(value, sympy.MatrixBase):
        return true.shape == value.shape and all(map(_same, true, value))
    many, statements = (sympy.Tuple, sympy.FiniteSet), (sympy.Set, Relational, BooleanFunction)
    if isinstance(true, many) or isinstance(value, many):
        return _same_parts(*(part if isinstance(part, many) else sympy.FiniteSet(part) for part in (true, value)))
    if isinstance(true, sympy.Eq) and isinstance(value, sympy.Eq):
        if true.lhs == value.lhs and _same(true.rhs, value.rhs):
            return True
        # One equation is the other times a constant, or has its sides exchanged.
        values = [(_value(true.lhs - true.rhs, i), _value(value.lhs - value.rhs, i)) for i in range(5)]
        ratios = [exact / given for exact, given in values if exact and given]
        constant = len(ratios) > 2 and all(abs(ratio - ratios[0]) < 1e-40 * abs(ratios[0]) for ratio in ratios)
        return constant or {true.lhs, true.rhs} == {value.lhs, value.rhs}
    if isinstance(true, sympy.Eq) or isinstance(value, sympy.Eq):
        (name, true), value = (true.args, value) if isinstance(true, sympy.Eq) else (value.args, true)
        return isinstance(name, (sympy.Symbol, AppliedUndef)) and _same(true, value)
    if isinstance(true, statements) and isinstance(value, statements):
        return verify(true, value, allow_set_relation_comp=True, timeout_seconds=None)
    if not isinstance(true, sympy.Expr) or not isinstance(value, sympy.Expr):
        return False
    if true == value or true.as_dummy() == value.as_dummy():
        return True
    agreed = 0
    for point in range(5):
        exact, given = _value(true, point), _value(value, point)
        # At negative values roots and logarithms may be another branch.
        if exact is None or given is None or (point >= 2 and not (exact.is_real and given.is_real)):
            continue
        error = abs(exact - given)
        if error > (0 if error.is_Rational else 1e-50 * abs(exact)):
            return bool(max(abs(exact), abs(given)) < 1e-50 and sympy.simplify(true - value) == 0)
        agreed += 1
    return agreed > 1


def _same_parts(true: Any, value: Any) -> bool:
    """Tuples in their order, sets in any; in its order a set beside a tuple, or with names beside one without."""
    tuples = [isinstance(side, sympy.Tuple) for side in (true, value)]
    # A set of the parser keeps the order, and what is written twice.
    parts = [getattr(side, "_unsorted_args", side.args) for side in (true, value)]
    sides = [list(one) if ordered else list(dict.fromkeys(one)) for one, ordered in zip(parts, tuples, strict=True)]
    if tuples[0] != tuples[1]:
        sides = [[part for part in side if str(part) != "Lambda_{oo}"] for side in sides]
    if len(sides[0]) != len(sides[1]):
        return False
    named = [len({part.lhs for part in side if isinstance(part, sympy.Eq)}) > 1 for side in sides]
    if any(tuples) or named[0] != named[1]:
        return all(map(_same, *sides))
    for part in sides[0]:
        found = next((other for other in sides[1] if _same(part, other)), None)
        if found is None:
            return False
        sides[1].remove(found)
    return True


def main() -> None:
    """Answer every line ``[truth, answer]`` until the end of input; the kernel ends this process at a limit."""
    seconds, megabytes = float(sys.argv[1]), int(sys.argv[2])
    # The parent may have been started with these ignored or blocked, and both are inherited.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
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
