"""A step of AsyPPO beside its three baselines on the same rollouts: ``python benchmarks/step_time.py``.

Trains with the CPU script, real verl, Ray and FSDP2, an actor with eight times the parameters of a mini-critic:

* ``grpo``: no critic;
* ``ppo``: verl's PPO, its critic of the actor's size;
* ``ppo_small_critic``: verl's PPO, its critic of a mini-critic's size;
* ``asyppo``: two mini-critics;
* on request, ``asyppo_pool``: the same with a rank of their own, at work while the actor is.

A first run samples the responses, and every other one replays them (verl's ``skip.rollout_tq``), so that all train on the
same tokens. A step's total is therefore one without generation, of which critics would be a smaller share. The algorithms
take turns, in another order every round, so that a change of the machine's speed meets all of them. The first steps of a run
do not count. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from recipe.asyppo.run_folder import read_metrics
from recipe.asyppo.toy.make_toy import build_model, build_tokenizer, write_data

ROOT = Path(__file__).resolve().parent.parent
# Twice the width and twice the layers: eight times the parameters, embeddings left out.
CRITIC = {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 4, "num_attention_heads": 6}
ACTOR = {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8, "num_attention_heads": 12}
PHASES = ["old_log_prob", "values", "adv", "update_critic", "update_actor", "step"]
CRITIC_PHASES = ["values", "adv", "update_critic"]
"""What is there for the critics' sake; ``adv`` holds GAE, and for AsyPPO the selections, masks and metrics."""

DEFAULT = ["grpo", "ppo", "ppo_small_critic", "asyppo"]
PROMPTS, RESPONSES = 16, 4


def settings(folder: Path, steps: int, length: int) -> list[str]:
    """Overrides that all runs have: the same batches, cut into the same number of mini-batches for actor and critics."""
    tokens = 4 * (16 + length)
    return [
        f"data.train_batch_size={PROMPTS}",
        f"data.max_response_length={length}",
        f"actor_rollout_ref.rollout.n={RESPONSES}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS // 2}",
        f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={tokens}",
        f"actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu={2 * tokens}",
        # The same budget for training and for values: verl's own V1 trainer uses the one for values for both.
        f"critic.ppo_max_token_len_per_gpu={2 * tokens}",
        f"critic.forward_max_token_len_per_gpu={2 * tokens}",
        "actor_rollout_ref.actor.entropy_coeff=0.001",
        "trainer.save_freq=-1",
        f"trainer.total_training_steps={steps}",
        "trainer.experiment_name=replay",
        "skip.rollout_tq.enable=True",
        f"skip.rollout_tq.steps={list(range(1, steps + 1))}".replace(" ", ""),
        f"skip.rollout_tq.dump_dir={folder}/dump",
    ]


def algorithms(folder: Path) -> dict[str, list[str]]:
    """What makes each algorithm."""
    return {
        "grpo": ["algorithm.adv_estimator=grpo", "critic.enable=False"],
        "ppo": ["algorithm.adv_estimator=gae", f"critic.model.path={folder}/actor"],
        "ppo_small_critic": ["algorithm.adv_estimator=gae"],
        "asyppo": ["algorithm.adv_estimator=asyppo"],
        "asyppo_pool": [
            "algorithm.adv_estimator=asyppo",
            "+asyppo.placement=pool",
            "+asyppo.pool.n_gpus_per_node=1",
        ],
    }


