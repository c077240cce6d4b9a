"""The panels of a report: which metrics stand together, as numbers for the page and as PNG plots."""

import dataclasses
import math
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe.asyppo.report.runs import Run

NUMBERS = 120_000
"""All the curves of a page hold about this many numbers: a megabyte."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """A plot: every metric whose key matches one of the patterns is a line of it."""

    title: str
    patterns: tuple[str, ...]
    log: bool = False


SECTIONS = {
    "Learning": [
        Panel("Reward", (r"critic/score/mean",)),
        Panel("Validation", (r"val-core/.*",)),
        Panel("Response length, tokens", (r"response_length/mean",)),
        Panel("Entropy of the actor", (r"actor/entropy",)),
    ],
    "Critics": [
        # verl's is that of the mean value; with one critic, as in the baselines, it is that critic's.
        Panel("Explained variance", (r"critic/vf_explained_var", r"asyppo/critic_\d+/explained_var")),
        Panel("Value loss", (r"asyppo/critic_\d+/vf_loss", r"critic/vf_loss"), log=True),
        Panel("Sigma: mean and quantiles", (r"asyppo/sigma/(mean|p\d+)",), log=True),
        Panel("Correlation of the critics", (r"asyppo/critic_correlation",)),
    ],
    "Selections": [
        Panel("|advantage|, kept and masked", (r"asyppo/adv_abs_.*",)),
        Panel("Share of tokens, masked and filtered", (r"asyppo/(adv_masked|entropy_filtered)_fraction", r"asyppo/sigma/tied")),
    ],
    "Updates": [
        Panel("KL", (r"actor/ppo_kl", r"actor/kl_loss", r"actor/reward_kl_penalty")),
        Panel("Clip fraction", (r"actor/pg_clipfrac(_lower)?", r"(asyppo/critic_\d+|critic)/vf_clipfrac")),
        Panel("Gradient norm", (r"actor/grad_norm", r"(asyppo/critic_\d+|critic)/grad_norm"), log=True),
        Panel("Learning rate", (r"actor/lr", r"(asyppo/critic_\d+|critic)/lr"), log=True),
    ],
    "Cost": [
        Panel("Time by phase, s", (r"timing_s/(step|gen|reward|old_log_prob|ref|values|adv|update_\w+)",)),
        Panel("Memory, GB", (r"perf/max_memory_\w+_gb", r"perf/cpu_memory_used_gb")),
        Panel("Tokens a second on a GPU", (r"perf/throughput",)),
    ],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Line:
    """A metric of a band of runs: mean, lowest and highest at every step of the panel, None where nothing was logged."""

    key: str
    band: int
    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]


@dataclasses.dataclass(frozen=True)
class Plot:
    """A panel with its data."""

    title: str
    log: bool
    steps: list[int]
    lines: list[Line]

    def as_json(self) -> dict[str, Any]:
        """What the page draws; a line that is no band needs no borders."""
        lines = []
        for line in self.lines:
            is_band = line.low != line.high
            borders = {"low": _rounded(line.low), "high": _rounded(line.high)} if is_band else {}
            lines.append({"key": line.key, "band": line.band, "mean": _rounded(line.mean), **borders})
        return {"title": self.title, "log": self.log, "steps": self.steps, "lines": lines}


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.6g}") for value in values]


def sections(bands: Sequence[Sequence[Run]]) -> dict[str, list[Plot]]:
    """Every section with its panels; a panel without data is left out, and a section without panels."""
    panels = [panel for section in SECTIONS.values() for panel in section]
    count = sum(len(matching(panel, band)) for panel in panels for band in bands)
    points = max(20, NUMBERS // (3 * max(1, count)))
    found = {title: [plot(panel, bands, points) for panel in section] for title, section in SECTIONS.items()}
    return {title: kept for title, plots in found.items() if (kept := [plot for plot in plots if plot.lines])}


def matching(panel: Panel, runs: Sequence[Run]) -> list[str]:
    """Keys of a panel in the order of its patterns, which any of the runs logged."""
    keys = {key for run in runs for key, values in run.metrics.items() if any(map(math.isfinite, values))}
    return [key for pattern in panel.patterns for key in sorted(keys) if re.fullmatch(pattern, key)]


def plot(panel: Panel, bands: Sequence[Sequence[Run]], points: int) -> Plot:
    """Fill a panel. With more steps than ``points`` a few steps become one, whose band shows their lowest and highest."""
    lines = [
        (key, index, values_by_step(key, band)) for index, band in enumerate(bands) for key in matching(panel, band)
    ]
    steps = sorted({step for _, _, values in lines for step in values})
    width = math.ceil(len(steps) / points) if steps else 1
    buckets = [steps[start : start + width] for start in range(0, len(steps), width)]
    return Plot(
        title=panel.title,
        log=panel.log and all(value > 0 for _, _, values in lines for row in values.values() for value in row),
        steps=[bucket[-1] for bucket in buckets],
        lines=[line(key, band, values, buckets) for key, band, values in lines],
    )


def values_by_step(key: str, band: Sequence[Run]) -> dict[int, list[float]]:
    """Step -> the finite values of the runs of a band."""
    found: dict[int, list[float]] = {}
    for run in band:
        for step, value in zip(run.steps, run.metrics.get(key, []), strict=False):
            if math.isfinite(value):
                found.setdefault(step, []).append(value)
    return found


def line(key: str, band: int, values: dict[int, list[float]], buckets: Sequence[Sequence[int]]) -> Line:
    """Mean, lowest and highest in every bucket of steps."""
    rows = [[value for step in bucket for value in values.get(step, [])] for bucket in buckets]
    return Line(
        key,
        band,
        mean=[math.fsum(row) / len(row) if row else None for row in rows],
        low=[min(row, default=None) for row in rows],
        high=[max(row, default=None) for row in rows],
    )


def draw(plots: Sequence[Plot], names: Sequence[str], out: Path, *, columns: int) -> None:
    """Write plots as one PNG; ``names`` are those of the bands."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(plots) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, plot in zip(axes, plots, strict=False):
        _draw_lines(axis, plot, names)
        axis.set_title(plot.title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.set_yscale("log" if plot.log else "linear")
        axis.tick_params(which="both", labelsize=7)
        axis.grid(alpha=0.3)
        if len(plot.lines) > 1:
            axis.legend(fontsize=7)
    for axis in axes[len(plots) :]:
        axis.set_axis_off()
    figure.savefig(out, dpi=110)


def _draw_lines(axis: Any, plot: Plot, names: Sequence[str]) -> None:
    """Colours tell metrics apart, or bands where there are several; the metrics then have dashes of their own."""
    keys = list(dict.fromkeys(line.key for line in plot.lines))
    dashes, several = ["-", "--", ":", "-."], len(names) > 1
    for line in plot.lines:
        index = keys.index(line.key)
        points = [row for row in zip(plot.steps, line.mean, line.low, line.high, strict=True) if None not in row]
        steps, mean, low, high = zip(*points, strict=True)
        colour, style = f"C{(line.band if several else index) % 10}", dashes[index % 4 if several else 0]
        name = names[line.band] if several else short_name(line.key, keys)
        axis.plot(
            steps, mean, color=colour, linestyle=style, linewidth=1.3, label=name if not several or not index else None
        )
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    for index, key in enumerate(keys if several and len(keys) > 1 else []):
        axis.plot([], [], color="grey", linestyle=dashes[index % 4], label=short_name(key, keys))


def short_name(key: str, keys: Sequence[str]) -> str:
    """A key without the folders that all the keys of its panel have in common."""
    return key.removeprefix(posixpath.commonpath(keys) + "/") if len(keys) > 1 else key
