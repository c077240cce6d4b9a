r"""How often the reward errs on real answers, and how fast it is: ``python benchmarks/reward.py --data data/asyppo``.

Every ground truth of the parquet files is answered three times: as it stands (must score 1), in another notation where
there is a mechanical one (must score 1: ``\frac{3}{4}`` as 3/4, ``\sqrt{2}`` as ``\sqrt[2]{2}``, a list backwards, 7 as 7.0), and
changed (must score 0: a number raised, Yes for No, S for S_3, "+1" behind anything else). Failures are listed. The last line is
one JSON object.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from recipe.asyppo.reward.answer_text import numbers, tidy
from recipe.asyppo.reward.math_reward import compute_score

OPPOSITES = {"yes": "No", "no": "Yes", "true": "False", "false": "True", r"\infty": r"-\infty", r"-\infty": r"\infty"}
NUMBER = re.compile(r"\d[\d,]*\.?\d*|\.\d+")
FRACTION = re.compile(r"\\d?frac\{([^{}]+)\}\{([^{}]+)\}")
ROOT = re.compile(r"\\sqrt\{")
INDEXED = re.compile(r"([A-Z])_\{?\d+\}?")
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}")


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
    plain = tidy(answer)
    if re.fullmatch(r"-?\d+", plain):
        return f"{plain}.0"
    if not numbers(plain) and not PROSE.search(plain) and len(parts := list_parts(plain)) > 1:
        return ", ".join(reversed(parts))
    if FRACTION.search(plain):
        return FRACTION.sub(r"((\1)/(\2))", plain)
    if ROOT.search(plain):
        return ROOT.sub(r"\\sqrt[2]{", plain)
    return None


def perturbed(answer: str) -> str:
    """A wrong answer that looks like the right one."""
    plain = tidy(answer)
    if plain.lower() in OPPOSITES:
        return OPPOSITES[plain.lower()]
    if re.fullmatch("[A-Z]", plain):
        return "A" if plain != "A" else "B"
    if name := INDEXED.fullmatch(plain):
        return name[1]
    if not (found := list(NUMBER.finditer(plain))):
        return f"{plain} + 1"
    place = found[-1]
    text = place.group()
    if text.isdigit():
        raised = str(int(text) + 1)
    else:
        first = re.search("[1-9]", text) or re.search("0", text)
        assert first is not None
        raised = text[: first.start()] + str((int(first.group()) + 1) % 9 + 1) + text[first.end() :]
    return plain[: place.start()] + raised + plain[place.end() :]


WRITINGS: dict[str, tuple[Callable[[str], str | None], float]] = {
    # name: how the answer is written, the score it must get
    "reference": (lambda answer: answer, 1.0),
    "rewritten": (rewritten, 1.0),
    "perturbed": (perturbed, 0.0),
}


def measure(path: Path, threads: int) -> dict:
    """Counts, failures and speed for one parquet file."""
    truths = [row["ground_truth"] for row in pd.read_parquet(path, columns=["reward_model"])["reward_model"]]
    jobs = [
        (writing, truth, answer, wanted)
        for writing, (write, wanted) in WRITINGS.items()
        for truth in truths
        if (answer := write(truth)) is not None
    ]

    def score(job: tuple[str, str, str, float]) -> tuple[dict, float]:
        start = time.perf_counter()
        result = compute_score(path.stem, f"The answer is $\\boxed{{{job[2]}}}$.", job[1])
        return result, time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as executor:
        results = list(tqdm(executor.map(score, jobs), total=len(jobs), desc=f"{path.stem:>13}", mininterval=1))
    seconds = time.perf_counter() - start
    errors = [
        (*job, result["gave_up"])
        for job, (result, _) in zip(jobs, results, strict=True)
        if result["score"] != job[3] or result["gave_up"]
    ]
    return {
        "rows": len(truths),
        "asked": {name: sum(job[0] == name for job in jobs) for name in WRITINGS},
        "wrong": {
            name: sum(
                job[0] == name and result["score"] != job[3] for job, (result, _) in zip(jobs, results, strict=True)
            )
            for name in WRITINGS
        },
        "gave_up": sum(int(result["gave_up"]) for result, _ in results),
        "answers_per_second": round(len(jobs) / seconds, 1),
        "slowest_seconds": round(max(duration for _, duration in results), 2),
        "failures": [{"writing": e[0], "truth": e[1], "answer": e[2], "gave_up": bool(e[4])} for e in errors],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=Path("data/asyppo"), help="folder of recipe.asyppo.data.prepare_data"
    )
    parser.add_argument("--threads", type=int, default=8, help="callers at the same time")
    arguments = parser.parse_args()
    files = sorted(arguments.data.rglob("*.parquet"))
    if not files:
        parser.error(
            f"--data {arguments.data}: no parquet file; make them with python -m recipe.asyppo.data.prepare_data"
        )
    compute_score("warm-up", r"\boxed{\sqrt{4}}", "2")
    measured = {path.stem: measure(path, arguments.threads) for path in files}
    for name, row in measured.items():
        for failure in row.pop("failures"):
            limit = " (gave up)" if failure["gave_up"] else ""
            print(f"{name}, {failure['writing']}{limit}: truth {failure['truth']!r}, answer {failure['answer']!r}")
    columns = ["set", "rows", *(f"{name} scored {wanted:g}" for name, (_, wanted) in WRITINGS.items())]
    columns += ["errors", "gave up", "answers/s", "slowest"]
    print("", *(f"| {column} " for column in columns), "|\n", *("|---" for _ in columns), "|", sep="")
    for name, row in measured.items():
        right = [f"{row['asked'][writing] - row['wrong'][writing]} of {row['asked'][writing]}" for writing in WRITINGS]
        errors = f"{sum(row['wrong'].values()) / sum(row['asked'].values()):.2%}"
        figures = [name, row["rows"], *right, errors, row["gave_up"], row["answers_per_second"]]
        print("| " + " | ".join(map(str, [*figures, f"{row['slowest_seconds']} s"])) + " |")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
