"""Start ``python -m verl.trainer.main_ppo`` many times at the cost of one: import it once, then fork for every command line.

    python refusals.py rows.json answers.json

The rows are a JSON list of ``{"folder": where to run, "arguments": [...]}``. Each answer, in the same order, has what the
process showed, its exit code, its seconds, its seconds of a processor (the import included), and what it left running.
"""

import dataclasses
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO, Any

from processes import of_session

AT_ONCE = 2
LONGEST = 60
"""Seconds after which a process is ended."""


@dataclasses.dataclass
class Row:
    """A process that does what the command does."""

    session: int
    started: float
    output: IO[bytes]


def start(folder: str, arguments: list[str]) -> Row:
    output = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the row)
    child = os.fork()
    if child:
        return Row(child, time.monotonic(), output)
    os.setsid()
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    code = 1
    try:
        run(arguments)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(arguments: list[str]) -> None:
    from verl.trainer import main_ppo

    sys.argv = ["main_ppo.py", *arguments]
    main_ppo.main()


def ended(row: Row, imported: float) -> dict[str, Any] | None:
    """What came of the process, or None while it runs."""
    child, status, used = os.wait4(row.session, os.WNOHANG)
    seconds = time.monotonic() - row.started
    if not child:
        if seconds > LONGEST:
            os.killpg(row.session, signal.SIGKILL)
        return None
    row.output.seek(0)
    return {
        "output": row.output.read().decode(errors="replace"),
        "code": os.waitstatus_to_exitcode(status),
        "seconds": seconds,
        "processor": imported + used.ru_utime + used.ru_stime,
        "left": list(of_session(row.session).values()),
    }


def main(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    import verl.trainer.main_ppo  # noqa: F401
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        compose("ppo_trainer", overrides=rows[0]["arguments"])  # what hydra remembers is remembered for all
    imported = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    waiting, running = list(enumerate(rows)), dict[int, Row]()
    answers: dict[int, dict[str, Any]] = {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            number, row = waiting.pop(0)
            running[number] = start(**row)
        for number, process in list(running.items()):
            if answer := ended(process, imported):
                answers[number] = answer
                del running[number]
        time.sleep(0.01)
    return [answers[number] for number in range(len(rows))]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
