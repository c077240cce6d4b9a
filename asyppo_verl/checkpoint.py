"""verl's folders of checkpoints: find the last, say whether it is complete and whether it fits the run.

A run writes ``<root>/global_step_<n>/{actor,critic,data.pt}``, with one file of each kind for every FSDP rank, and then,
when all is there, n into a tracker file. Mini-critics have folders of their own, ``critic/critic_<m>``.
"""

import dataclasses
import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
FILES = {"model": "model", "optimizer": "optim", "extra": "extra_state"}
"""What verl's ``checkpoint.load_contents`` calls a thing, and how the names of its files begin."""
OTHERWISE = (
    "resume from another one (trainer.resume_mode=resume_path trainer.resume_from_path=...), or start anew with "
    "trainer.resume_mode=disable"
)


def saved_steps(root: Path) -> list[int]:
    """Steps that have a folder ``global_step_<n>`` below ``root``, in order."""
    names = (folder.name.removeprefix("global_step_") for folder in root.glob("global_step_*") if folder.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())


def latest_step(root: Path) -> int | None:
    """Step of the last complete checkpoint below ``root``, verl's ``trainer.default_local_dir``; None before the first.

    Raises:
        ValueError: if the file that says so names no checkpoint, with the fix.
    """
    tracker = root / TRACKER
    if not tracker.exists():
        return None
    step = tracker.read_text().strip()
    if not step.isdecimal() or not (root / f"global_step_{step}").is_dir():
        raise ValueError(
            f"{tracker} names step {step!r}, but there are checkpoints of the steps {saved_steps(root)}; write the step of "
            "the last complete one into that file"
        )
    return int(step)


def find_checkpoint(path: Path) -> Path:
    """The ``global_step_N`` folder that ``path`` is, or the latest one of the run in ``path``.

    Raises:
        ValueError: if there is none.
    """
    for run in (path, path / "checkpoints"):
        if (step := latest_step(run)) is not None:
            path = run / f"global_step_{step}"
            break
    if not path.is_dir():
        raise ValueError(f"the checkpoint {path} does not exist; name a global_step_N folder or a run folder")
    return path


def critic_folders(num_critics: int) -> list[str]:
    """Names of the mini-critics' folders in a checkpoint."""
    return [f"critic_{index}" for index in range(num_critics)]


# -- resuming ------------------------------------------------------------------------------------------------------


def check_critics(path: Path, num_critics: int, *, held: Iterable[int] | None = None) -> None:
    """Refuse a ``critic`` folder of a run with another number of mini-critics.

    Args:
        path: the folder with those of the mini-critics.
        num_critics: M; a folder of a further critic is refused.
        held: critics whose folders must be there (default: all M); with disks of their own, a node has only its critics'.

    Raises:
        ValueError: naming the folder, what is wrong with it, and the fix.
    """
    found = {folder.name for folder in path.glob("critic_*")}
    names = critic_folders(num_critics)
    expected = {names[index] for index in (range(num_critics) if held is None else held)}
    missing, unexpected = sorted(expected - found), sorted(found - set(names))
    if missing or unexpected:
        fix = "set num_critics to what the run was saved with"
        if not found:
            fix = "if a run without mini-critics saved it, name a folder of your own (trainer.default_local_dir)"
        raise ValueError(
            f"the checkpoint {path} does not fit asyppo.num_critics={num_critics}: "
            f"missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}; "
            f"{fix}, or trainer.resume_mode=disable to start anew"
        )


@dataclasses.dataclass(frozen=True)
class Model:
    """One model of a checkpoint, as those who load it need it."""

    folder: Path
    """``actor`` or ``critic/critic_<m>`` below ``global_step_<n>``."""
    ranks: int
    """Workers that saved a file each, and load it."""
    contents: Sequence[str] | None
    """What is loaded, in verl's words; None for everything."""


def check_files(model: Model, ranks: Iterable[int]) -> None:
    """Refuse a folder in which a file of one of the given ranks is missing or cut off.

    Raises:
        ValueError: naming folder, file and fix.
    """
    begins = [begin for content, begin in FILES.items() if model.contents is None or content in model.contents]
    for rank in ranks:
        for begin in begins:
            file = model.folder / f"{begin}_world_size_{model.ranks}_rank_{rank}.pt"
            if not file.exists():
                found = sorted({path.name.split("_rank_")[0] for path in model.folder.glob("*_world_size_*.pt")})
                raise ValueError(
                    f"the checkpoint {model.folder} has no {file.name} (it has {', '.join(found) or 'nothing of the kind'}); "
                    "resume on as many GPUs as it was saved on (critics: asyppo.placement and asyppo.pool), with the contents "
                    f"that it was saved with, {OTHERWISE}"
                )
            check_archive(file, "the checkpoint file")


def check_archive(file: Path, name: str) -> None:
    """Refuse a file of ``torch.save`` without its table of contents, which is written last."""
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{name} {file} is missing or corrupt, its end is not there; {OTHERWISE}")


# -- weights to be used elsewhere ----------------------------------------------------------------------------------


def find_models(checkpoint: Path) -> dict[str, Path]:
    """The models in a checkpoint: name and folder, the actor first.

    Raises:
        ValueError: if there are none, or if the mini-critics are not numbered from 0 without a gap.
    """
    actor, critic = checkpoint / "actor", checkpoint / "critic"
    models = {"actor": actor} if actor.is_dir() else {}
    if found := {path.name for path in critic.glob("critic_*")}:
        names = critic_folders(len(found))
        if found != set(names):
            raise ValueError(
                f"{critic} holds {', '.join(sorted(found))} instead of {', '.join(names)}; bring all mini-critics together, "
                "or name another checkpoint"
            )
        models |= {name: critic / name for name in names}
    elif critic.is_dir() and any(critic.iterdir()):
        models["critic"] = critic
    if not models:
        raise ValueError(f"{checkpoint} holds neither actor nor critic; name a global_step_N folder or a run folder")
    return models


def check_shards(folder: Path) -> None:
    """Refuse a folder ("actor", "critic/critic_<m>") without all FSDP shards of one model.

    Raises:
        ValueError: naming the folder, the missing files, and the fix.
    """
    if (folder / "lora_train_meta.json").exists():
        raise ValueError(f"{folder} is a LoRA checkpoint; merge the adapter into its model, and name that folder")
    ranks = folder / "fsdp_config.json"
    if not ranks.exists():
        raise ValueError(
            f"{folder} is no complete FSDP checkpoint: fsdp_config.json is missing; name a checkpoint that was saved to its "
            "end (Megatron: python -m verl.model_merger merge --backend megatron)"
        )
    count = json.loads(ranks.read_text())["world_size"]
    files = ["huggingface/config.json", *(f"model_world_size_{count}_rank_{rank}.pt" for rank in range(count))]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is incomplete: {', '.join(missing)} missing; wait until it is written, bring the files of all {count} "
            "ranks together, and save 'model' (checkpoint.save_contents)"
        )
