"""Runs side by side: ``python -m recipe.asyppo.evaluation.compare RUN_A RUN_B ... [--json OUT.json]``.

A run is a run folder (``metrics.jsonl``, ``evaluation/``) or the folder of one evaluation. Prints Markdown; "-" stands
where a run has no such figure, and a note says why. Differences are taken to the first run.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from recipe.asyppo.evaluation import results, score
from recipe.asyppo.run_folder import REWARD, SECONDS, numbers, read_metrics

CRITIC_SECONDS = ("timing_s/values", "timing_s/update_critic")
TOKENS_PER_SECOND = "perf/throughput"
MEMORY = "perf/max_memory_allocated_gb"
# What two evaluations must have in common for a difference to mean something; their problems are compared themselves.
SAMPLING = ("temperature", "top_p", "top_k", "max_response_length", "reward")
TRAINING = {
    # heading: (figure, format)
    "steps": ("steps", "{:.0f}"),
    "reward, first steps": ("reward_start", "{:.3f}"),
    "last steps": ("reward_end", "{:.3f}"),
    "step, s": ("step_seconds", "{:.2f}"),
    "critic's share": ("critic_share", "{:.1%}"),
    "peak memory, GB": ("memory_gb", "{:.1f}"),
    "tokens/s per GPU": ("tokens_per_second", "{:.0f}"),
}


def load(path: Path) -> dict[str, Any]:
    """Everything known about a run.

    Raises:
        ValueError: if the folder holds neither metrics nor an evaluation.
    """
    steps = [numbers(data) for data in read_metrics(path / "metrics.jsonl").values() if SECONDS in data]
    files = (
        [path / "results.json"] if (path / "results.json").exists() else (path / "evaluation").glob("*/results.json")
    )
    latest = max(files, key=lambda file: _step(file.parent), default=None)
    if not steps and latest is None:
        raise ValueError(f"{path} holds neither metrics.jsonl with steps nor results.json or evaluation/*/results.json")
    evaluation = json.loads(latest.read_text()) | {"step": _step(latest.parent)} if latest else None
    return {
        "path": str(path),
        # An evaluation keeps verl's configuration too, but trains nothing.
        "algorithm": algorithm(path / "hydra/.hydra/config.yaml") if steps else None,
        "training": training(steps),
        "evaluation": evaluation,
    }


def _step(folder: Path) -> int:
    found = re.fullmatch(r"global_step_(\d+)", folder.name)
    return int(found[1]) if found else -1


def algorithm(config: Path) -> str | None:
    """The estimator of the configuration that hydra keeps in a run folder, with the number of mini-critics."""
    if not config.exists():
        return None
    settings = yaml.safe_load(config.read_text())
    name = settings["algorithm"]["adv_estimator"]
    critics = (settings.get("asyppo") or {}).get("num_critics")
    return f"{name}, M = {critics}" if critics else name


def training(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Figures of the steps of a run, as many as it logged. Times are medians, so that the first step does not count."""

    def logged(key: str) -> list[float]:
        return [step[key] for step in steps if key in step]

    rewards = logged(REWARD)
    window = min(5, max(1, len(rewards) // 4))
    with_critic = [step for step in steps if all(key in step for key in CRITIC_SECONDS)]
    figures: dict[str, tuple[Callable, list[float]]] = {
        "steps": (len, logged(SECONDS)),
        "reward_start": (statistics.mean, rewards[:window]),
        "reward_end": (statistics.mean, rewards[-window:]),
        "step_seconds": (statistics.median, logged(SECONDS)),
        "critic_share": (
            statistics.median,
            [sum(step[key] for key in CRITIC_SECONDS) / step[SECONDS] for step in with_critic],
        ),
        "memory_gb": (max, [value for step in steps for key, value in step.items() if key.endswith(MEMORY)]),
        "tokens_per_second": (statistics.median, logged(TOKENS_PER_SECOND)),
    }
    return {name: reduce(values) for name, (reduce, values) in figures.items() if values}


def obstacles(run: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> dict[str, str]:
    """The reasons why two evaluations cannot be compared, by benchmark; under "" what concerns all of them."""
    if run is None or base is None:
        return {"": "one of them has no evaluation"}
    mine, others = ({key: _value(key, each["settings"].get(key)) for key in SAMPLING} for each in (run, base))
    if differing := [f"{key} is {mine[key]}, not {others[key]}" for key in SAMPLING if mine[key] != others[key]]:
        return {"": ", ".join(differing)}
    found = {}
    for name in dict.fromkeys([*base["problems"], *run["problems"]]):
        problems, asked = (each["problems"].get(name, {}).keys() for each in (run, base))
        if not (problems and asked):
            found[name] = f"only one of them has {name}"
        elif problems != asked:
            found[name] = f"{len(problems ^ asked)} problems of {name} are in one of them only"
    return found


def _value(key: str, written: str | None) -> Any:
    """An override as hydra reads it, so that 1 and 1.0 are the same temperature; of the reward's file the name."""
    if written is None or key == "reward":
        return written and Path(written).name
    return yaml.safe_load(written)


def difference(run: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> dict[str, Any]:
    """avg@k of ``run`` minus that of ``base``, over the same problems: a paired bootstrap.

    Benchmarks with :func:`obstacles` are left out; the average is over those that remain.
    """
    left_out = obstacles(run, base)
    if run is None or base is None or "" in left_out:
        return {}
    columns = {}
    for name, problems in run["problems"].items():
        if name in left_out:
            continue
        others = base["problems"][name]
        columns[name] = {
            "avg": [
                right / samples - others[problem][0] / others[problem][1]
                for problem, (right, samples) in problems.items()
            ]
        }
    if not columns:
        return {}
    table, average = score.estimate(columns)
    return {name: asdict(entry["avg"]) for name, entry in (table | {"average": average}).items()}


def compare(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """One entry a run, the first being the one that the others are compared with."""
    runs = [load(path) for path in paths]
    names = [path.resolve().name for path in paths]
    for run, name in zip(runs, names, strict=True):
        run["name"] = name if names.count(name) == 1 else run["path"]
        base = runs[0]["evaluation"]
        run["difference"] = difference(run["evaluation"], base) if run is not runs[0] else {}
        run["notes"] = [*run["evaluation"]["notes"]] if run["evaluation"] else []
        if run is not runs[0] and (run["evaluation"] or base):
            left_out = ", ".join(obstacles(run["evaluation"], base).values())
            run["notes"] += [f"no difference to {runs[0]['name']}: {left_out}"] if left_out else []
    return runs


def markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """Training, benchmarks, and differences to the first run, without empty tables; then why figures are missing."""
    parts = []
    if any(run["training"] for run in runs):
        rows = [[run["name"], run["algorithm"] or "-", *_training_cells(run["training"])] for run in runs]
        parts.append(results.grid(["training", "estimator", *TRAINING], rows))
    evaluations = [run["evaluation"] for run in runs if run["evaluation"]]
    benchmarks = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation["benchmarks"]))
    if benchmarks:
        rows = [[run["name"], *_benchmark_cells(run["evaluation"], benchmarks)] for run in runs]
        parts.append(results.grid(["avg@k, percent", "step", "k", *benchmarks, "average"], rows))
    if any(run["difference"] for run in runs):
        columns = [*benchmarks, "average"]
        rows = [
            [run["name"], *(results.percent(run["difference"].get(column), sign="+") for column in columns)]
            for run in runs[1:]
        ]
        parts.append(results.grid([f"minus {runs[0]['name']}, paired", *columns], rows))
    if notes := [f"* {run['name']}: {note}" for run in runs for note in run["notes"]]:
        parts.append("\n".join(notes))
    return "\n".join(parts)


def _training_cells(figures: Mapping[str, float]) -> list[str]:
    return [form.format(figures[name]) if name in figures else "-" for name, form in TRAINING.values()]


def _benchmark_cells(evaluation: Mapping[str, Any] | None, benchmarks: Sequence[str]) -> list[str]:
    if evaluation is None:
        return ["-"] * (len(benchmarks) + 3)
    entries = [evaluation["benchmarks"].get(name, {}) for name in benchmarks]
    cells = [results.percent(_average_at_k(entry)) for entry in [*entries, evaluation["average"]]]
    step = str(evaluation["step"]) if evaluation["step"] >= 0 else "-"
    return [step, str(evaluation["settings"]["k"]), *cells]


def _average_at_k(entry: Mapping[str, Any]) -> Mapping[str, float] | None:
    return next((value for key, value in entry.items() if key.startswith("avg@")), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--json", type=Path, help="write every figure, in full precision")
    arguments = parser.parse_args()
    try:
        runs = compare(arguments.runs)
    except ValueError as error:
        sys.exit(f"compare: {error}")
    print(markdown(runs))
    if arguments.json:
        results.write(arguments.json, json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
