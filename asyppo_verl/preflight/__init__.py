"""What happens to an AsyPPO configuration in the driver, before Ray starts: checks, then the settings that verl needs."""

import importlib.metadata
import logging
import os
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from asyppo_verl import selection
from asyppo_verl.checkpoint import critic_folders
from asyppo_verl.config import ESTIMATOR, PLUGIN_MODULE, SUPPORTED_VERL, TRAINER_PREFIX, AsyPPOConfig
from asyppo_verl.critic_settings import critic_nodes
from asyppo_verl.placement import check_actor_sharding, critic_ranks
from asyppo_verl.preflight.checkpoints import check_checkpoints, checkpoint_notices
from asyppo_verl.preflight.combinations import check_against_verl, notices, trainer_mode
from asyppo_verl.preflight.files import check_exists
from asyppo_verl.preflight.kinds import check_kinds
from asyppo_verl.preflight.models import check_models, check_tokenizer
from asyppo_verl.preflight.single_critics import check_build, check_critic
from asyppo_verl.preflight.spelling import check_estimator, check_places
from asyppo_verl.resume import SIZES, Part, check_whole, resume_target

logger = logging.getLogger(__name__)


def is_asyppo(config: DictConfig) -> bool:
    """True if ``algorithm.adv_estimator`` is asyppo."""
    return str(config.algorithm.adv_estimator) == ESTIMATOR


def read_config(config: DictConfig) -> AsyPPOConfig:
    """The ``asyppo`` node of a verl configuration, checked; defaults where it is silent."""
    node = config.get("asyppo")
    if node is not None and not OmegaConf.is_dict(node):
        raise ValueError(
            f"asyppo={node!r} must be a mapping such as {{num_critics: 2}}; set single keys: +asyppo.num_critics=2"
        )
    return AsyPPOConfig.from_node(node and cast(dict, OmegaConf.to_container(node, resolve=True)))


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
    check_places(config)
    try:
        check_kinds(config)
        asyppo = read_config(config)
        selection.load(asyppo.selection)
        check_against_verl(config, asyppo)
        check_checkpoints(config)
        resumed = _check_workers(config, asyppo)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere, a value that is missing
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}; give it a value") from error
    for notice in [*notices(config, asyppo), *checkpoint_notices(config)]:
        logger.warning(notice)

    with open_dict(config):
        config.critic.enable = True
        # A process without the plugin does not know this name, so it stops instead of training something else.
        config.trainer.v1.trainer_mode = TRAINER_PREFIX + trainer_mode(config)
        if config.trainer.resume_mode == "resume_path":
            # verl reads the step from the end of the path, where a slash would be in its way.
            config.trainer.resume_from_path = os.path.abspath(str(resumed))
    # verl swallows the errors of entry points, but not those of the modules named here.
    key = "ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES"
    modules = OmegaConf.select(config, key) or os.environ.get("VERL_USE_EXTERNAL_MODULES", "")
    names = [name for name in modules.split(",") if name and name != PLUGIN_MODULE]
    OmegaConf.update(config, key, ",".join([*names, PLUGIN_MODULE]), force_add=True)
    return asyppo


def pass_over(config: DictConfig) -> None:
    """A run with another estimator: its name is checked, and that AsyPPO's settings are idle is said.

    Raises:
        ValueError: if the estimator is a misspelt asyppo.
    """
    check_estimator(config)
    if config.get("asyppo") is not None:
        logger.warning(
            f"the settings below asyppo are idle with algorithm.adv_estimator={config.algorithm.adv_estimator}; they act with "
            "algorithm.adv_estimator=asyppo"
        )


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


def _check_workers(config: DictConfig, asyppo: AsyPPOConfig) -> Path | None:
    """What actor and critics are asked, each critic with its own settings; then the checkpoint that all resume from."""
    actor, ranks = config.actor_rollout_ref, config.trainer.nnodes * config.trainer.n_gpus_per_node
    if actor.actor.strategy in ("fsdp", "fsdp2"):
        check_actor_sharding(actor.actor, ranks)
    nodes = critic_nodes(config, asyppo)
    for node in nodes:
        check_critic(node, config, asyppo)
        if config.trainer.nnodes == 1:
            check_exists(node.key("model.tokenizer_path"), node.config.model.get("tokenizer_path"))
            check_tokenizer(node.key("model.tokenizer_path"), node.config.model)
    _check_sequence_parallel(config.critic.fsdp.ulysses_sequence_parallel_size, [node.config.model for node in nodes])
    loaded_actor, loaded = check_models(actor.model, [(node.key("model.path"), node.config.model) for node in nodes])
    check_build(actor.model, lambda key: key)
    for node in {id(node.config): node for node in nodes}.values():
        check_build(node.config, node.whole_key)
    _notice_equal_heads([node.config for node in nodes], loaded)
    parts = [_part("actor", ranks, actor.actor, actor.model, loaded_actor)]
    for name, node, model in zip(critic_folders(len(nodes)), nodes, loaded, strict=True):
        parts.append(_part(f"critic/{name}", critic_ranks(config, asyppo), node.config, node.config.model, model))
    return _check_resume(config.trainer, parts)


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


def _check_resume(trainer: DictConfig, parts: list[Part]) -> Path | None:
    """Look at the checkpoint that the run will resume from, if it can be seen from here."""
    target = resume_target(trainer.resume_mode, Path(trainer.default_local_dir), trainer.resume_from_path)
    if target is not None:
        check_whole(target, parts)
    return target


def _part(folder: str, ranks: int, worker: DictConfig, model: DictConfig, loaded: Any) -> Part:
    """What a checkpoint must hold for a worker whose model's configuration has been loaded."""
    text = loaded.get_text_config()
    sizes = {key: model.override_config.get(key, getattr(text, key)) for key in SIZES if hasattr(text, key)}
    # Only FSDP's files are known here.
    contents = worker.checkpoint.load_contents if worker.strategy in ("fsdp", "fsdp2") else []
    return Part(folder, ranks, contents, sizes)
