"""Checkpoints: the run can write them, go on from them, and go on from the one that it is told to."""

import os
from collections.abc import Iterator
from pathlib import Path

from asyppo_verl import checkpoint
from asyppo_verl.config import check_known
from asyppo_verl.critic_settings import Run
from asyppo_verl.preflight.gpus import critic_ranks, is_on_this_machine

CONTENTS = ("model", "optimizer", "extra", "hf_model")
"""What verl's checkpoints can hold."""
WORKERS = ("actor_rollout_ref.actor", "critic")


def check_contents(run: Run) -> Iterator[str]:
    """Refuse contents of checkpoints that verl does not know, and would leave out in silence; say what is not read."""
    actor = run.config.actor_rollout_ref.actor
    if actor.checkpoint is None:
        raise ValueError(f"{WORKERS[0]}.checkpoint=None: verl stops at the first checkpoint; remove the override")
    if actor.strategy != "megatron" and actor.checkpoint.async_save:
        yield (
            f"{WORKERS[0]}.checkpoint.async_save=True: only Megatron saves in the background; with {actor.strategy} verl would "
            "never note which checkpoint is complete, and a run that is killed would begin anew, so this is set to False"
        )
    for worker in WORKERS:
        for key in (f"{worker}.checkpoint.save_contents", f"{worker}.checkpoint.load_contents"):
            for index, name in enumerate(run.get(key) or ()):  # null is all of them
                check_known(f"{key}[{index}]", name, CONTENTS)


def check_folder(run: Run) -> None:
    """Refuse a folder for checkpoints that cannot be written; that of other machines is not looked at."""
    trainer = run.config.trainer
    key, value = "trainer.default_local_dir", trainer.default_local_dir
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key}={value!r} must name the folder for checkpoints")
    if not is_on_this_machine(run.config) or trainer.save_freq <= 0:
        return
    folder = Path(value).absolute()
    present = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not os.path.isdir(present) or not os.access(present, os.W_OK | os.X_OK):
        raise ValueError(
            f"{key}={value}: {present} is a file or cannot be written, so saving would fail; name another folder"
        )


def resumed_checkpoint(run: Run) -> Path | None:
    """The ``global_step_<n>`` folder that verl will resume from, None if it starts anew."""
    trainer = run.config.trainer
    mode, path = trainer.resume_mode, str(trainer.resume_from_path)
    check_known("trainer.resume_mode", mode, ("auto", "disable", "resume_path"))
    if mode == "disable":
        return None
    if mode == "auto":
        try:
            last = checkpoint.latest_step(root := Path(trainer.default_local_dir))
        except ValueError as error:
            raise ValueError(f"{error}, or start anew with trainer.resume_mode=disable") from error
        return None if last is None else root / f"global_step_{last}"
    step = Path(path).name.removeprefix("global_step_")
    if not step.isdecimal() or not (Path(path).is_dir() or not is_on_this_machine(run.config)):
        raise ValueError(
            f"trainer.resume_from_path={path} is not the folder of a checkpoint; name one called global_step_<n>, "
            "or resume from the last one with trainer.resume_mode=auto"
        )
    return Path(path)


def check_resume(run: Run) -> Iterator[str]:
    """Refuse to resume from a checkpoint that is incomplete, corrupt, of another run, or would be loaded without weights.

    On other machines a rank's files may be on its node only: each rank looks at its own (:mod:`asyppo_verl.critic_worker`),
    and here only what can be seen is.
    """
    trainer, asyppo, folder = run.config.trainer, run.asyppo, resumed_checkpoint(run)
    if trainer.resume_mode == "auto" and trainer.resume_from_path:
        yield f"trainer.resume_from_path={trainer.resume_from_path} is ignored with trainer.resume_mode=auto"
    if folder is None:
        return
    is_local = is_on_this_machine(run.config) and (asyppo.pool.nnodes == 1 or not asyppo.critics_are_apart)
    if is_local:
        checkpoint.check_critics(folder / "critic", asyppo.num_critics)
        if (position := folder / "data.pt").exists():
            checkpoint.check_archive(position, "the position in the training data")
        else:
            yield f"{position} is not there: verl goes on from this checkpoint at the start of the training data"
    else:
        # A node that has critics has a part of every critic, unless each has GPUs of its own.
        has_all = asyppo.placement != "split" and any((folder / "critic").glob("critic_*"))
        checkpoint.check_critics(folder / "critic", asyppo.num_critics, held=None if has_all else ())
    unseen = []
    for model in _models(run, folder):
        if model.contents is not None and "model" not in model.contents:
            raise ValueError(
                f"checkpoint.load_contents={list(model.contents)} lacks 'model', so the run would go on from {model.folder} "
                "with a new run's weights; add it, or start anew with trainer.resume_mode=disable"
            )
        files = f"*_world_size_{model.ranks}_rank_"
        seen = [rank for rank in range(model.ranks) if is_local or any(model.folder.glob(f"{files}{rank}.pt"))]
        of_others = not seen and any(model.folder.glob("*_world_size_*"))  # files of another number of ranks
        checkpoint.check_files(model, [0] if of_others else seen)
        if len(seen) < model.ranks:
            unseen.append(f"{len(seen)} of {model.ranks} ranks of {model.folder}")
    if unseen:
        yield f"only part of the checkpoint is visible here: {'; '.join(unseen)}; each rank will check its own files"


def _models(run: Run, folder: Path) -> Iterator[checkpoint.Model]:
    """What this run loads from a checkpoint; only FSDP's files are known here."""
    trainer, names = run.config.trainer, checkpoint.critic_folders(run.asyppo.num_critics)
    parts = [("critic", f"critic/{names[index]}", critic_ranks(run)) for index in run.critics]
    if not run.own:
        parts.append((WORKERS[0], "actor", trainer.nnodes * trainer.n_gpus_per_node))
    for node, name, ranks in parts:
        if run.get(f"{node}.strategy") in ("fsdp", "fsdp2"):
            yield checkpoint.Model(folder / name, ranks, run.get(f"{node}.checkpoint.load_contents"))
