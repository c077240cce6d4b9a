"""The mini-critics' part of a checkpoint: one folder each, in verl's own format, made by as many ranks as a critic has."""

import os
import re
from collections.abc import Iterable

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
