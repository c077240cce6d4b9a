"""Where AsyPPO enters verl: each hook waits until verl itself imports the module that it completes.

Nothing heavy happens before that, since every process that imports verl loads this module. Runs with another estimator
go through the functions and trainer classes of verl.
"""

from typing import Any

import wrapt

from asyppo_verl import cpu
from asyppo_verl.config import ESTIMATOR, is_asyppo, is_supported_verl
from asyppo_verl.cpu import platform as cpu_platform

_is_active = False


def activate() -> None:
    """Install the hooks, once."""
    global _is_active
    if _is_active:
        return
    _is_active = True
    cpu_platform.activate()
    wrapt.register_post_import_hook(_check_configurations, "verl.utils.config")
    if not is_supported_verl():
        return  # AsyPPO runs are refused by that check; nothing else of an unknown verl is touched
    for name, hook in (
        ("verl.trainer.ppo.utils", lambda module: wrapt.wrap_function_wrapper(module, "need_critic", _need_critic)),
        ("verl.trainer.ppo.core_algos", lambda module: module.register_adv_est(ESTIMATOR)(_stop_wrong_trainer)),
        ("verl.trainer.ppo.v1", _register_trainers),
    ):
        wrapt.register_post_import_hook(hook, name)
    if cpu.is_selected():
        wrapt.register_post_import_hook(_honour_attention, "verl.utils.model")


def is_active() -> bool:
    """True once the hooks are installed in this process."""
    return _is_active


def _check_configurations(config_module: Any) -> None:
    if hasattr(config_module, "validate_config"):
        wrapt.wrap_function_wrapper(config_module, "validate_config", _validate_config)


def _need_critic(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> bool:
    config = args[0] if args else kwargs["config"]
    return is_asyppo(config) or wrapped(config)


def _validate_config(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
    from asyppo_verl.preflight import prepare
    from asyppo_verl.preflight.support import check_estimator

    config = args[0] if args else kwargs["config"]
    if is_asyppo(config):
        prepare(config)
    else:
        check_estimator(config)
    return wrapped(*args, **kwargs)


def _register_trainers(v1: Any) -> None:
    from asyppo_verl import trainer

    for name, cls in trainer.TRAINERS.items():
        v1.register_trainer(name)(cls)


def _honour_attention(model: Any) -> None:
    from asyppo_verl import value_model

    value_model.install(model)


def _stop_wrong_trainer(**_kwargs: Any) -> None:
    raise RuntimeError(
        "algorithm.adv_estimator=asyppo reached verl's own trainer, which cannot compute it: the asyppo plugin was not "
        "active where the run was started. Run `python -m asyppo_verl.doctor` there, or start the run with "
        "`python -m recipe.asyppo.main_asyppo`."
    )
