"""Step time of AsyPPO with two critics against verl's PPO with one of the same size: ``python benchmarks/step_time.py``.

Runs the CPU script with both estimators in turn (A B A B ...), so that a change of the machine's speed meets both, and
compares the steps after the first ones of every run. Both build their critics from the same folder and sample 16 prompts
x 4 responses. "start" is the time from the command to the first completed step. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHASES = ["gen", "old_log_prob", "values", "adv", "update_critic", "update_actor", "update_weights", "step"]
# Both are asked for the same micro-batches; verl's V1 trainer runs its critic with dynamic ones whatever it is asked.
SETTINGS = [
    "data.train_batch_size=16",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.actor.entropy_coeff=0",
    "trainer.save_freq=-1",
]


def run(estimator: str, steps: int, folder: Path, extra: list[str]) -> tuple[float, list[dict]]:
    """Train; returns seconds to the first completed step and the metrics of all steps."""
    run_dir = folder / estimator / str(time.monotonic_ns())
    command = [
        "bash",
        str(ROOT / "scripts/run_asyppo_cpu.sh"),
        *SETTINGS,
        f"algorithm.adv_estimator={estimator}",
        f"trainer.total_training_steps={steps}",
        *extra,
    ]
    metrics = run_dir / "metrics.jsonl"
    start = time.perf_counter()
    first = None
    with (
        open(folder / f"{estimator}.out", "w") as out,
        subprocess.Popen(
            command, env={**os.environ, "RUN_DIR": str(run_dir)}, stdout=out, stderr=subprocess.STDOUT
        ) as process,
    ):
        while process.poll() is None:
            if first is None and metrics.exists() and metrics.stat().st_size:
                first = time.perf_counter() - start
            time.sleep(0.1)
    if process.returncode or first is None:
        raise RuntimeError((folder / f"{estimator}.out").read_text()[-4000:])
    return first, [json.loads(line)["data"] for line in metrics.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="runs of each estimator")
    parser.add_argument("--steps", type=int, default=14, help="steps a run")
    parser.add_argument("--skip", type=int, default=3, help="first steps of a run that do not count")
    parser.add_argument("overrides", nargs="*", help="verl overrides for both")
    arguments = parser.parse_args()

    seconds: dict[str, dict[str, list[float]]] = {name: {p: [] for p in PHASES} for name in ("gae", "asyppo")}
    starts: dict[str, list[float]] = {"gae": [], "asyppo": []}
    with tempfile.TemporaryDirectory(prefix="asyppo-bench-") as folder:
        for number in range(arguments.rounds):
            for name in ("gae", "asyppo") if number % 2 == 0 else ("asyppo", "gae"):
                first, steps = run(name, arguments.steps, Path(folder), arguments.overrides)
                starts[name].append(first)
                for step in steps[arguments.skip :]:
                    for phase in PHASES:
                        seconds[name][phase].append(step[f"timing_s/{phase}"])
                print(f"round {number + 1}: {name} done, first step after {first:.1f} s", flush=True)

    median = {name: {p: statistics.median(values) for p, values in phases.items()} for name, phases in seconds.items()}
    print(f"\n{'phase':<15} {'gae s':>8} {'min-max':>15} {'asyppo s':>9} {'min-max':>15} {'ratio':>6}")
    for phase in PHASES:
        cells = [f"{min(seconds[n][phase]):.2f}-{max(seconds[n][phase]):.2f}" for n in ("gae", "asyppo")]
        gae, ours = median["gae"][phase], median["asyppo"][phase]
        print(f"{phase:<15} {gae:>8.3f} {cells[0]:>15} {ours:>9.3f} {cells[1]:>15} {ours / gae:>6.2f}")
    print(
        json.dumps(
            {
                "asyppo_over_gae": round(median["asyppo"]["step"] / median["gae"]["step"], 3),
                "gae_step_seconds": round(median["gae"]["step"], 3),
                "asyppo_step_seconds": round(median["asyppo"]["step"], 3),
                "asyppo_first_step_after_seconds": [round(value, 1) for value in starts["asyppo"]],
                "steps": len(seconds["asyppo"]["step"]),
            }
        )
    )


if __name__ == "__main__":
    main()
