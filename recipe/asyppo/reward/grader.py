r"""The grading process: decides with math-verify whether two answers are equal, one JSON line in and one out.

It is a program of its own, ``python grader.py SECONDS MEGABYTES``, because sympy can run for hours or fill the memory on
an expression of ten characters, in C code that no signal handler and no other thread can stop. The process loads
math-verify once and forks a child that answers the questions; the kernel ends the child when an answer takes too long
(``SIGALRM``), and caps its memory. The parent then reports that question as given up and forks the next child, in a few
milliseconds. End of input ends both.
"""

import contextlib
import json
import logging
import os
import re
import resource
import signal
import sys
from functools import lru_cache
from typing import Any, TextIO

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Eq, Float, MatrixBase, simplify

# A child is renewed after this many answers, before what sympy remembers becomes much.
ANSWERS_PER_CHILD = 20_000
RENEW = 3
# No plain expressions: math-verify reads those with Python's eval.
LATEX = [LatexExtractionConfig(boxed_match_priority=0)]
# latex2sympy takes E_1 for Euler's number with an index, which it then loses.
INDEXED_E = re.compile(r"(?<![\\A-Za-z])E(?=\s*_)")
SIDES = re.compile(r"([^=]+)=([^=]+)")
NAME = re.compile(r"\s*[A-Za-z](?:_\{?\\?\w+\s*\}?)?(?:\([\w,\s]*\))?\s*")


@lru_cache(maxsize=4096)
def _parse(text: str) -> Any:
    """The sympy value of LaTeX ``text``, or None."""
    boxed = "\\boxed{" + INDEXED_E.sub(r"\\Xi ", text) + "}"
    found = parse(boxed, extraction_config=LATEX, fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None


def _close(truth: Any, answer: Any) -> bool | None:
    """Compare constants with a relative 1e-4 if the truth contains a rounded number, else None."""
    if not (isinstance(truth, Basic) and isinstance(answer, Basic) and truth.has(Float)):
        return None
    if not (getattr(truth, "is_number", False) and getattr(answer, "is_number", False)):
        return None
    true, value = complex(truth.evalf()), complex(answer.evalf())
    return abs(value - true) <= 1e-4 * abs(true)


def _equations(truth: Eq, answer: Eq) -> bool:
    """Whether two equations say the same: one is the other times a constant.

    math-verify compares their solutions, and takes two equations that sympy cannot solve for the same.
    """
    factor = simplify((truth.lhs - truth.rhs) / (answer.lhs - answer.rhs))
    return bool(factor.is_number and factor.is_finite and not factor.is_zero)


def _same(truth: str, answer: str) -> bool:
    true, value = _parse(truth), _parse(answer)
    if true is None or value is None:
        return False
    if all(isinstance(side, Eq) and not side.has(MatrixBase) for side in (true, value)):
        return _equations(true, value)
    close = _close(true, value)
    return close if close is not None else verify(true, value, allow_set_relation_comp=True, timeout_seconds=None)


def _name_and_value(text: str) -> tuple[str, str]:
    """The sides of "x = 5", "f(x) = 2x" and the like; an empty name for anything else."""
    sides = SIDES.fullmatch(text)
    return (sides[1].replace(" ", ""), sides[2]) if sides else ("", text)


def equal(truth: str, answer: str) -> bool:
    r"""Whether two tidy answers are equal expressions, sets, tuples, intervals, equations, ...

    "x = 5" and "5" are equal, whichever is the truth; "x = 5" and "y = 5" are not. 62.5% is 5/8, and may be 62.5.
    """
    if ("%" in truth) != ("%" in answer):
        exact = (text.replace("%", r"\cdot\frac{1}{100}") for text in (truth, answer))
        if _same(*exact):
            return True
    truth, answer = truth.replace("%", ""), answer.replace("%", "")
    (true_name, true_value), (name, value) = _name_and_value(truth), _name_and_value(answer)
    if true_name == name:
        return _same(true_value, value)
    if not (true_name and name) and NAME.fullmatch(true_name or name) and _same(true_value, value):
        return True
    return _same(truth, answer)


def _limit(megabytes: int) -> None:
    """Cap the address space of this process; beyond it Python raises MemoryError or the process ends."""
    resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))


def answer_questions(requests: TextIO, replies: TextIO, seconds: float) -> int:
    """Reply to every line ``[truth, answer]``; the exit status: 0 at the end of input, RENEW after a child's time."""
    for _ in range(ANSWERS_PER_CHILD):
        if not (line := requests.readline()):
            return 0
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            verdict = equal(*json.loads(line))
        except Exception:
            # Whatever sympy raises on nonsense, RecursionError and MemoryError included: not equal.
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(verdict) + "\n")
        replies.flush()
    return RENEW


def supervise(requests: TextIO, replies: TextIO, seconds: float, megabytes: int) -> None:
    """Keep one child that answers; where it ends with a question unanswered, reply null and fork the next."""
    while True:
        child = os.fork()
        if child == 0:
            _limit(megabytes)
            status = answer_questions(requests, replies, seconds)
            os._exit(status)
        _, ended = os.waitpid(child, 0)
        if ended == 0:
            return
        if os.waitstatus_to_exitcode(ended) != RENEW:
            replies.write("null\n")
            replies.flush()


def main() -> None:
    seconds, megabytes = float(sys.argv[1]), int(sys.argv[2])
    # The parent may have been started with these ignored or blocked, and both are inherited.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    # Ctrl-C reaches the whole group; the end of input is what ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    requests, replies = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    with open(os.devnull, "r+b") as nothing:
        # Nothing that a library prints or reads may disturb the protocol.
        os.dup2(nothing.fileno(), 0)
        os.dup2(nothing.fileno(), 1)
    equal(r"\frac{1}{2}", r"\sqrt{x^2}+3")  # loads the grammar before the first fork
    replies.write("ready\n")
    replies.flush()
    with contextlib.suppress(BrokenPipeError):
        supervise(requests, replies, seconds, megabytes)


if __name__ == "__main__":
    main()
