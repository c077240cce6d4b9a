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

from recipe.asyppo.console import latest_checkpoint

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


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
        return Source(str(_with_weights(folder)))
    run = folder.parent if folder.name == "checkpoints" else folder
    if (run / "checkpoints").is_dir():
        folder = run / "checkpoints" / f"global_step_{latest_checkpoint(run)}"
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


def _with_weights(folder: Path) -> Path:
    indexes = [folder / name for name in INDEXES if (folder / name).exists()]
    expected = {name for index in indexes for name in json.loads(index.read_text())["weight_map"].values()}
    missing = sorted(name for name in expected if not (folder / name).exists())
    if missing:
        raise ValueError(
            f"{folder} is incomplete: {missing[0]} is missing ({len(missing)} of {len(expected)} weight files)"
        )
    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise ValueError(f"{folder} has a config.json but no weights ({' or '.join(WEIGHTS)})")
    return folder


def _checkpoint(actor: Path) -> Source:
    if (actor / "huggingface").is_dir() and any(
        p for pattern in WEIGHTS for p in (actor / "huggingface").glob(pattern)
    ):
        return Source(str(_with_weights(actor / "huggingface")), checkpoint=actor.parent)
    if (actor / "lora_train_meta.json").exists():
        raise ValueError(f"{actor} is a LoRA checkpoint; merge the adapter into its model and evaluate that folder")
    if not (actor / "fsdp_config.json").exists():
        raise ValueError(f"{actor}/fsdp_config.json is missing: the checkpoint is incomplete, or not one of FSDP")
    ranks = json.loads((actor / "fsdp_config.json").read_text())["world_size"]
    expected = [f"model_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)] + ["huggingface/config.json"]
    missing = [name for name in expected if not (actor / name).exists()]
    if missing:
        raise ValueError(
            f"{actor} is incomplete: {missing[0]} is missing ({len(missing)} of {len(expected)} files); wait until the "
            "checkpoint is written, or gather the files of all nodes in one folder"
        )
    return Source(str(actor), checkpoint=actor.parent, is_sharded=True)


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
