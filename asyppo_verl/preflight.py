"""What happens to an AsyPPO configuration in the driver, before Ray starts: checks, then the settings that verl needs."""

import copy
import importlib.metadata
import logging
import os
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from asyppo_verl.checkpoint import critic_folders
from asyppo_verl.checks import check_against_verl, notices
from asyppo_verl.config import ESTIMATOR, SUPPORTED_VERL, TRAINER_PREFIX, AsyPPOConfig
from asyppo_verl.model_checks import check_models
from asyppo_verl.number_checks import check_critic_numbers
from asyppo_verl.placement import critic_ranks
from asyppo_verl.resume import SIZES, Part, check_whole, resume_target

logger = logging.getLogger(__name__)

PLUGIN_MODULE = "asyppo_verl.plugin"


PATHS = (
    "data.train_files",
    "data.val_files",
    "reward.custom_reward_function.path",
    "actor_rollout_ref.model.tokenizer_path",
    "critic.model.tokenizer_path",
)
"""Settings that name files which verl would only look for when everything has been started."""


def is_asyppo(config: DictConfig) -> bool:
    """True if ``algorithm.adv_estimator`` is asyppo."""
    return str(config.algorithm.adv_estimator) == ESTIMATOR


def refuse_other_spelling(config: DictConfig) -> None:
    """Raises ValueError if the estimator is "AsyPPO" or the like, which verl would only miss after its first rollout."""
    name = str(config.algorithm.adv_estimator)
    if name.lower().replace("_", "").replace("-", "") == ESTIMATOR:
        raise ValueError(f"algorithm.adv_estimator={name!r} is not an estimator; it is spelt {ESTIMATOR}")


def read_config(config: DictConfig) -> AsyPPOConfig:
    """The ``asyppo`` node of a verl configuration, checked; defaults where it is silent."""
    node = config.get("asyppo")
    if node is not None and not OmegaConf.is_dict(node):
        raise ValueError(
            f"asyppo={node!r} must be a mapping such as {{num_critics: 2}}; set single keys: +asyppo.num_critics=2"
        )
    return AsyPPOConfig.from_node(node and cast(dict, OmegaConf.to_container(node, resolve=True)))


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
        raise ValueError(f"asyppo.critic_overrides.{index}: {error}") from error
    key = "ulysses_sequence_parallel_size"
    if merged.critic.fsdp[key] != config.critic.fsdp[key]:
        raise ValueError(
            f"asyppo.critic_overrides.{index}.fsdp.{key}={merged.critic.fsdp[key]}: critic {index} gets its data together "
            f"with the others, so all need critic.fsdp.{key}={config.critic.fsdp[key]}; remove the override"
        )
    return merged.critic


def is_supported_verl() -> bool:
    """True if the installed verl is one that this package is tested with."""
    return importlib.metadata.version("verl") in SUPPORTED_VERL


def check_verl_version() -> None:
    """Raises ValueError unless the installed verl is one that this package is tested with."""
    if not is_supported_verl():
        raise ValueError(
            f"verl=={importlib.metadata.version('verl')} is not supported by asyppo_verl; install one of "
            + ", ".join(f"verl=={supported}" for supported in SUPPORTED_VERL)
        )


def prepare(config: DictConfig) -> AsyPPOConfig:
    """Check the configuration and point it at AsyPPO's trainer; changes ``config`` in place.

    Raises:
        ValueError: naming key, value and cure.
    """
    check_verl_version()
    asyppo = read_config(config)
    check_against_verl(config, asyppo)
    _check_critics(config, asyppo)
    for notice in notices(config, asyppo):
        logger.warning(notice)

    with open_dict(config):
        config.critic.enable = True
        # A process without the plugin does not know this name, so it stops instead of training something else.
        mode = config.trainer.v1.trainer_mode.removeprefix(TRAINER_PREFIX)
        config.trainer.v1.trainer_mode = TRAINER_PREFIX + mode
    # verl swallows the errors of entry points, but not those of the modules named here.
    key = "ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES"
    modules = OmegaConf.select(config, key) or os.environ.get("VERL_USE_EXTERNAL_MODULES", "")
    names = [name for name in modules.split(",") if name and name != PLUGIN_MODULE]
    OmegaConf.update(config, key, ",".join([*names, PLUGIN_MODULE]), force_add=True)
    return asyppo


