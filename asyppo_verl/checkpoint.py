"""What is in a checkpoint of verl: the mini-critics' folders, and the files of one model that FSDP ranks saved."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

_SHARD_FILE = re.compile(r"_world_size_(\d+)_rank_\d+\.pt$")
"""How verl names what one FSDP rank saved."""


def critic_folders(num_critics: int) -> list[str]:
    """Names of the mini-critics' folders in a checkpoint."""
    return [f"critic_{index}" for index in range(num_critics)]


def check_checkpoint(
    path: str, num_critics: int, *, held: Iterable[int] | None = None, ranks: int | None = None
) -> None:
    """Refuse a checkpoint that does not fit the run, before anything of it is loaded.

    Args:
        path: the folder with the folders of the mini-critics.
        num_critics: M; a folder of a further critic is refused.
        held: critics whose folders must be there (default: all M); with disks of their own, a node has only its critics'.
        ranks: ranks of one critic (None: any), which FSDP's files are bound to.

    Raises:
        ValueError: naming the folder, what is wrong with it, and the cure.
    """
    found = {name for name in (os.listdir(path) if os.path.isdir(path) else []) if name.startswith("critic_")}
    names = critic_folders(num_critics)
    expected = {names[index] for index in (range(num_critics) if held is None else held)}
    missing, unexpected = sorted(expected - found), sorted(found - set(names))
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint {path} does not fit asyppo.num_critics={num_critics}: "
            f"missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}; "
            "set num_critics to what the run was saved with, or trainer.resume_mode=disable to start anew"
        )
    for name in sorted(expected) if ranks is not None else []:
        folder = os.path.join(path, name)
        sizes = {int(match[1]) for match in map(_SHARD_FILE.search, os.listdir(folder)) if match}
        if sizes and ranks not in sizes:
            raise ValueError(
                f"the checkpoint {folder} was saved by {' or '.join(map(str, sorted(sizes)))} ranks, but a mini-critic now "
                f"has {ranks}, and FSDP checkpoints keep their number of ranks; choose asyppo.placement and asyppo.pool so "
                "that every critic has as many again, or trainer.resume_mode=disable to start anew"
            )


def check_model(folder: Path) -> None:
    """Refuse a folder ("actor", "critic/critic_<m>") that does not hold one whole model to be merged.

    Raises:
        ValueError: naming the folder, the missing files, and the cure.
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
