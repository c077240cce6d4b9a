"""From sampled answers to a table: what ``scripts/evaluate.sh`` writes and ``scripts/compare.sh`` reads."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from recipe.asyppo.evaluation import score

NO_MAJORITY = "maj@k is not available: the reward function returns no `pred`, the answer that it extracted"


def write(path: Path, text: str) -> None:
    """Write all of a file or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSONL file. Only a newline ends a line; a response may hold Unicode's other separators."""
    with open(path, encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def read_dump(path: Path) -> list[dict]:
    """The samples of verl's validation dump, each with benchmark, problem, answer and whether it is right."""
    from recipe.asyppo.evaluation.labelled_reward import LABEL  # here, since it imports verl, for seconds

    samples = []
    for row in read_lines(path):
        label = json.loads(row[LABEL])
        reward = label.pop("reward")
        samples.append(
            {
                **label,
                "prompt_uid": row["uid"].rsplit("_", 2)[0],
                "correct": as_right(said := reward.get("acc", row["score"])),
                "said": said,
                "score": row["score"],
                **({"answer": reward["pred"]} if "pred" in reward else {}),
                "ground_truth": row["gts"],
                "prompt": row["input"],
                "response": row["output"],
            }
        )
    return samples


def as_right(value: object) -> bool | None:
    """True for right, False for wrong, as a reward says; None if it says something in between."""
    return bool(value) if value in (0, 1) else None


def check_complete(samples: list[dict], *, problems: int, k: int, log: Path) -> None:
    """Refuse a dump in which responses are missing, which would make the benchmark easier, or none could be graded.

    Raises:
        ValueError: naming how many there are and where the reason is.
    """
    by_prompt: dict[str, int] = defaultdict(int)
    for sample in samples:
        by_prompt[sample["prompt_uid"]] += 1
    if len(by_prompt) != problems or set(by_prompt.values()) != {k}:
        raise ValueError(
            f"{problems * k - len(samples)} of {problems} problems x {k} responses are missing: their generation or reward "
            f"failed, {log} says why"
        )
    for name in sorted({sample["benchmark"] for sample in samples}):
        failures = [sample.get("failure") for sample in samples if sample["benchmark"] == name]
        if all(failures):
            raise ValueError(
                f"the reward function failed on every response of {name}, first with {failures[0]}: mend REWARD"
            )


def evaluate(samples: Iterable[Mapping[str, Any]], *, seed: int = 0) -> dict:
    """Every figure of the tables, and per problem what a paired comparison needs.

    Samples of the same problem belong together, also when a file lists it several times. The k of a benchmark is the
    smallest number of samples that one of its problems has.
    """
    grouped: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        grouped[sample["benchmark"]][sample["problem"]].append(sample)
    columns, facts, problems = {}, {}, {}
    for name in sorted(grouped):
        per_problem = list(grouped[name].values())
        columns[name] = _columns(per_problem)
        flat = [sample for group in per_problem for sample in group]
        facts[name] = {
            "problems": len(per_problem),
            "samples": len(flat),
            "response_tokens": float(np.mean([sample["tokens"] for sample in flat])),
            "truncated": float(np.mean([sample["truncated"] for sample in flat])),
        }
        if not is_graded(flat):
            right = {
                problem: [sum(s["correct"] for s in group), len(group)] for problem, group in grouped[name].items()
            }
            problems[name] = right
    table, average = score.estimate(columns, seed=seed)
    return {
        "benchmarks": {name: facts[name] | _plain(table[name]) for name in table},
        "average": _plain(average),
        "notes": _notes(grouped, table),
        "problems": problems,
    }


def is_graded(samples: Iterable[Mapping[str, Any]]) -> bool:
    """True if the reward of some sample says something between right and wrong."""
    return any(sample["correct"] is None for sample in samples)


def _notes(grouped: Mapping[str, Mapping[str, list]], table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The reasons why figures are missing, or less than they look."""
    notes, silent = [], []
    for name, per_problem in grouped.items():
        flat = [sample for group in per_problem.values() for sample in group]
        if failures := [sample["failure"] for sample in flat if "failure" in sample]:
            notes.append(
                f"{name}: {len(failures)} of {len(flat)} responses count 0 because the reward function failed, "
                f"first with {failures[0]}"
            )
        if is_graded(flat):
            said = next(sample["said"] for sample in flat if sample["correct"] is None)
            notes.append(
                f"{name}: the mean score only, since the reward function said {said!r}, and not which answers are right; let it "
                "return a dict with `score` and `acc`, where acc is 0 or 1"
            )
        elif not any(key.startswith("maj@") for key in table[name]):
            silent.append(name)
    if silent:
        notes.append(NO_MAJORITY if len(silent) == len(table) else f"{NO_MAJORITY} ({', '.join(sorted(silent))})")
    return notes + unequal_k(table)


def unequal_k(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A note if the benchmarks of an evaluation have no k in common."""
    k = {name: key.removeprefix("avg@") for name, entry in table.items() for key in entry if key.startswith("avg@")}
    shown = ", ".join(f"{name} {samples}" for name, samples in k.items())
    return [f"no average of avg@k and maj@k: k differs ({shown})"] if len(set(k.values())) > 1 else []


def _columns(per_problem: list[list[Mapping[str, Any]]]) -> dict[str, list[float]]:
    """One value a problem for avg@n, pass@k and, where answers are known, maj@n; for score@n where none is right or wrong."""
    n = min(map(len, per_problem))
    if any(map(is_graded, per_problem)):
        return {f"score@{n}": [float(np.mean([sample["score"] for sample in group])) for group in per_problem]}
    counts = [(sum(sample["correct"] for sample in group), len(group)) for group in per_problem]
    columns = {f"avg@{n}": [right / samples for right, samples in counts]}
    for k in score.powers(n):
        columns[f"pass@{k}"] = [score.pass_at_k(right, samples, k) for right, samples in counts]
    if all("answer" in sample for group in per_problem for sample in group):
        columns[f"maj@{n}"] = [
            score.majority([sample["answer"] for sample in group], [sample["correct"] for sample in group])
            for group in per_problem
        ]
    return columns


def _plain(estimates: Mapping[str, score.Estimate]) -> dict[str, dict[str, float]]:
    return {name: asdict(value) for name, value in estimates.items()}


def percent(value: Mapping[str, float] | None, *, sign: str = "", of: int = 100) -> str:
    """An estimate with its interval, in percent, or as it is (of 1); "-" if there is none."""
    if value is None:
        return "-"
    mid, low, high = (f"{of * value[key]:{sign}.{1 if of > 1 else 3}f}" for key in ("value", "low", "high"))
    return f"{mid} [{low}, {high}]"


def grid(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *rows))


def markdown(results: Mapping[str, Any]) -> str:
    """The table of one evaluation. pass@1 is left out: it is avg@k."""
    named = [key for entry in results["benchmarks"].values() for key in entry if "@" in key and key != "pass@1"]
    metrics = list(dict.fromkeys(named))
    rows = []

    def cells(entry: Mapping[str, Any]) -> list[str]:
        return [percent(entry.get(metric), of=1 if metric.startswith("score@") else 100) for metric in metrics]

    for name, entry in results["benchmarks"].items():
        figures = [f"{entry['response_tokens']:.4g}", f"{100 * entry['truncated']:.1f}"]
        rows.append([name, str(entry["problems"]), *cells(entry), *figures])
    rows.append(["average", "", *cells(results["average"]), "", ""])
    settings = ", ".join(f"{key} {value}" for key, value in results["settings"].items() if key != "files")
    lines = [
        f"# {results['target']}\n",
        grid(["benchmark", "problems", *metrics, "tokens", "truncated"], rows),
        f"Percent, with {score.LEVEL:.0%} intervals from {score.DRAWS:,} bootstrap draws of the problems. {settings}.",
        *results["notes"],
    ]
    return "\n".join(lines) + "\n"
