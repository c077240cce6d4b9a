"""Tables and plots of the study, from its finished runs."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

from recipe.asyppo.study import rows
from recipe.asyppo.study.credit import Run
from recipe.asyppo.study.rows import ABLATIONS, ALGORITHMS, Seeds, Store, TaskRun, on_fresh_tables, with_seeds
from recipe.asyppo.study.tasks import TASKS

HEAD = """# Tables of the study

Written by `python -m recipe.asyppo.study report`; what they mean is in [the study](../study.md). Mean score of the
seeds and its 95 % interval, differences paired by seed."""
FITNESS = rows.WITHOUT_CRITICS
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145)


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval, by Student's t; at least two numbers."""
    quantile = T_QUANTILES[min(len(numbers) - 1, len(T_QUANTILES)) - 1]
    return fmean(numbers), quantile * stdev(numbers) / len(numbers) ** 0.5


def shown(numbers: Sequence[float] | None, sign: str = "") -> str:
    if numbers is None:
        return "not run"
    mean, half = interval(numbers)
    return f"{mean:{sign}.3f} ± {half:.3f}"


def differences(ours: Sequence[float] | None, theirs: Sequence[float] | None) -> list[float] | None:
    """Differences by seed; None where one side is missing."""
    return None if ours is None or theirs is None else [a - b for a, b in zip(ours, theirs, strict=True)]


def progress(store: Store, seeds: Seeds) -> list[str]:
    """A line for every row: how many of its runs are done."""
    lines = []
    for row in rows.rows():
        runs = rows.runs_of(row, store, seeds)
        lines.append(f"{row:18} {sum(store.line(*run) is not None for run in runs)} of {len(runs)} runs")
    return lines


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_learning_rate(store: Store, task: str, seeds: Seeds) -> str:
    """Mean scores of what needs no learned critics on the tuning seeds, at every actor learning rate."""

    def cell(algorithm: str, lr: float) -> str:
        scores = store.scores(with_seeds(task, [replace(ALGORITHMS[algorithm], actor_lr=lr)], seeds.tuning))
        return f"{fmean(scores):.3f}" if scores else "not run"

    body = [[f"{lr:g}", *(cell(algorithm, lr) for algorithm in FITNESS)] for lr in TASKS[task].actor_lrs]
    return table(["actor lr", *FITNESS], body)


def setting(run: Run | None) -> str:
    if run is None:
        return "not tuned"
    critics = f", critic lr {run.critic_lr:g}" if run.num_critics else ""
    return f"actor lr {run.actor_lr:g}{critics}"


