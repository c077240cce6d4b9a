"""See AsyPPO train on this machine's GPU: ``bash scripts/accept_gpu.sh [FOLDER]``.

Four checks, each a run of the project's own commands; see :func:`announce`. Models and data are made here, nothing is
downloaded. The last line is one JSON object; the exit code is 1 if a check failed. With ``VERL_PLATFORM=cpu`` the same runs
are made with tiny shapes, to try the script itself.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe.asyppo.acceptance.runs import ROOT, Machine, Recipe, make

ALGORITHMS = ["asyppo", "ppo", "grpo"]
PHASES = ["gen", "old_log_prob", "values", "update_critic", "update_actor", "all but gen", "step"]


def announce(machine: Machine, algorithms: Sequence[str]) -> None:
    actor, critic = (machine.models[role].name for role in ("actor", "critic"))
    responses = machine.toy_prompts * 8
    print(
        f"""accept_gpu on {machine.name}, about {11 if len(algorithms) == 2 else 15} minutes, no network:
  1 doctor, one minute with the making of models: is the plugin active here and in a Ray worker?
  2 toy, four minutes: verl's stock main on two-digit additions, {machine.toy_steps} steps of {responses} responses;
    does the reward rise, do rollout and trainer agree, do both critics learn?
    Killed after step {machine.toy_kill}, does it go on from step {machine.toy_resumed}?
  3 asyppo, three and a half minutes: the Qwen3 recipe's own script with random weights, actor {actor}, two critics {critic}
  4 grpo, two and a half minutes: the same without critics; what do the critics cost?"""
    )
    if "ppo" in algorithms:
        print(f"  5 ppo, four minutes: the same with one critic of the actor's size, {actor}")
    print(flush=True)


class Checks:
    """What was checked, printed with the time as it is found."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.results: dict[str, bool] = {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def __call__(self, name: str, is_right: bool, seen: str) -> None:
        self.results[name] = bool(is_right)
        print(f"  {'ok  ' if is_right else 'FAIL'} {self.seconds:>4.0f} s  {name:<42} {seen}", flush=True)


def check_doctor(folder: Path, check: Checks) -> None:
    run = subprocess.run([sys.executable, "-m", "asyppo_verl.doctor"], capture_output=True, text=True)
    (folder / "doctor.log").write_text(run.stdout + run.stderr)
    check("doctor: the plugin is active", run.returncode == 0, f"exit code {run.returncode}, {folder / 'doctor.log'}")


