r"""How often graders err, and how fast they are: ``python benchmarks/reward.py --data data/asyppo [--pairs pairs.jsonl]``.

Ours, math-verify alone and verl's three scorers of mathematics side by side, on

* the ground truths of the parquet files, each answered three times: as it stands (must score 1), in another notation where
  there is a mechanical one (must score 1: ``\frac{3}{4}`` as 3/4, ``\sqrt{2}`` as ``\sqrt[2]{2}``, a list backwards, 7 as 7.0),
  and changed (must score 0: a number raised, Yes for No, S for S_3, "+1" behind anything else). Ours takes them all and
  its failures are listed; every grader takes the same sample of ``--sample`` answers a set, one at a time;
* labelled pairs, one JSON object a line: ``ground_truth``, ``response``, ``expected`` (0 or 1) and, if there is, ``family``.

The last line is one JSON object; ``false_accept`` and ``false_reject`` are ours on the pairs (null without them).
"""

import argparse
import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from math_verify import parse, verify
from tqdm import tqdm
from verl.utils.reward_score import math_dapo, math_verify, prime_math

from recipe.asyppo.reward.math_reward import compute_score, number, plain

OPPOSITES = {"yes": "No", "no": "Yes", "true": "False", "false": "True", r"\infty": r"-\infty", r"-\infty": r"\infty"}
DIGITS = re.compile(r"\d[\d,]*\.?\d*|\.\d+")
FRACTION = re.compile(r"\\frac\{([^{}]+)\}\{([^{}]+)\}")
ROOT = re.compile(r"\\sqrt\{")
INDEXED = re.compile(r"([A-Z])_\{?\d+\}?")
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}")


class Case(NamedTuple):
    """An answer to grade; ``kind`` is how it was written, or the family of a pair."""

    kind: str
    truth: str
    response: str
    expected: int


GRADERS: dict[str, Callable[[str, str], bool]] = {
    # name: does the response equal the truth?
    "ours": lambda truth, response: compute_score("benchmark", response, truth)["score"] == 1,
    "math-verify": lambda truth, response: verify(parse(f"\\boxed{{{truth}}}"), parse(response)),
    "verl math_verify": lambda truth, response: math_verify.compute_score(response, truth) == 1,
    "verl math_dapo": lambda truth, response: math_dapo.compute_score(response, truth)["acc"],
    "verl prime_math": lambda truth, response: prime_math.compute_score(response, truth)[0],
}


def list_parts(answer: str) -> list[str]:
    """The parts of a list without brackets around it; one part for anything else."""
    depth, parts = 0, [""]
    for char in answer:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def rewritten(answer: str) -> str | None:
    """The same answer in another notation, or None if none is known here."""
    text = plain(answer)
    if re.fullmatch(r"-?\d+", text):
        return f"{text}.0"
    if number(text) is None and not PROSE.search(text) and len(parts := list_parts(text)) > 1:
        return ", ".join(reversed(parts))
    if FRACTION.search(text):
        return FRACTION.sub(r"((\1)/(\2))", text)
    if ROOT.search(text):
        return ROOT.sub(r"\\sqrt[2]{", text)
    return None


def perturbed(answer: str) -> str:
    """A wrong answer that looks like the right one."""
    text = plain(answer)
    if text.lower() in OPPOSITES:
        return OPPOSITES[text.lower()]
    if re.fullmatch("[A-Z]", text):
        return "A" if text != "A" else "B"
    if name := INDEXED.fullmatch(text):
        return name[1]
    if not (found := list(DIGITS.finditer(text))):
        return f"{text} + 1"
    place = found[-1]
    digits = place.group()
    if digits.isdigit():
        raised = str(int(digits) + 1)
    else:
        first = re.search("[1-9]", digits) or re.search("0", digits)
        assert first is not None
        raised = digits[: first.start()] + str((int(first.group()) + 1) % 9 + 1) + digits[first.end() :]
    return text[: place.start()] + raised + text[place.end() :]


WRITINGS: dict[str, tuple[Callable[[str], str | None], int]] = {
    # name: how the answer is written, the score it must get
    "reference": (lambda answer: answer, 1),
    "rewritten": (rewritten, 1),
    "perturbed": (perturbed, 0),
}


def read_set(path: Path) -> list[Case]:
    """The ground truths of one parquet file, each as often as there are writings of it."""
    truths = [row["ground_truth"] for row in pd.read_parquet(path, columns=["reward_model"])["reward_model"]]
    return [
        Case(name, truth, f"The answer is $\\boxed{{{answer}}}$.", expected)
        for name, (write, expected) in WRITINGS.items()
        for truth in truths
        if (answer := write(truth)) is not None
    ]


def grade(name: str, cases: Iterable[Case], threads: int = 1) -> tuple[list[bool], float]:
    """Verdict on every case and answers a second; math-verify's own time-outs need the main thread."""
    cases, grader, start = list(cases), GRADERS[name], time.perf_counter()

    def verdict(case: Case) -> bool:
        return bool(grader(case.truth, case.response))

    if threads == 1:
        verdicts = [verdict(case) for case in tqdm(cases, desc=f"{name:>16}", mininterval=1)]
    else:
        with ThreadPoolExecutor(threads) as executor:
            verdicts = list(tqdm(executor.map(verdict, cases), total=len(cases), desc=f"{name:>16}", mininterval=1))
    return verdicts, round(len(cases) / (time.perf_counter() - start), 1)


