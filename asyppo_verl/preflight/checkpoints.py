"""Whether a run could be resumed from the checkpoints that it is told to write, and whether it can write them."""

import os
from pathlib import Path
from typing import Any

from asyppo_verl.config import nearest

CONTENTS = ("model", "optimizer", "extra", "hf_model")
"""What verl's checkpoints can hold."""

WORKERS = ("actor_rollout_ref.actor", "critic")
"""Who writes them; the critic's settings are those of every mini-critic."""

REST = {"optimizer": "the optimizer starts anew", "extra": "learning rate schedule and random numbers start anew"}
"""What a resumed run can do without, and what follows."""


def check_checkpoints(config: Any) -> None:
    """Refuse settings that would write checkpoints without weights, or none, or resume without weights.

    Raises:
        ValueError: naming key, value and cure.
    """
    trainer = config.trainer
    if trainer.get("remove_previous_ckpt_in_save"):
        raise ValueError(
            "trainer.remove_previous_ckpt_in_save=True removes the last checkpoint before the next one is whole; remove it "
            "and set trainer.max_actor_ckpt_to_keep=1 and trainer.max_critic_ckpt_to_keep=1"
        )
    for worker, node in _workers(config):
        for key in ("save_contents", "load_contents"):
            _check_contents(f"{worker}.checkpoint.{key}", node.checkpoint[key])
        # Megatron also loads from what it has saved in Hugging Face format; FSDP does not.
        weights = ("model",) if node.strategy in ("fsdp", "fsdp2") else ("model", "hf_model")
        keys = ("save_contents", "load_contents") if trainer.save_freq > 0 else ("load_contents",)
        for key in keys:
            if not set(weights) & set(node.checkpoint[key]):
                raise ValueError(
                    f"{worker}.checkpoint.{key}={list(node.checkpoint[key])} lacks 'model': "
                    f"{'a checkpoint would hold no weights' if key == 'save_contents' else 'a resumed run would start anew'}; "
                    "set [model,optimizer,extra]"
                )
        missing = [name for name in node.checkpoint.load_contents if name not in node.checkpoint.save_contents]
        if missing and trainer.save_freq > 0:
            raise ValueError(
                f"{worker}.checkpoint.load_contents={list(node.checkpoint.load_contents)} names {', '.join(missing)}, which "
                f"{worker}.checkpoint.save_contents={list(node.checkpoint.save_contents)} lacks, so no run could resume from "
                "these checkpoints; make the two equal"
            )
    _check_folder(trainer)
    _check_resume_path(trainer)


def checkpoint_notices(config: Any) -> list[str]:
    """What checkpoints will lack though a run can go on from them."""
    return [
        f"{worker}.checkpoint.{key}={list(node.checkpoint[key])} lacks {name!r}: in a resumed run {consequence}"
        for worker, node in _workers(config)
        for key in (("save_contents", "load_contents") if config.trainer.save_freq > 0 else ("load_contents",))
        for name, consequence in REST.items()
        if name not in node.checkpoint[key]
    ]


def _workers(config: Any) -> list[tuple[str, Any]]:
    return list(zip(WORKERS, (config.actor_rollout_ref.actor, config.critic), strict=True))


def _check_contents(key: str, contents: Any) -> None:
    if contents is None or isinstance(contents, str) or not hasattr(contents, "__iter__"):
        raise ValueError(f"{key}={contents!r} must be a list such as [model,optimizer,extra]")
    for name in contents:
        if name not in CONTENTS:
            raise ValueError(
                f"{key} names {name!r}, which verl would leave out in silence{nearest(name, CONTENTS)}; "
                f"valid: {', '.join(CONTENTS)}"
            )


def _check_folder(trainer: Any) -> None:
    key, value = "trainer.default_local_dir", trainer.default_local_dir
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key}={value!r} must name the folder for checkpoints")
    if trainer.nnodes > 1:
        return  # it may exist on the other nodes only
    folder = Path(value).absolute()
    present = next(path for path in (folder, *folder.parents) if path.exists())
    if not present.is_dir():
        raise ValueError(f"{key}={value}: {present} is a file, so no checkpoint could be written; name another folder")
    if trainer.save_freq > 0 and not os.access(present, os.W_OK | os.X_OK):
        raise ValueError(
            f"{key}={value}: {present} cannot be written, so no checkpoint could be; name another folder, or change its rights"
        )


def _check_resume_path(trainer: Any) -> None:
    path = trainer.resume_from_path
    if path is not None and not isinstance(path, str):
        raise ValueError(
            f"trainer.resume_from_path={path!r} must be the folder of a checkpoint, global_step_<n>, or null"
        )
    if path and trainer.resume_mode == "auto":
        raise ValueError(
            f"trainer.resume_from_path={path} would not be looked at with trainer.resume_mode=auto, which resumes from the "
            "last checkpoint of trainer.default_local_dir; set trainer.resume_mode=resume_path, or remove the path"
        )
