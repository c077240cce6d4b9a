"""Run a training command in a run folder: progress on the terminal, the complete log in a file, a summary at the end.

``python -m recipe.asyppo.console RUN_DIR [--verbose] -- COMMAND ...``

The folder holds ``metrics.jsonl`` (verl's file logger, one JSON object a step), ``checkpoints/`` and ``log``. A folder
whose latest checkpoint is below ``trainer.total_training_steps`` (or where that is open) is resumed with its metrics kept;
any other earlier run is moved aside, never overwritten. A signal that would end this program ends the training first.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from asyppo_verl.checkpoint import latest_step
from asyppo_verl.doctor import short_tmpdir
from recipe.asyppo import fork_server

PROGRESS = re.compile(r"Training Progress:.*")
REWARD = "critic/score/mean"
SECONDS = "timing_s/step"
EXPLAINED, MASKED, KEPT = "asyppo/explained_var", "asyppo/adv_abs_masked", "asyppo/adv_abs_kept"
QUESTIONS = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--info", "-i"}
"""hydra's flags that print something instead of running."""

PRIVATE_TMPDIR = "ASYPPO_PRIVATE_TMPDIR"
"""If set, the command gets a temporary folder of its own, which is removed after it, and with it a fork server."""

RAY_LOGS = "ray/session_latest/logs"
"""Where Ray has the output of its processes, in its temporary folder; kept as ``ray_logs`` if the command fails."""

# Ray's shell reads it: python of the fork server, in that folder. verl 0.9.0 has no such key.
FORKED = "++ray_kwargs.ray_init.runtime_env.py_executable='$TMPDIR/python'"


def setting(command: Sequence[str], key: str) -> str | None:
    """The value that an override has in a command; the last one counts, as in hydra."""
    values = [part.split("=", 1)[1] for part in command if part.lstrip("+").startswith(f"{key}=")]
    return values[-1] if values else None


def is_question(command: Sequence[str]) -> bool:
    """True if ``python -m MODULE ...`` asks hydra for something that it prints, without training."""
    arguments = command[command.index("-m") + 2 :] if "-m" in command else []
    return any(part.split("=", 1)[0] in QUESTIONS for part in arguments)


def ask(command: Sequence[str]) -> NoReturn:
    """Run the command, whose answer belongs on the terminal, and exit with its code."""
    with private_tmpdir() as environment:
        sys.exit(subprocess.run(command, env=environment).returncode)


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
        try:
            step = latest_step(run_dir / "checkpoints")
        except ValueError as error:
            raise SystemExit(f"error: {error}") from error
        is_unfinished = step and ((last := last_step(command)) is None or step < last)
        if is_unfinished and setting(command, "trainer.resume_mode") != "disable":
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


@contextlib.contextmanager
def private_tmpdir() -> Iterator[dict[str, str]]:
    """The environment for a command, with a ``TMPDIR`` of its own if :data:`PRIVATE_TMPDIR` asks for it."""
    if not os.environ.get(PRIVATE_TMPDIR):
        yield {**os.environ}
        return
    # A short name, since Ray's sockets lie below it; what is still being written to it must not keep it from going.
    with tempfile.TemporaryDirectory(prefix="asyppo-ray-", dir=short_tmpdir(), ignore_cleanup_errors=True) as folder:
        yield {**os.environ, "TMPDIR": folder}


@contextlib.contextmanager
def forking(command: Sequence[str], environment: Mapping[str, str], log: IO[str]) -> Iterator[list[str]]:
    """The command, with a fork server for its Ray workers if it has a temporary folder of its own."""
    if not os.environ.get(PRIVATE_TMPDIR):
        yield [*command]
        return
    overrides = command.index("-m") + 2 if "-m" in command else len(command)
    with fork_server.running(environment["TMPDIR"], environment, log):
        yield [*command[:overrides], FORKED, *command[overrides:]]


