"""What a run resumes from, looked at in the driver: which checkpoint, whether it is whole, and whether it fits the run.

verl writes ``<root>/global_step_<n>/{actor,critic,data.pt}`` and then, when all is there, n into a tracker file.
"""

import dataclasses
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asyppo_verl.checkpoint import check_checkpoint
from asyppo_verl.config import nearest
from asyppo_verl.retention import latest_step

RESUME_MODES = ("auto", "disable", "resume_path")
FILES = {"model": "model", "optimizer": "optim", "extra": "extra_state"}
"""What verl's ``checkpoint.load_contents`` calls a thing, and how the names of its files begin."""
SIZES = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Entries of a model's configuration that bind its weights to it."""
CURE = (
    "resume from another one (trainer.resume_mode=resume_path trainer.resume_from_path=...), or start anew with "
    "trainer.resume_mode=disable"
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One model of a checkpoint, as the run that resumes needs it."""

    folder: str
    """Below ``global_step_<n>``: "actor" or "critic/critic_<m>"."""
    ranks: int
    """Workers that saved a file each, and load it."""
    contents: Sequence[str]
    """What is loaded, in verl's words; nothing if its format is unknown."""
    sizes: Mapping[str, Any]
    """What the saved model's configuration must say, of :data:`SIZES`."""


def resume_target(mode: str, root: Path, path: str | None) -> Path | None:
    """The ``global_step_<n>`` folder that verl will resume from, None if it starts anew.

    Args:
        mode, path: verl's ``trainer.resume_mode`` and ``trainer.resume_from_path``.
        root: verl's ``trainer.default_local_dir``.

    Raises:
        ValueError: if the mode is unknown, or what it names is not there.
    """
    if mode not in RESUME_MODES:
        raise ValueError(
            f"trainer.resume_mode={mode!r} is not a mode of verl{nearest(mode, RESUME_MODES)}; "
            f"set one of {', '.join(RESUME_MODES)}"
        )
    if mode == "resume_path":
        step = Path(path or "").name.removeprefix("global_step_")
        if not path or not step.isdecimal() or not Path(path).is_dir():
            raise ValueError(
                f"trainer.resume_from_path={path} is not the folder of a checkpoint; name one called global_step_<n>, "
                "or resume from the last one with trainer.resume_mode=auto"
            )
        return Path(path)
    if mode == "disable":
        return None
    try:
        last = latest_step(root)
    except ValueError as error:
        raise ValueError(f"{error}, or start anew with trainer.resume_mode=disable") from error
    return None if last is None else root / f"global_step_{last}"


def check_whole(checkpoint: Path, parts: Sequence[Part]) -> None:
    """Refuse a ``global_step_<n>`` folder that is not whole or not of this run.

    Args:
        checkpoint: the folder.
        parts: the actor, then every critic.

    Raises:
        ValueError: naming the folder or file, what is wrong with it, and the cure.
    """
    check_checkpoint(str(checkpoint / "critic"), len(parts) - 1, ranks=parts[1].ranks)
    for part in parts:
        if part.contents:
            _check_files(checkpoint / part.folder, part)
            _check_sizes(checkpoint / part.folder / "huggingface" / "config.json", part.sizes)
    data = checkpoint / "data.pt"
    if not zipfile.is_zipfile(data):
        raise ValueError(f"{data}, the position in the training data, is missing or damaged; {CURE}")


def _check_files(folder: Path, part: Part) -> None:
    for rank in range(part.ranks):
        for content in FILES.keys() & set(part.contents):
            file = folder / f"{FILES[content]}_world_size_{part.ranks}_rank_{rank}.pt"
            if not file.exists():
                found = sorted({path.name.split("_rank_")[0] for path in folder.glob("*_world_size_*.pt")})
                raise ValueError(
                    f"the checkpoint {folder} has no {file.name} (it has {', '.join(found) or 'nothing of the kind'}); "
                    f"resume on as many GPUs as it was saved on, {CURE}"
                )
            if not zipfile.is_zipfile(file):  # looks for the table of contents, which torch.save writes last
                raise ValueError(f"the checkpoint file {file} is damaged, its end is missing; {CURE}")


def _check_sizes(file: Path, sizes: Mapping[str, Any]) -> None:
    try:
        saved = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} of the checkpoint cannot be read ({error}); {CURE}") from error
    saved = saved.get("text_config", saved)
    for key, wanted in sizes.items():
        if saved.get(key, wanted) != wanted:
            raise ValueError(
                f"the checkpoint {file.parent.parent} is of another model: {key}={saved[key]}, while the configured model has "
                f"{wanted}; configure the model that it was trained from, {CURE}"
            )
