"""A command in a run folder: its log, what the terminal shows, and how a signal ends it."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from test_recipe import environment
from test_run_folder import COMMAND, write

from recipe.asyppo.console import FORKED, PRIVATE_TMPDIR, forking, is_question, run
from recipe.asyppo.run_folder import read_metrics


def test_output_goes_to_the_log_and_a_failure_is_shown(tmp_path, capfd):
    notice = "[2026-11-28 03:17:37,172][asyppo_verl.preflight][WARNING] - look here"
    code = f"import sys; print('Training Progress: 50%'); print('noise\\n{notice}'); sys.exit('it broke')"
    assert run(tmp_path, [sys.executable, "-c", code], verbose=False) == 1
    shown = capfd.readouterr()
    assert "Training Progress: 50%" in shown.out and "noise" not in shown.out and "\nnote: look here\n" in shown.out
    assert "it broke" in shown.err and str(tmp_path / "log") in shown.err
    assert "noise" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("verbose", [False, True])
def test_the_command_line(tmp_path, root, verbose):
    """Everything behind the first -- is the command, options and all; --verbose shows its output."""
    ours = [str(tmp_path / "run"), *(["--verbose"] if verbose else [])]
    command = [sys.executable, "-c", "import sys; print(sys.argv[1:])", "--", "--verbose"]
    run = subprocess.run(
        [sys.executable, "-m", "recipe.asyppo.console", *ours, "--", *command],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("['--', '--verbose']" in run.stdout) == verbose
    assert "--verbose" in (tmp_path / "run" / "log").read_text()


CHILD = """
import os, pathlib, signal, sys, time
def end(number, frame):
    print("got", number)
    time.sleep(0.3)
    sys.exit(5)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
logs = pathlib.Path(os.environ["TMPDIR"], "ray", f"session_today_{os.getpid()}", "logs")
logs.mkdir(parents=True)
(logs / "left").touch()
print("Training Progress: started in", os.environ["TMPDIR"])
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_command_and_its_temporary_folder(tmp_path, root, number):
    """Sent twice, and to all of the group, as by Ctrl-C and timeout: the command gets one, and time to end."""
    write(tmp_path / "run", [1, 2], checkpoint=2)
    console = subprocess.Popen(
        [sys.executable, "-m", "recipe.asyppo.console", tmp_path / "run", "--", sys.executable, "-c", CHILD, *COMMAND],
        cwd=root,
        env={**os.environ, PRIVATE_TMPDIR: "1", "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # under nohup one is ignored
    )
    private = next(line.split()[-1] for line in console.stdout if "started in" in line)
    # The name of pytest's folder is too long for Ray's sockets.
    assert os.path.exists(f"{private}/ray") and os.path.dirname(private) == "/tmp"
    second = subprocess.run(console.args, cwd=root, capture_output=True, text=True)
    assert second.returncode == 1 and "a run is going on in" in second.stderr
    os.killpg(console.pid, number)
    time.sleep(0.1)
    os.killpg(console.pid, number)
    _, errors = console.communicate(timeout=30)
    assert console.returncode == 128 + number
    assert f"ended by {number.name}" in errors and "Traceback" not in errors
    assert (tmp_path / "run" / "log").read_text().count(f"got {signal.SIGTERM}") == 1
    assert not os.path.exists(private) and (tmp_path / "run" / "ray_logs" / "left").exists()
    assert [*read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    "flag", ["--help", "-h", "--cfg=job", "--cfg", "-c", "--info", "-i", "--hydra-help", "--resolve", "--package=data"]
)
def test_hydras_flags_are_known(flag):
    assert is_question(["python", "-m", "verl.trainer.main_ppo", "a=1", flag, "job"])
    assert not is_question(["python", "-c", "pass", f"x={flag}"]) and not is_question(["python", "-m", "main", "-x=1"])


@pytest.mark.e2e
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("run_asyppo_cpu.sh", ["--cfg", "job", "--resolve", "--package", "algorithm"]),
        ("run_asyppo_qwen3_4b.sh", ["+asyppo.num_critics=3", "--cfg", "job", "--package", "algorithm"]),  # added twice
        ("evaluate.sh", ["--cfg=job", "-p", "algorithm"]),
    ],
)
def test_hydra_answers_on_the_terminal(root, toy, tmp_path, script, flags):
    env = environment(root, toy, VERL_PLATFORM="cpu", RUN_DIR=str(tmp_path / "run"), OUT=str(tmp_path / "run"))
    target = [str(toy / "actor")] if script == "evaluate.sh" else []
    answer = subprocess.run(
        ["bash", str(root / "scripts" / script), *target, *flags],
        env=env | {"TOY_DIR": str(toy)},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert "starting Ray" not in answer.stdout and not list(tmp_path.iterdir())
    assert yaml.safe_load(answer.stdout)["adv_estimator"] == ("grpo" if target else "asyppo")


def test_only_a_command_that_is_run_from_here_gets_forked_workers(tmp_path, monkeypatch, root):
    """Users of recipe/asyppo/cpu.sh start verl themselves: nothing there may need the fork server. Their override wins."""
    command, folder = ["python", "-m", "verl.trainer.main_ppo", "a=1"], {"TMPDIR": str(tmp_path)}
    monkeypatch.delenv(PRIVATE_TMPDIR, raising=False)
    with forking(command, folder, None) as same:
        assert same == command
    monkeypatch.setenv(PRIVATE_TMPDIR, "1")
    with open(tmp_path / "log", "w") as log, forking(command, {**os.environ, **folder}, log) as forked:
        assert forked == [*command[:3], FORKED, "a=1"] and (tmp_path / "python").exists()
    assert "py_executable" not in (root / "recipe/asyppo/cpu.sh").read_text()
