"""Run folders: what an earlier run left is resumed or moved aside, never lost."""

import json

import pytest

from recipe.asyppo.run_folder import figures, last_step, merge_history, prepare, read_metrics, setting, summary

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
def test_an_unfinished_run_is_resumed_with_its_metrics(tmp_path, capsys, steps):
    run_dir = tmp_path / "run"
    write(run_dir, [1, 2, 3], checkpoint=2)
    prepare(run_dir, [*COMMAND, steps])
    assert capsys.readouterr().out == f"resuming {run_dir} after step 2\n"
    assert (run_dir / "metrics.history.jsonl").exists() and not (run_dir / "metrics.jsonl").exists()
    validated = {
        "step": 2,
        "data": {"val-core/x": 1.0},
    }  # verl validates first, and logs that under the checkpoint's step
    write(run_dir, [3, 4], checkpoint=4)
    after = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text(json.dumps(validated) + "\n" + after)
    going_on = read_metrics(run_dir / "metrics.jsonl")
    merge_history(run_dir)
    merged = read_metrics(run_dir / "metrics.jsonl")
    assert merged == going_on and [*merged] == [1, 2, 3, 4]
    assert merged[2] == {"critic/score/mean": 0.2, "timing_s/step": 2.0, "val-core/x": 1.0}
    assert not (run_dir / "metrics.history.jsonl").exists()


@pytest.mark.parametrize(("checkpoint", "extra"), [(6, []), (None, []), (2, ["trainer.resume_mode=disable"])])
def test_any_other_run_is_moved_aside(tmp_path, checkpoint, extra):
    run_dir = tmp_path / "run"
    for number in (1, 2):
        write(run_dir, [1], checkpoint)
        prepare(run_dir, [*COMMAND, *extra])
        assert list(run_dir.iterdir()) == []
        assert [*read_metrics(tmp_path / f"run.{number}" / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("place", ["run", "another"])
def test_a_checkpoint_that_is_named_is_gone_on_from_where_it_lies(tmp_path, capsys, place):
    """Also one of a run that is finished; and one of elsewhere does not go on the run that is here."""
    run_dir = tmp_path / "run"
    write(run_dir, [1, 2, 3, 4, 5, 6], checkpoint=6)
    start = tmp_path / place / "checkpoints/global_step_2"
    start.mkdir(parents=True)
    prepare(run_dir, [*COMMAND, "trainer.resume_mode=resume_path", f"trainer.resume_from_path='{start}'"])
    assert start.exists() and (tmp_path / "run.1").exists() == (place != "run")
    assert ("after step 2" in capsys.readouterr().out) == (place == "run")
    assert [*read_metrics(run_dir / "metrics.jsonl")] == ([1, 2, 3, 4, 5, 6] if place == "run" else [])
    write(run_dir, [3])
    assert [*read_metrics(run_dir / "metrics.jsonl")] == ([1, 2, 3] if place == "run" else [3])


def test_a_run_killed_twice_keeps_all_its_steps(tmp_path):
    run_dir = tmp_path / "run"
    write(run_dir, [1, 2], checkpoint=2)
    prepare(run_dir, COMMAND)
    write(run_dir, [3, 4], checkpoint=4)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "da')
    prepare(run_dir, COMMAND)  # killed before it could merge
    assert [*read_metrics(run_dir / "metrics.jsonl")] == [1, 2, 3, 4]


def test_summary(tmp_path):
    write(tmp_path, range(1, 11))
    assert "reward       0.150 -> 0.950 (mean of the first 2 and the last 2 of 10 steps)" in summary(tmp_path)
    assert "2.00 s" in summary(tmp_path) and str(tmp_path) in summary(tmp_path)
    assert "critics" not in summary(tmp_path).replace(str(tmp_path), "")
    with open(tmp_path / "metrics.jsonl", "a") as file:  # as verl writes what is no number
        file.write('{"step": 11, "data": {"critic/score/mean": null, "timing_s/step": 2.0}}\n')
    assert "-> nan" in summary(tmp_path)
    assert "ended early  after step 11 of 12" in summary(tmp_path, 12) and "early" not in summary(tmp_path, 11)


def test_figures_are_those_of_the_last_fifth():
    step = {"critic/score/mean": 0.5, "timing_s/step": 1.0}
    first, last = (
        step | {"asyppo/explained_var": explained, "asyppo/adv_abs_masked": masked, "asyppo/adv_abs_kept": 0.8}
        for explained, masked in ((-1.0, 5.0), (0.25, 0.6))
    )
    shown = figures([first] * 24 + [last] * 6)
    assert "reward       0.500 -> 0.500 (mean of the first 5 and the last 6 of 30 steps)" in shown
    assert "critics      explained variance 0.250 in the last 6 of 30 steps; 1 is perfect, 0 a constant" in shown
    assert "masks        |advantage| of masked over kept tokens: 0.75, same steps" in shown
    assert len(figures([step] * 30)) == 2  # another algorithm
    assert not any("masks" in line for line in figures([last | {"asyppo/adv_abs_masked": 0.0}]))
