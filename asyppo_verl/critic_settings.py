"""verl's ``critic`` node as each mini-critic has it: with its own settings merged in."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from asyppo_verl.config import AsyPPOConfig, nearest


@dataclasses.dataclass(frozen=True)
class CriticNode:
    """The node of one mini-critic, and which of its settings are its own."""

    index: int
    """m."""
    config: DictConfig
    """The merged node."""
    own: Mapping[str, Any]
    """``asyppo.critic_overrides.<m>``."""

    def key(self, name: str) -> str:
        """Where the value of a setting such as "optim.lr" was given, for a message."""
        node: Any = self.own
        for part in name.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return f"critic.{name}"
            node = node[part]
        return f"asyppo.critic_overrides.{self.index}.{name}"

    def whole_key(self, name: str) -> str:
        """The same for a key of the whole configuration, such as "critic.optim"."""
        return name if name == "critic" else self.key(name.removeprefix("critic."))


def critic_nodes(config: DictConfig, asyppo: AsyPPOConfig) -> list[CriticNode]:
    """The nodes of all mini-critics.

    Raises:
        ValueError: as :func:`critic_node`.
    """
    return [
        CriticNode(index, critic_node(config, asyppo, index), asyppo.critic_overrides.get(index, {}))
        for index in range(asyppo.num_critics)
    ]


def critic_node(config: DictConfig, asyppo: AsyPPOConfig, index: int) -> DictConfig:
    """verl's ``critic`` node with the overrides of mini-critic ``index`` merged in.

    Raises:
        ValueError: if an override names a key that verl's critic node does not have.
    """
    overrides = asyppo.critic_overrides.get(index)
    if not overrides:
        return config.critic
    # Merged from the root, so that verl's interpolations still resolve.
    merged = copy.deepcopy(config)
    OmegaConf.set_struct(merged, True)
    OmegaConf.set_struct(merged.critic.model.override_config, False)
    try:
        merged.merge_with({"critic": overrides})
    except OmegaConfBaseException as error:
        name = str(error.full_key or "").removeprefix("critic.")
        known = [str(key) for key in error.parent_node or []]
        cure = (
            f"{nearest(str(error.key), known)}; valid: {', '.join(known)}"
            if known
            else f" ({str(error).splitlines()[0]})"
        )
        raise ValueError(
            f"asyppo.critic_overrides.{index}.{name} is not a setting of verl's critic node{cure}"
        ) from error
    key = "ulysses_sequence_parallel_size"
    if merged.critic.fsdp[key] != config.critic.fsdp[key]:
        raise ValueError(
            f"asyppo.critic_overrides.{index}.fsdp.{key}={merged.critic.fsdp[key]}: critic {index} gets its data together "
            f"with the others, so all need critic.fsdp.{key}={config.critic.fsdp[key]}; remove the override"
        )
    return merged.critic
