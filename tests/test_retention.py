"""Which checkpoint a run goes on from while another is written: on folders as verl leaves them."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from asyppo_verl.retention import TRACKER, latest_step, older_ones_last


@pytest.fixture
def saved(tmp_path):
    """Make whole checkpoints of some steps, the tracker naming the last."""

    def save(*steps: int) -> Path:
        for step in steps:
            for part in ("actor", "critic"):
                (tmp_path / f"global_step_{step}" / part).mkdir(parents=True, exist_ok=True)
            (tmp_path / TRACKER).write_text(str(step))
        return tmp_path

    return save


def config(root: Path, keep: int | None = None, **checkpoint: object):
    trainer = {"default_local_dir": str(root), "max_actor_ckpt_to_keep": keep, "max_critic_ckpt_to_keep": keep}
    return OmegaConf.create({"trainer": trainer, "actor_rollout_ref": {"actor": {"checkpoint": checkpoint}}})


def parts(root: Path) -> set[str]:
    return {f"{path.parent.name.removeprefix('global_step_')}/{path.name}" for path in root.glob("global_step_*/*")}


def test_older_checkpoints_go_when_the_new_one_is_whole(saved):
    root = saved(1, 2)
    run = config(root, keep=1)
    with older_ones_last(run, 3):
        assert run.trainer.max_actor_ckpt_to_keep is None and run.trainer.max_critic_ckpt_to_keep is None
        saved(3)
        assert parts(root) == {f"{step}/{part}" for step in (1, 2, 3) for part in ("actor", "critic")}
    assert parts(root) == {"3/actor", "3/critic"} and latest_step(root) == 3
    assert run.trainer.max_actor_ckpt_to_keep == run.trainer.max_critic_ckpt_to_keep == 1


def test_a_checkpoint_that_cannot_be_written_costs_no_older_one(saved):
    root = saved(1, 2)
    with pytest.raises(OSError, match="no space"), older_ones_last(config(root, keep=1), 3):
        raise OSError("no space")
    assert len(parts(root)) == 4 and latest_step(root) == 2


def test_no_checkpoint_counts_as_whole_while_it_is_written_over(saved):
    """A run that resumed from step 5 of ten comes to step 10 again; killed there, it must go on from its own step 9."""
    root = saved(5, 10)
    saved(6, 9)
    (root / TRACKER).write_text("10")
    with pytest.raises(KeyboardInterrupt), older_ones_last(config(root), 10):
        assert latest_step(root) == 9
        raise KeyboardInterrupt
    assert latest_step(root) == 9
    with older_ones_last(config(root), 10):
        saved(10)
    assert latest_step(root) == 10


def test_a_run_that_begins_anew_in_a_used_folder_does_not_go_on_with_the_other_run(saved):
    root = saved(20)
    with pytest.raises(KeyboardInterrupt), older_ones_last(config(root), 5):
        raise KeyboardInterrupt
    assert latest_step(root) is None
    (root / TRACKER).write_text("twenty")
    with older_ones_last(config(root), 5):
        saved(5)
    assert latest_step(root) == 5 and "20/actor" in parts(root), (
        "a later checkpoint of the other run is not ours to remove"
    )


def test_checkpoints_that_verl_writes_in_the_background_are_left_to_it(saved):
    root = saved(1, 2)
    run = config(root, keep=1, async_save=True)
    with older_ones_last(run, 2):
        assert run.trainer.max_actor_ckpt_to_keep == 1 and latest_step(root) == 2
    assert len(parts(root)) == 4
