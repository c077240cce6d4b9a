r"""Rule-based reward for mathematics, in the form of verl's ``reward.custom_reward_function``.

A response scores 1 if the content of its last ``\boxed{...}`` equals the ground truth, else 0. What text cannot decide goes to
math-verify, in bounded processes (:mod:`.grader`): verl calls from many threads, where its own time-outs cannot work.

    reward.custom_reward_function.path=pkg://recipe.asyppo.reward.math_reward
    +reward.custom_reward_function.reward_kwargs.seconds=2      # time for one answer
"""

import importlib.util
import json
import os
import queue
import re
import sys
import threading
from fractions import Fraction
from functools import cache
from numbers import Real
from subprocess import PIPE, Popen
from typing import Any
from unicodedata import normalize

if importlib.util.find_spec("math_verify") is None:
    # Raised in a call it would be one more response without a score: verl logs that, and trains on.
    raise ImportError(f"{__name__} needs math-verify: on every node, pip install 'verl[math]==0.9.1'")
LONGEST_ANSWER = 1000  # Longer than any ground truth by far; a longer answer is wrong without being read.
LIMITS = {"processes": 2, "seconds": 5.0, "megabytes": 1024}
OPENING = r"\\(?:boxed|fbox|framebox)\s*\{"
# A box holds no other box, and braces to a depth of 20. One answer are boxes with only "and", "or" or commas between them.
CONTENT = r""
for _ in range(20):
    CONTENT = rf"(?:[^{{}}\\]|\\(?!boxed|fbox|framebox).|\{{{CONTENT}\}})*+"
