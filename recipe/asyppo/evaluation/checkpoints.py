"""Where the weights are: a Hugging Face model, an FSDP checkpoint of verl, or the latest checkpoint of a run."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from asyppo_verl.checkpoint import check_shards, find_checkpoint

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Weights of a Hugging Face folder, in the order in which transformers looks for them."""


@dataclass(frozen=True)
class Source:
    """A model to be evaluated."""

    path: str
    """Hugging Face folder or hub name, or the ``actor`` folder of an FSDP checkpoint."""
    checkpoint: Path | None = None
    """The ``global_step_N`` folder that holds it."""
    is_sharded: bool = False
    """True for FSDP shards, which have to be merged first."""

    @property
    def default_out(self) -> Path:
        """``evaluation/global_step_N`` in the run folder; for other models ``runs/evaluation/NAME``."""
        if self.checkpoint is None:
            return Path("runs/evaluation") / Path(self.path).name
        parent = self.checkpoint.parent
        return (parent.parent if parent.name == "checkpoints" else parent) / "evaluation" / self.checkpoint.name


def locate(target: str) -> Source:
    """Find the weights that ``target`` names, and see that they are all there.

    Raises:
        ValueError: if there are none, or a file of them is missing.
    """
    folder = Path(target)
    if not folder.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", target):
            return _on_the_hub(target)
        raise ValueError(f"{target} does not exist; give a Hugging Face model, a checkpoint folder or a run folder")
    folder = folder.resolve()
    if (folder / "config.json").exists():
        check_weights(folder)
        return Source(str(folder))
    folder = find_checkpoint(folder)
    actor = folder if folder.name == "actor" else folder / "actor"
    if not actor.is_dir():
        raise ValueError(
            f"{actor} does not exist: {target} is neither a Hugging Face model (config.json and weights), nor a checkpoint "
            "(global_step_N with actor/ in it), nor a run folder whose latest checkpoint is complete"
        )
    return _checkpoint(actor)


def _on_the_hub(name: str) -> Source:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is neither a folder nor a model that transformers can load: {error}") from error
    return Source(name)


def _checkpoint(actor: Path) -> Source:
    huggingface = actor / "huggingface"
    if any(huggingface.glob("*.safetensors")) or any(huggingface.glob("pytorch_model*.bin")):
        check_weights(huggingface)
        return Source(str(huggingface), checkpoint=actor.parent)
    check_shards(actor)
    return Source(str(actor), checkpoint=actor.parent, is_sharded=True)


def check_weights(folder: Path) -> None:
    """Refuse a Hugging Face folder whose weights are missing, incomplete or cut off; only headers are read.

    Raises:
        ValueError: naming folder, file and fix.
    """
    fix = "copy or download the model again"
    names = {path.name for path in folder.iterdir()}
    main = next((name for name in WEIGHTS if name in names), None)
    if main is None:
        if any(name.endswith((".safetensors", ".bin")) for name in names):
            return  # under names that the model's own code may know
        raise ValueError(f"{folder} has a configuration but no weights (*.safetensors); {fix}")
    files = {main}
    if main.endswith(".json"):
        files = set(json.loads((folder / main).read_text())["weight_map"].values())
        if missing := sorted(files - names):
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which {main} lists; {fix}")
    for name in sorted(files):
        try:
            if name.endswith(".safetensors"):
                with safe_open(folder / name, framework="pt"):  # the header says how long the file must be
                    pass
        except SafetensorError as error:
            raise ValueError(f"{folder}: {name} is corrupt ({error}); {fix}") from error


@contextmanager
def as_huggingface(source: Source, folder: Path, log: Path) -> Iterator[str]:
    """The model as a Hugging Face folder or hub name; shards are merged into ``folder``, which is removed afterwards.

    verl's merger writes bfloat16, the precision in which the rollout engine receives weights on a GPU. Merged weights
    do not depend on the number of GPUs that trained them.
    """
    if not source.is_sharded:
        yield source.path
        return
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    try:
        with open(log, "a") as file:
            merged = subprocess.run(
                [*command, "--local_dir", source.path, "--target_dir", str(folder)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ,
            )
        if merged.returncode:
            raise ValueError(f"verl could not merge {source.path}; see the end of {log}")
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
