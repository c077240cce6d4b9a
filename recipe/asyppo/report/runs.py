"""Read runs: metrics of verl's file logger, settings that hydra kept, and the runs that differ in nothing but the seed."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from recipe.asyppo.run_folder import numbers, read_metrics

PLACES = {
    "trainer.default_local_dir",
    "trainer.experiment_name",
    "trainer.project_name",
    "trainer.logger",
    "trainer.rollout_data_dir",
    "trainer.validation_data_dir",
    "trainer.resume_mode",
    "trainer.resume_from_path",
    "ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH",
}
"""Settings that say where a run lies and what it is called, not what it does."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as it lies on disk, finished or not."""

    name: str
    folder: Path
    steps: list[int]
    metrics: dict[str, list[float]]
    """Key -> a value for every step; NaN where the step has none."""
    not_finite: dict[str, list[int]]
    """Key -> steps whose value was logged, but was no finite number."""
    settings: dict[str, Any] | None
    """Dotted key -> value of the whole configuration; None where hydra's folder is missing."""

    @property
    def identity(self) -> tuple:
        """Equal for runs that differ in nothing but seeds; a run of unknown settings equals itself alone."""
        if self.settings is None:
            return (str(self.folder.resolve()), self.name)
        settings = {key: repr(value) for key, value in self.settings.items() if not is_seed(key) and key not in PLACES}
        return tuple(sorted(settings.items()))


def is_seed(key: str) -> bool:
    """Tell the seed of the data, of the rollout, of a model or of a critic's head by the setting's name."""
    return key.rsplit(".", 1)[-1].endswith("seed")


def load(path: Path) -> Run:
    """Read a run folder (``metrics.jsonl``, ``hydra/``), or the ``.jsonl`` of verl's file logger by itself.

    Raises:
        ValueError: if there is no metrics file or no step in it.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    logged = {step: numbers(data) for step, data in read_metrics(file).items()}
    if not logged and not file.exists():
        raise ValueError(
            f"{path} holds no metrics.jsonl; give a run folder, or the .jsonl that trainer.logger=file wrote"
        )
    if not logged:
        raise ValueError(f"{file} holds no step yet")
    steps = [*logged]
    keys = sorted({key for data in logged.values() for key in data})
    return Run(
        name=path.name if path.is_dir() else path.stem,
        folder=file.parent,
        steps=steps,
        metrics={key: [logged[step].get(key, math.nan) for step in steps] for key in keys},
        not_finite={
            key: bad for key in keys if (bad := [s for s in steps if not math.isfinite(logged[s].get(key, 0.0))])
        },
        settings=read_settings(file.parent),
    )


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The configuration that hydra kept in a run folder, flat; None where it kept none."""
    for file in (folder / "hydra/.hydra/config.yaml", folder / ".hydra/config.yaml"):
        if file.exists():
            return flatten(yaml.safe_load(file.read_text()))
    return None


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def bands(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in nothing but seeds together, in the order given."""
    found: dict[tuple, list[Run]] = {}
    for run in runs:
        found.setdefault(run.identity, []).append(run)
    return list(found.values())


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings that differ between the runs, with the value of each; "-" where a run has no such setting."""
    known = [run.settings for run in runs if run.settings is not None]
    rows = []
    for key in sorted({key for settings in known for key in settings} - PLACES):
        if len({repr(settings.get(key, "-")) for settings in known}) > 1:
            rows.append((key, ["unknown" if run.settings is None else str(run.settings.get(key, "-")) for run in runs]))
    return rows
