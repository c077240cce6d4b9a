"""The hooks by which AsyPPO enters verl: each waits until verl itself imports the module that it completes.

Every process that imports verl loads this module, so what it needs itself is imported in the hooks. Runs with another
estimator go through the functions and trainer classes of verl.
"""

import pkgutil
from collections.abc import Callable
from typing import Any

import wrapt

from asyppo_verl import cpu

_is_active = False


def activate() -> None:
    """Install the hooks, once."""
    global _is_active
    if _is_active:
        return
    _is_active = True
    wrapt.register_post_import_hook(_check_configurations, "verl.utils.config")
    for name, hook in (
        ("verl.trainer.ppo.utils", lambda module: wrapt.wrap_function_wrapper(module, "need_critic", _need_critic)),
        ("verl.trainer.ppo.core_algos", _register_estimator),
        ("verl.trainer.ppo.v1", _register_trainers),
        ("verl.workers.rollout.vllm_rollout.vllm_rollout", "asyppo_verl.weight_sockets:install_sender"),
        ("verl.workers.rollout.vllm_rollout.vllm_async_server", "asyppo_verl.weight_sockets:install_receiver"),
    ):
        wrapt.register_post_import_hook(_on_supported_verl(hook), name)
    wrapt.register_post_import_hook("asyppo_verl.packed_attention:register", "transformers.modeling_utils")
    if cpu.is_selected():
        from asyppo_verl.cpu import platform

        platform.activate()
        wrapt.register_post_import_hook(_on_supported_verl("asyppo_verl.value_model:install"), "verl.utils.model")


def _on_supported_verl(hook: Callable[[Any], Any] | str) -> Callable[[Any], None]:
    """Skip a hook under an unknown verl: AsyPPO runs are refused there, and other runs are left untouched.

    A hook given as ``module:function`` is imported when it is called, as wrapt does.
    """

    def hooked(module: Any) -> None:
        from asyppo_verl.config import is_supported_verl

        if is_supported_verl():
            (pkgutil.resolve_name(hook) if isinstance(hook, str) else hook)(module)

    return hooked


def is_active() -> bool:
    """True once the hooks are installed in this process."""
    return _is_active


def _check_configurations(config_module: Any) -> None:
    if hasattr(config_module, "validate_config"):
        wrapt.wrap_function_wrapper(config_module, "validate_config", _validate_config)


def _need_critic(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> bool:
    from asyppo_verl.config import is_asyppo

    config = args[0] if args else kwargs["config"]
    return is_asyppo(config) or wrapped(config)


def _validate_config(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
    from asyppo_verl.config import is_asyppo
    from asyppo_verl.preflight import look_at_another, prepare

    config = args[0] if args else kwargs["config"]
    if is_asyppo(config):
        prepare(config)
    else:
        look_at_another(config)
    return wrapped(*args, **kwargs)


def _register_estimator(core_algos: Any) -> None:
    from asyppo_verl.config import ESTIMATOR

    core_algos.register_adv_est(ESTIMATOR)(_stop_wrong_trainer)


def _register_trainers(v1: Any) -> None:
    from asyppo_verl import trainer

    for name, cls in trainer.TRAINERS.items():
        v1.register_trainer(name)(cls)


def _stop_wrong_trainer(**_kwargs: Any) -> None:
    raise RuntimeError(
        "algorithm.adv_estimator=asyppo reached a trainer that cannot compute it. Start the run with "
        "`python -m verl.trainer.main_ppo` or `python -m recipe.asyppo.main_asyppo`: programs that bring a trainer of their own, "
        "such as recipe.dapo, one_step_off_policy and fully_async_policy, leave AsyPPO's out. If the run was started so, the "
        "asyppo plugin was not active there: `python -m asyppo_verl.doctor` says why."
    )
