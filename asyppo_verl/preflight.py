"""What happens to an AsyPPO configuration in the driver, before Ray starts: checks, then the settings that verl needs."""

import copy
import importlib.metadata
import logging
import os
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from asyppo_verl.checks import check_against_verl, notices
from asyppo_verl.config import ESTIMATOR, SUPPORTED_VERL, TRAINER_PREFIX, AsyPPOConfig

logger = logging.getLogger(__name__)

PLUGIN_MODULE = "asyppo_verl.plugin"

TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")
"""Beginnings of the names under which tokenizers are stored."""


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
    _check_platform(config)
    _check_sequence_parallel(config, asyppo)
    _check_models(config, asyppo)
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


def _check_platform(config: DictConfig) -> None:
    for key in ("actor_rollout_ref.actor.strategy", "critic.strategy"):
        strategy = OmegaConf.select(config, key)
        if os.environ.get("VERL_PLATFORM") == "cpu" and strategy == "fsdp":
            raise ValueError(f"{key}='fsdp': torch's FSDP1 does not start on a CPU (VERL_PLATFORM=cpu); set fsdp2")


def _check_sequence_parallel(config: DictConfig, asyppo: AsyPPOConfig) -> None:
    """verl exchanges a sequence's parts between ranks only inside flash attention; any other would see one part alone."""
    size = config.critic.fsdp.get("ulysses_sequence_parallel_size", 1)
    if size == 1:
        return
    asked = f"critic.fsdp.ulysses_sequence_parallel_size={size}"
    for index in range(asyppo.num_critics):
        model = critic_node(config, asyppo, index).model
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


def _check_models(config: DictConfig, asyppo: AsyPPOConfig) -> None:
    actor = _load_config("actor_rollout_ref.model.path", config.actor_rollout_ref.model)
    checked = set()
    for index in range(asyppo.num_critics):
        model = critic_node(config, asyppo, index).model
        is_own = bool(asyppo.critic_overrides.get(index, {}).get("model", {}).get("path"))
        key = f"asyppo.critic_overrides.{index}.model.path" if is_own else "critic.model.path"
        if model.path in checked:
            continue
        checked.add(model.path)
        critic = _load_config(key, model)
        if hasattr(critic, "vision_config"):
            raise ValueError(
                f"{key}={model.path} is a vision-language model; mini-critics read text only: name a text model"
            )
        _check_vocabulary(config, key, model, actor, critic)


def _load_config(key: str, model: DictConfig) -> Any:
    from transformers import AutoConfig
    from verl.utils.fs import copy_to_local

    try:
        path = copy_to_local(model.path, use_shm=model.get("use_shm", False))
        return AutoConfig.from_pretrained(path, trust_remote_code=model.get("trust_remote_code", False))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}={model.path} has no readable model configuration ({str(error).splitlines()[0]}); "
            "name a folder or hub repository in Hugging Face format"
        ) from error


def _check_vocabulary(config: DictConfig, key: str, model: DictConfig, actor: Any, critic: Any) -> None:
    """Token ids go from the actor to the critics as they are, so both must mean the same by them."""
    actor_model = config.actor_rollout_ref.model
    actor_path = actor_model.path
    actor_vocabulary = _vocabulary(actor_model.get("tokenizer_path") or actor_path, actor_model)
    critic_vocabulary = _vocabulary(model.path, model)
    if critic_vocabulary is not None and actor_vocabulary is not None:
        if actor_vocabulary != critic_vocabulary:
            raise ValueError(
                f"{key}={model.path} and actor_rollout_ref.model.path={actor_path} have tokenizers with different "
                "vocabularies; take actor and critics from one model family"
            )
        if critic.vocab_size > max(actor_vocabulary.values()):
            return  # Families pad their embeddings differently; every id has a row.
    if actor.vocab_size != critic.vocab_size:
        raise ValueError(
            f"{key}={model.path} has vocab_size={critic.vocab_size}, actor_rollout_ref.model.path={actor_path} has "
            f"{actor.vocab_size}; take actor and critics from one model family"
        )


def _vocabulary(path: str, model: DictConfig) -> dict[str, int] | None:
    """Token to id of the tokenizer that lies beside the model, or None if there is none."""
    from transformers import AutoTokenizer
    from verl.utils.fs import copy_to_local

    local_path = copy_to_local(path, use_shm=model.get("use_shm", False))
    # transformers would make up an empty tokenizer for a folder without one.
    if os.path.isdir(local_path) and not any(name.startswith(TOKENIZER_FILES) for name in os.listdir(local_path)):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(local_path, trust_remote_code=model.get("trust_remote_code", False))
    except (OSError, ValueError):
        return None
    return tokenizer.get_vocab()
