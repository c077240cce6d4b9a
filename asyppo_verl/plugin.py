"""The ``verl.plugins`` entry point: importing this module makes ``algorithm.adv_estimator=asyppo`` known to verl.

verl imports it in every process that imports verl, so nothing heavy happens here: each hook waits until verl itself
imports the module that it completes. Runs with another estimator see unchanged functions and trainer classes.
"""

import sys
from typing import Any

import wrapt

from asyppo_verl import preflight
from asyppo_verl.config import ESTIMATOR
from asyppo_verl.cpu import platform as cpu_platform

_is_active = False


def activate() -> None:
    """Install the hooks, once; importing this module calls it."""
    global _is_active
    if _is_active:
        return
    _is_active = True
    cpu_platform.activate()
    for name, hook in (
        ("verl.trainer.ppo.utils", lambda module: wrapt.wrap_function_wrapper(module, "need_critic", _need_critic)),
        ("verl.utils.config", lambda module: wrapt.wrap_function_wrapper(module, "validate_config", _validate_config)),
        ("verl.trainer.ppo.core_algos", lambda module: module.register_adv_est(ESTIMATOR)(_stop_wrong_trainer)),
        ("verl.trainer.ppo.v1", _register_trainers),
    ):
        wrapt.register_post_import_hook(hook, name)
    if cpu_platform.is_selected():
        wrapt.register_post_import_hook(_honour_attention, "verl.utils.model")


def is_active() -> bool:
    """True once the hooks are installed in this process."""
    return _is_active


def _need_critic(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> bool:
    (config,) = (*args, *kwargs.values())
    return preflight.is_asyppo(config) or wrapped(config)


def _validate_config(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
    config = kwargs["config"] if "config" in kwargs else args[0]
    if preflight.is_asyppo(config):
        preflight.prepare(config)
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


def _activate_loudly() -> None:
    """verl hides the exceptions of its plugins, so a failure is printed, and an AsyPPO run stops at once."""
    try:
        activate()
    except Exception as error:
        message = f"asyppo_verl: the verl plugin could not be loaded ({type(error).__name__}: {error}); see python -m asyppo_verl.doctor"
        if any(f"adv_estimator={ESTIMATOR}" in argument for argument in sys.argv):
            raise SystemExit(message) from error
        print(message, file=sys.stderr)
        raise


_activate_loudly()
