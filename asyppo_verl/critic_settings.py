"""The run as each mini-critic has it: a complete verl configuration whose ``critic`` node is that critic's."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict

from asyppo_verl.config import OVERRIDABLE, AsyPPOConfig, nearest

OPEN = ("fsdp.mixed_precision", "model.override_config", "optim.override_optimizer_config")
"""Nodes of verl's critic that take any key."""

UNLISTED = {
    "fsdp": ("mixed_precision",),
    "fsdp.wrap_policy": ("disable", "transformer_layer_cls_to_wrap"),
    "optim": ("grad_clip",),
}
"""Keys that verl reads, though its configuration files do not list them."""

GOES_FIRST = (
    ("model.path", "model.hf_config_path"),
    ("fsdp.wrap_policy.min_num_params", "fsdp.wrap_policy.disable"),
    ("fsdp.wrap_policy.transformer_layer_cls_to_wrap", "fsdp.wrap_policy.disable"),
    ("fsdp.wrap_policy.transformer_layer_cls_to_wrap", "fsdp.wrap_policy.min_num_params"),
    ("optim.betas", "optim.override_optimizer_config.betas"),
    ("optim.clip_grad", "optim.grad_clip"),
    ("optim.lr", "optim.override_optimizer_config.lr"),
    ("optim.lr_scheduler_type", "optim.warmup_style"),
    ("optim.lr_warmup_steps_ratio", "optim.lr_warmup_steps"),
    ("optim.weight_decay", "optim.override_optimizer_config.weight_decay"),
    ("forward_max_token_len_per_gpu", "ppo_infer_max_token_len_per_gpu"),
    ("forward_micro_batch_size_per_gpu", "ppo_infer_micro_batch_size_per_gpu"),
)
"""Pairs of a setting of verl's critic and one that overrides it where set."""


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


def settle(views: Sequence[Run]) -> None:
    """Write beside a critic's own settings, in place, what verl's configuration derives from them by interpolation.

    verl resolves the configuration before it builds the critics; what is derived would then be that of all critics.
    """
    (run, *apart), overrides = views, {}
    for critic in apart:
        own, shared = (cast(dict, OmegaConf.to_container(c.config.critic, resolve=True)) for c in (critic, run))
        idle = {name for name, first in GOES_FIRST if own.get(first) is not None}  # verl does not look at these
        derived = {k: v for k, v in _changed(own, shared).items() if k in OVERRIDABLE and k not in idle}
        overrides[critic.critics[0]] = OmegaConf.merge(derived, critic.own)
    if overrides:
        run.config.asyppo.critic_overrides = overrides


def _changed(own: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``own`` that ``shared`` lacks, or has otherwise."""
    found = {}
    for name, value in own.items():
        other = shared.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            value = _changed(value, other) or other
        if name not in shared or value != other:
            found[name] = value
    return found


def critic_nodes(config: DictConfig, asyppo: AsyPPOConfig) -> list[DictConfig]:
    """verl's ``critic`` node of every mini-critic; those without settings of their own share one."""
    nodes = {index: run.config.critic for run in runs(config, asyppo) for index in run.critics}
    return [nodes[index] for index in range(asyppo.num_critics)]


def _merged(config: DictConfig, index: int, overrides: Mapping[str, Any]) -> DictConfig:
    # Merged from the root, so that verl's interpolations still resolve.
    merged = copy.deepcopy(config)
    _check_names(overrides, merged.critic, index)
    with open_dict(merged):
        merged.merge_with({"critic": overrides})
        for name, first in GOES_FIRST:
            # What is set for all under another name does not silence a critic's own value.
            if _has(overrides, name) and not _has(overrides, first) and _has(merged.critic, first):
                path, _, key = first.rpartition(".")
                del (OmegaConf.select(merged.critic, path) if path else merged.critic)[key]
    if merged.critic.fsdp.strategy != config.critic.fsdp.strategy:
        raise ValueError(
            f"asyppo.critic_overrides.{index}.fsdp.strategy={merged.critic.fsdp.strategy} would be overruled: verl takes "
            f"critic.strategy={config.critic.strategy} for all; set that, and remove the override"
        )
    key = "ulysses_sequence_parallel_size"
    if merged.critic.fsdp[key] != config.critic.fsdp[key]:
        raise ValueError(
            f"asyppo.critic_overrides.{index}.fsdp.{key}={merged.critic.fsdp[key]}: critic {index} gets its data together "
            f"with the others, so all need critic.fsdp.{key}={config.critic.fsdp[key]}; remove the override"
        )
    return merged


def _check_names(own: Mapping[str, Any], node: DictConfig, index: int, path: str = "") -> None:
    """Refuse a key that verl would not read, or would read for all critics."""
    names = [*map(str, node), *UNLISTED.get(path, ())] if path else OVERRIDABLE
    for key, value in own.items():
        name = f"{path}.{key}".lstrip(".")
        if key not in names:
            raise ValueError(
                f"asyppo.critic_overrides.{index}.{name} cannot be set for a single critic{nearest(str(key), names)}; "
                f"a critic may have its own {', '.join(names)}"
            )
        if OmegaConf.is_dict(inner := node.get(key)) and name not in OPEN and (value is not None or not path):
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"asyppo.critic_overrides.{index}.{name}={value!r} must be a mapping of {', '.join(inner)}"
                )
            _check_names(value, inner, index, name)


def _has(node: Any, name: str) -> bool:
    for part in name.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True