def _check_sequence_parallel(size: int, models: list[DictConfig]) -> None:
    """verl exchanges a sequence's parts between ranks only inside flash attention; any other would see one part alone."""
    if size == 1:
        return
    asked = f"critic.fsdp.ulysses_sequence_parallel_size={size}"
    for index, model in enumerate(models):
        attention = model.override_config.get("attn_implementation", "flash_attention_2")
        if "flash" not in attention:
            raise ValueError(
                f"{asked} with critic.model.override_config.attn_implementation={attention!r} (mini-critic {index}): every "
                "rank would attend to its own part of a sequence only; remove one of the two settings"
            )
        if not model.use_remove_padding:
            raise ValueError(
                f"{asked} needs critic.model.use_remove_padding=True (mini-critic {index} has False): set it, or set the "
                "size to 1"
            )


def check_paths(config: DictConfig) -> None:
    """Raises ValueError if a file of :data:`PATHS` is missing; with several nodes it need not be on this one."""
    if config.trainer.nnodes > 1:
        return
    for key in PATHS:
        value = OmegaConf.select(config, key)
        for path in value if OmegaConf.is_list(value) else [value]:
            is_repository = key.endswith("tokenizer_path") and not str(path).startswith(("/", "~", "."))
            if path and "://" not in path and not is_repository and not os.path.exists(os.path.expanduser(path)):
                raise ValueError(f"{key}={path} does not exist; name one that does")


def _check_critics(config: DictConfig, asyppo: AsyPPOConfig) -> None:
    """What every single critic is asked, its overrides merged in; then the checkpoint that all will resume from."""
    longest = config.data.max_prompt_length + config.data.max_response_length
    nodes, models = [], []
    for index in range(asyppo.num_critics):
        own = asyppo.critic_overrides.get(index, {})
        nodes.append(critic_node(config, asyppo, index))
        check_critic_numbers(f"asyppo.critic_overrides.{index}" if own else "critic", nodes[-1], longest)
        has_model = bool(own.get("model", {}).get("path"))
        models.append((f"asyppo.critic_overrides.{index}" if has_model else "critic", nodes[-1].model))
    _check_sequence_parallel(
        config.critic.fsdp.get("ulysses_sequence_parallel_size", 1), [node.model for node in nodes]
    )
    actor = config.actor_rollout_ref
    loaded_actor, loaded = check_models(actor.model, models)
    _notice_equal_heads(nodes, loaded)
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    parts = [_part("actor", ranks, actor.actor, actor.model, loaded_actor)]
    for name, node, model in zip(critic_folders(len(nodes)), nodes, loaded, strict=True):
        parts.append(_part(f"critic/{name}", critic_ranks(config, asyppo), node, node.model, model))
    _check_resume(config.trainer, parts)


def _notice_equal_heads(nodes: list[DictConfig], loaded: list[Any]) -> None:
    """Critics that start from one folder with a value head start as one critic; new heads would differ."""
    with_head = [
        node.model.path
        for node, model in zip(nodes, loaded, strict=True)
        if any(name.endswith("ForTokenClassification") for name in model.architectures or [])
    ]
    for path in sorted({path for path in with_head if with_head.count(path) > 1}):
        logger.warning(
            f"{with_head.count(path)} mini-critics start from {path} with its value head, so they begin equal and disagree on "
            "nothing; give each a folder of its own with asyppo.critic_overrides.<m>.model.path"
        )


def _check_resume(trainer: DictConfig, parts: list[Part]) -> None:
    """Look at the checkpoint that the run will resume from, if it can be seen from here."""
    target = resume_target(trainer.resume_mode, Path(trainer.default_local_dir), trainer.resume_from_path)
    if target is not None:
        check_whole(target, parts)


def _part(folder: str, ranks: int, worker: DictConfig, model: DictConfig, loaded: Any) -> Part:
    """What a checkpoint must hold for a worker whose model's configuration has been loaded."""
    text = loaded.get_text_config()
    sizes = {key: model.override_config.get(key, getattr(text, key)) for key in SIZES if hasattr(text, key)}
    # Only FSDP's files are known here.
    contents = worker.checkpoint.load_contents if worker.strategy in ("fsdp", "fsdp2") else []
    return Part(folder, ranks, contents, sizes)
