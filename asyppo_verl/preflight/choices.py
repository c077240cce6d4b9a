"""Names that must be among those that verl knows: how losses are averaged, which policy loss, which optimizer."""

import importlib.util
import sys
from typing import Any

from asyppo_verl.config import PLUGIN_MODULE, nearest
from asyppo_verl.critic_settings import CriticNode

LOSS_AGG_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
"""How verl averages a loss; a test compares with verl's own function."""

SCHEDULES = ("constant", "cosine")
"""Learning rates of verl's FSDP optimizer."""


def check_choices(config: Any) -> None:
    """Raises ValueError naming key, value, the nearest valid one and all of them."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    actor = config.actor_rollout_ref.actor
    _require("actor_rollout_ref.actor.loss_agg_mode", actor.loss_agg_mode, LOSS_AGG_MODES)
    _require("critic.loss_agg_mode", config.critic.loss_agg_mode, LOSS_AGG_MODES)
    if not registers_in_workers(config):
        key = "actor_rollout_ref.actor.policy_loss.loss_mode"
        _require(key, actor.policy_loss.get("loss_mode", "vanilla"), tuple(POLICY_LOSS_REGISTRY))


def check_optimizer(node: CriticNode) -> None:
    """The same for the optimizer of one mini-critic; a library that is not loaded is only looked for."""
    optim = node.config.optim
    _require(node.key("optim.lr_scheduler_type"), optim.lr_scheduler_type, SCHEDULES)
    library = str(optim.optimizer_impl)
    module = sys.modules.get(library)
    if module is None and not _is_installed(library):
        raise ValueError(
            f"{node.key('optim.optimizer_impl')}={library!r} is not installed; install it, or set torch.optim"
        )
    if module is not None and not hasattr(module, str(optim.optimizer)):
        key = node.key("optim.optimizer")
        hint = nearest(str(optim.optimizer), dir(module))
        raise ValueError(f"{key}={optim.optimizer!r} is not an optimizer of {library}{hint}; set AdamW, verl's default")


def registers_in_workers(config: Any) -> bool:
    """True if code of the user is loaded in Ray's workers only, where it can teach verl names unknown here."""
    ray = (config.get("ray_kwargs") or {}).get("ray_init") or {}
    variables = (ray.get("runtime_env") or {}).get("env_vars") or {}
    modules = str(variables.get("VERL_USE_EXTERNAL_MODULES") or "").split(",")
    libraries = [node.model.get("external_lib") for node in (config.actor_rollout_ref, config.critic)]
    return any([*libraries, *(name for name in modules if name != PLUGIN_MODULE)])


def _require(key: str, value: Any, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ValueError(
            f"{key}={value!r} is unknown to verl{nearest(str(value), names)}; set one of {', '.join(names)}"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # a parent package is missing, or it is no name
        return False