BOX = rf"{OPENING}({CONTENT})\}}"
BOXES = re.compile(rf"(?s:{BOX}(?:[\s$,;]{{0,9}}(?:and|or)?[\s$]{{0,9}}{BOX})*+)")
# What prints the same. Behind a rule, here and below: equal pairs missed without it, of 276, and wrong ones accepted.
SAME_AS = r"""²:^2 ×:\times ÷:/ ·:\cdot −:- °:^\circ ≤:\le ≥:\ge ∞:\infty π:\pi 或:, 和:, 、:, \div:/ \prime:' \pmod:\mod
\varnothing:\emptyset \dots:\ldots ...:\ldots \Bbb:\mathbb \lbrace:\{ \rbrace:\} \dfrac:\frac \tfrac:\frac \sfrac:\frac"""  # noqa: RUF001
SAME = dict(pair.split(":") for pair in SAME_AS.split())
FUNCTION = r"(?:arc|ar|a)?(?:sin|cos|tan|cot|sec|csc)h?|exp|ln|log|gcd|max|min|det|dim|Re|Im|mod|sqrt|pi"
PART = r"(?:(?!\\pm|\\[{}])[^,()\[\]]|\((?:[^,()]|\([^,()]*\))*+\))*+"  # of a list
# A letter of a multiple-choice question and its value.
CHOICE = re.compile(
    r"(?:\\text\{)?\(?([A-Z])[).:]\}?((?:\.?\d|\\frac|\\sqrt)(?:(?!,(?:\\text\{)?\(?[A-Z](?:[).:}]|,|$)|[A-Z][).:](?!$)).)*)"
)
REWRITES: dict[str, Any] = {
    # Signs and names that print the same.
    r"\\[A-Za-z]+|\.\.\.|[^\x00-\x7f]": lambda m: f"{SAME[m[0]]} " if m[0] in SAME else normalize("NFKC", m[0]),  # 13
    r"\\!\s*|\\?\$|(?<!\\)\\[()\[\]]|[€£¥]|\\(?:text)?color *\{\w+\}|USD *(?=\d)|(?<!\\)\{ *([:,]?) *\}": r"\1",  # 10
    r"\\(?:mathrm|operatorname|mbox|text(?:bf|it|rm|normal)|mathit)(?![a-z])": r"\\text",  # 21
    r"(?:[~\s]|(?<!\\)\\(?:[,;: ]|(?:left|right|[bB]ig[glr]*|\w+style|large|bf|underline|\w*square|q*uad)(?![a-z])))+": " ",  # 23
    r"^ *(?:\\text *)?\{([^{}]*)\} *$": r"\1",  # 8
    r"[(\[] *\\begin *\{array\} *\{[clr| ]*\}(.*?)\\end *\{array\} *[)\]]": r"\\begin{pmatrix}\1\\end{pmatrix}",  # 0
    r"\\\\ *\[[\d.]+ *[a-z]{2}\]": r"\\\\",  # 0
    r"\\([lr])angle(?![a-z])": lambda m: "()"[m[1] == "r"],  # 0
    r"(?<![\d,.(\[])(?<!\\\{)\d{1,3}(?:[, ]\d{3})+(?![\d,]| \d)": lambda m: re.sub(r"\D", "", m[0]),  # 4
    r"\\mathbb *\{?Z\}? */ *\{?(\w+)\}? *\\mathbb *\{?Z\}?": r"\\mathbb{Z}_{\1}",  # 3
    r"\\%|\\text *\{ *(?:\\?%|percent) *\}|(?<=\d) *percent\b": "%",  # 4
    r"\\text *\{ *degrees? *\}|\^ *\\circ(?= *[CFK]\b)": r"^{\\circ}",  # 2
    r"(?<=[\d}]) *(\\text *\{ *)?\\?(?:(min)(?:ute)?|sec(?:ond)?)s?\.? *(?(1)\})$": lambda m: (
        r"\text{minutes}" if m[2] else r"\text{seconds}"
    ),  # 0
    # Roman letters are a word or a unit, but not a function, a constant, or what is applied like a function.
    rf"\\text *\{{ *({FUNCTION}) *\}}|(?<![\\A-Za-z])({FUNCTION})(?![A-Za-z])": r"\\\1\2 ",  # 9
    r"\\(?:boldsymbol|bm)(?![a-z])": r"\\mathbf",  # 0
    r"\\(?:mathbf\{ *(\w+)|text *\{ *([eid]|\d+|[A-Za-z]+(?= *\}[_(]))) *\}|(?<=_\{)\\text *\{(\w+)\}": r"\1\2\3",  # 10, 4 wrong
    r"(?<=\d) +((?:[a-z]{3,}|[ckm]m|kg|ft)(?: [a-z]+)*)$": r"\\text{\1}",  # 2
    r"(?:√|\\sqrt) *\(([^()]*)\)|√ *(\d+|\w)": r"\\sqrt{\1\2}",  # 2
    r"\\(frac|binom|sqrt|mathbb|mod) *([^\s{\\[(]|\\pi)": r"\\\1{\2}",  # 28
    r"(\\(?:frac|binom) *\{(?:[^{}]|\{[^{}]*\})*\}) *([^\s{\\]|\\pi)": r"\1{\2}",  # 20
    r"(?<=[_^]) *(\w|\\[A-Za-z]+(?! *[A-Za-z{]))": r"{\1}",  # 13, and 1 wrong
    # Words, and spaces but between two numbers or letters.
    r"(?:\\text *\{[ ,]*(?:and|or)?[ ,]*\}|(?<!\\)\b(?:and|or)\b|[;,] *)+": ",",  # 6, and 2 wrong
    r"((?<=\d) (?=\d)|(?<=[A-Za-z]) (?=[A-Za-z]))| +": r"\1",  # 16
    r"^(?:[ ,]|\.(?!\d)|\\approx|\\text\{(?:[Tt]he )?(?:answer is|converges to|approximately|about)\})+|[ .,\\]+$": "",  # 6
    r"^(?:\\text\{)?\(?([A-Z])[).:]\}?$": r"\1",  # 2
    rf"(?:(?<![^,])|(?<=\\\{{))({PART})\\pm({PART})(?=,|$|\\\}})": r"\1+\2,\1-\2",  # 3
    # As the parser reads it: f' as a name of its own, sines of degrees, log as the natural one.
    r"\^\{('+)\}|('+)": lambda m: f"_{{{'p' * len(m[1] or m[2])}}}",  # 1, and 4 wrong
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{\d\})?\(?)(\d+)\^\{\\circ\}": r"\1\\frac{\2\\pi}{180}",  # 4
    r"\\log(?!_)(?=(.?))": lambda m: r"\ln " if m[1].isalnum() else r"\ln",  # 3
}


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}``, or of several that differ as a list; None if empty, never closed or not there."""
    boxes = [*BOXES.finditer(text)]
    if not boxes or re.search(OPENING, text[boxes[-1].end() :]):
        return None
    parts = map(str.strip, re.findall(BOX, boxes[-1][0], re.DOTALL))
    return ", ".join(dict.fromkeys(filter(None, parts))) or None


def plain(answer: str) -> str:
    r"""``answer`` in one way of writing, without layout: the same text for \frac12, \dfrac{1}{2} and \frac{1}{2}."""
    for pattern, replacement in REWRITES.items():
        answer = re.sub(pattern, replacement, answer)
    return answer


def number(answer: str) -> Fraction | None:
    r"""The exact value of a plain ``answer`` that is one number: .5, 50%, 1\frac{3}{4}, 0.\overline{3}, 4.5\times10^{33}."""
    text = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r" \1/\2", answer.removesuffix("%"))
    if repeating := re.search(r"\.(\d*)\\(?:overline|dot)\{(\d+)\}$", text):
        text = f"{text[: repeating.end(1)]}0 {repeating[2]}/{'9' * len(repeating[2])}{'0' * len(repeating[1])}"
    text = re.sub(r"(?<=\d)\\(?:times|cdot)10\^\{([+-]?\d{1,3})\}$", r"e\1", text)
    if not re.fullmatch(r"[+-]? ?(?:(?:\d+(?:\.\d+)? )?\d+/0*[1-9]\d*|\d*\.?\d+(?:e[+-]?\d{1,3})?)", text):
        return None
    value = sum(map(Fraction, text.lstrip("+- ").split()), Fraction(0))
    return value / (-1 if text[0] == "-" else 1) / (100 if answer.endswith("%") else 1)


def _alike(answer: str, other: str) -> str:
    """Of "(B) 27", the part to compare: its letter if ``other`` is one, its value if not, both if ``other`` has both."""
    if not (choice := CHOICE.fullmatch(answer)):
        return answer
    letter, value = choice.groups()
    if CHOICE.fullmatch(other):
        return f"({letter}){value}"
    return letter if re.fullmatch("[A-Z]", other) else value


class Graders:
    """Grading processes, each started when first needed, for any number of threads; ``limits`` other than ``LIMITS``."""

    def __init__(self, **limits: Any) -> None:
        for name, value in (limits := LIMITS | limits).items():
            if name not in LIMITS or type(value) not in (int, type(LIMITS[name])) or not 0 < value < 1e9:
                raise ValueError(
                    f"reward_kwargs.{name}={value!r}: give {', '.join(LIMITS)} above 0, whole but for seconds"
                )
        self._command = [sys.executable, "-P", "-m", "recipe.asyppo.reward.grader", json.dumps(limits)]
        # The processes find the modules that this one finds.
        self._paths = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._idle: queue.LifoQueue[Any] = queue.LifoQueue()
        for _ in range(limits["processes"]):
            self._idle.put(None)

    def equal(self, truth: str, answer: str) -> bool | None:
        """Equality of two plain answers; None where the kernel ended the process: time or memory did not suffice."""
        process: Any = self._idle.get()
        try:
            process = process or Popen(self._command, stdin=PIPE, stdout=PIPE, text=True, env=self._paths)
            print(json.dumps([truth, answer]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            (ended := process).communicate()
            process = None
            if ended.returncode > 0:
                raise RuntimeError(
                    f"{self._command} failed, see above: pip install 'math-verify[antlr4_9_3]'?"
                ) from None
            return None
        except BaseException:  # an interruption: the process would give its answer to the next question
            if process:
                process.kill()
                process.communicate()
            process = None
            raise
        finally:
            self._idle.put(process)


_graders_lock, _graders = threading.Lock(), cache(Graders)


def compute_score(
    data_source: str, solution_str: str, ground_truth: str | float, extra_info: dict | None = None, **options: Any
) -> dict[str, float | str]:
    """Score one response; ``options`` are ``seconds`` and ``megabytes`` for each of the grading ``processes``.

    Returns:
        ``score`` and ``acc`` (0 or 1), ``pred`` (the answer in plain notation, empty without one, by which verl's
        validation takes its majority votes) and ``gave_up`` (1 where the limits were too tight to decide: score 0).
    """
    own = {"reward_router_address", "reward_model_tokenizer"}  # verl adds them where there is a reward model.
    with _graders_lock:
        graders = _graders(**{name: value for name, value in options.items() if name not in own})
    if not isinstance(ground_truth, str | Real) or str(ground_truth).strip() in ("", "nan"):
        row = f"row {(extra_info or {}).get('index', '(no index)')} of {data_source}"
        raise ValueError(f"reward_model.ground_truth={ground_truth!r} in {row} must be text or a number")
    verdict: bool | None = False
    boxed, pred = last_boxed(solution_str), ""
    if boxed is not None and len(boxed) <= LONGEST_ANSWER:
        truth, answer = plain(str(ground_truth)), plain(boxed)
        truth, answer = _alike(truth, answer), _alike(answer, truth)
        exact, value = number(truth), number(answer)
        pred = answer if value is None else str(value)
        verdict = truth == answer or (exact is not None and exact == value) or graders.equal(truth, answer)
    score = float(bool(verdict))
    return {"score": score, "acc": score, "pred": pred, "gave_up": float(verdict is None)}
