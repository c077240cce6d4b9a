"""See AsyPPO train on this machine's GPU: ``bash scripts/accept_gpu.sh [FOLDER]``.

Four checks, each a run of the project's own commands; see :func:`announce`. Models and data are made here, nothing is
downloaded. The last line is one JSON object; the exit code is 1 if a check failed. With ``VERL_PLATFORM=cpu`` the same runs
are made with tiny shapes, to try the script itself.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from recipe.asyppo.console import read_metrics
from recipe.asyppo.plan.model import BUILT_IN, Model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "run_asyppo_qwen3_4b.sh"
TINY = {
    "actor": Model("tiny", 512, 128, 256, 2, 2, 2, 32, tied=True),
    "critic": Model("tiny", 512, 64, 128, 1, 2, 2, 32, tied=True),
}
SMALL_CRITIC = Model("0.05b", 151_936, 256, 768, 8, 4, 4, 64, tied=True)
CARDS = {
    # GiB of a card: models of the recipe's run, and tokens of a micro-batch to train on and to evaluate
    120: ({"actor": BUILT_IN["4b"], "critic": BUILT_IN["0.6b"]}, 9216, 18_432),
    70: ({"actor": BUILT_IN["1.7b"], "critic": BUILT_IN["0.6b"]}, 9216, 18_432),
    20: ({"actor": BUILT_IN["0.6b"], "critic": SMALL_CRITIC}, 2560, 5120),
}
PHASES = ["gen", "old_log_prob", "values", "update_critic", "update_actor", "step"]
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
        self.models, self.tokens, self.log_prob_tokens = CARDS.get(least, (TINY, 4096, 4096))
        self.response = 1024 if least else 16
        self.steps = 3
        # Steps of the toy, of them up to a checkpoint, and up to SIGKILL; prompts of a step.
        self.toy_steps, self.toy_save, self.toy_kill, self.toy_prompts = (12, 5, 7, 64) if least else (6, 2, 3, 16)


def announce(machine: Machine) -> None:
    actor, critic = (machine.models[role].name for role in ("actor", "critic"))
    resumed = machine.toy_kill // machine.toy_save * machine.toy_save
    responses = machine.toy_prompts * 8
    print(
        f"""accept_gpu on {machine.name}, about ten minutes, no network:
  1 doctor, half a minute: is the plugin active here and in a Ray worker?
  2 toy, five minutes: verl's stock main on two-digit additions, {machine.toy_steps} steps of {responses} responses;
    does the reward rise, do rollout and trainer agree, do both critics learn?
    Killed after step {machine.toy_kill}, does it go on from step {resumed}?
  3 asyppo, three minutes: the Qwen3 recipe's own script with random weights, actor {actor}, two critics {critic}
  4 grpo, two minutes: the same without critics; what do the critics cost?
