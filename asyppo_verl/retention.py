"""What happens around a save: older checkpoints go when the new one is complete, on every node."""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from asyppo_verl.checkpoint import TRACKER, saved_steps

logger = logging.getLogger(__name__)

KEEP = ("max_actor_ckpt_to_keep", "max_critic_ckpt_to_keep", "remove_previous_ckpt_in_save")
"""verl's settings of how many checkpoints stay."""


def remove_old(root: Path, step: int, keep: Mapping[str, int | None]) -> None:
    """Remove all but the newest checkpoints up to ``step``; those of earlier starts of the run count as well.

    Args:
        root: verl's ``trainer.default_local_dir``.
        step: the checkpoint that was written last; later ones belong to a run that this one branched off from, and stay.
        keep: how many to keep of each folder ("actor", "critic") below ``global_step_<n>``; as in verl, what is no number
            of at least 1 keeps all.
    """
    for folder, count in keep.items():
        paths = [root / f"global_step_{saved}" / folder for saved in saved_steps(root) if saved <= step]
        paths = [path for path in paths if path.is_dir()]
        for path in paths[:-count] if isinstance(count, int) and count > 0 else []:
            shutil.rmtree(path, onerror=_warn)


def _warn(_function: Any, path: str, caught: tuple) -> None:
    """Say what could not be removed, unless another node has that shares the disk; the next save tries again."""
    if not isinstance(caught[1], FileNotFoundError):
        logger.warning(f"an old checkpoint stays for now: {path} cannot be removed ({caught[1]})")


def remove_old_elsewhere(root: Path, step: int, keep: Mapping[str, int | None]) -> None:
    """Do the same on the other nodes of the cluster, whose ranks may write to disks of their own."""
    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    task = ray.remote(num_cpus=0)(remove_old)
    ray.get(
        [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True)).remote(root, step, keep)
            for node in others
        ]
    )


def step_back(root: Path, step: int) -> None:
    """Let the tracker name a checkpoint before ``step``, which is about to be written, if it names that one or a later one.

    Those belong to a run that this one branched off from. Were this run killed while it writes over one of them, the next
    start would else take what is there for complete, or go on with the other run.
    """
    tracker = root / TRACKER
    named = tracker.read_text().strip() if tracker.exists() else ""
    if not named.isdecimal() or int(named) < step:
        return
    earlier = [
        saved for saved in saved_steps(root) if saved < step and (root / f"global_step_{saved}" / "actor").is_dir()
    ]
    if earlier:
        tracker.write_text(str(earlier[-1]))
    else:
        tracker.unlink()


@contextlib.contextmanager
def older_ones_last(config: Any, step: int) -> Iterator[None]:
    """Around verl's saving of step ``step``: the older checkpoints go when the new one is complete, and none is mixed.

    verl removes them while it writes, the actor's before the critics' are there, so that a crash at that moment would leave
    nothing to resume from; and it forgets those of earlier starts. Checkpoints that verl writes in the background are
    complete at a time that only verl knows, and are left to it.
    """
    trainer = config.trainer
    if config.actor_rollout_ref.actor.get("checkpoint", {}).get("async_save", False):
        yield
        return
    given = {name: trainer.get(name) for name in KEEP}
    keeps_one = given["remove_previous_ckpt_in_save"]
    keep = {folder: 1 if keeps_one else given[f"max_{folder}_ckpt_to_keep"] for folder in ("actor", "critic")}
    root = Path(trainer.default_local_dir)
    step_back(root, step)
    trainer.update({name: None for name, value in given.items() if value is not None})
    try:
        yield
    finally:
        trainer.update({name: value for name, value in given.items() if value is not None})
    remove_old(root, step, keep)
    if ray.is_initialized():
        remove_old_elsewhere(root, step, keep)