def make_task(folder: Path) -> None:
    """Untrained models, whose responses have all lengths, and additions as prompts."""
    tokenizer = build_tokenizer()
    for seed, (name, shape) in enumerate((("actor", ACTOR), ("critic", CRITIC))):
        build_model(shape, tokenizer, seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_data(folder, seed=0, train=6000, test=16)
    (folder / "made.json").write_text("{}")


def train(folder: Path, name: str, overrides: list[str]) -> list[dict[str, float]]:
    """Run the CPU script; returns the metrics of its steps."""
    run_dir = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
    command = ["bash", str(ROOT / "scripts/run_asyppo_cpu.sh"), *overrides]
    environment = {**os.environ, "RUN_DIR": str(run_dir), "TOY_DIR": str(folder)}
    with open(run_dir / "shown", "w") as shown:
        code = subprocess.run(command, env=environment, stdout=shown, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"{name} ended with {code}:\n{(run_dir / 'shown').read_text()[-4000:]}")
    return [*read_metrics(run_dir / "metrics.jsonl").values()]


def seconds(step: dict[str, float], phase: str) -> float:
    return step.get(f"timing_s/{phase}", 0.0)


def table(measured: dict[str, list[dict[str, float]]]) -> str:
    """Median, lowest and highest seconds of every phase, and the ratio to the first algorithm's."""
    lines = [f"{'phase':<14}" + "".join(f"{name:>31}" for name in measured)]
    for phase in [*PHASES, "critics"]:
        parts = CRITIC_PHASES if phase == "critics" else [phase]
        cells, base = [], None
        for steps in measured.values():
            values = [sum(seconds(step, part) for part in parts) for step in steps]
            median = statistics.median(values)
            base = median if base is None else base
            ratio = f"x{median / base:.2f}" if base > 0.05 else ""
            cells.append(f"{median:>10.3f} ({min(values):.2f}-{max(values):.2f}) {ratio:>6}")
        lines.append(f"{'total' if phase == 'step' else phase:<14}" + "".join(f"{cell:>31}" for cell in cells))
    return "\n".join(lines)


def result(measured: dict[str, list[dict[str, float]]], generation: float) -> dict[str, object]:
    """Ratios of medians, those of the goals among them, as far as the algorithms were run."""
    total = {name: statistics.median(seconds(s, "step") for s in steps) for name, steps in measured.items()}
    critics = {
        name: statistics.median(sum(seconds(s, phase) for phase in CRITIC_PHASES) for s in steps)
        for name, steps in measured.items()
    }
    found: dict[str, object] = {}
    if "grpo" in measured:
        found |= {f"{name}_over_grpo": round(total[name] / total["grpo"], 3) for name in measured if name != "grpo"}
    if {"asyppo", "ppo"} <= measured.keys():
        found["asyppo_critic_over_ppo_critic"] = round(critics["asyppo"] / critics["ppo"], 3)
    if {"asyppo", "grpo"} <= measured.keys():
        sampled = (total["asyppo"] + generation) / (total["grpo"] + generation)
        found["asyppo_over_grpo_with_generation"] = round(sampled, 3)
    if {"asyppo_pool", "asyppo"} <= measured.keys():
        found["asyppo_pool_over_asyppo"] = round(total["asyppo_pool"] / total["asyppo"], 3)
    return {
        **found,
        "seconds": {name: round(value, 3) for name, value in total.items()},
        "critic_seconds": {name: round(value, 3) for name, value in critics.items()},
        "generation_seconds": round(generation, 3),
        "steps": {name: len(steps) for name, steps in measured.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="runs of each algorithm")
    parser.add_argument("--steps", type=int, default=6, help="steps a run")
    parser.add_argument("--skip", type=int, default=2, help="first steps of a run that do not count")
    parser.add_argument("--length", type=int, default=96, help="longest response, tokens")
    parser.add_argument("--only", nargs="+", choices=list(algorithms(ROOT)), default=DEFAULT, help="which algorithms")
    parser.add_argument("overrides", nargs="*", help="verl overrides for all runs")
    arguments = parser.parse_args()
    if not 0 <= arguments.skip < arguments.steps:
        parser.error(f"--skip {arguments.skip} leaves none of {arguments.steps} steps")

    with tempfile.TemporaryDirectory(prefix="asyppo-bench-") as name:
        folder = Path(name)
        make_task(folder)
        shared = [*settings(folder, arguments.steps, arguments.length), *arguments.overrides]
        known = algorithms(folder)
        chosen = {name: known[name] for name in arguments.only}
        recorded = train(folder, "recording", [*shared, *known["grpo"]])[arguments.skip :]
        generation = statistics.median(seconds(step, "gen") for step in recorded)
        length = statistics.mean(step["response_length/mean"] for step in recorded)
        print(f"recorded {PROMPTS * RESPONSES} responses a step of {length:.0f} tokens, {generation:.1f} s", flush=True)
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
        for number in range(arguments.rounds):
            order = list(chosen) if number % 2 == 0 else list(reversed(chosen))
            for name in order:
                measured[name] += train(folder, name, [*shared, *chosen[name]])[arguments.skip :]
                print(f"round {number + 1}: {name}", flush=True)
    print(table(measured))
    print(json.dumps(result(measured, generation)))


if __name__ == "__main__":
    main()