""",
        flush=True,
    )


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
        common |= {"PYTHON": sys.executable, "RUN_DIR": self.run_dir}
        self.environment = os.environ | {key: str(value) for key, value in {**common, **variables}.items()}
        few = [] if os.environ.get("VERL_PLATFORM") == "cpu" else FEW_PROCESSES
        self.command = ["bash", str(SCRIPT), *few, *overrides]
        self.seconds_to_first_step = 0.0
        shutil.rmtree(self.run_dir, ignore_errors=True)
        self.log.unlink(missing_ok=True)

    def run(self, limit: float, kill_after: int | None = None) -> int | None:
        """Run to the end, or kill all its processes after a step; returns the exit code, None if it was killed."""
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
        files = (self.run_dir / name for name in ("metrics.history.jsonl", "metrics.jsonl"))
        found = {line["step"]: line["data"] for file in files for line in read_metrics(file)}
        return [found[step] for step in sorted(found) if "critic/score/mean" in found[step]]


def kill(script: subprocess.Popen) -> None:
    """SIGKILL to a script and all that it started, at once, as when a machine is lost."""
    processes = [*psutil.Process(script.pid).children(recursive=True), psutil.Process(script.pid)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended with another one
            process.kill()
    script.wait()
    psutil.wait_procs(processes, timeout=30)


class Checks:
    """What was checked, printed as it is found."""

    def __init__(self) -> None:
        self.results: dict[str, bool] = {}

    def __call__(self, name: str, is_right: bool, seen: str) -> None:
        self.results[name] = bool(is_right)
        print(f"  {'ok  ' if is_right else 'FAIL'}  {name:<42} {seen}", flush=True)


def check_doctor(folder: Path, check: Checks) -> None:
    run = subprocess.run([sys.executable, "-m", "asyppo_verl.doctor"], capture_output=True, text=True)
    (folder / "doctor.log").write_text(run.stdout + run.stderr)
    check("doctor: the plugin is active", run.returncode == 0, f"exit code {run.returncode}, {folder / 'doctor.log'}")


def check_toy(folder: Path, machine: Machine, check: Checks) -> dict[str, float]:
    """Train the toy, kill the run, resume it; returns rewards and how long the first step took to begin."""
    toy, prompts, resumed = folder / "toy", machine.toy_prompts, machine.toy_kill // machine.toy_save * machine.toy_save
    variables: dict[str, Any] = {
        "PROMPTS": prompts,
        "MAX_PROMPT": 16,
        "MAX_RESPONSE": 8,
        "ACTOR_LR": 2e-4,
        "CRITIC_LR": 1e-3,
    }
    variables |= {"STEPS": machine.toy_steps, "SAVE_FREQ": machine.toy_save}
    variables |= {"TRAIN_FILES": toy / "train.parquet", "VAL_FILES": toy / "test.parquet"}
    variables |= {"ACTOR_MODEL": toy / "actor", "CRITIC_MODEL": toy / "critic"}
    variables |= {"REWARD": ROOT / "recipe/asyppo/toy/toy_reward.py"}
    updates = [f"actor_rollout_ref.actor.ppo_mini_batch_size={prompts // 2}", "actor_rollout_ref.actor.ppo_epochs=1"]
    recipe = Recipe(folder, "toy_run", variables, updates)

    was_killed = recipe.run(300, kill_after=machine.toy_kill) is None
    first, seconds = len(recipe.steps()), recipe.seconds_to_first_step
    seen = f"{first} steps, the first began after {seconds:.0f} s"
    check("toy: trains", was_killed and first >= machine.toy_kill, seen)
    recipe.environment["FAST_START"] = "1"
    code, steps = recipe.run(300), recipe.steps()
    went_on = f"resuming {recipe.run_dir} after step {resumed}" in recipe.log.read_text()
    seen = f"exit code {code}, {len(steps)} steps, log {recipe.log}"
    check("toy: resumes after SIGKILL", code == 0 and went_on and len(steps) == machine.toy_steps, seen)
    if not steps:
        return {}

    rewards = [step["critic/score/mean"] for step in steps]
    start, end = (statistics.mean(part) for part in (rewards[: len(steps) // 3], rewards[-len(steps) // 3 :]))
    check("toy: the reward rises", end > start + 0.03, f"{start:.3f} -> {end:.3f}")
    difference = max(step["training/rollout_probs_diff_mean"] for step in steps)
    check("toy: rollout and trainer agree", difference < 0.02, f"probabilities differ by {difference:.1e} at most")
    for critic in ("critic_0", "critic_1"):
        loss = statistics.mean(step[f"asyppo/{critic}/vf_loss"] for step in steps[-len(steps) // 3 :])
        skipped = sum(step[f"asyppo/{critic}/skipped_updates"] for step in steps)
        constant = end * (1 - end) / 2  # loss of one that always says the mean reward
        seen = f"value loss {loss:.3f}, of a constant {constant:.3f}"
        check(f"toy: {critic} learns", loss < 1.3 * constant and not skipped, seen)
    return {"seconds_to_first_step": seconds, "reward_start": start, "reward_end": end}


def check_recipe(folder: Path, machine: Machine, algorithm: str, check: Checks) -> dict[str, Any]:
    """Train a few steps; returns seconds of each phase (medians without the first step) and peak memory in GiB."""
    tokens = {"LOG_PROB_TOKENS": machine.log_prob_tokens, "CRITIC_TOKENS": machine.log_prob_tokens}
    variables: dict[str, Any] = {
        "ALGO": algorithm,
        "PROMPTS": 4,
        "MAX_PROMPT": 256,
        "MAX_RESPONSE": machine.response,
        **tokens,
    }
    variables |= {"STEPS": machine.steps, "SAVE_FREQ": -1, "FAST_START": 1, "ACTOR_TOKENS": machine.tokens}
    variables |= {"ACTOR_MODEL": folder / "actor", "CRITIC_MODEL": folder / "critic", "REWARD": folder / "reward.py"}
    variables |= {"TRAIN_FILES": folder / "train.parquet", "VAL_FILES": folder / "test.parquet"}
    recipe = Recipe(folder, f"recipe_{algorithm}", variables, [])
    code, steps = recipe.run(300), recipe.steps()
    seen = f"exit code {code}, {len(steps)} steps, log {recipe.log}"
    check(f"recipe: {algorithm} trains", code == 0 and len(steps) == machine.steps, seen)
    if len(steps) < 2:
        return {}
    norms = [step["actor/grad_norm"] for step in steps]
    check(f"recipe: {algorithm}'s actor gets gradients", min(norms) > 0, f"gradient norm {norms[-1]:.3g}")
    phases = {name: statistics.median(step.get(f"timing_s/{name}", 0.0) for step in steps[1:]) for name in PHASES}
    peak = max(step["actor/perf/max_memory_allocated_gb"] for step in steps)
    return {"phases": phases, "peak_gib": peak, "seconds_to_first_step": recipe.seconds_to_first_step}


def planned_peak(folder: Path, machine: Machine, algorithm: str) -> float:
    """GiB that the planner expects the trainer to hold at its peak: without vLLM, which is another process."""
    lengths = {"prompt-length": 256, "mean-prompt-length": 170}
    lengths |= {"response-length": machine.response, "mean-response-length": machine.response}
    tokens = {"actor-tokens": machine.tokens, "log-prob-tokens": machine.log_prob_tokens}
    tokens |= {"critic-tokens": machine.log_prob_tokens, "value-tokens": machine.log_prob_tokens}
    models = {"actor": folder / "actor", "critic": folder / "critic"}
    options = {"gpus": 1, "prompts": 4, "responses": 8, **lengths, **tokens, **models}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    plan = subprocess.check_output([sys.executable, "-m", "recipe.asyppo.plan", "--json", *arguments], text=True)
    phases = json.loads(plan)["algorithms"][algorithm]["phases_gib"]
    return max(phase["actor"] + phase["critics"] + phase["working"] for phase in phases.values())


def compare(folder: Path, machine: Machine, report: dict[str, Any]) -> dict[str, Any]:
    """Print phases, peaks and ratios of AsyPPO and GRPO side by side; returns what of it is new."""
    runs = {name: report[name] for name in ("asyppo", "grpo")}
    print(f"\n{'seconds of a step (medians)':<32}{'asyppo':>10}{'grpo':>10}")
    for phase in PHASES:
        print(f"  {phase:<30}" + "".join(f"{run['phases'][phase]:>10.2f}" for run in runs.values()))
    step = {name: run["phases"]["step"] for name, run in runs.items()}
    training = {name: step[name] - run["phases"]["gen"] for name, run in runs.items()}
    ratios = {
        "asyppo_over_grpo": step["asyppo"] / step["grpo"],
        "asyppo_over_grpo_without_generation": training["asyppo"] / training["grpo"],
    }
    for name, ratio in ratios.items():
        print(f"  {name:<40}{ratio:>12.3f}")
    planned = {name: planned_peak(folder, machine, name) for name in runs}
    print(f"{'GiB of the trainer at its peak':<32}" + "".join(f"{run['peak_gib']:>10.1f}" for run in runs.values()))
    print(f"{'  planned':<32}" + "".join(f"{peak:>10.1f}" for peak in planned.values()) + "\n")
    return ratios | {"planned_peak_gib": planned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="accept_gpu.sh")
    parser.add_argument(
        "folder", type=Path, nargs="?", default=ROOT / "runs/accept_gpu", help="default: runs/accept_gpu"
    )
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    machine, folder = Machine(), arguments.folder.resolve()
    if arguments.make:
        make(folder, machine)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no run stays behind
    announce(machine)
    start, check = time.monotonic(), Checks()
    folder.mkdir(parents=True, exist_ok=True)
    # In a process of its own, which holds no memory of the GPU afterwards.
    subprocess.run([sys.executable, "-m", "recipe.asyppo.acceptance", str(folder), "--make"], check=True)
    check_doctor(folder, check)
    report: dict[str, Any] = {"card": machine.name, "toy": check_toy(folder, machine, check)}
    for algorithm in ("asyppo", "grpo"):
        report[algorithm] = check_recipe(folder, machine, algorithm, check)
    if report["asyppo"] and report["grpo"]:
        report |= compare(folder, machine, report)
    report |= {"checks": check.results, "minutes": (time.monotonic() - start) / 60}
    print(json.dumps(report))
    sys.exit(not all(check.results.values()))


if __name__ == "__main__":
    main()
