"""Decontamination: exact repeats, and training problems that are also evaluation problems.

Two problems are the same if their words and numbers agree, notation aside, or nearly so: at least half of the word
6-grams of the shorter one occur in the other, and four fifths of their numbers agree; or if nearly all of these do, as
with a number or a source in front. One long common n-gram, the usual test for prose, fails on mathematics both ways: stock
phrases such as "where m and n are relatively prime positive integers, find m + n" are longer than 13 words, and the same
sentence with other numbers is another problem. The counts are exact; an index of the 6-grams of some 1,500 evaluation problems
is small, and MinHash would only approximate it.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

RUN = 6
SHARED_RUNS = 0.5
SHARED_NUMBERS = 0.8
ALL_RUNS = 0.95
WORD = re.compile(r"[^\W\d_]+|\d+|[-+*/^=<>!|%]")
# Notation without meaning, and one word for what is written in several ways.
DROPPED = {"left", "right", "displaystyle", "limits", "quad", "qquad", "text", "mathrm", "operatorname", "boxed"}
SAME = {
    "dfrac": "frac",
    "tfrac": "frac",
    "leq": "le",
    "geq": "ge",
    "rightarrow": "to",
    "cdots": "dots",
    "ldots": "dots",
}


def words(problem: str) -> list[str]:
    """Lower-case words, numbers and operators of a problem, without LaTeX notation; if there is none, all of it."""
    found = WORD.findall(unicodedata.normalize("NFKC", problem).casefold())
    return [SAME.get(word, word) for word in found if word not in DROPPED] or [problem]


@dataclass(frozen=True)
class Fingerprint:
    """A problem as it is compared."""

    text: str
    runs: frozenset[tuple[str, ...]]
    numbers: Counter[str]

    @classmethod
    def of(cls, problem: str) -> "Fingerprint":
        listed = words(problem)
        runs = frozenset(tuple(listed[start : start + RUN]) for start in range(max(1, len(listed) - RUN + 1)))
        return cls(" ".join(listed), runs, Counter(word for word in listed if word.isdecimal()))


def is_near(one: Fingerprint, other: Fingerprint) -> bool:
    """True if two problems differ in wording only; see the module."""
    shared = len(one.runs & other.runs) / min(len(one.runs), len(other.runs))
    numbers, all_numbers = (one.numbers & other.numbers).total(), (one.numbers | other.numbers).total()
    return shared >= ALL_RUNS or (shared >= SHARED_RUNS and numbers >= SHARED_NUMBERS * all_numbers)


class Index:
    """Named problems that others are compared with."""

    def __init__(self, problems: Iterable[tuple[str, str]]) -> None:
        """``problems`` are pairs (name of the set, text); of equal problems the first gives the name."""
        self._prints = [(name, Fingerprint.of(text)) for name, text in problems]
        self._exact: dict[str, str] = {}
        self._by_run: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, (name, fingerprint) in enumerate(self._prints):
            self._exact.setdefault(fingerprint.text, name)
            for run in fingerprint.runs:
                self._by_run[run].append(number)

    def find(self, problem: str) -> tuple[str, str] | None:
        """("same" or "nearly", name of the set) of a problem that is the same as this one, or None."""
        fingerprint = Fingerprint.of(problem)
        if name := self._exact.get(fingerprint.text):
            return "same", name
        shared = Counter(number for run in fingerprint.runs for number in self._by_run.get(run, ()))
        for number, _ in shared.most_common():
            if is_near(fingerprint, self._prints[number][1]):
                return "nearly", self._prints[number][0]
        return None
