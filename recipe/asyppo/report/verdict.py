"""The verdict on runs: every metric outside its healthy range."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from asyppo_verl.config import AsyPPOConfig
from recipe.asyppo.report.ranges import METRICS, START, Limit, Metric
from recipe.asyppo.report.runs import Run

FEW_STEPS = 20
"""Below this many steps a verdict is an early one."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A metric of a run outside its healthy range."""

    run: str
    metric: str
    value: str
    healthy: str
    advice: str


def judge(run: Run) -> list[Finding]:
    """Every metric whose mean over the last quarter of the steps lies outside its range, or that was ever not finite."""
    settings = _settings(run)
    findings = []
    for metric, key in _logged(run, settings):
        value = _mean(run.metrics[key], last=True)
        if steps := run.not_finite.get(key):
            said = f"not finite in step {', '.join(map(str, steps[:5]))}" + (" ..." if len(steps) > 5 else "")
        elif not _is_inside(value, metric, key, run, settings):
            said = f"{value:.4g}"
        else:
            continue
        findings.append(Finding(run.name, key, said, metric.healthy.replace("`", ""), metric.advice))
    return findings


def _logged(run: Run, settings: Mapping[str, Any]) -> Iterator[tuple[Metric, str]]:
    """The rows that say something about a run, with the keys that it logged."""
    for metric in METRICS:
        if metric.of_several and settings["asyppo.num_critics"] == 1:
            continue
        pattern = re.escape(metric.key).replace("<m>", r"\d+")
        yield from ((metric, key) for key in run.metrics if re.fullmatch(pattern, key))


def _settings(run: Run) -> dict[str, Any]:
    """The run's settings with the defaults of AsyPPO, which a command line need not name."""
    defaults = {f"asyppo.{field.name}": field.default for field in dataclasses.fields(AsyPPOConfig)}
    return defaults | (run.settings or {})


def _mean(values: list[float], *, last: bool) -> float:
    """Mean over the first or the last quarter of the steps that have a value; NaN if none has."""
    numbers = [value for value in values if math.isfinite(value)]
    quarter = max(1, len(numbers) // 4)
    return math.fsum(numbers[-quarter:] if last else numbers[:quarter]) / quarter if numbers else math.nan


def _is_inside(value: float, metric: Metric, key: str, run: Run, settings: Mapping[str, Any]) -> bool:
    def reference(name: str) -> Any:
        if name == START:
            return _mean(run.metrics[key], last=False)
        return _mean(run.metrics[name], last=True) if name in run.metrics else settings.get(name)

    def number(limit: Limit) -> float | None:
        """None: what the limit refers to is not known of this run."""
        if not isinstance(limit, tuple):
            return limit
        of = reference(limit[1])
        return limit[0] * of if isinstance(of, (int, float)) else None

    slack = 1e-9 * abs(value)
    low, high = (None if limit is None else number(limit) for limit in (metric.low, metric.high))
    is_above = low is None or (value > low if metric.low == 0 else value >= low - slack)
    return is_above and (high is None or value <= high + slack)


def verdict(runs: Sequence[Run]) -> dict[str, Any]:
    """Every metric of every run that is outside its healthy range."""
    findings = [finding for run in runs for finding in judge(run)]
    summary = f"{len(findings)} metrics are" if len(findings) != 1 else "1 metric is"
    summary = f"{summary} outside the healthy range (mean over the last quarter of the steps)."
    if not findings:
        summary = "Every metric is inside its healthy range (mean over the last quarter of the steps)."
    if early := [run.name for run in runs if len(run.steps) < FEW_STEPS]:
        summary += f" Too early to judge what is learned, with fewer than {FEW_STEPS} steps: {', '.join(early)}."
    return {"summary": summary, "findings": [dataclasses.astuple(finding) for finding in findings]}
