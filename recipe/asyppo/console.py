"""Run a training command in a run folder: progress on the terminal, the complete log in a file, a summary at the end.

``python -m recipe.asyppo.console RUN_DIR [--verbose] -- COMMAND ...``

What an earlier run left there: :mod:`recipe.asyppo.run_folder`. A signal that would end this program ends the training first.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from asyppo_verl.doctor import short_tmpdir
from recipe.asyppo import fork_server
from recipe.asyppo.run_folder import alone, last_step, merge_history, prepare, summary

PROGRESS = re.compile(r"Training Progress:.*")
NOTICE = re.compile(r"\[asyppo_verl\.[\w.]+\]\[WARNING\] - (.*)")
"""What the checks before a run have to say of it."""
QUESTIONS = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--info", "-i"}
"""hydra's flags that print something instead of running."""

PRIVATE_TMPDIR = "ASYPPO_PRIVATE_TMPDIR"
"""If set, the command gets a temporary folder of its own, which is removed after it, and with it a fork server."""

# Ray's shell reads it: python of the fork server, in that folder. verl 0.9.0 has no such key.
FORKED = "++ray_kwargs.ray_init.runtime_env.py_executable='$TMPDIR/python'"


def is_question(command: Sequence[str]) -> bool:
    """True if ``python -m MODULE ...`` asks hydra for something that it prints, without training."""
    arguments = command[command.index("-m") + 2 :] if "-m" in command else []
    return any(part.split("=", 1)[0] in QUESTIONS for part in arguments)


def ask(command: Sequence[str]) -> NoReturn:
    """Run the command, whose answer belongs on the terminal, and exit with its code."""
    with private_tmpdir() as environment:
        sys.exit(subprocess.run(again_allowed(command), env=environment).returncode)


def again_allowed(command: Sequence[str]) -> list[str]:
    """The command with ``++key`` for ``+key`` where it has the key twice: hydra refuses to add what has been added."""
    keys = [part.lstrip("+").partition("=")[0] for part in command]
    return [
        f"++{part.lstrip('+')}" if part.startswith("+") and key in keys[:index] else part
        for index, (part, key) in enumerate(zip(command, keys, strict=True))
    ]


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
        forking(again_allowed(command), environment, log) as forked,
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
            progress, notice = PROGRESS.search(line), NOTICE.search(line)
            if verbose:
                print(line, end="", flush=True)
            elif notice:
                print(f"note: {notice[1]}", flush=True)
            elif progress:
                print(progress.group().rstrip(), end="\r" if is_terminal else "\n", flush=True)
        code = process.wait()
        if code:
            keep_ray_logs(environment, process.pid, run_dir / "ray_logs")
    if signals:
        print(f"ended by {signal.Signals(signals[0]).name}; the log is {run_dir / 'log'}", file=sys.stderr)
        return 128 + signals[0]
    if code and not verbose:
        print("".join(tail), file=sys.stderr)
        print(f"the run failed with exit code {code}; the complete log is {run_dir / 'log'}", file=sys.stderr)
    return code


def keep_ray_logs(environment: Mapping[str, str], driver: int, kept: Path) -> None:
    """Copy what each process of a driver's Ray wrote; nothing, if it ended before Ray began, or joined another's."""
    ray = Path(environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp", "ray")  # as Ray chooses it
    for logs in ray.glob(f"session_*_{driver}/logs"):
        with contextlib.suppress(OSError):  # what is still being written goes
            shutil.copytree(logs, kept, dirs_exist_ok=True)


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
