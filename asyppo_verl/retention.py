"""Which checkpoints of a run are on disk, which is the last whole one, and which are too many."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TRACKER = "latest_checkpointed_iteration.txt"
"""The file in which verl writes the step of a checkpoint when all of it is there."""


def saved_steps(root: Path) -> list[int]:
    """Steps that have a folder ``global_step_<n>`` below ``root``, in order."""
    names = (folder.name.removeprefix("global_step_") for folder in root.glob("global_step_*") if folder.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())


def latest_step(root: Path) -> int | None:
    """Step of the last whole checkpoint below ``root``, verl's ``trainer.default_local_dir``; None before the first.

    Raises:
        ValueError: if the file that says so names no checkpoint, with the cure.
    """
    tracker = root / TRACKER
    if not tracker.exists():
        return None
    step = tracker.read_text().strip()
    if not step.isdecimal() or not (root / f"global_step_{step}").is_dir():
        raise ValueError(
            f"{tracker} names step {step!r}, but there are checkpoints of the steps {saved_steps(root)}; write the step of "
            "the last whole one into that file"
        )
    return int(step)


def remove_old(root: Path, step: int, keep: Mapping[str, int | None]) -> None:
    """Remove all but the newest checkpoints up to ``step``; those of earlier starts of the run count as well.

    Args:
        root: verl's ``trainer.default_local_dir``.
        step: the checkpoint that was written last; later ones belong to a run that this one branched off from, and stay.
        keep: how many to keep of each folder ("actor", "critic") below ``global_step_<n>``; None keeps all.
    """
    for folder, count in keep.items():
        paths = [root / f"global_step_{saved}" / folder for saved in saved_steps(root) if saved <= step]
        paths = [path for path in paths if path.is_dir()]
        for path in paths[:-count] if count else []:
            shutil.rmtree(path)


def step_back(root: Path, step: int) -> None:
    """Let the tracker name a checkpoint before ``step``, which is about to be written, if it names that one or a later one.

    Those belong to a run that this one branched off from. Were this run killed while it writes over one of them, the next
    start would else take what is there for whole, or go on with the other run.
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
    """Around verl's saving of step ``step``: the older checkpoints go when the new one is whole, and none is mixed.

    verl removes them while it writes, the actor's before the critics' are there, so that a crash at that moment would leave
    nothing to resume from; and it forgets those of earlier starts. Checkpoints that verl writes in the background are whole
    at a time that only verl knows, and are left to it.
    """
    trainer = config.trainer
    if config.actor_rollout_ref.actor.get("checkpoint", {}).get("async_save", False):
        yield
        return
    keep = {"actor": trainer.max_actor_ckpt_to_keep, "critic": trainer.max_critic_ckpt_to_keep}
    step_back(Path(trainer.default_local_dir), step)
    trainer.max_actor_ckpt_to_keep = trainer.max_critic_ckpt_to_keep = None
    try:
        yield
    finally:
        trainer.max_actor_ckpt_to_keep, trainer.max_critic_ckpt_to_keep = keep.values()
    remove_old(Path(trainer.default_local_dir), step, keep)
