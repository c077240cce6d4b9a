"""The runs of the acceptance: a machine and what fits it, models and data made for it, and the recipe's script, killed or not."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from recipe.asyppo.plan.model import BUILT_IN, Model
from recipe.asyppo.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "run_asyppo_qwen3_4b.sh"
TINY = {
    "actor": Model("tiny", 512, 128, 256, 2, 2, 2, 32, tied=True),
    "critic": Model("tiny", 512, 64, 128, 1, 2, 2, 32, tied=True),
}
SMALL_CRITIC = Model("0.05b", 151_936, 256, 768, 8, 4, 4, 64, tied=True)
CARDS = {
    # GiB of a card: models of the recipe's run, and tokens of a micro-batch to train the actor on
    120: ({"actor": BUILT_IN["4b"], "critic": BUILT_IN["0.6b"]}, 9216),
    70: ({"actor": BUILT_IN["1.7b"], "critic": BUILT_IN["0.6b"]}, 9216),
    20: ({"actor": BUILT_IN["0.6b"], "critic": SMALL_CRITIC}, 2560),
}
# One GPU has few cores: one process of each kind, and logical CPUs for all of them.
FEW_PROCESSES = [
    "reward.num_workers=1",
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "data.dataloader_num_workers=0",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "actor_rollout_ref.rollout.enforce_eager=True",
    "+ray_kwargs.ray_init.include_dashboard=False",
    "ray_kwargs.ray_init.num_cpus=64",
]
REWARD = """import zlib


def compute_score(data_source, solution_str, ground_truth, **_):
    return float(zlib.crc32(solution_str.encode("utf-8", "replace")) & 1)
"""


class Machine:
    """What the runs are made on: its memory, and what follows from that."""

    def __init__(self) -> None:
        self.is_cpu = os.environ.get("VERL_PLATFORM") == "cpu"
        self.name, self.gib = "CPU", 0.0
        if not self.is_cpu:
            query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits", "--id=0"]
            try:
                name, mib = subprocess.check_output(query, text=True).strip().rsplit(", ", 1)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(
                    f"accept_gpu: no NVIDIA GPU was found ({error}); VERL_PLATFORM=cpu tries the script on a CPU"
                ) from error
            self.name, self.gib = name, int(mib) / 1024
            if self.gib < min(CARDS):
                raise SystemExit(f"accept_gpu: {self.name} has {self.gib:.0f} GiB; the smallest runs need {min(CARDS)}")
        least = max((gib for gib in CARDS if gib <= self.gib), default=0)
        self.models, self.actor_tokens = CARDS.get(least, (TINY, 4096))
        self.log_prob_tokens, self.critic_tokens = 2 * self.actor_tokens, 4 * self.actor_tokens
        # Of the recipe's runs. Many short responses are generated sooner than few long ones.
        self.prompts, self.response, self.steps = (8, 256, 3) if least else (4, 16, 3)
        # Steps of the toy, of them up to a checkpoint, and up to SIGKILL; prompts of a step.
        self.toy_steps, self.toy_save, self.toy_kill, self.toy_prompts = (10, 4, 5, 32) if least else (6, 2, 3, 16)
        self.toy_resumed = self.toy_kill // self.toy_save * self.toy_save


def make(folder: Path, machine: Machine) -> None:
    """Write the toy task, and random models with prompts and a reward for the recipe, once."""
    import torch

    from recipe.asyppo.toy import make_toy

    if not machine.is_cpu:
        torch.set_default_device("cuda")
    if not (folder / "toy/made.json").exists():
        make_toy.make(folder / "toy", head_dim=32 if machine.is_cpu else 64)
    tokenizer = make_toy.build_tokenizer(machine.models["actor"].vocab)
    torch.set_default_dtype(torch.bfloat16)
    for index, (role, shape) in enumerate(machine.models.items()):
        made = folder / role / "made"
        if made.exists() and made.read_text() == repr(shape):
            continue
        settings = {**shape.shape, "tie_word_embeddings": shape.tied, "rope_theta": 1e6}
        make_toy.build_model(settings, tokenizer, index).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
        made.write_text(repr(shape))
    rng = random.Random(0)
    prompts = ["".join(rng.choices("abcdefghij ", k=rng.randint(100, 240))) for _ in range(512)]
    make_toy.write_pairs(folder, "random", [(prompt, "") for prompt in prompts], test=16)
    (folder / "reward.py").write_text(REWARD)


class Recipe:
    """The Qwen3 recipe's script with settings of its own, in ``FOLDER/NAME``."""

    def __init__(self, folder: Path, name: str, variables: Mapping[str, Any], overrides: Sequence[str]) -> None:
        self.run_dir, self.log = folder / name, folder / f"{name}.log"
        common: dict[str, Any] = {
            "N_GPUS": 1,
            "N": 8,
            "VAL_BEFORE_TRAIN": False,
            "TEST_FREQ": -1,
            "GPU_MEMORY_UTILIZATION": 0.25,
        }
        common |= {"PYTHON": sys.executable, "RUN_DIR": self.run_dir, "FAST_START": 1}
        self.environment = os.environ | {key: str(value) for key, value in {**common, **variables}.items()}
        few = [] if os.environ.get("VERL_PLATFORM") == "cpu" else FEW_PROCESSES
        self.command = ["bash", str(SCRIPT), *few, *overrides]
        self.seconds_to_first_step = 0.0
        shutil.rmtree(self.run_dir, ignore_errors=True)
        self.log.unlink(missing_ok=True)

    def run(self, kill_after: int | None = None, limit: float = 600) -> int | None:
        """Run to the end, or kill all processes after a step or ``limit`` seconds; returns the exit code, None if killed."""
        start, before = time.monotonic(), len(self.steps())
        with open(self.log, "a") as log:
            script = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            while (code := script.poll()) is None:
                time.sleep(0.5)
                steps = self.steps()
                if len(steps) != before and not self.seconds_to_first_step:
                    self.seconds_to_first_step = time.monotonic() - start - steps[-1]["timing_s/step"]
                if (kill_after and len(steps) >= kill_after) or time.monotonic() - start > limit:
                    return None
            return code
        finally:
            if script.poll() is None:
                kill(script)

    def steps(self) -> list[dict[str, float]]:
        """Metrics of every step so far, also of those before a resumption."""
        return [step for step in read_metrics(self.run_dir / "metrics.jsonl").values() if "critic/score/mean" in step]


def kill(script: subprocess.Popen) -> None:
    """SIGKILL to a script and all that it started, at once, as when a machine is lost."""
    processes = [*psutil.Process(script.pid).children(recursive=True), psutil.Process(script.pid)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended with another one
            process.kill()
    script.wait()
    psutil.wait_procs(processes, timeout=30)
