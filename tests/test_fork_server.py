"""A process that the fork server makes is the one that was asked for: its words, files, folder, group, code and end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = """
import json, os, signal, sys, marker
here = {"argv": sys.argv[1:], "name": __name__, "folder": os.getcwd(), "own": os.environ["OWN"], "pid": os.getpid(),
        "group": os.getpgrp(), "imported_by": marker.pid}
print(json.dumps(here), flush=True)
if "wait" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
    print("ready", flush=True)
    sys.stdin.read()
sys.exit(7)
"""


@pytest.fixture
def asked(root, tmp_path):
    """What starts a worker in the way of Ray, beside a fork server that has imported ``marker``."""
    (tmp_path / "marker.py").write_text("import os\npid = os.getpid()\n")
    (tmp_path / "default_worker.py").write_text(SCRIPT)
    (tmp_path / "folder").mkdir()
    path = tmp_path / "s"
    command = [sys.executable, "-m", "asyppo_verl.cpu.fork_server", str(path), "marker"]
    server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    while not path.exists():
        time.sleep(0.01)

    def start(*words: str) -> tuple[subprocess.Popen, dict]:
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "default_worker.py"), *words],
            env={
                **os.environ,
                "PYTHONPATH": f"{root}/asyppo_verl/cpu/startup",
                "ASYPPO_FORK_SERVER": str(path),
                "OWN": "é",
            },
            cwd=tmp_path / "folder",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        here = json.loads(process.stdout.readline())
        assert here["imported_by"] == server.pid and here["pid"] not in (server.pid, process.pid)
        return process, here

    yield start
    server.kill()
    server.wait()


def test_a_worker_is_what_was_asked_for(asked, tmp_path):
    process, here = asked("--a=b", "c d")
    assert here["argv"] == ["--a=b", "c d"] and here["name"] == "__main__" and here["own"] == "é"
    assert Path(here["folder"]) == tmp_path / "folder" and here["group"] == process.pid
    assert process.wait(10) == 7


def test_a_signal_reaches_the_worker(asked):
    process, _ = asked("wait")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 9


def test_a_worker_ends_with_the_process_that_asked(asked):
    process, here = asked("wait")
    process.kill()
    psutil.wait_procs([psutil.Process(here["pid"])], timeout=10)
    assert not psutil.pid_exists(here["pid"])
