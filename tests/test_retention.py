"""Which checkpoint a run goes on from while another is written: on folders as verl leaves them."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest
from omegaconf import OmegaConf

from asyppo_verl.checkpoint import TRACKER, latest_step
from asyppo_verl.retention import Saved, older_ones_last


@pytest.fixture
def saved(tmp_path):
    """Make complete checkpoints of some steps, the tracker naming the last."""

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


def test_older_checkpoints_go_when_the_new_one_is_complete(saved):
    root = saved(1, 2)
    run = config(root, keep=1)
    with older_ones_last(run, Saved(start=2), 3):
        assert run.trainer.max_actor_ckpt_to_keep is None and run.trainer.max_critic_ckpt_to_keep is None
        saved(3)
        assert parts(root) == {f"{step}/{part}" for step in (1, 2, 3) for part in ("actor", "critic")}
    assert parts(root) == {"3/actor", "3/critic"} and latest_step(root) == 3
    assert run.trainer.max_actor_ckpt_to_keep == run.trainer.max_critic_ckpt_to_keep == 1


def test_a_checkpoint_that_cannot_be_written_costs_no_older_one(saved):
    root = saved(1, 2)
    with pytest.raises(OSError, match="no space"), older_ones_last(config(root, keep=1), Saved(start=2), 3):
        raise OSError("no space")
    assert len(parts(root)) == 4 and latest_step(root) == 2


def test_no_checkpoint_counts_as_complete_while_it_is_written_over(saved):
    """A run that resumed from step 5 of ten comes to step 10 again; killed there, it must go on from its own step 9."""
    root = saved(5, 10)
    saved(6, 9)
    (root / TRACKER).write_text("10")
    with pytest.raises(KeyboardInterrupt), older_ones_last(config(root), Saved(5, [6, 9]), 10):
        assert latest_step(root) == 9
        raise KeyboardInterrupt
    assert latest_step(root) == 9
    with older_ones_last(config(root), Saved(5, [6, 9]), 10):
        saved(10)
    assert latest_step(root) == 10


@pytest.mark.parametrize(
    ("mode", "parent", "start"), [("auto", None, 25), ("resume_path", "here", 25), ("resume_path", "elsewhere", 0)]
)
def test_a_run_that_goes_on_from_elsewhere_owns_nothing_here(tmp_path, mode, parent, start):
    trainer = {"resume_mode": mode, "default_local_dir": f"{tmp_path}/here"}
    trainer |= {"resume_from_path": parent and f"{tmp_path}/{parent}/global_step_25"}
    assert Saved.of(OmegaConf.create(trainer), 25) == Saved(start, stays=25 if parent == "here" else 0)


def test_the_checkpoint_that_a_command_names_stays(saved):
    root, run = saved(40, 50), Saved(start=50, stays=50)
    for step in (60, 70):
        with older_ones_last(config(root, keep=1), run, step):
            saved(step)
    assert {path.split("/")[0] for path in parts(root)} == {"40", "50", "70"}


@pytest.mark.parametrize("step", [5, 25])
def test_a_run_that_begins_anew_in_a_used_folder_leaves_the_other_run_alone(saved, step):
    """It neither goes on with it nor removes or counts its checkpoints, the earlier ones no more than the later ones."""
    root, run = saved(10, 20), Saved(start=0)
    with pytest.raises(KeyboardInterrupt), older_ones_last(config(root, keep=2), run, step):
        raise KeyboardInterrupt
    assert latest_step(root) is None
    (root / TRACKER).write_text("twenty")
    for own in (step, step + 1, step + 2):
        with older_ones_last(config(root, keep=2), run, own):
            saved(own)
    kept = {path.split("/")[0] for path in parts(root)}
    assert latest_step(root) == step + 2 and kept == {"10", "20", f"{step + 1}", f"{step + 2}"}


def test_checkpoints_that_verl_writes_in_the_background_are_left_to_it(saved):
    root = saved(1, 2)
    run = config(root, keep=1, async_save=True)
    with older_ones_last(run, Saved(start=1), 2):
        assert run.trainer.max_actor_ckpt_to_keep == 1 and latest_step(root) == 2
    assert len(parts(root)) == 4


def test_an_old_checkpoint_that_cannot_be_removed_costs_no_run(saved, monkeypatch, caplog):
    """As where a file of it is still open on NFS; the next save tries again."""
    root, run = saved(1, 2), Saved(start=2)
    with monkeypatch.context() as patch, older_ones_last(config(root, keep=1), run, 3):
        saved(3)
        patch.setattr(os, "rmdir", Mock(side_effect=OSError("Directory not empty")))
    assert "an old checkpoint stays for now" in caplog.text and "Directory not empty" in caplog.text
    assert len(parts(root)) == 6
    with older_ones_last(config(root, keep=1), run, 4):
        saved(4)
    assert parts(root) == {"4/actor", "4/critic"}


def test_the_older_setting_keeps_one(saved):
    """verl's ``remove_previous_ckpt_in_save`` would remove the last checkpoint before the next one is complete."""
    root = saved(1, 2)
    run = config(root)
    run.trainer.remove_previous_ckpt_in_save = True
    with older_ones_last(run, Saved(start=2), 3):
        assert not run.trainer.remove_previous_ckpt_in_save
        saved(3)
        assert len(parts(root)) == 6
    assert parts(root) == {"3/actor", "3/critic"} and run.trainer.remove_previous_ckpt_in_save is True


@pytest.mark.parametrize("keep", [0, -1, None])
def test_what_is_no_number_to_keep_keeps_all_as_in_verl(saved, keep):
    root = saved(1, 2)
    with older_ones_last(config(root, keep), Saved(start=2), 3):
        saved(3)
    assert len(parts(root)) == 6


NODES = """
import sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from asyppo_verl import retention

root = Path(sys.argv[1])

def note(root, saved, keep):
    node = ray.get_runtime_context().get_node_id()
    (root / node).write_text(f"{saved.since} {keep}")

cluster = Cluster()
for _ in range(4):
    cluster.add_node(num_cpus=1)
ray.init(address=cluster.address)
here = ray.get_runtime_context().get_node_id()
*ours, foreign = [node["NodeID"] for node in ray.nodes() if node["NodeID"] != here]
retention.remove_old = note
retention.remove_old_elsewhere(root, retention.Saved(0, [7]), {"actor": 1}, {here, *ours})
asked = {path.name: path.read_text() for path in root.iterdir()}
assert asked == {node: "[7] {'actor': 1}" for node in ours}, asked
retention.remove_old = lambda *_: 1 / 0
retention.remove_old_elsewhere(root, retention.Saved(0, [7]), {"actor": 1}, {here, *ours})
print("asked")
"""


@pytest.mark.ray
def test_every_other_node_of_the_run_is_asked_once(tmp_path):
    """Disks may be a node's own, so the trainer's removal alone would leave all others full. What fails costs no run."""
    command = [sys.executable, "-c", NODES, tmp_path]
    # A temporary folder of its own, since others look there for a cluster that is running.
    with tempfile.TemporaryDirectory(prefix="asyppo-ray-") as folder:
        env = {**os.environ, "TMPDIR": folder}
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0 and "asked\n" in run.stdout, run.stderr[-3000:]
    assert "old checkpoints stay for now on another node" in run.stderr and "division by zero" in run.stderr