@contextlib.contextmanager
def passing_on_signals(process: subprocess.Popen) -> Iterator[list[int]]:
    """Ask ``process`` to end when this one is asked to; yields the list of the signals that came."""
    received: list[int] = []

    def pass_on(number: int, _frame: Any) -> None:
        received.append(number)
        if len(received) == 1:  # a second one would interrupt Ray's clean-up
            process.terminate()

    # One that is ignored, as under nohup, stays so.
    numbers = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(run_dir: Path, command: Sequence[str], *, verbose: bool, held: Sequence[int] = ()) -> int:
    """Run the command, all output into ``log``; returns its exit code, or 128 + n if signal n ended it.

    It keeps the descriptors of :func:`alone`: were this program killed, the command would still be alone.
    """
    if re.search(r"\s", sys.executable):
        sys.exit(
            f"error: Ray cannot start workers with {sys.executable}: put the environment where no name has white space"
        )
    tail: deque[str] = deque(maxlen=40)
    is_terminal = sys.stdout.isatty()
    print(f"starting Ray, verl and vLLM, about a minute; log in {run_dir / 'log'}", flush=True)
    with (
        private_tmpdir() as environment,
        open(run_dir / "log", "a") as log,
        forking(command, environment, log) as forked,
        subprocess.Popen(
            forked,
            env={**environment, "VERL_FILE_LOGGER_PATH": str(run_dir / "metrics.jsonl"), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=held,
            process_group=0,  # a terminal sends Ctrl-C to all of its group, and the command must get one signal
        ) as process,
        passing_on_signals(process) as signals,
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
        if code and os.environ.get(PRIVATE_TMPDIR):
            with contextlib.suppress(OSError):  # it ended before Ray started; or what is still being written goes
                shutil.copytree(Path(environment["TMPDIR"], RAY_LOGS), run_dir / "ray_logs", dirs_exist_ok=True)
    if signals:
        print(f"ended by {signal.Signals(signals[0]).name}; the log is {run_dir / 'log'}", file=sys.stderr)
        return 128 + signals[0]
    if code and not verbose:
        print("".join(tail), file=sys.stderr)
        print(f"the run failed with exit code {code}; the complete log is {run_dir / 'log'}", file=sys.stderr)
    return code


def summary(run_dir: Path, wanted: int | None = None) -> str:
    """Where the files are, what the last fifth of the run shows, and that fewer steps than ``wanted`` were made."""
    found = [line for line in read_metrics(run_dir / "metrics.jsonl") if REWARD in line["data"]]
    lines = [f"\nrun folder   {run_dir} (metrics.jsonl, checkpoints/, log)"]
    if found:
        lines += figures([line["data"] for line in found])
    if found and wanted is not None and found[-1]["step"] < wanted:
        lines.append(
            f"ended early  after step {found[-1]['step']} of {wanted}: the data lasted for trainer.total_epochs only"
        )
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
            f"masks        |advantage| of masked tokens {mean(MASKED) / mean(KEPT):.2f} of the kept ones' there"
        )
    return [*lines, f"step time    {statistics.median(step[SECONDS] for step in steps):.2f} s (median)"]


def main() -> None:
    usage = "python -m recipe.asyppo.console [-h] [--verbose] RUN_DIR -- COMMAND ..."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=usage)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--verbose", action="store_true", help="show the complete log")
    separator = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, command = parser.parse_args(sys.argv[1:separator]), sys.argv[separator + 1 :]
    if not command:
        parser.error("a training command must follow --")
    if is_question(command):
        ask(command)
    with alone(arguments.run_dir) as held:
        prepare(arguments.run_dir, command)
        try:
            code = run(arguments.run_dir, command, verbose=arguments.verbose, held=held)
        finally:
            merge_history(arguments.run_dir)
    if code == 0:
        print(summary(arguments.run_dir, last_step(command)))
    sys.exit(code)


if __name__ == "__main__":
    main()