def mean_metric(store: Store, runs: Iterable[TaskRun], metric: str) -> str:
    """A metric over the last fifth of the runs, averaged over them; a dash where there is none."""
    lines = [store.line(*run) for run in runs]
    series = [line["metrics"].get(metric) for line in lines if line]
    fifth = slice(store.steps - max(1, store.steps // 5), store.steps)
    return f"{fmean(fmean(numbers[fifth]) for numbers in series):.2f}" if series and all(series) else "-"


def comparison(store: Store, task: str, seeds: Seeds) -> str:
    """Every algorithm at its tuned setting, on the main seeds, against GRPO seed by seed."""
    tuned = {algorithm: rows.best(store, task, algorithm, seeds) for algorithm in ALGORITHMS}
    runs = {algorithm: with_seeds(task, [run] if run else [], seeds.main) for algorithm, run in tuned.items()}
    scores = {algorithm: store.scores(runs[algorithm]) or None for algorithm in ALGORITHMS}
    body = [
        [
            algorithm,
            shown(scores[algorithm]),
            "-" if algorithm == "grpo" else shown(differences(scores[algorithm], scores["grpo"]), "+"),
            *(mean_metric(store, runs[algorithm], name) for name in ("explained_var", "masked_to_kept", "admitted")),
            setting(run),
        ]
        for algorithm, run in tuned.items()
    ]
    head = ["algorithm", "score", "less GRPO's", "explained variance", "masked to kept", "admitted", "tuned setting"]
    return table(head, body)


def ablation(store: Store, task: str, seeds: Seeds, name: str) -> tuple[str | None, str]:
    """The variants of one ablation that have run, against its first, and what is missing; no table of fewer than two."""
    tuned = rows.best(store, task, "asyppo", seeds)
    if tuned is None:
        return None, name
    variants = rows.ablations(tuned)[name]
    return variants_table(
        store, name, {variant: with_seeds(task, [run], seeds.main) for variant, run in variants.items()}
    )


def fresh(store: Store, task: str, seeds: Seeds) -> dict[str, list[TaskRun]]:
    """What is run again on fresh tables, GRPO first; nothing before the learning rates are known."""
    variants = rows.confirmation(store, task, seeds)
    return {name: on_fresh_tables(task, [run], seeds) for name, run in variants.items()}


def variants_table(store: Store, name: str, variants: Mapping[str, Sequence[TaskRun]]) -> tuple[str | None, str]:
    """The variants that have run, against the first, and what is missing; no table of fewer than two."""
    scores = {variant: store.scores(runs) for variant, runs in variants.items()}
    there = {variant: numbers for variant, numbers in scores.items() if numbers is not None}
    first, *others = scores.values() or [None]
    if first is None or len(there) < 2:
        return None, name
    body = [
        [
            variant,
            shown(numbers),
            "-" if numbers is first else shown(differences(numbers, first), "+"),
            mean_metric(store, variants[variant], "explained_var"),
        ]
        for variant, numbers in there.items()
    ]
    missing = f"{name} but for {', '.join(there)}" if None in others else ""
    return table([name, "score", "less the first's", "explained variance"], body), missing


def plot(store: Store, seeds: Seeds, path: Path) -> None:
    """Reward by responses of every algorithm at its tuned setting, mean of the seeds; a panel for each task that has runs."""
    import matplotlib.pyplot as plt

    panels = [task for task in TASKS if has_runs(store, task)]
    size = (4.5 * len(panels), 3.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axis, task in zip(axes[0], panels, strict=True):
        for algorithm in ALGORITHMS:
            run = rows.best(store, task, algorithm, seeds)
            runs = with_seeds(task, [run], seeds.main) if run else []
            if not store.scores(runs):
                continue
            lines = [store.done[rows.key(*run)] for run in runs]
            curve = [fmean(step) for step in zip(*(line["curve"][: store.steps] for line in lines), strict=True)]
            smooth = [fmean(curve[max(0, i - 1) : i + 1]) for i in range(len(curve))]
            responses = runs[0][1].prompts * runs[0][1].responses
            axis.plot([responses * (i + 1) for i in range(len(curve))], smooth, label=algorithm)
        axis.set(title=task, xlabel="responses", ylim=(0, 1))
    axes[0, 0].set_ylabel("reward")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=80)


def plot_fresh(store: Store, seeds: Seeds, path: Path) -> None:
    """Score less GRPO's on fresh tables, with 95 % intervals, of the tasks for which all of it has run."""
    import matplotlib.pyplot as plt

    scores = {
        task: {name: store.scores(runs) for name, runs in fresh(store, task, seeds).items()}
        for task in TASKS
        if has_runs(store, task)
    }
    scores = {task: of_task for task, of_task in scores.items() if of_task and all(of_task.values())}
    if not scores:
        return
    figure, axis = plt.subplots(figsize=(9, 3.5), layout="constrained")
    names = [name for name in next(iter(scores.values())) if name != "grpo"]
    for index, name in enumerate(names):
        found = [interval(differences(of_task[name], of_task["grpo"]) or []) for of_task in scores.values()]
        means, halves = zip(*found, strict=True)
        places = [place + 0.13 * (index - (len(names) - 1) / 2) for place in range(len(scores))]
        axis.errorbar(places, means, yerr=halves, fmt="o", capsize=3, label=name)
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.set_xticks(range(len(scores)), scores)
    axis.set_ylabel("score less GRPO's")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=80)


def has_runs(store: Store, task: str) -> bool:
    return any(json.loads(key)[0] == task for key in store.done)


def results(store: Store, seeds: Seeds) -> str:
    """All tables as Markdown."""
    parts = []
    for task in TASKS:
        parts += [f"## {task}"]
        if not has_runs(store, task):
            parts += ["Not run."]
            continue
        parts += [comparison(store, task, seeds), "Score by actor learning rate:", by_learning_rate(store, task, seeds)]
        found = [ablation(store, task, seeds, name) for name in ABLATIONS]
        found.append(variants_table(store, "fresh", fresh(store, task, seeds)))
        tables, missing = zip(*found, strict=True)
        parts += filter(None, tables)
        parts += [f"Not run on this task: {'; '.join(filter(None, missing))}."] if any(missing) else []
    seen = Counter((line["machine"], line["commit"]) for line in store.done.values())
    runs = [f"{count} on {machine} at commit {commit}" for (machine, commit), count in sorted(seen.items())]
    return "\n\n".join([*parts, f"{len(store.done)} runs: {'; '.join(runs)}."])


def write(store: Store, seeds: Seeds, folder: Path) -> None:
    """``tables.md``, ``curves.png`` and ``fresh.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    plot(store, seeds, folder / "curves.png")
    plot_fresh(store, seeds, folder / "fresh.png")
    (folder / "tables.md").write_text(f"{HEAD}\n\n{results(store, seeds)}\n")
