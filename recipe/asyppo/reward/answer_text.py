r"""Answers as text: find the box in a response, write its content in one plain way, read a plain number.

All of it is linear in the length of the text and evaluates nothing. Behind a rule: equal pairs missed without it, of 276.
"""

import re
import unicodedata
from fractions import Fraction
from typing import Any

BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# What may stand between two boxes of one answer: "$\boxed{3}$ and $\boxed{5}$".
BETWEEN_BOXES = re.compile(r"\}[\s$,;]{0,9}(?:and|or)?[\s$]{0,9}")
# Commands and signs that print the same: 44
SAME_AS = r"""\left: \right: \big: \bigl: \bigr: \Big: \Bigl: \Bigr: \displaystyle: \textstyle: \large: \bf: \underline: \square:
\blacksquare: \quad: \qquad: \bm:\mathbf \boldsymbol:\mathbf \dfrac:\frac \tfrac:\frac \sfrac:\frac \cfrac:\frac \dbinom:\binom
\tbinom:\binom \mathrm:\text \operatorname:\text \mbox:\text \textbf:\text \textit:\text \textrm:\text \textnormal:\text
\mathit:\text \div:/ \prime:' \pmod:\mod \varnothing:\emptyset \dots:\ldots \cdots:\ldots ...:\ldots \geq:\ge \leq:\le
\geqslant:\ge \leqslant:\le \Bbb:\mathbb \lbrace:\{ \rbrace:\} ²:^2 ×:\times ÷:/ ·:\cdot −:- °:^\circ ≤:\le ≥:\ge
∞:\infty π:\pi 或:, 和:, 、:,"""  # noqa: RUF001
SAME = dict(pair.split(":") for pair in SAME_AS.split())
FUNCTION = r"(?:arc|ar|a)?(?:sin|cos|tan|cot|sec|csc)h?|exp|ln|log|gcd|max|min|det|dim|Re|Im"
REWRITES: dict[str, Any] = {
    r"^(?:\\text *)?\{([^{}]*)\}$": r"\1",  # 1
    r"√ *(\d+|\w|\([^()]*\))|\\sqrt *([^\s{\[\\(]|\\pi)": r"\\sqrt{\1\2}",  # 5
    r"\\!\s*|\\?\$|(?<!\\)\\[()\[\]]|[€£¥]|\\(?:text)?color *\{\w+\}|USD *(?=\d)|(?<!\\)\{ *\}": "",  # 8
    r"(?:(?<!\\)\\[,;: ]|~|\s)+": " ",  # 16
    r"(?<=\d)\{,\}(?=\d{3})|(?<=\d) (?=\d{3}(?: \d{3})*(?![\d ]*\d))": "",  # 2
    r"(?<![\d,.(\[])(?<!\\\{)\d{1,3}(?:,\d{3})+(?![\d,])": lambda thousands: thousands[0].replace(",", ""),  # 2
    r"\\mathbb *\{?([A-Z])\}?": r"\\mathbb{\1}",  # 7
    r"\\mathbb\{Z\} */ *\{?(\w+)\}? *\\mathbb\{Z\}": r"\\mathbb{Z}_{\1}",  # 4
    r"\^ *\{ *\\circ *\}|\^ *\\circ|\\text *\{ *degrees? *\}": r"^{\\circ}",  # 9
    r"\^ *\{? *('(?: *')*) *\}?": r"\1",  # 1
    r"\\%|\\text *\{ *(?:\\?%|percent) *\}|(?<=\d) *percent\b": "%",  # 4
    r"\(?(?:\\mod|\\text *\{ *mod *\}) *\{?(\w+)\}? *\)?": r"\\mod{\1}",  # 2
    # Roman letters are a word or a unit, but not a function, a constant, or what is applied like a function.
    rf"\\text *\{{ *({FUNCTION}) *\}}": r"\\\1 ",  # 2
    r"\\(?:mathbf *\{ *(\w+)|text *\{ *([eid]|\d+)|text *\{ *([A-Za-z]+) *(?=\}[_(])) *\}": r"\1\2\3",  # 11
    # Plain text, as sympy and Python write it.
    rf"(?<![\\A-Za-z])(?:np\.)?({FUNCTION}|sqrt|pi)(?![A-Za-z])": r"\\\1",  # 4
    r"\\sqrt *\(([^()]*)\)": r"\\sqrt{\1}",  # 1
    r"(?<=\d) +((?:[a-z]{3,}|[ckm]m|kg|ft)(?: [a-z]+)*)$": r"\\text{\1}",  # 2
    # Arguments in braces.
    r"\\(frac|binom) *([^\s{\\]|\\pi)": r"\\\1{\2}",  # 20
    r"(\\(?:frac|binom) *\{(?:[^{}]|\{[^{}]*\})*\}) *([^\s{\\]|\\pi)": r"\1{\2}",  # 21
    r"_ *\{ *\\text *\{ *(\w+) *\} *\}": r"_{\1}",  # 1 in Minerva
    r"(?<=[_^]) *(\w)": r"{\1}",  # 10
    # Words.
    r"(?:\\text *\{[ ,]*(?:and|or)?[ ,]*\}|(?<!\\)\b(?:and|or)\b|[;,] *)+": ",",  # 8, and 2 wrong
    r"\\text *\{ *(?:[Tt]he )?(?:answer is|converges to|approximately|about) *\}|^ *\\approx": "",  # 3
    r"(?<=\d)(?:\^\{)? *\\text *\{ *(?:st|nd|rd|th) *\}\}?": "",  # 2
    r"((?<=\d) (?=\d)|(?<=[A-Za-z]) (?=[A-Za-z]))| +": r"\1",  # 50, and 4 wrong
    r"^(?:[ ,]|\.(?!\d))+|[ .,\\]+$": "",
    r"^\{([^{}]*)\}$|^\(([A-Z])\)$": r"\1\2",  # 2, and the choices of MATH-500
}


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}``; boxes with only "and", "or" or commas between them are one answer.

    None without a box, or when the last one is empty or never closed (a response that was cut off).
    """
    parts: list[str] = []
    after = len(text)
    for box in reversed(list(BOX.finditer(text))):
        depth = 1
        for brace in BRACE.finditer(text, box.end(), after):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                break
        if depth or (parts and not BETWEEN_BOXES.fullmatch(text, brace.start(), after)):
            break
        parts, after = [text[box.end() : brace.start()].strip(), *parts], box.start()
    # A box that is written twice is one answer.
    return ", ".join(dict.fromkeys(part for part in parts if part)) or None


def plain(answer: str) -> str:
    r"""``answer`` in one way of writing, without layout: the same text for \frac12, \dfrac{1}{2} and \frac{1}{2}."""
    answer = re.sub(r"\\[A-Za-z]+|\.\.\.|[^\x00-\x7f]", lambda sign: SAME.get(sign[0], sign[0]) + " ", answer)
    answer = unicodedata.normalize("NFKC", answer)
    for pattern, replacement in REWRITES.items():
        answer = re.sub(pattern, replacement, answer)
    return answer


def number(answer: str) -> Fraction | None:
    r"""The exact value of a plain ``answer`` that is one number: .5, 3/4, 1\frac{3}{4}, 0.\overline{3}, 4.5\times10^{33}."""
    answer = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r" \1/\2", answer)
    repeating = re.search(r"\.(\d*)\\(?:overline|dot)\{(\d+)\}$", answer)
    if repeating:
        answer = f"{answer[: repeating.end(1)]}0 {repeating[2]}/{'9' * len(repeating[2])}{'0' * len(repeating[1])}"
    answer = re.sub(r"(?<=\d)\\(?:times|cdot)10\^\{([+-]?\d{1,3})\}$", r"e\1", answer)
    if re.fullmatch(r"[+-]? ?(?:(?:\d+(?:\.\d+)? )?\d+/0*[1-9]\d*|\d*\.?\d+(?:e[+-]?\d{1,3})?)", answer):
        return (-1 if answer[0] == "-" else 1) * sum(map(Fraction, answer.lstrip("+- ").split()), Fraction(0))
    return None
