"""How far the planner is from what was measured on a GPU: ``python benchmarks/plan_error.py``. Needs no GPU.

Seconds and peak memory of ``benchmarks/critic_cost.py --lengths 4096`` on one H200 (8 rows of 256 + 4096 tokens, micro-batches
of 4 rows to train on, torch's fused AdamW, all critics on the card, nothing compiled), beside what ``recipe.asyppo.plan`` says
for the same. 4b: as verl builds it; 0.6b: with the bounds of packed sequences found once, as ours are (commit c7ac239); 1.7b:
rows that were not packed (commit 268da4e). The last line is one JSON object.
"""

import json

from recipe.asyppo.plan.cost import Pass
from recipe.asyppo.plan.memory import ADAM, GRADIENT, MASTER, update_working
from recipe.asyppo.plan.model import BUILT_IN
from recipe.asyppo.plan.settings import GIB, Settings

ROWS, LENGTH, MICRO_BATCH = 8, 256 + 4096, 4 * (256 + 4096)
MEASURED = {
    # size and number of critics: seconds of an update, of an evaluation, peak GiB
    ("4b", 1): (4.00, 0.938, 68.0),
    ("0.6b", 2): (1.01, 0.435, 16.8),
    ("1.7b", 2): (1.52, 0.699, 46.8),
}
FIGURES = ("update, s", "evaluation, s", "peak, GiB")


def planned(size: str, count: int) -> tuple[float, float, float]:
    """The planner's figures for ``count`` critics, each of which evaluates all rows and trains on its share."""
    model = BUILT_IN[size].as_critic()
    settings = Settings(BUILT_IN[size], model, hardware="h200")
    batch = ROWS * LENGTH, ROWS * LENGTH**2
    update = count * Pass(model, "training", 1 / count).seconds(*batch, settings)
    evaluation = count * Pass(model, "forward", 1).seconds(*batch, settings)
    states = (MASTER + GRADIENT + ADAM + (count - 1) * (MASTER + ADAM)) * model.params
    return update, evaluation, (states + update_working(model, MICRO_BATCH)) / GIB


def main() -> None:
    errors = []
    print(f"{'critics':<8} {'figure':<14} {'measured':>9} {'planned':>9} {'error':>7}")
    for (size, count), measured in MEASURED.items():
        for name, found, plan in zip(FIGURES, measured, planned(size, count), strict=True):
            errors.append(plan / found - 1)
            print(f"{f'{count}x{size}':<8} {name:<14} {found:>9.3f} {plan:>9.3f} {errors[-1]:>+7.1%}")
    print(json.dumps({"largest_error": max(map(abs, errors))}))


if __name__ == "__main__":
    main()
