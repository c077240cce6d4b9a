"""Whether the models of a run can be read, and whether actor and critics mean the same by a token."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from asyppo_verl.weights import check_weights

TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")
"""Beginnings of the names under which tokenizers are stored."""

HUB_SECONDS = 5
"""For the hub to answer whether it has a model."""


def check_models(actor_model: DictConfig, critic_models: Sequence[tuple[str, DictConfig]]) -> tuple[Any, list[Any]]:
    """Read the configurations of all models, and refuse those that do not go together.

    Args:
        actor_model: verl's ``actor_rollout_ref.model`` node.
        critic_models: for each critic the setting that names its model, for messages, and verl's ``model`` node.

    Returns:
        The model configurations of the actor and of every critic.

    Raises:
        ValueError: naming key, value and cure.
    """
    actor = _load_config("actor_rollout_ref.model.path", actor_model)
    loaded: dict[str, Any] = {}
    for key, model in critic_models:
        if model.path in loaded:
            continue
        loaded[model.path] = critic = _load_config(key, model)
        if hasattr(critic, "vision_config"):
            raise ValueError(
                f"{key}={model.path} is a vision-language model; mini-critics read text only: name a text model"
            )
        _check_vocabulary(actor_model, key, model, actor, critic)
    return actor, [loaded[model.path] for _, model in critic_models]


def check_tokenizer(key: str, model: DictConfig) -> None:
    """Refuse a tokenizer that ``model.tokenizer_path`` names and that cannot be read; ``key`` is what to call it.

    Raises:
        ValueError: naming key, value and cure.
    """
    if model.get("tokenizer_path"):
        _vocabulary(key, model.tokenizer_path, model)


def _load_config(key: str, model: DictConfig) -> Any:
    from transformers import AutoConfig
    from verl.utils.fs import copy_to_local

    if not model.path or not isinstance(model.path, str):
        raise ValueError(f"{key}={model.path!r} must name a folder or hub repository in Hugging Face format")
    if model.path.startswith(("/", "~", ".")) and not os.path.exists(model.path):
        raise ValueError(f"{key}={model.path} does not exist; name a folder or hub repository in Hugging Face format")
    if model.path.endswith("/"):
        raise ValueError(f"{key}={model.path} ends with a slash, which verl refuses; remove it")
    try:
        ask_hub(model.path)
        path = copy_to_local(model.path, use_shm=model.get("use_shm", False))
        loaded = AutoConfig.from_pretrained(path, trust_remote_code=model.get("trust_remote_code", False))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}={model.path} has no readable model configuration ({str(error).splitlines()[0]}); "
            "name a folder or hub repository in Hugging Face format"
        ) from error
    if os.path.isdir(path):
        check_weights(key, Path(path))
    return loaded


def ask_hub(name: str) -> None:
    """Ask once whether a model that is not on this machine can be fetched; its library would ask for half a minute.

    Raises:
        OSError: if no hub answers. One that answers no is left to the library, which says why.
    """
    import httpx
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    # verl can be told to fetch from another hub, and the libraries to fetch from none.
    is_asked_elsewhere = os.environ.get("VERL_USE_MODELSCOPE", "").lower() == "true" or constants.HF_HUB_OFFLINE
    if is_asked_elsewhere or os.path.exists(name) or "://" in name or name.startswith(("/", "~", ".")):
        return
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_SECONDS)
    except HfHubHTTPError:
        return
    except httpx.TransportError as error:
        raise OSError(
            f"it is no folder here, not in the cache, and {constants.ENDPOINT} cannot be asked: {error}"
        ) from error


def _check_vocabulary(actor_model: DictConfig, key: str, model: DictConfig, actor: Any, critic: Any) -> None:
    """Token ids go from the actor to the critics as they are, so both must mean the same by them."""
    actor_path = actor_model.path
    actor_key = "actor_rollout_ref.model." + ("tokenizer_path" if actor_model.get("tokenizer_path") else "path")
    actor_vocabulary = _vocabulary(actor_key, actor_model.get("tokenizer_path") or actor_path, actor_model)
    critic_vocabulary = _vocabulary(key, model.path, model)
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


def _vocabulary(key: str, path: str, model: DictConfig) -> dict[str, int] | None:
    """Token to id of the tokenizer that lies beside the model, or None if there is none."""
    from transformers import AutoTokenizer
    from verl.utils.fs import copy_to_local

    try:
        ask_hub(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}={path} has no tokenizer ({str(error).splitlines()[0]}); name a folder with one"
        ) from error
    local_path = copy_to_local(path, use_shm=model.get("use_shm", False))
    is_local = os.path.isdir(local_path)
    # transformers would make up an empty tokenizer for a folder without one.
    if is_local and not any(name.startswith(TOKENIZER_FILES) for name in os.listdir(local_path)):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(local_path, trust_remote_code=model.get("trust_remote_code", False))
    except Exception as error:  # the tokenizers library raises no other class for a damaged file
        if not is_local:
            return None
        raise ValueError(
            f"the tokenizer of {key}={path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); copy or "
            "download the model again"
        ) from error
    return tokenizer.get_vocab()
