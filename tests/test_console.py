"""Run folders: what an earlier run left is resumed or moved aside, never lost."""

import json
import subprocess
import sys

import pytest

from recipe.asyppo.console import merge_history, prepare, read_metrics, run, setting, summary

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


def test_an_unfinished_run_is_resumed_with_its_metrics(tmp_path):
    run_dir = tmp_path / "run"
    write(run_dir, [1, 2, 3], checkpoint=2)
    prepare(run_dir, COMMAND)
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
    write(tmp_path, range(1, 9))
    assert "reward       0.150 -> 0.750 (mean of the first and the last 2 of 8 steps)" in summary(tmp_path)
    assert "2.00 s" in summary(tmp_path) and str(tmp_path) in summary(tmp_path)


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