def table(title: str, header: list[str], rows: list[list]) -> None:
    """Print a table in Markdown."""
    print(f"\n{title}\n")
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(map(str, row))} |")


def measure_set(path: Path, threads: int, sample: int) -> dict:
    """Ours on all cases of a parquet file, every grader on a sample of them."""
    cases = read_set(path)
    verdicts, speed = grade("ours", cases, threads)
    wrong = [case for case, verdict in zip(cases, verdicts, strict=True) if verdict != case.expected]
    for case in wrong:
        print(f"{path.stem}, {case.kind}: truth {case.truth!r}, response {case.response!r}")
    counts = {name: [sum(case.kind == name for case in part) for part in (cases, wrong)] for name in WRITINGS}
    drawn = random.Random(0).sample(cases, min(sample, len(cases)))
    graded = {name: grade(name, drawn) for name in GRADERS}
    return {
        "rows": counts["reference"][0],
        "asked": {name: asked for name, (asked, _) in counts.items()},
        "wrong": {name: errors for name, (_, errors) in counts.items()},
        "answers_per_second": speed,
        "sample": {
            name: {
                "errors": sum(verdict != case.expected for case, verdict in zip(drawn, found, strict=True)),
                "answers_per_second": rate,
            }
            for name, (found, rate) in graded.items()
        },
        "sampled": len(drawn),
    }


def measure_pairs(path: Path) -> dict[str, dict[str, float | None]]:
    """Shares of pairs that differ and are accepted, and of equal ones that are not, by grader; tables by family."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    cases = [
        Case(line.get("family", ""), line["ground_truth"], line["response"], int(line["expected"])) for line in lines
    ]
    graded = {name: grade(name, cases) for name in GRADERS}
    for case, verdict in zip(cases, graded["ours"][0], strict=True):
        if verdict != case.expected:
            print(f"pairs: expected {case.expected}: truth {case.truth!r}, response {case.response[-200:]!r}")

    def errors(name: str, expected: int, family: str | None = None) -> tuple[int, int]:
        verdicts = [
            verdict
            for case, verdict in zip(cases, graded[name][0], strict=True)
            if case.expected == expected and family in (None, case.kind)
        ]
        return sum(verdict != expected for verdict in verdicts), len(verdicts)

    for expected, title in ((0, "Pairs that differ, accepted"), (1, "Equal pairs, rejected")):
        rows = [
            [family or "(none)", *("{} of {}".format(*errors(name, expected, family)) for name in GRADERS)]
            for family in [*sorted({case.kind for case in cases}), None]
        ]
        rows[-1][0] = "all"
        table(title, ["family", *GRADERS], rows)
    return {
        name: {
            **{
                key: round(wrong / asked, 4) if asked else None
                for key, (wrong, asked) in (("false_accept", errors(name, 0)), ("false_reject", errors(name, 1)))
            },
            "answers_per_second": rate,
        }
        for name, (_, rate) in graded.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/asyppo"), help="folder of recipe.asyppo.data.prepare_data")
    add("--pairs", type=Path, help="JSON lines of ground_truth, response, expected")
    add("--sample", type=int, default=100, help="answers of a set that every grader takes")
    add("--threads", type=int, default=8, help="callers of ours at the same time")
    arguments = parser.parse_args()
    files = sorted(arguments.data.rglob("*.parquet"))
    if not files and (not arguments.pairs or arguments.data != parser.get_default("data")):
        parser.error(
            f"--data {arguments.data}: no parquet file; make them with python -m recipe.asyppo.data.prepare_data, "
            "or give --pairs"
        )
    # math-verify warns of what it cannot parse.
    logging.disable(logging.WARNING)
    for name in GRADERS:
        grade(name, [Case("warm-up", "2", r"\boxed{\sqrt{4}}", 1)])
    sets = {path.stem: measure_set(path, arguments.threads, arguments.sample) for path in files}
    if sets:
        table(
            "Ours on all answers",
            ["set", "rows", *(f"{name} scored {expected}" for name, (_, expected) in WRITINGS.items()), "answers/s"],
            [
                [
                    name,
                    row["rows"],
                    *(f"{row['asked'][kind] - row['wrong'][kind]} of {row['asked'][kind]}" for kind in WRITINGS),
                    row["answers_per_second"],
                ]
                for name, row in sets.items()
            ],
        )
        table(
            "Errors on a sample, and answers a second, one at a time",
            ["set", "sample", *GRADERS],
            [
                [
                    name,
                    row["sampled"],
                    *(f"{it['errors']}, {it['answers_per_second']}/s" for it in row["sample"].values()),
                ]
                for name, row in sets.items()
            ],
        )
    pairs = measure_pairs(arguments.pairs) if arguments.pairs else {name: {} for name in GRADERS}
    ours = {key: pairs["ours"].get(key) for key in ("false_accept", "false_reject")}
    print(json.dumps({**ours, "pairs": pairs, "sets": sets}))


if __name__ == "__main__":
    main()
