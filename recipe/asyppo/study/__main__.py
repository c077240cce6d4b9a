"""``python -m recipe.asyppo.study ROW ...``: run rows of the study, as many runs at once as a stack holds.

A run that is done is not run again; Ctrl-C or ``--seconds`` lose only the stack in progress.
``--list`` shows the rows and how far they are; ``report`` in place of a row writes tables and plots into docs/study.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from recipe.asyppo.one_page import Models
from recipe.asyppo.study import engine, report, rows, tasks
from recipe.asyppo.study.credit import Run
from recipe.asyppo.study.rows import Seeds, Store


def starting_model(task: tasks.Task, folder: Path, size: tuple[int, int]) -> Models:
    """The task's language model of a size, made once and kept in the folder."""
    path = folder / f"start_{task.name}_{size[0]}x{size[1]}.pt"
    if not path.exists():
        model = tasks.starting_model(task, size)
        torch.save({name: weight.detach().cpu() for name, weight in model.weights.items()}, path)
    weights = torch.load(path, weights_only=True, map_location=torch.get_default_device())
    return Models([weights], [0.0])


def machine() -> str:
    return torch.cuda.get_device_name() if torch.get_default_device().type == "cuda" else platform.processor() or "CPU"


def commit() -> str:
    """The commit of this checkout; ``COMMIT`` of the environment names it where there is none."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"


def run_row(row: str, store: Store, seeds: Seeds, *, stack: int, has_time: Callable[[], bool]) -> bool:
    """Run what the row lacks; False if time ran out before its end."""
    while True:
        missing = [(name, run) for name, run in rows.runs_of(row, store, seeds) if store.line(name, run) is None]
        if not missing:
            return True
        name = missing[0][0]
        task = tasks.named(name)
        start = partial(starting_model, task, store.path.parent)
        runs = sorted((run for other, run in missing if other == name), key=engine.kind)
        runs = [run for run in runs if run.free_steps == runs[0].free_steps][:stack]
        began = time.perf_counter()
        with tqdm(total=store.steps, desc=f"{row}: {len(runs)} of {len(missing)} runs", mininterval=2) as bar:
            history = engine.train(task, runs, start, steps=store.steps, may_go_on=has_time, progress=bar.update)
        save(store, name, runs, history, (time.perf_counter() - began) / len(runs))
        if len(history) < store.steps:
            return False


def save(store: Store, task: str, runs: Sequence[Run], history: list[list[dict]], seconds: float) -> None:
    """A line for every run, also of those that were stopped: their beginning may be all that a row needs."""
    for index, run in enumerate(runs if history else []):
        series = {metric: [round(step[index][metric], 4) for step in history] for metric in history[0][index]}
        facts = {"seconds": round(seconds, 2), "machine": machine(), "commit": commit()}
        store.add(task, run, series.pop("reward"), metrics=series, **facts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipe.asyppo.study", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help="rows, in order, or: report")
    parser.add_argument("--list", action="store_true", help="show the rows and how far they are")
    parser.add_argument("--seeds", type=int, default=5, help="seeds that are reported")
    parser.add_argument("--tuning-seeds", type=int, default=2, help="other seeds that choose the learning rates")
    parser.add_argument("--fresh-seeds", type=int, default=10, help="seeds of the runs with tables of their own")
    parser.add_argument("--steps", type=int, default=50, help="of 128 responses")
    parser.add_argument("--stack", type=int, help="runs at once (192 on a GPU; 4 on a CPU, where more are no faster)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop cleanly after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parser.add_argument("--out", type=Path, default=Path("docs/study"), help="where report writes")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    counts = {0: options.seeds, 100: options.tuning_seeds, 200: options.fresh_seeds}
    seeds = Seeds(*(tuple(range(first, first + count)) for first, count in counts.items()))
    store = Store(options.folder, steps=options.steps)
    stack = options.stack or (4 if options.device == "cpu" else 192)
    torch.set_default_device(options.device)
    torch.set_float32_matmul_precision("high")
    if options.list:
        print("\n".join(report.progress(store, seeds)))
    elif options.rows == ["report"]:
        if min(options.seeds, options.fresh_seeds) < 2 or not store.done:
            parser.error(f"a report needs two or more seeds of both kinds, and runs in --folder {options.folder}")
        report.write(store, seeds, options.out)
    for row in options.rows if options.rows != ["report"] else []:
        try:
            finished = run_row(row, store, seeds, stack=stack, has_time=lambda: time.monotonic() < end)
        except ValueError as error:
            sys.exit(str(error))
        if not finished:
            print(f"time is up in {row}; the same command goes on from here")
            break


if __name__ == "__main__":
    main()
