"""The rows of the study: which runs each needs. A row may rest on earlier ones: the learning rates come from the tuning.

Every run has its line in ``runs.jsonl``; two rows that need the same run share it.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean

from recipe.asyppo.study.credit import Run
from recipe.asyppo.study.tasks import TASKS, Task

CRITIC_LRS = (3e-3, 1e-2)
ALGORITHMS = {
    "grpo": Run(num_critics=0),
    "oracle": Run(num_critics=0, is_oracle=True),
    "oracle lam=0": Run(num_critics=0, is_oracle=True, lam=0.0),
    "ppo": Run(num_critics=1, critic_size=Task("").actor_size),
    "ppo_small_critic": Run(num_critics=1),
    "asyppo": Run(num_critics=2),
}
WITHOUT_CRITICS = ("grpo", "oracle", "oracle lam=0")
TO_CONFIRM = ("grpo", "ppo_small_critic", "asyppo")
TaskRun = tuple[str, Run]
"""A task's name, and a run of it."""


def key(task: str, run: Run) -> str:
    """One text for one run: all its settings."""
    return json.dumps([task, asdict(run)], sort_keys=True)


class Store:
    """The runs of a folder, a JSON line each. A long one holds a short one as its beginning: learning rates are constant."""

    def __init__(self, folder: Path, *, steps: int) -> None:
        self.path, self.steps = folder / "runs.jsonl", steps
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.done: dict[str, dict] = {}
        for line in map(json.loads, lines):
            self._keep(line)

    def add(self, task: str, run: Run, curve: Sequence[float], **facts: object) -> None:
        line = {"key": key(task, run), "curve": [round(reward, 4) for reward in curve], **facts}
        self._keep(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _keep(self, line: dict) -> None:
        """The longest of a run's lines counts: a later one may have been stopped early."""
        if len(line["curve"]) >= len(self.done.get(line["key"], {"curve": ()})["curve"]):
            self.done[line["key"]] = line

    def line(self, task: str, run: Run) -> dict | None:
        """The run's line, if it has as many steps as are asked for."""
        line = self.done.get(key(task, run))
        return line if line and len(line["curve"]) >= self.steps else None

    def score(self, task: str, run: Run) -> float | None:
        """Mean reward in the last fifth of the steps that are asked for; None for a run that is not there."""
        line = self.line(task, run)
        return None if line is None else fmean(line["curve"][self.steps - max(1, self.steps // 5) : self.steps])

    def scores(self, runs: Iterable[TaskRun]) -> list[float] | None:
        """Scores of a setting by seed; None if one is missing."""
        scores = [self.score(task, run) for task, run in runs]
        there = [score for score in scores if score is not None]
        return there if len(there) == len(scores) else None


@dataclass(frozen=True)
class Seeds:
    """Seeds that choose the learning rates, others that are reported, and those of runs with tables of their own."""

    main: tuple[int, ...] = tuple(range(5))
    tuning: tuple[int, ...] = (100, 101)
    fresh: tuple[int, ...] = tuple(range(200, 210))


def grid(task: str, algorithm: str) -> list[Run]:
    """The settings among which an algorithm's is chosen; the highest rate only shows where those without critics break."""
    base, rates = ALGORITHMS[algorithm], TASKS[task].actor_lrs
    if algorithm in WITHOUT_CRITICS:
        return [replace(base, actor_lr=lr) for lr in rates]
    return [replace(base, actor_lr=lr, critic_lr=critic_lr) for lr, critic_lr in product(rates[:-1], CRITIC_LRS)]


def best(store: Store, task: str, algorithm: str, seeds: Seeds) -> Run | None:
    """The setting with the highest mean score on the tuning seeds; None before they are there."""
    settings = grid(task, algorithm)
    scores = {run: fmean(found) for run in settings if (found := store.scores(with_seeds(task, [run], seeds.tuning)))}
    return max(scores, key=scores.__getitem__) if len(scores) == len(settings) else None


def ablations(run: Run) -> dict[str, dict[str, Run]]:
    """Variants of a tuned AsyPPO run, by row and name; the first of a row is what the others are compared with."""
    shares = (0.0, 0.05, 0.2, 0.4)
    masked = replace(run, entropy_filter_fraction=0.0)
    bare = replace(masked, adv_mask_fraction=0.0)
    kh = {
        f"k={k} h={h}": replace(run, adv_mask_fraction=k, entropy_filter_fraction=h) for k, h in product(shares, shares)
    }
    return {
        "masks": {
            "both": run,
            "masks off": bare,
            "mask alone": masked,
            "filter alone": replace(run, adv_mask_fraction=0.0),
            "both from 0.2 explained": replace(run, mask_from=0.2),
        },
        "lambdas": {
            f"lam={lam} critic_lam={critic_lam}": replace(run, lam=lam, critic_lam=critic_lam)
            for lam, critic_lam in ((0.95, 1.0), (0.0, 1.0), (0.5, 1.0), (0.8, 1.0), (1.0, 1.0), (0.95, 0.95))
        },
        "lam0": {
            "both": (at_once := replace(run, lam=0.0)),
            "both from 0.2 explained": replace(at_once, mask_from=0.2),
            "masks off": (unmasked := replace(bare, lam=0.0)),
            "one small critic": replace(unmasked, num_critics=1),
        },
        "shares": {"k=0.2 h=0.2": run} | kh,
        "shard": {shard: replace(run, shard=shard) for shard in ("group", "prompt", "none", "half")},
        "number": {
            f"M={m} of {size[0]} x {size[1]}": replace(run, num_critics=m, critic_size=size)
            for m, size in ((2, (16, 1)), (1, (16, 1)), (4, (16, 1)), (1, (16, 2)), (2, (16, 2)))
        },
        "mask_by": {by: replace(masked, mask_by=by) for by in ("sigma", "relative", "highest", "random", "surprisal")}
        | {"no mask": bare},
        "update_first": {
            "after": bare,
            "before": (before := replace(bare, update_first=True)),
            "before, both masks": replace(run, update_first=True),
            "before, lam=0.8": replace(before, lam=0.8),
            "before, lam=0": replace(before, lam=0.0),
            "before, adaptive lam": (adaptive := replace(before, adaptive_lam=True)),
            "before, adaptive lam, both masks": replace(run, update_first=True, adaptive_lam=True),
            "after, adaptive lam": replace(adaptive, update_first=False),
        },
        "warmup": {f"{steps} steps": replace(run, critic_warmup=steps) for steps in (0, 2, 5, 10)},
        "critic_size": {
            f"{width} x {layers}": replace(run, critic_size=(width, layers))
            for width, layers in ((16, 1), (16, 2), (32, 1), (32, 2))
        },
        "pretraining": {f"{steps} steps before": replace(run, free_steps=steps) for steps in (0, 25, 100, 400, 1000)},
    }


ABLATIONS = tuple(ablations(ALGORITHMS["asyppo"]))


def confirmation(store: Store, task: str, seeds: Seeds) -> dict[str, Run]:
    """What is run again on fresh tables: tuned GRPO, one small critic and AsyPPO, and what the study made of the last.

    Nothing before the learning rates are known.
    """
    grpo, small, run = (best(store, task, algorithm, seeds) for algorithm in TO_CONFIRM)
    if not (grpo and small and run):
        return {}
    bare = replace(run, adv_mask_fraction=0.0, entropy_filter_fraction=0.0)
    return {
        "grpo": grpo,
        "one small critic": small,
        "asyppo": run,
        "asyppo, masks off": bare,
        "critics first, lam=0": replace(bare, update_first=True, lam=0.0),
        "critics first, adaptive lam": replace(bare, update_first=True, adaptive_lam=True),
    }


def runs_of(row: str, store: Store, seeds: Seeds) -> list[TaskRun]:
    """The runs of a row, such as ``fitness-plain``: those that choose learning rates, and once they are there, those
    that are reported.

    Raises:
        ValueError: for a row that is unknown.
    """
    name, _, task = row.partition("-")
    if task not in TASKS or name not in NAMES:
        raise ValueError(f"row {row!r} is none of: {', '.join(rows())}")
    algorithms = {"fitness": WITHOUT_CRITICS, "main": tuple(ALGORITHMS), "fresh": TO_CONFIRM}.get(name, ("asyppo",))
    grids = with_seeds(task, [run for algorithm in algorithms for run in grid(task, algorithm)], seeds.tuning)
    tuned = [run for algorithm in algorithms if (run := best(store, task, algorithm, seeds))]
    if len(tuned) < len(algorithms):
        return grids
    if name == "fresh":
        return grids + on_fresh_tables(task, confirmation(store, task, seeds).values(), seeds)
    if name in ABLATIONS:
        tuned = list(ablations(tuned[0])[name].values())
    return grids + with_seeds(task, tuned, seeds.main)


def with_seeds(task: str, settings: Iterable[Run], seeds: Iterable[int]) -> list[TaskRun]:
    return [(task, replace(run, seed=seed)) for run, seed in product(dict.fromkeys(settings), seeds)]


def on_fresh_tables(task: str, settings: Iterable[Run], seeds: Seeds) -> list[TaskRun]:
    """A seed draws everything here: table, demonstrations, start, prompts and value heads."""
    return [(f"{task}@{seed}", replace(run, seed=seed)) for seed, run in product(seeds.fresh, dict.fromkeys(settings))]


NAMES = ("fitness", "main", *ABLATIONS, "fresh")


def rows() -> list[str]:
    """All rows, the most important first."""
    return [f"{name}-{task}" for name in NAMES for task in TASKS]
