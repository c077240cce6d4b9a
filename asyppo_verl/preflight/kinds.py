"""Values of another kind than verl's own default, such as the text "no" for a switch, which would count as true."""

import functools
import importlib.resources
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from asyppo_verl.preflight.quantities import is_number

NEEDED = (
    "algorithm",
    "data",
    "trainer",
    "trainer.v1",
    "critic",
    "critic.optim",
    "critic.fsdp",
    "critic.model",
    "critic.model.override_config",
    "critic.checkpoint",
    "actor_rollout_ref",
    "actor_rollout_ref.model",
    "actor_rollout_ref.model.override_config",
    "actor_rollout_ref.actor",
    "actor_rollout_ref.actor.optim",
    "actor_rollout_ref.actor.checkpoint",
    "actor_rollout_ref.actor.policy_loss",
    "actor_rollout_ref.rollout",
    "reward",
    "reward.reward_model",
    "ray_kwargs",
    "ray_kwargs.ray_init",
)
"""Groups of settings that are read below; verl does without some of the others."""

ALSO_TEXT = ("algorithm.rollout_correction.rollout_is_threshold",)
"""Numbers that verl takes as text too, here "lower_upper"."""


@functools.cache
def default_config() -> dict[str, Any]:
    """verl's own configuration with nothing overridden, as it ships it in one file."""
    file = importlib.resources.files("verl.trainer.config") / "_generated_ppo_trainer.yaml"
    return cast(dict, OmegaConf.to_container(OmegaConf.create(file.read_text()), resolve=True))


def check_kinds(config: DictConfig) -> None:
    """Refuse switches that are not on or off, numbers that are text or nan, and groups of settings that are none.

    Null counts as a number and as a group where verl may take it so.

    Raises:
        ValueError: naming key, value and what would do.
    """
    _raise_first(_misfits(config, default_config(), "", lambda key: key))


def check_critic_kinds(critic: DictConfig, name: Callable[[str], str]) -> None:
    """The same for a ``critic`` node that has been changed.

    Args:
        critic: the node.
        name: from a key below "critic." to how a message calls it.
    """
    defaults = default_config()["critic"]
    _raise_first(_misfits(critic, defaults, "critic.", lambda key: name(key.removeprefix("critic."))))


def _raise_first(misfits: Iterator[tuple[bool, str]]) -> None:
    """A setting that takes its value from another comes after those that have their own."""
    found = sorted(misfits, key=lambda misfit: misfit[0])
    if found:
        raise ValueError(found[0][1])


def _misfits(
    node: DictConfig, defaults: Mapping[str, Any], prefix: str, name: Callable[[str], str]
) -> Iterator[tuple[bool, str]]:
    """For each value that does not fit: whether it is taken from another setting, and the message."""
    for key, default in defaults.items():
        if key not in node or not isinstance(default, bool | int | float | Mapping):
            continue
        path, value = f"{prefix}{key}", node[key]
        if isinstance(default, bool):
            fits, cure = isinstance(value, int), "must be True or False"
        elif isinstance(default, Mapping):
            fits = OmegaConf.is_dict(value) or (value is None and path not in NEEDED)
            cure = "must be a group of settings; set single keys of it, or remove the override"
        else:
            is_text = isinstance(value, str) and path in ALSO_TEXT
            fits, cure = value is None or is_text or (is_number(value) and value == value), "must be a number"
        if not fits:
            yield OmegaConf.is_interpolation(node, key), f"{name(path)}={value!r} {cure}"
        elif OmegaConf.is_dict(value):
            yield from _misfits(value, cast(Mapping, default), f"{path}.", name)
