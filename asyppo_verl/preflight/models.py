"""Models of a run: verl can build them, actor and critics mean the same by a token, and critics can learn."""

import functools
import os
from collections.abc import Iterator
from typing import Any, cast

from omegaconf import OmegaConf

from asyppo_verl.critic_settings import Run

TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")
"""Beginnings of the names under which tokenizers are stored."""

ACTOR, CRITIC = "actor_rollout_ref.model", "critic"


@functools.lru_cache(maxsize=16)
def _build(node: str) -> Any:
    from verl.utils.config import omega_conf_to_dataclass

    return omega_conf_to_dataclass(OmegaConf.create(node))


def built(run: Run, key: str) -> Any:
    """verl's own object of a node with a ``_target_``, as the workers make it: a model's with its configuration and tokenizer."""
    from hydra.errors import InstantiationException

    node = cast(dict, OmegaConf.to_container(run.get(key), resolve=True))
    model = node.get("model", node)
    if model.get("use_shm"):
        # The weights would be copied into this machine's memory, though the run may be elsewhere.
        model["use_shm"] = False
    try:
        return _build(OmegaConf.to_yaml(OmegaConf.create(node)))
    except InstantiationException as error:
        cause = error.__cause__
        said = " ".join(f"{type(cause).__name__} {cause or ''}".split())
        part = str(error).rpartition("full_key: ")[2] if "full_key: " in str(error) else ""
        name = f"{key}.{part}" if part else key
        path = f", {run.key(f'{name}.path')}={run.get(f'{name}.path')}" if run.get(f"{name}.path") else ""
        fix = "correct them" + (", or name another model, its folder or its name on the hub" if path else "")
        raise ValueError(f"{run.key(name)}{path}: verl cannot use these settings ({said}); {fix}") from error


def check_text_models(run: Run) -> Iterator[str]:
    """Refuse vision-language critics, and actors whose positions no text model takes.

    Critics are given tokens and positions, no images. verl numbers the positions of Qwen-VL and GLM-V along several axes.
    """
    actor, critic = built(run, ACTOR), built(run, CRITIC).model
    if hasattr(critic.hf_config, "vision_config"):
        raise ValueError(
            f"{run.key('critic.model.path')}={critic.path} is a vision-language model; mini-critics read text only: name a "
            "text model"
        )
    if hasattr(actor.processor, "get_rope_index"):
        raise ValueError(
            f"{ACTOR}.path={actor.path} is a vision-language model whose tokens have positions along several axes, which "
            "the critics, text models, cannot take; name a text model"
        )
    if hasattr(actor.hf_config, "vision_config"):
        yield f"{ACTOR}.path={actor.path} is a vision-language model: the critics will see the text only, no images"


def check_vocabulary(run: Run) -> Iterator[str]:
    """Refuse a critic of another vocabulary than the actor's: it is given the actor's token ids as they are."""
    actor, critic = built(run, ACTOR), built(run, CRITIC).model
    names = f"{run.key('critic.model.path')}={critic.path} and {ACTOR}.path={actor.path}"
    ids = _vocabulary(actor.tokenizer, actor.local_tokenizer_path)
    # A tokenizer from elsewhere says nothing about the weights.
    known = _vocabulary(critic.tokenizer, critic.local_path) if critic.tokenizer_path == critic.path else None
    if ids is not None and known is not None:
        moved = [token for token in ids.keys() & known.keys() if ids[token] != known[token]]
        new = ids.keys() - known.keys()
        taken = {ids[token] for token in new} & {*known.values()}
        if moved or taken:
            raise ValueError(
                f"{names} have tokenizers with different vocabularies; take actor and critics from one model family"
            )
        if new:
            yield f"{names}: {len(new)} tokens of the actor, such as {min(new)!r}, are not in the critic's tokenizer"
    sizes = [model.hf_config.get_text_config().vocab_size for model in (critic, actor)]
    # Families pad their embeddings differently; every id needs a row.
    if sizes[0] < (min(sizes[1], max(ids.values()) + 1) if ids else sizes[1]):
        raise ValueError(
            f"{names} have vocab_size={sizes[0]} and {sizes[1]}, so the critic has no row for some token ids; take actor and "
            "critics from one model family"
        )
    if known is None and sizes[0] != sizes[1]:
        yield f"{names} have vocab_size={sizes[0]} and {sizes[1]}, and no tokenizers to compare; is it one model family?"


def _vocabulary(tokenizer: Any, path: str) -> dict[str, int] | None:
    """Token to id, or None for a folder without a tokenizer, for which transformers makes up an empty one."""
    if os.path.isdir(path) and not any(name.startswith(TOKENIZER_FILES) for name in os.listdir(path)):
        return None
    return tokenizer.get_vocab()


def check_trainable_heads(run: Run) -> Iterator[str]:
    """Refuse LoRA critics, whose value head verl does not train; say it where critics start from one head."""
    critic = built(run, CRITIC).model
    for name, given in (("lora_rank", (critic.lora_rank or 0) > 0), ("lora_adapter_path", critic.lora_adapter_path)):
        if given:
            raise ValueError(
                f"{run.key(f'critic.model.{name}')}={run.get(f'critic.model.{name}')}: verl does not train the value head of "
                "a LoRA critic; set critic.model.lora_rank=0, and lora_adapter_path=null"
            )
    has_head = any(
        name.endswith(("ForTokenClassification", "ForSequenceClassification")) for name in critic.architectures
    )
    if len(run.critics) > 1 and has_head:
        yield (
            f"{len(run.critics)} mini-critics start from {critic.path} with its value head, so they begin equal and disagree "
            "on nothing; give each a folder of its own with asyppo.critic_overrides.<m>.model.path"
        )
