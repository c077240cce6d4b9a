"""Run folders: what an earlier run left is resumed or moved aside, never lost."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from test_recipe import environment

from recipe.asyppo.console import (
    FORKED,
    PRIVATE_TMPDIR,
    figures,
    forking,
    is_question,
    last_step,
    merge_history,
    prepare,
    read_metrics,
    run,
    setting,
    summary,
)

COMMAND = ["python", "trainer.total_training_steps=4", "x=1", "trainer.total_training_steps=6"]


def write(run_dir, steps, checkpoint=None):
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    line = {"critic/score/mean": 0.0, "timing_s/step": 2.0}
    (run_dir / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "data": {**line, "critic/score/mean": s / 10}}) + "\n" for s in steps)
    )
    if checkpoint is not None:
        (run_dir / f"checkpoints/global_step_{checkpoint}").mkdir(exist_ok=True)
        (run_dir / "checkpoints/latest_checkpointed_iteration.txt").write_text(str(checkpoint))


def test_the_last_override_counts():
    assert setting(COMMAND, "trainer.total_training_steps") == "6" and setting(COMMAND, "y") is None
    assert setting(["+a.b=c=d"], "a.b") == "c=d"


OPEN = "trainer.total_training_steps=null"  # the data decide


def test_a_number_may_be_quoted_or_open():
    assert last_step(COMMAND) == 6 and last_step([]) is None and last_step([*COMMAND, OPEN]) is None
    assert last_step(["trainer.total_training_steps='6'"]) == last_step(['++trainer.total_training_steps="6"']) == 6


@pytest.mark.parametrize("steps", ["trainer.total_training_steps=6", "trainer.total_training_steps='6'", OPEN])
def test_an_unfinished_run_is_resumed_with_its_metrics(tmp_path, steps):
    run_dir = tmp_path / "run"
    write(run_dir, [1, 2, 3], checkpoint=2)
    prepare(run_dir, [*COMMAND, steps])
    assert (run_dir / "metrics.history.jsonl").exists() and not (run_dir / "metrics.jsonl").exists()
    write(run_dir, [3, 4], checkpoint=4)
    merge_history(run_dir)
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")] == [1, 2, 3, 4]
    assert not (run_dir / "metrics.history.jsonl").exists()


@pytest.mark.parametrize(("checkpoint", "extra"), [(6, []), (None, []), (2, ["trainer.resume_mode=disable"])])
def test_any_other_run_is_moved_aside(tmp_path, checkpoint, extra):
    run_dir = tmp_path / "run"
    for number in (1, 2):
        write(run_dir, [1], checkpoint)
        prepare(run_dir, [*COMMAND, *extra])
        assert list(run_dir.iterdir()) == []
        assert [line["step"] for line in read_metrics(tmp_path / f"run.{number}" / "metrics.jsonl")] == [1]


def test_a_run_killed_twice_keeps_all_its_steps(tmp_path):
    run_dir = tmp_path / "run"
    write(run_dir, [1, 2], checkpoint=2)
    prepare(run_dir, COMMAND)
    write(run_dir, [3, 4], checkpoint=4)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "da')
    prepare(run_dir, COMMAND)  # killed before it could merge
    assert [line["step"] for line in read_metrics(run_dir / "metrics.history.jsonl")] == [1, 2, 3, 4]


def test_summary(tmp_path):
    write(tmp_path, range(1, 11))
    assert "reward       0.150 -> 0.950 (mean of the first 2 and the last 2 of 10 steps)" in summary(tmp_path)
    assert "2.00 s" in summary(tmp_path) and str(tmp_path) in summary(tmp_path)
    assert "critics" not in summary(tmp_path).replace(str(tmp_path), "")
    assert "ended early  after step 10 of 11" in summary(tmp_path, 11) and "early" not in summary(tmp_path, 10)


def test_figures_are_those_of_the_last_fifth():
    step = {"critic/score/mean": 0.5, "timing_s/step": 1.0}
    first, last = (
        step | {"asyppo/explained_var": explained, "asyppo/adv_abs_masked": masked, "asyppo/adv_abs_kept": 0.8}
        for explained, masked in ((-1.0, 5.0), (0.25, 0.6))
    )
    shown = figures([first] * 24 + [last] * 6)
    assert "reward       0.500 -> 0.500 (mean of the first 5 and the last 6 of 30 steps)" in shown
    assert "critics      explained variance 0.250 in the last 6 of 30 steps; 1 is perfect, 0 a constant" in shown
    assert "masks        |advantage| of masked tokens 0.75 of the kept ones' there" in shown
    assert len(figures([step] * 30)) == 2  # another algorithm
    assert not any("masks" in line for line in figures([last | {"asyppo/adv_abs_masked": 0.0}]))


def test_output_goes_to_the_log_and_a_failure_is_shown(tmp_path, capfd):
    code = "import sys; print('Training Progress: 50%'); print('noise'); sys.exit('it broke')"
    assert run(tmp_path, [sys.executable, "-c", code], verbose=False) == 1
    shown = capfd.readouterr()
    assert "Training Progress: 50%" in shown.out and "noise" not in shown.out
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
logs = pathlib.Path(os.environ["TMPDIR"], "ray", "session_latest", "logs")
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
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


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
