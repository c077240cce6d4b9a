"""How far the planner is from what was measured on a GPU: ``python benchmarks/plan_error.py``. Needs no GPU.

First seconds and peak memory of ``benchmarks/critic_cost.py --lengths 4096`` on one H200 (8 rows of 256 + 4096 tokens,
micro-batches of 4 rows to train on, torch's fused AdamW, all critics on the card), beside what ``recipe.asyppo.plan`` says for
the same; verl, packed and compiled are its ways to build a critic. Commits c7ac239, 442896f (4b, compiled) and 268da4e (1.7b,
whose rows were neither packed nor under autocast).

Then the phases of a step of ``scripts/accept_gpu.sh`` on one H200, commit 442896f: 4B actor, two compiled critics of 0.6B, 64
responses, four passes. The short phases hold what a call takes whatever the batch, which is not in the plan. The last line is
one JSON object; ``largest_error`` is that of the benchmark's rows.
"""

import json

from recipe.asyppo.plan.cost import Pass, seconds
from recipe.asyppo.plan.memory import ADAM, GRADIENT, MASTER, update_working
from recipe.asyppo.plan.model import BUILT_IN
from recipe.asyppo.plan.settings import GIB, Settings

ROWS, LENGTH, MICRO_BATCH = 8, 256 + 4096, 4 * (256 + 4096)
CRITICS = {
    # size, number and build of critics: seconds of an update, of an evaluation, peak GiB
    ("4b", 1, "verl"): (4.00, 0.938, 68.0),
    ("4b", 1, "compiled"): (2.54, 0.567, 66.7),
    ("0.6b", 2, "verl"): (1.29, 0.565, 16.8),
    ("0.6b", 2, "packed"): (1.01, 0.435, 16.8),
    ("0.6b", 2, "compiled"): (0.577, 0.236, 16.4),
    ("1.7b", 2, "packed"): (1.52, 0.699, 46.8),
}
FIGURES = ("update, s", "evaluation, s", "peak, GiB")
RUN = {"old log-probs": 1.35, "values": 0.352, "critic update": 5.24, "actor update": 19.2}


def planned(size: str, count: int, built: str) -> tuple[float, float, float]:
    """The planner's figures for ``count`` critics, each of which evaluates all rows and trains on its share."""
    model = BUILT_IN[size].as_critic()
    settings = Settings(BUILT_IN[size], model, hardware="h200")
    batch = ROWS * LENGTH, ROWS * LENGTH**2
    update = count * Pass(model, "training", 1 / count, built).seconds(*batch, settings)
    evaluation = count * Pass(model, "forward", 1, built).seconds(*batch, settings)
    states = (MASTER + GRADIENT + ADAM + (count - 1) * (MASTER + ADAM)) * model.params
    return update, evaluation, (states + update_working(model, MICRO_BATCH)) / GIB


def planned_run() -> dict[str, float]:
    settings = Settings(
        BUILT_IN["4b"],
        BUILT_IN["0.6b"].as_critic(),
        hardware="h200",
        gpus=1,
        prompts=8,
        responses=8,
        prompt_length=256,
        mean_prompt_length=193,
        response_length=512,
        mean_response_length=512,
    )
    return seconds(settings, "asyppo")


def main() -> None:
    errors = []
    print(f"{'critics':<17} {'figure':<14} {'measured':>9} {'planned':>9} {'error':>7}")

    def compare(what: str, name: str, found: float, plan: float) -> float:
        print(f"{what:<17} {name:<14} {found:>9.3f} {plan:>9.3f} {plan / found - 1:>+7.1%}")
        return plan / found - 1

    for (size, count, built), measured in CRITICS.items():
        for name, found, plan in zip(FIGURES, measured, planned(size, count, built), strict=True):
            errors.append(compare(f"{count}x{size} {built}", name, found, plan))
    run = planned_run()
    of_run = {name: compare("a step, s", name, found, run[name]) for name, found in RUN.items()}
    print(json.dumps({"largest_error": max(map(abs, errors)), "errors_of_a_step": of_run}))


if __name__ == "__main__":
    main()
