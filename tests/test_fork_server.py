"""``python`` of the fork server does what python does, only sooner."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipe.asyppo import fork_server

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("f")
    with (
        open(folder / "log", "w") as log,
        fork_server.running(str(folder), {**os.environ, "VERL_PLATFORM": "cpu"}, log),
    ):
        yield str(folder / "python")


@pytest.mark.parametrize("flags", [[], ["-B"]])
def test_code_and_script_run_as_under_python(python, tmp_path, flags):
    """Arguments, path, folder, environment, files, number of threads and exit code are those of the caller."""
    code = (
        "import os, sys; print(sys.argv, sys.path[0], os.getcwd(), os.environ['X'], input(), __name__); "
        "print('e', file=sys.stderr); import torch; print(torch.get_num_threads()); os.write(9, b'nine'); sys.exit(7)"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    for arguments in (["-c", code, "a", "--b"], [str(script), "a"]):
        seen = []
        for program in (sys.executable, python):
            nine = tmp_path / "nine"
            line = f'exec 9>{nine}; exec {program} "$@"'
            run = subprocess.run(
                ["bash", "-c", line, "bash", *flags, *arguments],
                cwd=tmp_path,
                env={**os.environ, "X": "é", "OMP_NUM_THREADS": "1"},
                input="in\n",
                capture_output=True,
                text=True,
            )
            seen.append((run.returncode, run.stdout, run.stderr, nine.read_text()))
        assert seen[0] == seen[1]
        assert seen[1][0] == 7


def test_modules_are_there_and_random_numbers_differ(python):
    code = "import sys, random, numpy; print('vllm' in sys.modules, 'ray' in sys.modules, random.random(), numpy.random.random())"
    lines = [subprocess.run([python, "-c", code], capture_output=True, text=True).stdout for _ in range(2)]
    assert all(line.startswith("True False ") for line in lines)
    assert not set(lines[0].split()[2:]) & set(lines[1].split()[2:])


def test_forks_share_no_process_group(python):
    """Ray ends the whole process group of a worker: a shared one would take the other workers with it."""
    code = "import os, sys; print(os.getpid(), os.getpgid(0), flush=True); sys.stdin.read()"
    with subprocess.Popen([python, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        pid, group = process.stdout.readline().split()
        assert group == pid
        process.communicate()


@pytest.mark.parametrize("to_fork", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_both(python, number, to_fork):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    with subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        assert pid != process.pid
        os.kill(pid if to_fork else process.pid, number)
        assert process.wait(10) == -number
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()


def test_without_a_server_it_is_python(tmp_path):
    program = tmp_path / "python"
    program.write_text(fork_server.CLIENT.format(python=sys.executable, address=str(tmp_path / "none")))
    program.chmod(0o700)
    code = "import sys; print(sys.argv, sys.executable)"
    assert subprocess.check_output([program, "-c", code], text=True).split()[-1] == sys.executable
