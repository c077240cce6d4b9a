"""What happens to an AsyPPO configuration in the driver, before Ray starts: a list of checks, then what verl needs.

A check is called once with the run and once more for each critic that has settings of its own. It raises ValueError to
refuse, naming key, value and fix, and yields what the user should know though nothing is wrong. There is a check for what
AsyPPO adds, for verl settings that AsyPPO makes wrong, and for what verl notices only after minutes, or never; what verl,
hydra or vLLM refuse at start is left to them.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from asyppo_verl.config import PLUGIN_MODULE, TRAINER_PREFIX, AsyPPOConfig, is_supported_verl, trainer_mode
from asyppo_verl.critic_settings import Run, read_config, runs, settle
from asyppo_verl.preflight import files, gpus, models, saving, support, values

logger = logging.getLogger(__name__)

PROGRAMS = ("verl.trainer.main_ppo", "recipe.asyppo.main_asyppo")
"""Programs whose actors are counted; others start others."""

CHECKS: tuple[Callable[[Run], Iterator[str] | None], ...] = (
    support.check_version,
    support.check_places,
    values.check_types,
    support.check_trainer,
    values.check_values,
    values.check_ignored,
    support.check_losses,
    support.check_selection,
    support.check_shards,
    gpus.check_placement,
    gpus.check_sharding,
    gpus.check_sequence_parallel,
    gpus.check_cpus,
    values.check_batches,
    saving.check_contents,
    saving.check_folder,
    files.check_prompts,
    models.check_text_models,
    models.check_vocabulary,
    models.check_trainable_heads,
    saving.check_resume,
)
"""In this order: each can rely on what those before it let through."""


def prepare(config: DictConfig) -> AsyPPOConfig:
    """Check the configuration and point it at AsyPPO's trainer; changes ``config`` in place.

    Raises:
        ValueError: naming key, value and fix.
    """
    notices: dict[str, None] = {}  # a set that keeps its order
    try:
        asyppo = read_config(config)
        views = runs(config, asyppo)
        for check in CHECKS:
            for run in views:
                notices |= dict.fromkeys(check(run) or ())
        resumed = saving.resumed_checkpoint(views[0])
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere, a value that is missing
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}; give it a value") from error
    for notice in notices:
        logger.warning(notice)

    with open_dict(config):
        settle(views)
        config.critic.enable = True
        actor = config.actor_rollout_ref.actor
        if actor.strategy != "megatron":
            actor.checkpoint.async_save = False
        # A process without the plugin does not know this name, so it stops instead of training something else.
        config.trainer.v1.trainer_mode = TRAINER_PREFIX + trainer_mode(config)
        if config.trainer.resume_mode == "resume_path":
            # verl reads the step from the end of the path, where a slash would be in its way.
            config.trainer.resume_from_path = os.path.abspath(str(resumed))
    _load_plugin_in_workers(config)
    return asyppo


def look_at_another(config: DictConfig) -> None:
    """Say it where a run of another estimator would wait for ever; refuse a name that is meant to be ours.

    Raises:
        ValueError: naming key, value and fix.
    """
    support.check_estimator(config)
    program = getattr(sys.modules["__main__"], "__spec__", None)
    is_known = program is not None and program.name in PROGRAMS and is_supported_verl() and config.trainer.use_v1
    if is_known and (missing := gpus.missing_cpus(config)):
        logger.warning(missing)


def _load_plugin_in_workers(config: DictConfig) -> None:
    """Name the plugin in the workers' environment: verl swallows the errors of entry points, but not of modules named there."""
    variable = "VERL_USE_EXTERNAL_MODULES"
    job = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    of_job = ((job.get("runtime_env") or {}).get("env_vars") or {}).get(variable)
    if of_job is not None and os.environ.get("RAY_OVERRIDE_JOB_RUNTIME_ENV") != "1":
        # Ray refuses a driver that sets a variable of its job.
        if PLUGIN_MODULE not in of_job.split(","):
            raise ValueError(
                f"the runtime environment of this Ray job sets {variable}={of_job}; add {PLUGIN_MODULE} to it, or remove it"
            )
        return
    key = f"ray_kwargs.ray_init.runtime_env.env_vars.{variable}"
    modules = OmegaConf.select(config, key) or os.environ.get(variable, "")
    names = [name for name in modules.split(",") if name and name != PLUGIN_MODULE]
    OmegaConf.update(config, key, ",".join([*names, PLUGIN_MODULE]), force_add=True)
