"""Training runs on recorded rollouts, whose every step can be compared bit by bit."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rollouts
import torch
from training import train

GOLDEN = Path(__file__).resolve().parent / "golden"
TESTS = str(GOLDEN.parent)
EXPERIMENT, PROJECT = "replay", "asyppo_cpu"
MEASURED = ("timing_", "perf/")
"""What is in the names of metrics that measure the machine, not the training."""


def make_task(folder: Path) -> None:
    """Actor, critic with a head of its own, data and the recorded rollouts; nothing is trained, so seeds fix every bit."""
    from transformers import Qwen3ForTokenClassification

    from recipe.asyppo.toy.make_toy import SIZES, build_model, build_tokenizer, write_data

    folder.mkdir(parents=True)
    tokenizer = build_tokenizer()
    build_model(SIZES["actor"], tokenizer, seed=0).save_pretrained(folder / "actor")
    body = build_model(SIZES["critic"], tokenizer, seed=1).config
    body.num_labels = 1
    torch.manual_seed(2)
    Qwen3ForTokenClassification(body).save_pretrained(folder / "critic")
    for model in ("actor", "critic"):
        tokenizer.save_pretrained(folder / model)
    write_data(folder, seed=0, train=640, test=16)
    shape = f"GBS{rollouts.PROMPTS}_N{rollouts.RESPONSES}_in16_out4"
    rollouts.dump(GOLDEN / "rollouts.jsonl", folder / "dump" / f"{EXPERIMENT}_{PROJECT}" / shape, tokenizer)
    (folder / "made.json").write_text("{}")


class Replay:
    """What a run on recorded rollouts computed."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def metrics(self) -> dict[int, dict[str, float]]:
        """Metrics by step, without those that measure the machine."""
        lines = map(json.loads, (self.run_dir / "metrics.jsonl").read_text().splitlines())
        return {
            line["step"]: {key: x for key, x in line["data"].items() if not any(part in key for part in MEASURED)}
            for line in lines
        }

    def step(self, step: int) -> dict[str, Any]:
        """What the probe wrote down: ``rows[field][row key]``, and whether the plugin was active."""
        return torch.load(self.run_dir / "probe" / f"step_{step}.pt", weights_only=False)

    def state(self, step: int, folder: str) -> dict[str, torch.Tensor]:
        """Every tensor of a checkpoint folder, such as ``actor`` or ``critic/critic_0``, by file and name."""
        found = {}
        for file in sorted((self.run_dir / "checkpoints" / f"global_step_{step}" / folder).glob("*.pt")):
            for name, tensor in _tensors(torch.load(file, weights_only=False)):
                found[f"{file.name}: {name}"] = tensor
        return found


def _tensors(node: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a nested state, sharded ones as this rank has them, and the numbers as tensors."""
    if isinstance(node, torch.Tensor):
        yield name, getattr(node, "_local_tensor", node)
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _tensors(value, f"{name}.{key}")
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _tensors(value, f"{name}.{index}")
    elif isinstance(node, int | float):
        yield name, torch.tensor(node, dtype=torch.float64)


def replay(
    root: Path, task: Path, run_dir: Path, *overrides: str, steps: int = rollouts.STEPS, **environment: str
) -> Replay:
    """Train on the recorded rollouts, by default with AsyPPO, and keep every step's checkpoint."""
    (run_dir / "probe").mkdir(parents=True, exist_ok=True)
    modules = environment.pop("MODULES", "")
    train(root, task, run_dir, *settings(task, steps), *overrides, **probed(run_dir, modules), **environment)
    return Replay(run_dir)


def settings(task: Path, steps: int) -> list[str]:
    """Overrides of a replay."""
    return [
        f"trainer.total_training_steps={steps}",
        f"trainer.experiment_name={EXPERIMENT}",
        "trainer.save_freq=1",
        "trainer.max_actor_ckpt_to_keep=null",
        "trainer.max_critic_ckpt_to_keep=null",
        "skip.rollout_tq.enable=True",
        f"skip.rollout_tq.steps={list(range(1, rollouts.STEPS + 1))}".replace(" ", ""),
        f"skip.rollout_tq.dump_dir={task}/dump",
        "critic.shuffle=False",
    ]


def probed(run_dir: Path, modules: str = "") -> dict[str, str]:
    """Environment of a run with the probe inside; one thread, so that sums do not depend on the number of cores."""
    return {
        "PROBE_DIR": str(run_dir / "probe"),
        "VERL_USE_EXTERNAL_MODULES": ",".join(filter(None, [modules, "probe"])),
        "PYTHONPATH": os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
    }
