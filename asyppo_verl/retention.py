"""What happens around a save: older checkpoints go when the new one is complete, on every node of the run."""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from asyppo_verl.checkpoint import TRACKER, saved_steps

logger = logging.getLogger(__name__)

KEEP = ("max_actor_ckpt_to_keep", "max_critic_ckpt_to_keep", "remove_previous_ckpt_in_save")
"""verl's settings of how many checkpoints stay."""


@dataclasses.dataclass
class Saved:
    """Checkpoints of a run; others in its folder belong to a run that it branched off from, or to one before."""

    start: int
    """The step of this folder that it went on from; 0 if it began anew, or elsewhere."""
    since: list[int] = dataclasses.field(default_factory=list)
    """The steps that it has saved since then."""
    stays: int = 0
    """The checkpoints up to this step stay: a run that names the one to go on from is started by the same command again."""

    @classmethod
    def of(cls, trainer: Any, step: int) -> "Saved":
        """Those of a run that verl has just loaded at ``step``."""
        if trainer.resume_mode != "resume_path":
            return cls(start=step)
        is_here = Path(trainer.resume_from_path).resolve().parent == Path(trainer.default_local_dir).resolve()
        return cls(start=step, stays=step) if is_here else cls(start=0)

    def __contains__(self, step: int) -> bool:
        return step <= self.start or step in self.since  # those of earlier starts count as well

    def below(self, root: Path) -> list[int]:
        """Those that are there, in order."""
        return [step for step in saved_steps(root) if step in self]


def remove_old(root: Path, saved: Saved, keep: Mapping[str, int | None]) -> None:
    """Remove all but the newest checkpoints of a run.

    Args:
        root: verl's ``trainer.default_local_dir``.
        saved: the run's checkpoints.
        keep: how many to keep of each folder ("actor", "critic") below ``global_step_<n>``; as in verl, what is no number
            of at least 1 keeps all.
    """
    for folder, count in keep.items():
        paths = [root / f"global_step_{step}" / folder for step in saved.below(root) if step > saved.stays]
        paths = [path for path in paths if path.is_dir()]
        for path in paths[:-count] if isinstance(count, int) and count > 0 else []:
            shutil.rmtree(path, onerror=_warn)


def _warn(_function: Any, path: str, caught: tuple) -> None:
    """Say what could not be removed, unless another node has that shares the disk; the next save tries again."""
    if not isinstance(caught[1], FileNotFoundError):
        logger.warning(f"an old checkpoint stays for now: {path} cannot be removed ({caught[1]})")


def remove_old_elsewhere(root: Path, saved: Saved, keep: Mapping[str, int | None], nodes: Iterable[str]) -> None:
    """Do the same on other nodes, whose ranks may write to disks of their own; the next save tries again where it fails."""
    here, task = ray.get_runtime_context().get_node_id(), ray.remote(num_cpus=0)(remove_old)
    on = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes if node != here}
    answers = [task.options(scheduling_strategy=strategy).remote(root, saved, keep) for strategy in on.values()]
    try:
        ray.get(answers)
    except ray.exceptions.RayError as error:
        logger.warning(f"old checkpoints stay for now on another node: {error}")


def step_back(root: Path, saved: Saved, step: int) -> None:
    """Let the tracker name the run's last checkpoint before ``step``, which is about to be written, if it names another run's.

    Otherwise, if this run were killed while overwriting it, the next start would take what is there
    for complete, or resume the other run.
    """
    tracker = root / TRACKER
    named = tracker.read_text().strip() if tracker.exists() else ""
    if not named.isdecimal() or (int(named) < step and int(named) in saved):
        return
    earlier = [one for one in saved.below(root) if one < step and (root / f"global_step_{one}" / "actor").is_dir()]
    if earlier:
        tracker.write_text(str(earlier[-1]))
    else:
        tracker.unlink()


@contextlib.contextmanager
def older_ones_last(config: Any, saved: Saved, step: int, nodes: Iterable[str] = ()) -> Iterator[None]:
    """Around verl's saving of step ``step``: the older checkpoints go when the new one is complete, and none is mixed.

    ``saved`` then has the step too. ``nodes`` are Ray's names of those on which models of the run are saved.

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
    step_back(root, saved, step)
    trainer.update({name: None for name, value in given.items() if value is not None})
    try:
        yield
    finally:
        trainer.update({name: value for name, value in given.items() if value is not None})
    saved.since.append(step)
    remove_old(root, saved, keep)
    if nodes:
        remove_old_elsewhere(root, saved, keep, nodes)
