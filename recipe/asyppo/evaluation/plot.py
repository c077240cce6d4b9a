"""Plot the curves of one or more runs: ``python -m recipe.asyppo.evaluation.plot OUT.png RUN_DIR [RUN_DIR ...]``."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from recipe.asyppo.console import read_metrics

PANELS = [
    ("reward", ["critic/score/mean"]),
    ("explained variance", ["asyppo/explained_var", "asyppo/critic_0/explained_var", "asyppo/critic_1/explained_var"]),
    ("sigma: mean, median, 90 %", ["asyppo/sigma/mean", "asyppo/sigma/p50", "asyppo/sigma/p90"]),
    ("|advantage| kept, masked", ["asyppo/adv_abs_kept", "asyppo/adv_abs_masked"]),
    ("entropy", ["actor/entropy"]),
    ("seconds a step", ["timing_s/step"]),
]


def plot(runs: list[Path], out: Path) -> None:
    """One panel a topic, one line a metric and run; the title of a panel says what it shows."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, PANELS, strict=True):
        for run in runs:
            lines = read_metrics(run / "metrics.jsonl")
            for key in keys:
                points = [(line["step"], line["data"][key]) for line in lines if line["data"].get(key) is not None]
                if points:
                    label = (
                        key.removeprefix("asyppo/") if len(runs) == 1 else f"{run.name}: {key.removeprefix('asyppo/')}"
                    )
                    axis.plot(*zip(*points, strict=True), label=label, linewidth=1.3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1:
            axis.legend(fontsize=7)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    arguments = parser.parse_args()
    plot(arguments.runs, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