def check_toy(folder: Path, machine: Machine, check: Checks) -> dict[str, float]:
    """Train the toy, kill the run, resume it; returns rewards and how long the first step took to begin."""
    toy, prompts = folder / "toy", machine.toy_prompts
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

    was_killed = recipe.run(kill_after=machine.toy_kill) is None
    first, seconds = len(recipe.steps()), recipe.seconds_to_first_step
    seen = f"{first} steps, the first began after {seconds:.0f} s"
    check("toy: trains", was_killed and first >= machine.toy_kill, seen)
    code, steps = recipe.run(), recipe.steps()
    went_on = f"resuming {recipe.run_dir} after step {machine.toy_resumed}" in recipe.log.read_text()
    seen = f"exit code {code}, {len(steps)} steps, log {recipe.log}"
    check("toy: resumes after SIGKILL", code == 0 and went_on and len(steps) == machine.toy_steps, seen)
    if len(steps) < 3:
        return {}

    rewards = [step["critic/score/mean"] for step in steps]
    start, end = (statistics.mean(part) for part in (rewards[: len(steps) // 3], rewards[-len(steps) // 3 :]))
    check("toy: the reward rises", end > start + 0.03, f"{start:.3f} -> {end:.3f}")
    difference = max(step["training/rollout_probs_diff_mean"] for step in steps)
    check("toy: rollout and trainer agree", difference < 0.02, f"probabilities differ by {difference:.1e} at most")
    for critic in ("critic_0", "critic_1"):
        loss = statistics.mean(step[f"asyppo/{critic}/vf_loss"] for step in steps[-len(steps) // 3 :])
        skipped = sum(step[f"asyppo/{critic}/skipped_updates"] for step in steps)
        constant = end * (1 - end) / 2
        seen = f"value loss {loss:.3f}; of one that says the mean {constant:.3f}, that says 0 {end / 2:.3f}"
        check(f"toy: {critic} learns the mean", loss < 1.3 * constant and not skipped, seen)
    return {"seconds_to_first_step": seconds, "reward_start": start, "reward_end": end}


def check_recipe(folder: Path, machine: Machine, algorithm: str, check: Checks) -> dict[str, Any]:
    """Train a few steps; returns seconds of each phase (medians without the first step) and peak memory in GiB."""
    variables: dict[str, Any] = {
        "ALGO": algorithm,
        "PROMPTS": machine.prompts,
        "MAX_PROMPT": 256,
        "MAX_RESPONSE": machine.response,
        "ACTOR_TOKENS": machine.actor_tokens,
        "LOG_PROB_TOKENS": machine.log_prob_tokens,
        "CRITIC_TOKENS": machine.critic_tokens,
    }
    variables |= {"STEPS": machine.steps, "SAVE_FREQ": -1}
    variables |= {"ACTOR_MODEL": folder / "actor", "CRITIC_MODEL": folder / "critic", "REWARD": folder / "reward.py"}
    variables |= {"TRAIN_FILES": folder / "train.parquet", "VAL_FILES": folder / "test.parquet"}
    recipe = Recipe(folder, f"recipe_{algorithm}", variables, [])
    code, steps = recipe.run(), recipe.steps()
    seen = f"exit code {code}, {len(steps)} steps, log {recipe.log}"
    check(f"recipe: {algorithm} trains", code == 0 and len(steps) == machine.steps, seen)
    if len(steps) < 2:
        return {}
    norms = [step["actor/grad_norm"] for step in steps]
    check(f"recipe: {algorithm}'s actor gets gradients", min(norms) > 0, f"gradient norm {norms[-1]:.3g}")
    for step in steps:
        step["timing_s/all but gen"] = step["timing_s/step"] - step["timing_s/gen"]
    phases = {name: statistics.median(step.get(f"timing_s/{name}", 0.0) for step in steps[1:]) for name in PHASES}
    peak = max(step["actor/perf/max_memory_allocated_gb"] for step in steps)
    return {"phases": phases, "peak_gib": peak, "seconds_to_first_step": recipe.seconds_to_first_step}


def planned_peak(folder: Path, machine: Machine, algorithm: str) -> float:
    """GiB that the planner expects the trainer to hold at its peak: without vLLM, which is another process."""
    lengths = {"prompt-length": 256, "mean-prompt-length": 170}
    lengths |= {"response-length": machine.response, "mean-response-length": machine.response}
    tokens = {"actor-tokens": machine.actor_tokens, "log-prob-tokens": machine.log_prob_tokens}
    tokens |= {"critic-tokens": machine.critic_tokens, "value-tokens": machine.critic_tokens}
    models = {"actor": folder / "actor", "critic": folder / "critic"}
    options = {"gpus": 1, "prompts": machine.prompts, "responses": 8, **lengths, **tokens, **models}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    plan = subprocess.check_output([sys.executable, "-m", "recipe.asyppo.plan", "--json", *arguments], text=True)
    phases = json.loads(plan)["algorithms"][algorithm]["phases_gib"]
    return max(phase["actor"] + phase["critics"] + phase["working"] for phase in phases.values())


def compare(folder: Path, machine: Machine, report: dict[str, Any]) -> dict[str, Any]:
    """Print phases, peaks and ratios to GRPO of the algorithms that were run; returns the ratios and the planned peaks."""
    runs = {name: report[name] for name in ALGORITHMS if report.get(name)}
    print(f"\n{'seconds of a step (medians)':<42}" + "".join(f"{name:>10}" for name in runs))
    for phase in PHASES:
        print(f"  {phase:<40}" + "".join(f"{run['phases'][phase]:>10.2f}" for run in runs.values()))
    # Generation is the same work for all and takes now more, now less, in steps of the two seconds after which verl looks again
    # whether it is done: in the ratios all have the mean.
    generation = statistics.mean(run["phases"]["gen"] for run in runs.values())
    training = {name: run["phases"]["all but gen"] for name, run in runs.items()}
    step = {name: generation + seconds for name, seconds in training.items()}
    ratios: dict[str, float] = {}
    for kind, label, seconds in (
        ("over_grpo", "over grpo, with the same generation", step),
        ("over_grpo_without_generation", "over grpo, all but gen", training),
    ):
        ratios |= {f"{name}_{kind}": seconds[name] / seconds["grpo"] for name in runs if name != "grpo"}
        print(f"  {label:<40}" + "".join(f"{ratios.get(f'{name}_{kind}', 1.0):>10.3f}" for name in runs))
    planned = {name: planned_peak(folder, machine, name) for name in runs}
    print(f"{'GiB of the trainer at its peak':<42}" + "".join(f"{run['peak_gib']:>10.1f}" for run in runs.values()))
    print(f"{'  planned':<42}" + "".join(f"{peak:>10.1f}" for peak in planned.values()) + "\n")
    return ratios | {"planned_peak_gib": planned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="accept_gpu.sh")
    parser.add_argument(
        "folder", type=Path, nargs="?", default=ROOT / "runs/accept_gpu", help="default: runs/accept_gpu"
    )
    parser.add_argument(
        "--ppo",
        action="store_true",
        help="symmetric PPO too, where the card holds a critic of the actor's size: four minutes",
    )
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    machine, folder = Machine(), arguments.folder.resolve()
    if arguments.make:
        make(folder, machine)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no run stays behind
    algorithms = ["asyppo", "grpo", *(["ppo"] if arguments.ppo else [])]
    announce(machine, algorithms)
    check = Checks()
    folder.mkdir(parents=True, exist_ok=True)
    # In a process of its own, which holds no memory of the GPU afterwards.
    command = [sys.executable, "-m", "recipe.asyppo.acceptance", str(folder), "--make"]
    making = subprocess.Popen(command)
    try:
        check_doctor(folder, check)
        making.wait()
    finally:
        making.kill()
    if making.returncode:
        raise SystemExit(f"accept_gpu: making models and data failed with exit code {making.returncode}")
    report: dict[str, Any] = {"card": machine.name, "toy": check_toy(folder, machine, check)}
    for algorithm in algorithms:
        report[algorithm] = check_recipe(folder, machine, algorithm, check)
    if report["asyppo"] and report["grpo"]:
        report |= compare(folder, machine, report)
    report |= {"checks": check.results, "minutes": check.seconds / 60}
    print(json.dumps(report))
    sys.exit(not all(check.results.values()))


if __name__ == "__main__":
    main()
