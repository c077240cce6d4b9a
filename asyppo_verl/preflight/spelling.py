"""The name of the method where it is misspelt or misplaced: verl passes over settings that it does not know."""

import dataclasses
import difflib
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from asyppo_verl.config import ESTIMATOR, AsyPPOConfig
from asyppo_verl.preflight.choices import registers_in_workers
from asyppo_verl.preflight.kinds import default_config

KNOBS = [field.name for field in dataclasses.fields(AsyPPOConfig) if "_" in field.name]
"""Those of AsyPPO's settings whose names mean nothing else."""


def check_estimator(config: DictConfig) -> None:
    """Refuse an estimator called "AsyPPO" or the like, which verl would only miss after its first rollout.

    Raises:
        ValueError: naming the estimator, unless it is one of verl's, or may be one of the user's.
    """
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, AdvantageEstimator

    name = str(config.algorithm.adv_estimator)
    is_spelling = _plain(name) == ESTIMATOR
    is_known = name in ADV_ESTIMATOR_REGISTRY or name in {str(member.value) for member in AdvantageEstimator}
    if is_spelling or (_is_near(name) and not is_known and not registers_in_workers(config)):
        raise ValueError(f"algorithm.adv_estimator={name!r} is not an estimator; it is spelt {ESTIMATOR}")


def check_places(config: DictConfig) -> None:
    """Refuse settings of AsyPPO that stand elsewhere than below ``asyppo``.

    Raises:
        ValueError: naming key and value.
    """
    plain = cast(dict[str, Any], OmegaConf.to_container(config))
    _check_place(plain, default_config(), "", knobs=KNOBS)
    for section, node in plain.items():
        default = default_config().get(section)
        if isinstance(node, dict) and isinstance(default, dict):
            _check_place(node, default, f"{section}.", knobs=KNOBS if section in ("algorithm", "critic") else [])


def _check_place(node: dict[str, Any], default: dict[str, Any], prefix: str, *, knobs: list[str]) -> None:
    for key in node:
        if key in default or (not prefix and key == ESTIMATOR):
            continue
        if key in knobs or _is_near(str(key)):
            example = f"{ESTIMATOR}.{key}" if key in knobs else f"{ESTIMATOR}.num_critics"
            raise ValueError(
                f"{prefix}{key}={node[key]!r} would not be read: the settings of AsyPPO stand below {ESTIMATOR}; "
                f"set +{example}=..."
            )


def _is_near(name: str) -> bool:
    return difflib.SequenceMatcher(None, _plain(name), ESTIMATOR).ratio() > 0.75


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
