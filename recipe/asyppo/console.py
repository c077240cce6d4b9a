"""Run a training command in a run folder: progress on the terminal, the whole log in a file, a summary at the end.

``python -m recipe.asyppo.console RUN_DIR [--verbose] -- COMMAND ...``

The folder holds ``metrics.jsonl`` (verl's file logger, one JSON object a step), ``checkpoints/`` and ``log``. A folder
whose latest checkpoint is below ``trainer.total_training_steps`` is resumed with its metrics kept; any other earlier run
is moved aside, never overwritten.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from asyppo_verl.checkpoint import latest_step

PROGRESS = re.compile(r"Training Progress:.*")
REWARD = "critic/score/mean"
SECONDS = "timing_s/step"


def setting(command: Sequence[str], key: str) -> str | None:
    """The value that an override has in a command; the last one counts, as in hydra."""
    values = [part.split("=", 1)[1] for part in command if part.lstrip("+").startswith(f"{key}=")]
    return values[-1] if values else None


def prepare(run_dir: Path, command: Sequence[str]) -> None:
    """Keep what an earlier run left: as history if this one resumes it, else moved to ``<run_dir>.<n>``."""
    merge_history(run_dir)
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists() or (run_dir / "checkpoints").exists():
        try:
            step = latest_step(run_dir / "checkpoints")
        except ValueError as error:
            raise SystemExit(f"error: {error}") from error
        last_step = setting(command, "trainer.total_training_steps")
        resumes = step and last_step and step < int(last_step) and setting(command, "trainer.resume_mode") != "disable"
        if resumes:
            print(f"resuming {run_dir} after step {step}")
            if metrics.exists():
                metrics.rename(run_dir / "metrics.history.jsonl")
        else:
            aside = next(p for n in range(1, 10_000) if not (p := run_dir.with_name(f"{run_dir.name}.{n}")).exists())
            run_dir.rename(aside)
            print(f"an earlier run is now in {aside}")
    run_dir.mkdir(parents=True, exist_ok=True)


def read_metrics(path: Path) -> list[dict]:
    """The steps of a metrics file; a line cut off by a crash is left out."""
    steps = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            steps.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return steps


def merge_history(run_dir: Path) -> None:
    """Put the steps before a resumption in front of those after it; a repeated step counts as last written."""
    metrics, history = run_dir / "metrics.jsonl", run_dir / "metrics.history.jsonl"
    if not history.exists():
        return
    steps = {line["step"]: line for line in [*read_metrics(history), *read_metrics(metrics)]}
    merged = run_dir / "metrics.merged.jsonl"
    merged.write_text("".join(json.dumps(steps[step]) + "\n" for step in sorted(steps)))
    merged.replace(metrics)
    history.unlink()


def run(run_dir: Path, command: Sequence[str], *, verbose: bool) -> int:
    """Run the command, all output into ``log``; returns its exit code."""
    environment = {**os.environ, "VERL_FILE_LOGGER_PATH": str(run_dir / "metrics.jsonl"), "PYTHONUNBUFFERED": "1"}
    tail: deque[str] = deque(maxlen=40)
    is_terminal = sys.stdout.isatty()
    print(f"starting Ray, verl and vLLM, about a minute; log in {run_dir / 'log'}", flush=True)
    with (
        open(run_dir / "log", "a") as log,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout
        for line in process.stdout:
            log.write(line)
            log.flush()
            tail.append(line)
            progress = PROGRESS.search(line)
            if verbose:
                print(line, end="", flush=True)
            elif progress:
                print(progress.group().rstrip(), end="\r" if is_terminal else "\n", flush=True)
        code = process.wait()
    if code and not verbose:
        print("".join(tail), file=sys.stderr)
        print(f"the run failed with exit code {code}; the whole log is {run_dir / 'log'}", file=sys.stderr)
    return code


def summary(run_dir: Path) -> str:
    """Reward at the start and the end, seconds per step, and where the files are."""
    steps = [line["data"] for line in read_metrics(run_dir / "metrics.jsonl") if REWARD in line["data"]]
    lines = [f"\nrun folder   {run_dir} (metrics.jsonl, checkpoints/, log)"]
    if steps:
        window = min(5, max(1, len(steps) // 4))
        start, end = (statistics.mean(s[REWARD] for s in part) for part in (steps[:window], steps[-window:]))
        seconds = statistics.median(step[SECONDS] for step in steps)
        lines += [
            f"reward       {start:.3f} -> {end:.3f} (mean of the first and the last {window} of {len(steps)} steps)",
            f"step time    {seconds:.2f} s (median)",
        ]
    return "\n".join(lines)


def main() -> None:
    usage = "python -m recipe.asyppo.console [-h] [--verbose] RUN_DIR -- COMMAND ..."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=usage)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--verbose", action="store_true", help="show the whole log")
    separator = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, command = parser.parse_args(sys.argv[1:separator]), sys.argv[separator + 1 :]
    if not command:
        parser.error("a training command must follow --")
    prepare(arguments.run_dir, command)
    try:
        code = run(arguments.run_dir, command, verbose=arguments.verbose)
    finally:
        merge_history(arguments.run_dir)
    if code == 0:
        print(summary(arguments.run_dir))
    sys.exit(code)


if __name__ == "__main__":
    main()
