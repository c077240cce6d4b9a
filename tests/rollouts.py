"""The recorded rollouts of ``golden/rollouts.jsonl``: from a run's dump to the file, and from the file to a dump.

A line is a training step: ``{"step": 1, "groups": [{"prompt": "23+58=", "responses": [{"ids", "log_probs", "reward"}]}]}``.
Recorded by the README's first command, with verl's ``skip.rollout_tq`` switched on::

    RUN_DIR=/tmp/recorded bash scripts/run_asyppo_cpu.sh data.train_batch_size=16 actor_rollout_ref.rollout.n=4 \
        actor_rollout_ref.actor.ppo_mini_batch_size=8 trainer.total_training_steps=10 skip.rollout_tq.enable=True \
        skip.rollout_tq.steps=[1,2,3,4,5,6,7,8,9,10] skip.rollout_tq.dump_dir=/tmp/recorded/dump
    python tests/rollouts.py /tmp/recorded/dump tests/golden/rollouts.jsonl
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

PROMPTS, RESPONSES, STEPS = 16, 4, 10
"""Prompts in a step, responses to a prompt, steps on file."""


def record(dump: Path, out: Path) -> None:
    """Write what a run dumped with ``skip.rollout_tq`` as one JSON line a step."""
    files = {int(file.parent.parent.name): file for file in dump.rglob("tq_batch.pt")}
    with open(out, "w") as lines:
        for step, file in sorted(files.items()):
            dumped = torch.load(file, weights_only=False)
            groups: dict[str, dict[str, Any]] = {}
            for row, key in enumerate(dumped["keys"]):
                data = dumped["tensordict"][row]
                group = groups.setdefault(
                    key.split("_")[0], {"prompt": data["raw_prompt"][0]["content"], "responses": []}
                )
                group["responses"].append(
                    {
                        "ids": data["responses"].tolist(),
                        "log_probs": [round(x, 5) for x in data["rollout_log_probs"].tolist()],
                        "reward": data["rm_scores"].sum().item(),
                    }
                )
            lines.write(json.dumps({"step": step, "groups": list(groups.values())}, separators=(",", ":")) + "\n")


def dump(recorded: Path, folder: Path, tokenizer: Any) -> None:
    """Write the recorded steps where verl's ``skip.rollout_tq`` looks for them: ``<folder>/<step>/0/``."""
    for line in recorded.read_text().splitlines():
        step = json.loads(line)
        keys, rows, tags = [], [], []
        for index, group in enumerate(step["groups"]):
            prompt = torch.tensor(tokenizer(group["prompt"]).input_ids)
            for session, response in enumerate(group["responses"]):
                keys.append(f"{index}_{session}_0")
                rows.append(_row(index, session, prompt, response))
                tags.append({"status": "success", **_lengths(prompt, response["ids"])})
        target = folder / str(step["step"]) / "0"
        target.mkdir(parents=True)
        data = list_of_dict_to_tensordict(rows)
        torch.save(
            {"tensordict": data, "keys": keys, "tags": tags, "global_steps": step["step"]}, target / "tq_batch.pt"
        )
        (target / "meta.json").write_text(json.dumps({"global_steps": step["step"]}))


def _row(index: int, session: int, prompt: torch.Tensor, response: dict[str, Any]) -> dict[str, Any]:
    ids = torch.tensor(response["ids"])
    mask = torch.ones_like(ids)
    reward = torch.zeros(len(ids))
    reward[-1] = response["reward"]
    return {
        "uid": str(index),
        "session_id": session,
        "num_turns": 2,
        "prompts": prompt,
        "responses": ids,
        "input_ids": torch.cat([prompt, ids]),
        "position_ids": torch.arange(len(prompt) + len(ids)),
        "response_mask": mask,
        "loss_mask": mask,
        "rm_scores": reward,
        "rollout_log_probs": torch.tensor(response["log_probs"]),
    }


def _lengths(prompt: torch.Tensor, ids: list[int]) -> dict[str, int]:
    return {"prompt_len": len(prompt), "response_len": len(ids), "seq_len": len(prompt) + len(ids)}


if __name__ == "__main__":
    record(Path(sys.argv[1]), Path(sys.argv[2]))
