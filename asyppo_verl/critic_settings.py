"""The run as each mini-critic has it: a complete verl configuration whose ``critic`` node is that critic's."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from asyppo_verl.config import AsyPPOConfig, nearest

OPEN = ("fsdp.wrap_policy", "model.override_config", "optim.override_optimizer_config")
"""Nodes of verl's critic that take keys which verl's configuration files do not list."""

GOES_FIRST = {
    "model.path": "model.hf_config_path",
    "optim.betas": "optim.override_optimizer_config.betas",
    "optim.clip_grad": "optim.grad_clip",
    "optim.lr": "optim.override_optimizer_config.lr",
    "optim.lr_scheduler_type": "optim.warmup_style",
    "optim.lr_warmup_steps_ratio": "optim.lr_warmup_steps",
    "optim.weight_decay": "optim.override_optimizer_config.weight_decay",
    "forward_max_token_len_per_gpu": "ppo_infer_max_token_len_per_gpu",
    "forward_micro_batch_size_per_gpu": "ppo_infer_micro_batch_size_per_gpu",
}
"""Settings of verl's critic, and those that verl lets go before them where they are set."""


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A verl configuration, and the mini-critics that are built from its ``critic`` node."""

    config: DictConfig
    asyppo: AsyPPOConfig
    critics: tuple[int, ...]
    """The mini-critics with these settings."""
    own: Mapping[str, Any]
    """``asyppo.critic_overrides.<m>`` of the one critic that these settings are of; empty for those that share verl's."""

    def get(self, key: str) -> Any:
        """The value of a key, None where it or a node above it is missing or null."""
        return OmegaConf.select(self.config, key)

    def key(self, name: str) -> str:
        """Where the value of a key such as "critic.optim.lr" was given, for a message."""
        section, _, rest = name.partition(".")
        is_own = section == "critic" and _has(self.own, rest)
        return f"asyppo.critic_overrides.{self.critics[0]}.{rest}" if is_own else name


def read_config(config: DictConfig) -> AsyPPOConfig:
    """The checked ``asyppo`` node of a verl configuration; defaults where it is silent.

    Raises:
        ValueError: naming key, value and fix.
    """
    node = config.get("asyppo")
    if node is not None and not OmegaConf.is_dict(node):
        raise ValueError(
            f"asyppo={node!r} must be a mapping such as {{num_critics: 2}}; set single keys: +asyppo.num_critics=2"
        )
    return AsyPPOConfig.from_node(node and cast(dict, OmegaConf.to_container(node, resolve=True)))


def runs(config: DictConfig, asyppo: AsyPPOConfig) -> list[Run]:
    """The run as configured, then as each critic with settings of its own has it.

    Raises:
        ValueError: if an override names a key that verl's critic node does not have.
    """
    own = {index: settings for index, settings in sorted(asyppo.critic_overrides.items()) if settings}
    shared = tuple(index for index in range(asyppo.num_critics) if index not in own)
    return [
        Run(config, asyppo, shared, {}),
        *(Run(_merged(config, index, settings), asyppo, (index,), settings) for index, settings in own.items()),
    ]


def critic_nodes(config: DictConfig, asyppo: AsyPPOConfig) -> list[DictConfig]:
    """verl's ``critic`` node of every mini-critic; those without settings of their own share one."""
    nodes = {index: run.config.critic for run in runs(config, asyppo) for index in run.critics}
    return [nodes[index] for index in range(asyppo.num_critics)]


def _merged(config: DictConfig, index: int, overrides: Mapping[str, Any]) -> DictConfig:
    # Merged from the root, so that verl's interpolations still resolve.
    merged = copy.deepcopy(config)
    OmegaConf.set_struct(merged, True)
    for name in OPEN:
        if OmegaConf.is_dict(node := OmegaConf.select(merged.critic, name)):
            OmegaConf.set_struct(node, False)
    try:
        merged.merge_with({"critic": overrides})
    except OmegaConfBaseException as error:
        name = str(error.full_key or "").removeprefix("critic.")
        known = [str(key) for key in error.parent_node or []]
        fix = (
            f"{nearest(str(error.key), known)}; valid: {', '.join(known)}"
            if known
            else f" ({str(error).splitlines()[0]})"
        )
        raise ValueError(
            f"asyppo.critic_overrides.{index}.{name} is not a setting of verl's critic node{fix}"
        ) from error
    for name, first in GOES_FIRST.items():
        # What is set for all under another name does not silence a critic's own value.
        if _has(overrides, name) and not _has(overrides, first) and _has(merged.critic, first):
            path, _, key = first.rpartition(".")
            with open_dict(node := OmegaConf.select(merged.critic, path) if path else merged.critic):
                del node[key]
    key = "ulysses_sequence_parallel_size"
    if merged.critic.fsdp[key] != config.critic.fsdp[key]:
        raise ValueError(
            f"asyppo.critic_overrides.{index}.fsdp.{key}={merged.critic.fsdp[key]}: critic {index} gets its data together "
            f"with the others, so all need critic.fsdp.{key}={config.critic.fsdp[key]}; remove the override"
        )
    return merged


def _has(node: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True
