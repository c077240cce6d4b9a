"""How a test trains: the CPU script as a user starts it, on a task small enough for a minute."""

import json
import os
import subprocess
from pathlib import Path

SMALL = [
    "data.train_batch_size=16",
    "data.max_response_length=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.rollout.n=4",
    # Large steps, so that stale rollout weights could not go unnoticed.
    "actor_rollout_ref.actor.optim.lr=2e-3",
    "critic.optim.lr=1e-3",
]


def replaying(rollouts: Path) -> list[str]:
    """Overrides with which verl takes the rollouts of two steps from a folder, or records them where there are none."""
    return [
        "trainer.experiment_name=replay",
        "skip.rollout_tq.enable=True",
        "skip.rollout_tq.steps=[1,2]",
        f"skip.rollout_tq.dump_dir={rollouts}",
    ]


def train(root: Path, toy: Path, run_dir: Path, *overrides: str, **environment: str) -> tuple[list[dict], str]:
    """Run the CPU script; returns the metrics of every step and what the terminal showed."""
    return run_script(root / "scripts/run_asyppo_cpu.sh", toy, run_dir, *SMALL, *overrides, **environment)


def run_script(script: Path, toy: Path, run_dir: Path, *overrides: str, **environment: str) -> tuple[list[dict], str]:
    """The same of any script that takes RUN_DIR and TOY_DIR."""
    env = {**os.environ, "RUN_DIR": str(run_dir), "TOY_DIR": str(toy), **environment}
    run = subprocess.run(
        ["bash", str(script), *overrides],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    return [line["data"] for line in steps], run.stdout
