"""A run folder: held by one run at a time, resumed or moved aside by the next, its metrics read and summed up.

It holds ``metrics.jsonl`` (verl's file logger, one JSON object a step), ``checkpoints/`` and ``log``. A folder whose latest
checkpoint is below ``trainer.total_training_steps`` (or where that is null), or that ``trainer.resume_from_path`` is in, is
resumed with its metrics kept; any other earlier run is moved aside, never overwritten.
"""

import contextlib
import fcntl
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from asyppo_verl.checkpoint import latest_step

HISTORY = ".history.jsonl"
"""Suffix of the metrics before a resumption, while the resumed run goes on."""

REWARD = "critic/score/mean"
SECONDS = "timing_s/step"
EXPLAINED, MASKED, KEPT = "asyppo/explained_var", "asyppo/adv_abs_masked", "asyppo/adv_abs_kept"


def setting(command: Sequence[str], key: str) -> str | None:
    """The value that an override has in a command; the last one counts, as in hydra."""
    values = [part.split("=", 1)[1] for part in command if part.lstrip("+").startswith(f"{key}=")]
    return values[-1] if values else None


def last_step(command: Sequence[str]) -> int | None:
    """The number that ``trainer.total_training_steps`` has in a command; None if the data decide (``null``)."""
    value = (setting(command, "trainer.total_training_steps") or "").strip("'\"")
    return int(value) if value.isdecimal() else None


@contextlib.contextmanager
def alone(run_dir: Path) -> Iterator[list[int]]:
    """Keep other runs out of a run folder, whose files would mix, as long as a process has the descriptors that it yields."""
    lock = run_dir.resolve().with_name(f".{run_dir.resolve().name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(lock, "w"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = [file.fileno()]
        except BlockingIOError:
            raise SystemExit(
                f"error: a run is going on in {run_dir}; wait for it, or choose another folder (RUN_DIR, --out)"
            ) from None
        except OSError:
            held = []  # a file system without locks, or a parent that cannot be written
        yield held


def prepare(run_dir: Path, command: Sequence[str]) -> None:
    """Keep what an earlier run left: as history if this one resumes it, else moved to ``<run_dir>.<n>``."""
    merge_history(run_dir)
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists() or (run_dir / "checkpoints").exists():
        if start := resumed_from(run_dir, command):
            print(f"resuming {run_dir} after step {start}")
            if metrics.exists():
                metrics.rename(metrics.with_suffix(HISTORY))
        else:
            aside = next(p for n in range(1, 10_000) if not (p := run_dir.with_name(f"{run_dir.name}.{n}")).exists())
            run_dir.rename(aside)
            print(f"an earlier run is now in {aside}")
    run_dir.mkdir(parents=True, exist_ok=True)


def resumed_from(run_dir: Path, command: Sequence[str]) -> str | None:
    """The step of the checkpoint of this folder that the command will go on from, if it will."""
    mode = setting(command, "trainer.resume_mode")
    if mode == "resume_path":
        start = Path((setting(command, "trainer.resume_from_path") or "").strip("'\"")).resolve()
        return start.name.removeprefix("global_step_") if run_dir.resolve() in start.parents else None
    try:
        step = latest_step(run_dir / "checkpoints") if mode != "disable" else None
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    is_unfinished = step and ((last := last_step(command)) is None or step < last)
    return str(step) if is_unfinished else None


def read_metrics(metrics: Path) -> dict[int, dict]:
    """Step -> metrics, of a file of verl's logger and of the history that a resumption left beside it, in order of steps.

    The history counts up to the first step of the file, of which both may have a part: verl validates when it resumes, and
    logs that under the step of the checkpoint. A line cut off by a crash is left out.
    """
    steps: dict[int, dict] = {}
    for path in (metrics.with_suffix(HISTORY), metrics):
        entries = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                entries.append(json.loads(line))
        if entries:
            steps = {step: data for step, data in steps.items() if step <= entries[0]["step"]}
        for entry in entries:
            steps[entry["step"]] = steps.get(entry["step"], {}) | entry["data"]
    return dict(sorted(steps.items()))


def numbers(data: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a logged step; verl's file logger writes NaN and infinity as null."""
    return {
        key: math.nan if value is None else float(value)
        for key, value in data.items()
        if value is None or isinstance(value, (int, float))
    }


def merge_history(run_dir: Path) -> None:
    """Put the steps before a resumption in front of those after it."""
    metrics = run_dir / "metrics.jsonl"
    history = metrics.with_suffix(HISTORY)
    if not history.exists():
        return
    steps = read_metrics(metrics)
    merged = run_dir / "metrics.merged.jsonl"
    merged.write_text("".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in steps.items()))
    merged.replace(metrics)
    history.unlink()


def summary(run_dir: Path, wanted: int | None = None) -> str:
    """Where the files are, what the last fifth of the run shows, and that fewer steps than ``wanted`` were made."""
    logged = read_metrics(run_dir / "metrics.jsonl")
    found = {step: numbers(data) for step, data in logged.items() if REWARD in data}
    lines = [f"\nrun folder   {run_dir} (metrics.jsonl, checkpoints/, log)"]
    if found:
        lines += figures([*found.values()])
    if found and wanted is not None and (last := max(found)) < wanted:
        lines.append(f"ended early  after step {last} of {wanted}: the data lasted for trainer.total_epochs only")
    return "\n".join(lines)


def figures(steps: Sequence[dict]) -> list[str]:
    """Does it learn, do the critics know anything, do the masks hit tokens that matter less; and seconds a step."""
    first, last = steps[: min(5, max(1, len(steps) // 5))], steps[-max(1, len(steps) // 5) :]

    def mean(key: str, part: Sequence[dict] = last) -> float:
        return statistics.mean(step[key] for step in part)

    where = f"the last {len(last)} of {len(steps)} steps"
    lines = [
        f"reward       {mean(REWARD, first):.3f} -> {mean(REWARD):.3f} (mean of the first {len(first)} and {where})"
    ]
    if all(EXPLAINED in step for step in last):
        lines.append(f"critics      explained variance {mean(EXPLAINED):.3f} in {where}; 1 is perfect, 0 a constant")
    if all(MASKED in step for step in last) and mean(MASKED):
        lines.append(
            f"masks        |advantage| of masked over kept tokens: {mean(MASKED) / mean(KEPT):.2f}, same steps"
        )
    return [*lines, f"step time    {statistics.median(step[SECONDS] for step in steps):.2f} s (median)"]
